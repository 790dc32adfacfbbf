"""The chat script: which model it offers, answers for other programs, wrong arguments."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from chat_helpers import QUESTIONS, prompts_of, reference
from conftest import ROOT
from small_runs import make_place, train

from model_download import load_local_model as script
from utils.errors import UserError, run
from utils.model.chat_format import DECODING
from utils.model.folder import find_models
from utils.model.generate import Decoding, TokenStream, read_answer

TINY = str(ROOT / "model_download/tiny_qwen3_tcm")
CPU = "--device cpu --precision fp32".split()


def test_the_newest_model_is_taken_where_none_is_named(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.model.folder.ROOT", tmp_path)
    with pytest.raises(UserError, match="download_model.py"):
        script.choose_model()
    places = [
        "model_download/tiny",
        "model_download/Qwen3-0.6B",
        "trainer_output/demo/new",
        "trainer_output/old",
    ]
    for age, name in enumerate(places):
        shutil.copytree(tiny_folder, tmp_path / name)
        os.utime(tmp_path / name / "model.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "trainer_output/unfinished/checkpoint-5").mkdir(parents=True)
    assert [path.name for path in find_models()] == ["new", "old", "Qwen3-0.6B", "tiny"]
    assert script.choose_model() == str(tmp_path / "trainer_output/demo/new")
    assert "demo/new (/model lists all)" in capsys.readouterr().err


def test_prompt_prints_the_answer_and_nothing_else(tiny_folder, chat_model, capsys):
    def said(*flags):
        script.main([str(tiny_folder), "--prompt", "甘草", "--max-new-tokens", "12", *CPU, *flags])
        return capsys.readouterr()

    prompt = prompts_of(chat_model)[0]
    answer = read_answer(chat_model.tokenizer, prompt, reference(chat_model, prompt, 12))
    greedy = said("--greedy")
    assert greedy.out == answer.content + "\n"
    for told in ("not medical advice", "12 tokens", "cut at the limit"):
        assert told in greedy.err
    assert said("--temperature", "0").out == greedy.out == said("--top-k", "1").out
    seeds = [said("--seed", str(seed)) for seed in (5, 5, 6)]
    assert seeds[0].out == seeds[1].out != seeds[2].out
    assert "temperature 0.6, top_p 0.95, top_k 20;" in seeds[0].err  # as the folder says
    told = said("--temperature", "1.5", "--top-p", "0.5", "--top-k", "9", "--repetition-penalty", "1.2").err
    assert "temperature 1.5, top_p 0.5, top_k 9, repetition_penalty 1.2" in told


def test_questions_from_a_pipe(tiny_folder, chat_model, monkeypatch, capsys):
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
def test_a_trained_folder_answers_the_same_through_the_code_in_the_docs(tmp_path, capsys):
    more = ["--rows-per-step", "4", "--epochs", "4"]
    assert train("lora", make_place(tmp_path), tmp_path / "trained", *more) == 0
    page = (ROOT / "docs/other_tools.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(from transformers import .*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    question = re.search('"content": "(.*?)"', code)[1]
    folder = str(tmp_path / "trained/merged")
    code = re.sub('folder = ".*"', f"folder = {folder!r}", code)
    greedy = "max_new_tokens=60, do_sample=False"
    code = re.sub(r"max_new_tokens=\d+(, do_sample=False)?", greedy, code)

    capsys.readouterr()
    script.main([folder, "--prompt", question, "--greedy", "--max-new-tokens", "60", *CPU])
    ours = capsys.readouterr().out
    exec(code, {})
    assert capsys.readouterr().out == ours and len(set(ours)) > 3


def test_questions_that_cannot_be_answered(tiny_folder, monkeypatch):
    for lines, message in (
        ("甘草\n".encode() + b"\xb8\xca", "stdin, line 2: not UTF-8"),
        (("长" * 5000).encode(), "stdin, line 1: the question has"),
        (b" \n\n", "no question on stdin"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        with pytest.raises(UserError, match=message):
            script.main([str(tiny_folder), "--max-new-tokens", "2", *CPU])


WRONG = [  # and what tests/test_settings.py says of flags
    (["no/such/tiny_folder/at/all", "--prompt", "x"], "does not exist"),
    ([str(ROOT / "utils"), "--prompt", "x"], "is not a model folder"),
    (["--prompt", " "], "--prompt: wanted a question"),
    (["--temperature", "11"], "--temperature is 11.0, wanted a number: -1 or 0 to 10"),
    ([TINY, "--serve", "--host", "0.0.0.0"], "a key is wanted too: --api-key TEXT"),
    (["--serve", "--prompt", "甘草"], "--serve takes no --prompt"),
    (["--beside-model", TINY], "--beside-model is for --serve"),
    (["--greedy", "--temperature", "0.5"], "--greedy and --temperature exclude each other"),
]


def test_wrong_arguments_are_refused_in_one_line(capsys):
    for words, message in WRONG:
        assert run(functools.partial(script.main, words)) == 2, words
        printed = capsys.readouterr()
        assert message in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


def test_help_needs_no_torch():
    code = "import sys\nfrom model_download import load_local_model\n"
    code += "try: load_local_model.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    command, form = [sys.executable, "-c", code], {"text": True, "encoding": "utf-8", "cwd": ROOT}
    output = subprocess.run(command, capture_output=True, **form).stdout
    assert "--thinking" in output and output.endswith("False\n")
