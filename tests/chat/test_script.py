"""The chat script: which model it offers, answers for other programs, wrong arguments."""

import functools
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from chat_helpers import QUESTIONS, prompts_of, reference
from conftest import ROOT
from small_runs import arguments, make_place

from utils.errors import UserError, run
from utils.model.chat_format import DECODING
from utils.model.folder import find_models
from utils.model.generate import Decoding, TokenStream, read_answer

SCRIPT = "model_download/load_local_model.py"
TINY = str(ROOT / "model_download/tiny_qwen3_tcm")
CPU = "--device cpu --precision fp32".split()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("load_local_model", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_newest_model_is_taken_where_none_is_named(script, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.model.folder.ROOT", tmp_path)
    with pytest.raises(UserError, match="download_model.py"):
        script.choose_model()
    places = (
        "model_download/tiny model_download/Qwen3-0.6B trainer_output/demo/new trainer_output/old".split()
    )
    for age, name in enumerate(places):
        shutil.copytree(tiny_folder, tmp_path / name)
        os.utime(tmp_path / name / "model.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "trainer_output/unfinished/checkpoint-5").mkdir(parents=True)
    assert [path.name for path in find_models()] == ["new", "old", "Qwen3-0.6B", "tiny"]
    assert script.choose_model() == str(tmp_path / "trainer_output/demo/new")
    assert "demo/new (/model lists all)" in capsys.readouterr().err


def test_prompt_prints_the_answer_and_nothing_else(script, tiny_folder, chat_model, capsys):
    command = [str(tiny_folder), "--prompt", "甘草", "--max-new-tokens", "12", *CPU]
    script.main([*command, "--greedy"])
    output = capsys.readouterr()
    prompt = prompts_of(chat_model)[0]
    answer = read_answer(chat_model.tokenizer, prompt, reference(chat_model, prompt, 12))
    assert output.out == answer.content + "\n"
    for told in ("not medical advice", "12 tokens", "cut at the limit"):
        assert told in output.err
    answers = []
    for seed in (5, 5, 6):
        script.main([*command, "--seed", str(seed)])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_sampling_by_flags(script, tiny_folder, capsys):
    command = [str(tiny_folder), "--prompt", "甘草", "--max-new-tokens", "12", "--seed", "3", *CPU]

    def said(*flags):
        script.main([*command, *flags])
        return capsys.readouterr()

    greedy = said("--greedy").out
    assert said("--temperature", "0").out == greedy == said("--top-k", "1").out
    told = said("--temperature", "1.5", "--top-p", "0.5", "--top-k", "9", "--repetition-penalty", "1.2").err
    assert "temperature 1.5, top_p 0.5, top_k 9, repetition_penalty 1.2" in told
    assert "temperature 0.6, top_p 0.95, top_k 20;" in said().err  # as the folder says


def test_questions_from_a_pipe(script, tiny_folder, chat_model, monkeypatch, capsys):
    questions = "\ufeff" + "\r\n\n".join(QUESTIONS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions.encode()), encoding="ascii"))
    script.main([str(tiny_folder), "--json", "--max-new-tokens", "12", "--seed", "4", *CPU])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == QUESTIONS
    assert all(list(row) == ["question", "answer", "tokens", "seconds"] for row in rows)
    for row, prompt in zip(rows, prompts_of(chat_model)):  # each as if it were the only one
        stream = TokenStream(chat_model.model, chat_model.stream.stop)
        random = torch.Generator().manual_seed(4)
        ids = list(stream.answer(prompt, Decoding(**DECODING[True]), 12, random))
        answer = read_answer(chat_model.tokenizer, prompt, ids).content
        assert (row["answer"], row["tokens"]) == (answer, len(ids)) and row["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method, inside", [("sft", ""), ("lora", "merged")])
def test_a_trained_folder_answers_the_same_through_the_code_in_the_docs(
    script, tmp_path, capsys, monkeypatch, method, inside
):
    # The trainer's handlers of Ctrl-C are its script's.
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    trainer = importlib.import_module(f"model_finetune.finetune_{method}")
    place = make_place(tmp_path)
    flags = arguments(method, place, tmp_path / "trained", "--rows-per-step", "4", "--epochs", "4")
    assert trainer.main(flags) in (None, 0)
    page = (ROOT / "docs/other_tools.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(from transformers import .*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    question = re.search('"content": "(.*?)"', code)[1]
    folder = str(tmp_path / "trained" / inside)
    code = re.sub('folder = ".*"', f"folder = {folder!r}", code)
    greedy = "max_new_tokens=60, do_sample=False"
    code = re.sub(r"max_new_tokens=\d+(, do_sample=False)?", greedy, code)

    capsys.readouterr()
    script.main([folder, "--prompt", question, "--greedy", "--max-new-tokens", "60", *CPU])
    ours = capsys.readouterr().out
    exec(code, {})
    assert capsys.readouterr().out == ours and len(set(ours)) > 3


@pytest.mark.parametrize(
    "lines, message",
    [
        ("甘草\n".encode() + b"\xb8\xca", "stdin, line 2: not UTF-8"),
        (("长" * 5000).encode(), "stdin, line 1: the question has"),
        (b" \n\n", "no question on stdin"),
    ],
)
def test_questions_that_cannot_be_answered(script, tiny_folder, monkeypatch, lines, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    with pytest.raises(UserError, match=message):
        script.main([str(tiny_folder), "--max-new-tokens", "2", "--precision", "fp32"])


WRONG = [
    (["no/such/tiny_folder/at/all", "--prompt", "x"], "does not exist"),
    (["--prompt", " "], "--prompt: wanted a question"),
    (["--thinking", "maybe", "--prompt", "x"], "--thinking is 'maybe'"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["--temperature", "11"], "--temperature is 11.0, wanted a number: -1 or 0 to 10"),
    (["--top-p", "2"], "--top-p is 2.0, wanted a number: -1 or > 0, at most 1"),
    (["--repetition-penalty", "0"], "--repetition-penalty is 0.0, wanted"),
    ([TINY, "--serve", "--host", "0.0.0.0"], "a key is wanted too: --api-key TEXT"),
    (["--serve", "--prompt", "甘草"], "--serve takes no --prompt"),
    (["--serve", "--port", "70000"], "--port is 70000, wanted a whole number: 0, 1, ... 65535"),
    (["--greedy", "--temperature", "0.5"], "--greedy and --temperature exclude each other"),
    ([str(ROOT / "utils"), "--prompt", "x"], "is not a model folder"),
    (["--promt", "x"], "did you mean --prompt?"),
    ([TINY, "--prompt", "x", "--device", "abacus"], "--device is 'abacus'"),
    ([TINY, "--prompt", "x", "--precision", "fp8"], "--precision is 'fp8'"),
]


def test_wrong_arguments_are_refused_in_one_line(script, capsys):
    for words, message in WRONG:
        assert run(functools.partial(script.main, words)) == 2, words
        printed = capsys.readouterr()
        assert message in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


def test_help_needs_no_torch():
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    command, form = [sys.executable, "-c", code], {"text": True, "encoding": "utf-8"}
    output = subprocess.run(command, capture_output=True, **form).stdout
    assert "--thinking" in output and output.endswith("False\n")
