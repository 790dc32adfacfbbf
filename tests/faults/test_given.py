"""What the user gave is wrong, or there is no network: refused before anything is imported, computed or written.

Broken mirrors are in tests/test_hub.py.
"""

import pytest
from fake_hub import TOKEN
from fault_runs import MADE, assert_told, contents, start

pytestmark = pytest.mark.slow

FILE = "photo.png is a file, wanted a folder"
MAKE = "does not exist; make it with: python data_prepare/"
NO_BASE = "orphan is an adapter for /gone/base, which is not there"
GIVEN = [  # a command, and words of the line
    # wrong folders
    ("sample --tables-dir {w}/nowhere", "nowhere/wordings.json"),
    *[(f"{name} --output-dir {{w}}/photo.png", FILE) for name in ("data", "pretrain")],
    *[(f"{name} --output-dir {{w}}/photo.png/in", FILE) for name in ("convert", "sft")],
    ("data --dataset {w}/raw/rows.jsonl", "rows.jsonl is a file on this disk; copy it into"),
    ("model --model {w}/base", "base is a folder on this disk; wanted a model on the Hub"),
    ("convert --input-files {w}/nowhere", "nowhere does not exist"),
    ("convert --input-files {w}/empty", "no data file"),
    ("pairs --input-dir {w}/raw", f"raw/sft_train.jsonl {MAKE}convert"),
    ("pretrain --statements-file {w}/nowhere", f"nowhere {MAKE}sample/"),
    ("sft --model {w}/nowhere", "nowhere does not exist; get the base model with: python model_download/"),
    ("lora --train-file {w}/nowhere.jsonl", f"nowhere.jsonl {MAKE}convert"),
    ("dpo --eval-file {w}/nowhere.jsonl", f"nowhere.jsonl {MAKE}build_pref"),
    ("compare --models {w}/base {w}/nowhere", "nowhere does not exist"),
    ("chat --model {w}/empty", "empty is not a model folder; a model has config.json"),
    # other kinds of file
    ("convert --input-files {w}/photo.png", "photo.png: cannot read .png; wanted .jsonl"),
    ("convert --input-files {w}/photo.jsonl", "no row could be used"),
    ("convert --input-files {w}/broken.parquet", "broken.parquet is not a whole .parquet file"),
    ("convert --input-files {w}/folder.jsonl", "no data file"),
    (
        "convert --input-files {w}/notes.json",
        "notes.json: none of its 1 rows could be used; line 1: fields not recognised; fields found: title",
    ),
    ("pairs --input-dir {w}/unanswered", "sft_train.jsonl, line 1: messages is not"),
    ("pairs --kind facts --terms-file {w}/photo.jsonl", "photo.jsonl, line 1: not"),
    ("pretrain --terms-file {w}/notes.jsonl", "notes.jsonl, line 1: no field kind, term"),
    ("lora --model {w}/pickled", "pickled holds no *.safetensors weights; other formats are not loaded"),
    ("sft --model {w}/bare", "bare has no tokenizer"),
    ("sft --train-file {w}/folder.jsonl", "folder.jsonl is a folder, wanted a file"),
    ("sft --train-file {w}/dpo_train.jsonl", "dpo_train.jsonl, line 1: no field messages"),
    ("dpo --train-file {w}/sft_train.jsonl", "sft_train.jsonl, line 1: no field prompt"),
    ("lora --eval-file {w}/empty.jsonl", "empty.jsonl is empty"),
    ("compare --eval-file {w}/notes.jsonl", "notes.jsonl, line 1: no field id, messages"),
    ("compare --exam-file {w}/raw/rows.jsonl", "rows.jsonl: no exam question in it"),
    ("chat --model {w}/photo.png", "photo.png is a file, wanted a model"),
    ("dpo --model {w}/orphan", "orphan is an adapter without merged/"),
    ("chat --model {w}/orphan", NO_BASE),
    ("chat --model {w}/cut", "cut cannot be loaded"),
]


def test_results_hold_no_token_and_nothing_that_could_be_code(world):
    """Weights and moments are safetensors, the rest is text: nothing is unpickled when a run goes on."""
    files = [path for folder in MADE.values() for path in (world / folder).rglob("*") if path.is_file()]
    assert len(files) > 60 and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [path for path in files if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.fixture(scope="module")
def before(world):
    return contents(world)


@pytest.mark.parametrize("command, words", GIVEN, ids=[command for command, _ in GIVEN])
def test_what_the_user_gave(world, before, command, words):
    assert_told(start(world, command, ready=True), 2, words)
    assert contents(world) == before


NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None}


@pytest.mark.parametrize(
    "command, environment, code, words",
    [
        ("data --dataset tcm/other", NOWHERE, 1, "no connection to http://127.0.0.1:9 ("),
        ("model --model tcm/other", {"HF_HUB_OFFLINE": "1"}, 1, "HF_HUB_OFFLINE"),
        # training downloads nothing itself
        ("sft --model Qwen/Nowhere", NOWHERE, 2, "download_model.py --model Qwen/Nowhere"),
    ],
)
def test_no_network(world, before, command, environment, code, words):
    assert_told(start(world, command, environment=environment, ready=False), code, words)
    assert contents(world) == before
