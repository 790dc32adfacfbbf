"""What other tools make of our folders, rows and exam: RoPE base, training tokens, scores."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from evaluation_files import CPU
from interop.conftest import script
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.evaluation.exams import INSTRUCTION, choices_by_text
from utils.files import read_json, read_jsonl, write_json, write_jsonl
from utils.model.chat_format import encode_answer, encode_prompt, encode_turns
from utils.model.folder import save_model
from utils.model.qwen3_train import prepare_packed


def test_transformers_4_reads_a_rope_base_of_a_million(run_in, tmp_path):
    base = make_tiny_model(tmp_path / "base")  # its RoPE base is that of Qwen3-0.6B
    model, folder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "saved"
    save_model(model, AutoTokenizer.from_pretrained(base), folder)
    ids = torch.randint(0, 400, (1, 800), generator=torch.Generator().manual_seed(0))
    write_json(tmp_path / "ids.json", ids.tolist())
    expected = model(ids).logits[0].argmax(-1).tolist()
    assert run_in("transformers4", "argmax_transformers.py", folder, tmp_path / "ids.json") == expected
    config = read_json(folder / "config.json")
    config.pop("rope_theta")
    write_json(folder / "config.json", config)
    assert run_in("transformers4", "argmax_transformers.py", folder, tmp_path / "ids.json") != expected


# The environment of a tool, and the files that its blocks of docs/other_tools.md are written to, in their order.
TOOLS = {
    "LLaMA-Factory": ("llamafactory", ("dataset_info.json", "settings.yaml")),
    "Axolotl": ("axolotl", ("sft.yaml", "dpo.yaml")),
    "mlx-lm": ("mlx", ()),
}


@pytest.fixture
def load(run_in, finished, place, tmp_path):
    """load("Axolotl", "sft", "dpo") -> (the exported rows of the model "sft" as the tool's own loader makes pairs of them, with its
    configuration of docs/other_tools.md; our rows; our tokenizer)."""

    def load(tool, name, kind):
        (environment, files), data = TOOLS[tool], place / ("thinking" if name == "thinking" else "qwen3")
        rows, words = tmp_path / "rows", ("--format", "training-data", "--data-dir", data, "--output-dir")
        script("model_download/export_model.py", *words, rows)
        text = (ROOT / "docs/other_tools.md").read_text(encoding="utf-8").split(f"## {tool}\n")[1]
        for file, block in zip(files, re.findall(r"```\w+\n(.*?)```", text.split("\n## ")[0], re.DOTALL)):
            thinking = str(name == "thinking").lower()
            block = block.replace("enable_thinking: false", f"enable_thinking: {thinking}")
            (rows / file).write_text(block, encoding="utf-8")
        read = run_in(environment, f"load_{environment}.py", rows, kind, finished(name))
        ours = list(read_jsonl(data / f"{kind}_train.jsonl"))
        return read, ours, AutoTokenizer.from_pretrained(finished(name))

    return load


@pytest.mark.parametrize("tool, name", itertools.product(TOOLS, ["sft", "thinking"]))
def test_a_tool_trains_our_tokens(load, tool, name):
    """And a line break. Axolotl, of an answer with reasoning, counts the opening tag as prompt: the template writes it in any case."""
    rows, ours, tokenizer = load(tool, name, "sft")
    turns = [turn for row in ours for turn in encode_turns(tokenizer, row["messages"])]
    axolotl, line_break = tool == "Axolotl", tokenizer("\n")["input_ids"]
    opening = len(tokenizer("<think>\n")["input_ids"]) if axolotl and name == "thinking" else 0
    assert len(rows) == len(turns)
    for row, (prompt, answer) in zip(rows, turns):
        assert row["input_ids"] == prompt + answer + line_break
        trained = answer[opening:] + ([-100] if axolotl else line_break)
        assert row["labels"] == [-100] * (len(prompt) + opening) + trained


@pytest.mark.parametrize("tool", ["LLaMA-Factory", "Axolotl"])
def test_a_tool_keeps_every_pair(load, tool):
    rows, pairs, tokenizer = load(tool, "sft", "dpo")
    end = [] if tool == "Axolotl" else tokenizer("\n")["input_ids"]
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs):
        prompt = encode_prompt(tokenizer, pair["prompt"], thinking=False)
        for side in ("chosen", "rejected"):
            assert row[f"{side}_input_ids"] == prompt + encode_answer(tokenizer, pair[side][-1]) + end


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
    [file] = exported("sft", "gguf", "q8_0").glob("*.gguf")
    rows = list(read_jsonl(place / "qwen3/sft_eval.jsonl"))[:300]
    texts = [message["content"] for row in rows for message in row["messages"]]
    texts.append("It's 12345 度, A/B\r\n\n  x  Ωμέγα 😀𠮷é")
    texts.append("<|im_start|>user\n你好<|im_end|>\n<think>\n\n</think>\n\n")
    write_json(tmp_path / "texts.json", texts)
    found = run_in("llamacpp", "ask_llamacpp.py", file, tmp_path / "texts.json", "tokens")
    tokenizer = AutoTokenizer.from_pretrained(finished("sft"))
    assert found == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif(
    not shutil.which("go"), reason="needs Go, in whose template language the Modelfile is written"
)
@pytest.mark.parametrize("name, system", itertools.product(["sft", "thinking"], ["", "你是中医。"]))
def test_the_modelfile_renders_our_prompt(exported, finished, name, system):
    """Ollama itself was not run: this is its template, rendered by the Go library that it uses."""
    modelfile = (exported(name, "gguf", "q8_0") / "Modelfile").read_text(encoding="utf-8")
    [template] = re.findall('TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    tokenizer = AutoTokenizer.from_pretrained(finished(name))
    history, program = [("user", "麻黄？"), ("assistant", "温。")], Path(__file__).with_name("render.go")
    for before in ([], history):
        asked = [*before, ("user", "甘草有什么\n功效？")]
        messages = [{"role": role, "content": text} for role, text in asked]
        given = json.dumps({"Template": template, "System": system, "Messages": messages})
        pipes = {"input": given, "capture_output": True, "text": True, "encoding": "utf-8"}
        done = subprocess.run(["go", "run", program], **pipes)
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert done.stdout == prompt, done.stderr
