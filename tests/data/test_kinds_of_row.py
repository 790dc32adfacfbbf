"""A kind of row is added in utils/data/schemas.py alone."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from data_rows import read, write_lines

# What a person writes there for rows {"prompt", "answer", "score"} that are to be trained on and held out by themselves.
LINE = '    "scored": OutputFiles("scored_train", "scored_eval", dealt=True),\n'
READER = """
def _scored(row, schema, options):
    prompt = [{"role": "user", "content": row.get("prompt")}]
    chosen = [{"role": "assistant", "content": row.get("answer")}]
    return "scored", schema, {"prompt": prompt, "chosen": chosen, "score": row.get("score")}
"""
RECOGNISED = '    if {"prompt", "answer", "score"} <= have:\n        return "scored", _scored\n'


@pytest.mark.slow
def test_a_kind_that_schemas_names_gets_its_files(tmp_path):
    for folder in ("utils", "data_prepare", "model_finetune"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "raw", "qwen3")
        )
    place = tmp_path / "utils/data/schemas.py"
    text = place.read_text(encoding="utf-8")
    for before, more in [("OUTPUT_FILES = {\n", LINE), ("    have = set(names)\n", RECOGNISED)]:
        assert text.count(before) == 1
        text = text.replace(before, before + more)
    place.write_text(text + READER, encoding="utf-8")
    rows = [{"prompt": f"{n} 号药的药性？", "answer": "温。", "score": n} for n in range(40)]
    given = write_lines(tmp_path / "in.jsonl", *rows, {"query": "甘草的药性？", "response": "平。"})
    command = [sys.executable, "data_prepare/convert_to_qwen3_format.py", "--tokenizer-model", ""]
    command += ["--input-files", str(given), "--output-dir", str(tmp_path / "out"), "--eval-share", "0.1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    trained, held_out = (read(tmp_path / f"out/scored_{split}.jsonl") for split in ("train", "eval"))
    assert len(held_out) == 8 and len(trained) == 32 and len(read(tmp_path / "out/sft_train.jsonl")) == 1
    assert {row["score"] for row in trained + held_out} == set(range(40))
