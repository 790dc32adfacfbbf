"""What the user gave is wrong: refused before anything is imported, computed or written."""

import pytest
from fault_runs import assert_told, contents, start

pytestmark = pytest.mark.slow

GIVEN = [
    # column, command, words of the line
    ("wrong folder", "sample --tables-dir {w}/nowhere", "nowhere/wordings.json"),
    ("wrong folder", "sample --output-dir {w}/photo.png", "photo.png is a file, wanted a folder"),
    (
        "wrong folder",
        "data --output-dir {w}/photo.png",
        "--output-dir: {w}/photo.png is a file, wanted a folder",
    ),
    ("wrong folder", "data --output-dir {w}/photo.png/raw", "photo.png is a file, wanted a folder"),
    ("wrong folder", "data --dataset {w}/raw/rows.jsonl", "rows.jsonl is a file on this disk; copy it into"),
    ("wrong folder", "model --model {w}/base", "base is a folder on this disk; wanted a model on the Hub"),
    ("wrong folder", "model --output-dir {w}/photo.png", "photo.png is a file, wanted a folder"),
    (
        "wrong folder",
        "convert --input-files {w}/nowhere",
        "nowhere does not exist; make it with: python data_prepare/download_tcm_data.py",
    ),
    ("wrong folder", "convert --input-files {w}/empty", "no data file"),
    ("wrong folder", "convert --output-dir {w}/photo.png/qwen3", "photo.png is a file, wanted a folder"),
    (
        "wrong folder",
        "pairs --input-dir {w}/raw",
        "raw/sft_train.jsonl does not exist; make it with: python data_prepare/convert",
    ),
    ("wrong folder", "pairs --kind model --model {w}/nowhere", "nowhere does not exist"),
    (
        "wrong folder",
        "pretrain --statements-file {w}/nowhere",
        "nowhere does not exist; make it with: python data_prepare/sample/",
    ),
    ("wrong folder", "pretrain --output-dir {w}/photo.png", "photo.png is a file, wanted a folder"),
    ("wrong folder", "sft --model {w}/nowhere", "nowhere does not exist; download one"),
    ("wrong folder", "sft --model {w}", "is not a model folder"),
    (
        "wrong folder",
        "lora --train-file {w}/nowhere.jsonl",
        "nowhere.jsonl does not exist; make it with: python data_prepare/convert",
    ),
    (
        "wrong folder",
        "dpo --eval-file {w}/nowhere.jsonl",
        "nowhere.jsonl does not exist; make it with: python data_prepare/build_pref",
    ),
    ("wrong folder", "sft --output-dir {w}/photo.png/sft", "photo.png is a file, wanted a folder"),
    ("wrong folder", "compare --models {w}/base {w}/nowhere", "nowhere does not exist"),
    ("wrong folder", "compare --output-dir {w}/photo.png/compared", "photo.png is a file, wanted a folder"),
    ("wrong folder", "chat --model {w}/empty", "empty is not a model folder (it holds nothing)"),
    ("wrong kind", "convert --input-files {w}/photo.png", "photo.png: cannot read .png; wanted .jsonl"),
    ("wrong kind", "convert --input-files {w}/photo.jsonl", "no row could be used"),
    ("wrong kind", "convert --input-files {w}/broken.parquet", "broken.parquet is not a whole .parquet file"),
    ("wrong kind", "convert --input-files {w}/folder.jsonl", "no data file"),
    (
        "wrong kind",
        "convert --input-files {w}/notes.json",
        "no row could be used (1 fields not recognised); the first is notes.json, line 1: fields not recognised; fields found: title",
    ),
    ("wrong kind", "pairs --input-dir {w}/unanswered", "sft_train.jsonl, line 1: messages is not"),
    ("wrong kind", "pairs --kind facts --terms-file {w}/photo.jsonl", "photo.jsonl, line 1: not"),
    ("wrong kind", "pretrain --terms-file {w}/notes.jsonl", "notes.jsonl, line 1: no field kind, term"),
    ("wrong kind", "sft --model {w}/photo.png", "photo.png is a file, wanted a model folder"),
    (
        "wrong kind",
        "lora --model {w}/pickled",
        "pickled holds no *.safetensors weights; other formats are not loaded",
    ),
    ("wrong kind", "dpo --model {w}/orphan", "orphan is a LoRA adapter for /gone/base, which is not there"),
    ("wrong kind", "sft --model {w}/bare", "bare has no tokenizer"),
    ("wrong kind", "sft --train-file {w}/folder.jsonl", "folder.jsonl is a folder, wanted a file"),
    ("wrong kind", "lora --train-file {w}/photo.jsonl", "photo.jsonl, line 1: not"),
    ("wrong kind", "sft --train-file {w}/dpo_train.jsonl", "dpo_train.jsonl, line 1: no field messages"),
    ("wrong kind", "dpo --train-file {w}/sft_train.jsonl", "sft_train.jsonl, line 1: no field prompt"),
    ("wrong kind", "lora --eval-file {w}/empty.jsonl", "empty.jsonl is empty"),
    ("wrong kind", "compare --eval-file {w}/notes.jsonl", "notes.jsonl, line 1: no field id, messages"),
    ("wrong kind", "compare --exam-file {w}/raw/rows.jsonl", "rows.jsonl: no exam question in it"),
    ("wrong kind", "compare --models {w}/pickled", "pickled holds no *.safetensors weights"),
    ("wrong kind", "chat --model {w}/photo.png", "photo.png is a file, wanted a model folder"),
    ("wrong kind", "chat --model {w}/orphan", "orphan is a LoRA adapter for /gone/base, which is not there"),
    ("wrong kind", "chat --model {w}/cut", "cut cannot be loaded"),
]


@pytest.mark.parametrize(
    "command, words",
    [case[1:] for case in GIVEN],
    ids=[f"{column}: {command}" for column, command, _ in GIVEN],
)
def test_what_the_user_gave(world, command, words):
    before = contents(world)
    assert_told(start(world, command, ready=command == "chat --model {w}/cut"), 2, words.format(w=world))
    assert contents(world) == before
