"""What other tools make of our folders, rows and exam: RoPE base, training tokens, scores."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from evaluation_files import CPU
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.evaluation.exams import INSTRUCTION, choices_by_text
from utils.files import read_json, read_jsonl, write_json, write_jsonl
from utils.model.chat_format import encode_answer, encode_prompt, encode_turns
from utils.model.folder import save_model
from utils.model.packed_forward import prepare_packed


def test_transformers_4_reads_a_rope_base_of_a_million(run_in, tmp_path):
    base = make_tiny_model(tmp_path / "base", context=4096)  # its RoPE base is that of Qwen3-0.6B
    model, folder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "saved"
    save_model(model, AutoTokenizer.from_pretrained(base), folder)
    ids = torch.randint(0, 400, (1, 800), generator=torch.Generator().manual_seed(0))
    write_json(tmp_path / "ids.json", ids.tolist())
    expected = model(ids).logits[0].argmax(-1).tolist()
    assert run_in("transformers4", "argmax_transformers.py", folder, tmp_path / "ids.json") == expected
    config = read_json(folder / "config.json")
    write_json(
        folder / "config.json", {name: value for name, value in config.items() if name != "rope_theta"}
    )
    assert run_in("transformers4", "argmax_transformers.py", folder, tmp_path / "ids.json") != expected


def training_data(exported_rows, tool, data, script):
    script("model_download/export_model.py", "--format", "training-data", "--for", tool, "--data-dir", data,
           "--output-dir", exported_rows)  # fmt: skip
    return exported_rows


@pytest.mark.parametrize("name", ["sft", "thinking"])
def test_llama_factory_trains_our_tokens(run_in, finished, place, tmp_path, name, script):
    data, tokenizer = (
        place / ("qwen3" if name == "sft" else name),
        AutoTokenizer.from_pretrained(finished(name)),
    )
    output = training_data(tmp_path / "rows", "llamafactory", data, script)
    rows = run_in(
        "llamafactory", "load_llamafactory.py", output, "sft_train", "sft", finished(name), tmp_path / "o"
    )
    ours = [
        turn
        for row in read_jsonl(data / "sft_train.jsonl")
        for turn in encode_turns(tokenizer, row["messages"])
    ]
    line_break = tokenizer("\n")["input_ids"]
    assert len(rows) == len(ours)
    for row, (prompt, answer) in zip(rows, ours):
        assert row["input_ids"] == prompt + answer + line_break
        assert row["labels"] == [-100] * len(prompt) + answer + line_break


def test_llama_factory_keeps_every_pair(run_in, finished, place, tmp_path, script):
    tokenizer = AutoTokenizer.from_pretrained(finished("sft"))
    output = training_data(tmp_path / "rows", "llamafactory", place / "qwen3", script)
    rows = run_in(
        "llamafactory", "load_llamafactory.py", output, "dpo_train", "rm", finished("sft"), tmp_path / "o"
    )
    pairs, line_break = list(read_jsonl(place / "qwen3/dpo_train.jsonl")), tokenizer("\n")["input_ids"]
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs):
        prompt = encode_prompt(tokenizer, pair["prompt"], thinking=False)
        for side in ("chosen", "rejected"):
            assert row[f"{side}_input_ids"] == prompt + encode_answer(tokenizer, pair[side][-1]) + line_break


@pytest.mark.parametrize("name", ["sft", "thinking"])
def test_axolotl_trains_our_tokens(run_in, finished, place, tmp_path, name, script):
    """Of an answer with reasoning it counts the opening tag as prompt, because the template writes it in any case."""
    data = place / ("qwen3" if name == "sft" else name)
    tokenizer = AutoTokenizer.from_pretrained(finished(name))
    output = training_data(tmp_path / "rows", "axolotl", data, script)
    rows = run_in("axolotl", "load_axolotl.py", output, "sft", finished(name))
    ours = [
        turn
        for row in read_jsonl(data / "sft_train.jsonl")
        for turn in encode_turns(tokenizer, row["messages"])
    ]
    line_break = tokenizer("\n")["input_ids"]
    opening = len(tokenizer("<think>\n")["input_ids"]) if name == "thinking" else 0
    assert len(rows) == len(ours)
    for row, (prompt, answer) in zip(rows, ours):
        assert row["input_ids"] == prompt + answer + line_break
        assert row["labels"] == [-100] * (len(prompt) + opening) + answer[opening:] + [-100]


def test_axolotl_keeps_every_pair(run_in, finished, place, tmp_path, script):
    tokenizer = AutoTokenizer.from_pretrained(finished("sft"))
    output = training_data(tmp_path / "rows", "axolotl", place / "qwen3", script)
    rows = run_in("axolotl", "load_axolotl.py", output, "dpo", finished("sft"))
    pairs = list(read_jsonl(place / "qwen3/dpo_train.jsonl"))
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs):
        tokens = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in row.items()}
        assert tokens["prompt"] == encode_prompt(tokenizer, pair["prompt"], thinking=False)
        for side in ("chosen", "rejected"):
            assert tokens[side] == encode_answer(tokenizer, pair[side][-1])


@pytest.mark.parametrize("name", ["sft", "thinking"])
def test_mlx_lm_trains_our_tokens(run_in, finished, place, tmp_path, name, script):
    data, tokenizer = (
        place / ("qwen3" if name == "sft" else name),
        AutoTokenizer.from_pretrained(finished(name)),
    )
    output = training_data(tmp_path / "rows", "mlx", data, script)
    rows = run_in("mlx", "load_mlx.py", output, finished(name))
    ours = [
        turn
        for row in read_jsonl(data / "sft_train.jsonl")
        for turn in encode_turns(tokenizer, row["messages"])
    ]
    line_break = tokenizer("\n")["input_ids"]
    assert rows == [[prompt + answer + line_break, len(prompt)] for prompt, answer in ours]


def test_lm_eval_scores_as_we_do_before_normalising(run_in, finished, tmp_path):
    """acc: the same choice on every question. acc_norm: another, because the harness counts the prompt's closing line breaks."""
    folder, file = finished("sft"), tmp_path / "exam.jsonl"
    exam = list(read_jsonl(ROOT / "data_prepare/sample/tcm_exam.jsonl"))
    write_jsonl(file, exam)
    found = run_in("lm_eval", "ask_lm_eval.py", folder, file, INSTRUCTION)
    model = prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    choices = choices_by_text(model, AutoTokenizer.from_pretrained(folder), exam, CPU)
    same = 0
    for item, choice, logps in zip(exam, choices, found["logps"], strict=True):
        ours = {letter: score * len(item["options"][letter]) for letter, score in choice.scores.items()}
        same += max(ours, key=ours.get) == list(ours)[logps.index(max(logps))]
    assert same == len(exam) == 602
    accuracy = sum(choice.letter == item["answer"] for item, choice in zip(exam, choices)) / len(exam)
    assert accuracy > found["metrics"]["acc_norm,none"] + 0.1, json.dumps(found["metrics"])


