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
from utils.model.qwen3_train import prepare_packed


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


# The blocks of docs/other_tools.md, in their order, and the files that they are written to.
FILES = {
    "LLaMA-Factory": ("dataset_info.json", "settings.yaml"),
    "Axolotl": ("sft.yaml", "dpo.yaml"),
    "mlx-lm": (),
}


@pytest.fixture
def line_break(finished):
    return AutoTokenizer.from_pretrained(finished("sft"))("\n")["input_ids"]


@pytest.fixture
def other_tool(finished, place, tmp_path, script):
    """other_tool("Axolotl", "sft") -> (folder with the exported rows and the tool's configuration as docs/other_tools.md
    has it, the turns that we train)."""

    def other_tool(tool, name):
        data = place / ("thinking" if name == "thinking" else "qwen3")
        rows = tmp_path / "rows"
        script("model_download/export_model.py", "--format", "training-data", "--data-dir", data,
               "--output-dir", rows)  # fmt: skip
        text = (ROOT / "docs/other_tools.md").read_text(encoding="utf-8").split(f"## {tool}\n")[1]
        blocks = re.findall(r"```\w+\n(.*?)```", text.split("\n## ")[0], re.DOTALL)
        if name == "thinking":
            blocks = [block.replace("enable_thinking: false", "enable_thinking: true") for block in blocks]
        for file, block in zip(FILES[tool], blocks):
            (rows / file).write_text(block, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(finished(name))
        turns = [encode_turns(tokenizer, row["messages"]) for row in read_jsonl(data / "sft_train.jsonl")]
        return rows, [turn for turns_of_row in turns for turn in turns_of_row]

    return other_tool


@pytest.mark.parametrize("name", ["sft", "thinking"])
def test_llama_factory_trains_our_tokens(run_in, finished, tmp_path, other_tool, line_break, name):
    folder, ours = other_tool("LLaMA-Factory", name)
    asked = (folder, "sft_train", "sft", finished(name), tmp_path / "o")
    rows = run_in("llamafactory", "load_llamafactory.py", *asked)
    assert len(rows) == len(ours)
    for row, (prompt, answer) in zip(rows, ours):
        assert row["input_ids"] == prompt + answer + line_break
        assert row["labels"] == [-100] * len(prompt) + answer + line_break


def test_llama_factory_keeps_every_pair(run_in, finished, place, tmp_path, other_tool, line_break):
    tokenizer, (folder, _) = (
        AutoTokenizer.from_pretrained(finished("sft")),
        other_tool("LLaMA-Factory", "sft"),
    )
    asked = (folder, "dpo_train", "rm", finished("sft"), tmp_path / "o")
    rows = run_in("llamafactory", "load_llamafactory.py", *asked)
    pairs = list(read_jsonl(place / "qwen3/dpo_train.jsonl"))
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs):
        prompt = encode_prompt(tokenizer, pair["prompt"], thinking=False)
        for side in ("chosen", "rejected"):
            assert row[f"{side}_input_ids"] == prompt + encode_answer(tokenizer, pair[side][-1]) + line_break


@pytest.mark.parametrize("name", ["sft", "thinking"])
def test_axolotl_trains_our_tokens(run_in, finished, other_tool, line_break, name):
    """Of an answer with reasoning it counts the opening tag as prompt, because the template writes it in any case."""
    folder, ours = other_tool("Axolotl", name)
    rows = run_in("axolotl", "load_axolotl.py", folder, "sft", finished(name))
    tokenizer = AutoTokenizer.from_pretrained(finished(name))
    opening = len(tokenizer("<think>\n")["input_ids"]) if name == "thinking" else 0
    assert len(rows) == len(ours)
    for row, (prompt, answer) in zip(rows, ours):
        assert row["input_ids"] == prompt + answer + line_break
        assert row["labels"] == [-100] * (len(prompt) + opening) + answer[opening:] + [-100]


def test_axolotl_keeps_every_pair(run_in, finished, place, other_tool):
    tokenizer, (folder, _) = AutoTokenizer.from_pretrained(finished("sft")), other_tool("Axolotl", "sft")
    rows = run_in("axolotl", "load_axolotl.py", folder, "dpo", finished("sft"))
    pairs = list(read_jsonl(place / "qwen3/dpo_train.jsonl"))
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs):
        tokens = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in row.items()}
        assert tokens["prompt"] == encode_prompt(tokenizer, pair["prompt"], thinking=False)
        for side in ("chosen", "rejected"):
            assert tokens[side] == encode_answer(tokenizer, pair[side][-1])


@pytest.mark.parametrize("name", ["sft", "thinking"])
def test_mlx_lm_trains_our_tokens(run_in, finished, other_tool, line_break, name):
    folder, ours = other_tool("mlx-lm", name)
    for ours_name, its_name in (("sft_train", "train"), ("sft_eval", "valid")):
        shutil.copy(folder / f"{ours_name}.jsonl", folder / f"{its_name}.jsonl")
    rows = run_in("mlx", "load_mlx.py", folder, finished(name))
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
        ours = {letter: score * len(item["options"][letter]) for letter, score in choice["text"].items()}
        same += max(ours, key=ours.get) == list(ours)[logps.index(max(logps))]
    assert same == len(exam) == 602
    accuracy = sum(choice["text_choice"] == item["answer"] for item, choice in zip(exam, choices)) / len(exam)
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