def test_llama_cpp_makes_our_tokens(run_in, exported, finished, place, tmp_path):
    tokenizer, [file] = (
        AutoTokenizer.from_pretrained(finished("sft")),
        exported("sft", "gguf", "q8_0").glob("*.gguf"),
    )
    rows = list(read_jsonl(place / "qwen3/sft_eval.jsonl"))[:300]
    texts = [message["content"] for row in rows for message in row["messages"]]
    texts += [
        "It's 12345 度, A/B\r\n\n  x  Ωμέγα 😀𠮷é",
        "<|im_start|>user\n你好<|im_end|>\n<think>\n\n</think>\n\n",
    ]
    write_json(tmp_path / "texts.json", texts)
    found = run_in("llamacpp", "tokenize_llamacpp.py", file, tmp_path / "texts.json")
    assert found == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif(
    not shutil.which("go"), reason="needs Go, in whose template language Ollama's Modelfile is written"
)
@pytest.mark.parametrize("name", ["sft", "thinking"])
@pytest.mark.parametrize("system", ["", "你是中医。"])
@pytest.mark.parametrize("turns", [1, 2])
def test_the_modelfile_renders_our_prompt(exported, finished, name, system, turns):
    """Ollama itself was not run: this is its template, rendered by the Go library that it uses."""
    modelfile = (exported(name, "gguf", "q8_0") / "Modelfile").read_text(encoding="utf-8")
    [template] = re.findall('TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    history = [{"role": "user", "content": "麻黄？"}, {"role": "assistant", "content": "温。"}] * (turns - 1)
    messages = [*history, {"role": "user", "content": "甘草有什么\n功效？"}]
    given = {"Template": template, "System": system, "Messages": messages}
    done = subprocess.run(
        ["go", "run", Path(__file__).with_name("render.go")],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    asked = [{"role": "system", "content": system}, *messages] if system else messages
    tokenizer = AutoTokenizer.from_pretrained(finished(name))
    assert done.stdout == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True), (
        done.stderr
    )
