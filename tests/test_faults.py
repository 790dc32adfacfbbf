"""The fault matrix: every script, through what users do wrong and what machines do to them.

A row is a script, a column a fault; the id of a case names both, so that `pytest -k "compare and disk"` finds any of them.
Each runs the script as its user would, and wants the same of all: one clear line, the right exit code (2: what was given, 1:
failed underway, 130: Ctrl-C), nothing lost of what was there before, nothing half done under a real name; and where the
fault can be mended, that the same command then works.

Everything happens in a copy of the repository in a folder with a space and Chinese characters in its name, from a working
directory elsewhere. {w} stands for that folder, which holds the results of an earlier run of every script.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fake_hub import FakeHub
from processes import SERVER, Script, little_memory, nobody_reads, obey_permissions

# Every script, as it was run to make what is there. A case repeats one, with what it adds or changes behind it.
COMMANDS = {
    "sample": "data_prepare/sample/make_sample.py --output-dir {w}/made",
    "data": "data_prepare/download_tcm_data.py --dataset tcm/rows --output-dir {w}/got-data --retries 0",
    "convert": "data_prepare/convert_to_qwen3_format.py --input-files {w}/raw --output-dir {w}/qwen3 --tokenizer-model none",
    "pairs": "data_prepare/build_preference_pairs.py --kind mismatch --input-dir {w}/qwen3 --output-dir {w}/qwen3",
    "model": "model_download/download_model.py --model tcm/small --output-dir {w}/got-model --retries 0",
    "pretrain": "model_download/pretrain_tiny_model.py --statements-file {w}/statements.jsonl --output-dir {w}/pretrained "
    "--vocabulary 600 --width 64 --layers 1 --epochs 1 --copies 50 --names 30",
    "sft": "model_finetune/finetune_sft.py --model {w}/base --train-file {w}/sft_train.jsonl --eval-file {w}/sft_eval.jsonl "
    "--output-dir {w}/sft --epochs 1 --max-length 256 --accumulation 2 --device cpu --precision fp32",
    "lora": "model_finetune/finetune_lora.py --model {w}/base --train-file {w}/sft_train.jsonl --eval-file {w}/sft_eval.jsonl "
    "--output-dir {w}/lora --epochs 1 --max-length 256 --accumulation 2 --device cpu --precision fp32",
    "dpo": "model_finetune/finetune_dpo.py --model {w}/base --train-file {w}/dpo_train.jsonl --eval-file {w}/dpo_eval.jsonl "
    "--output-dir {w}/dpo --epochs 1 --max-length 256 --accumulation 2 --device cpu --precision fp32",
    "compare": "model_finetune/compare_models.py --models {w}/base {w}/sft --eval-file {w}/sft_eval.jsonl --exam-rows 2 --generate 2 "
    "--general-file {w}/general.jsonl --max-new-tokens 4 --device cpu --output-dir {w}/compared",
    "chat": "model_download/load_local_model.py --model {w}/base --prompt 甘草 --greedy --max-new-tokens 8 --device cpu",
}
MADE = {
    "sample": "made",
    "data": "got-data",
    "convert": "qwen3",
    "pairs": "qwen3",
    "model": "got-model",
    "pretrain": "pretrained",
    "sft": "sft",
    "lora": "lora",
    "dpo": "dpo",
    "compare": "compared",
}  # where each puts its results
# What of it is the same to the byte, whenever it is made
SAME = {
    "sample": "tcm_*.jsonl",
    "data": "*train.json",
    "convert": "sft_*.jsonl",
    "pairs": "dpo_*.jsonl",
    "model": "[!s]*",
}
TRAINERS = ("sft", "lora", "dpo")
HEAVY = ("pretrain", "sft", "lora", "dpo", "compare", "chat")  # import torch, which takes seconds
ROWS = [
    {
        "instruction": f"第{number}味药有什么功效？",
        "output": f"它的功效是{'补益温清'[number % 4]}{'气血阴阳'[number % 3]}。",
    }
    for number in range(60)
]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture(scope="module")
def hub():
    """A Hub on the loopback with the model tcm/small and the data set tcm/rows."""
    fake = FakeHub()
    fake.add(
        "model",
        "tcm/small",
        {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights" * 100_000},
    )
    fake.add("dataset", "tcm/rows", {"train.json": b'{"query": "?"}\n' * 50_000})
    yield fake
    fake.stop()


def make_inputs(folder):
    from small_runs import make_place  # and with it torch: so this runs where that is imported already

    make_place(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, hub):
    """The folder {w}: repository, inputs, what every script made of them, and things that are none of these."""
    w = tmp_path_factory.mktemp("中医 数据")
    for folder in ("data_prepare/sample", "model_download/tiny_qwen3_tcm", "model_finetune", "utils"):
        shutil.copytree(ROOT / folder, w / "tcm" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in (*ROOT.glob("data_prepare/*.py"), *ROOT.glob("model_download/*.py")):
        shutil.copy(script, w / "tcm" / script.parent.name)
    maker = SERVER.Process(target=make_inputs, args=(w,))
    maker.start()
    for name, content in {
        "raw/rows.jsonl": lines(ROWS),
        "statements.jsonl": lines({"text": row["output"]} for row in ROWS),
        "photo.png": "\x89PNG\r\n\x1a\n\0",
        "photo.jsonl": "\x89PNG\r\n\x1a\n\0",
        "notes.json": '{"title": "no data"}',
        "notes.jsonl": '{"title": "no data"}\n',
        "general.jsonl": '{"id": "1", "question": "1+1=?", "answer": "2", "accept": ["2"]}\n',
        "empty.jsonl": "",
        "folder.jsonl/inside": "",
        "pickled/config.json": "{}",
        "pickled/pytorch_model.bin": "\x80\x04",
        "bare/config.json": "{}",
        "bare/model.safetensors": "no weights",
        "orphan/adapter_config.json": '{"base_model_name_or_path": "/gone/base"}',
        "orphan/adapter_model.safetensors": "",
        "unanswered/sft_train.jsonl": '{"id": "1", "messages": []}\n',
        "broken.parquet": "PAR1",
    }.items():
        (w / name).parent.mkdir(exist_ok=True)
        (w / name).write_text(
            content, encoding="latin-1" if "\x80" in content or "\x89" in content else "utf-8"
        )
    (w / "empty").mkdir()
    maker.join()
    shutil.copytree(w / "base", w / "cut")
    (w / "cut/model.safetensors").write_bytes((w / "base/model.safetensors").read_bytes()[:9000])
    for name in COMMANDS:
        done = run(w, name, hub=hub, ready=name in HEAVY)
        assert (done.end(), done.err if name not in ("compare", "chat") else "") == (0, ""), done.out
    return w


def run(w, command, *more, hub=None, **how):
    """Start one of COMMANDS (its name, and what the case adds), in a folder of its own outside of {w}."""
    name, *added = command.split()
    words = [word.format(w=w) for word in (*COMMANDS[name].split(), *added)]
    environment = {"PYTHONUNBUFFERED": None, "PYTHONDONTWRITEBYTECODE": None}  # as in most shells
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": None} if hub else {}
    environment |= how.pop("environment", {})
    run.count += 1
    return Script(
        [*words, *more],
        how.pop("repository", w / "tcm"),
        w.parent / f"ran {run.count}",
        environment=environment,
        **how,
    )


run.count = 0

# What may stand on stderr beside the line about the fault: what chat and compare say while they work
NOTES = re.compile(
    r"\[.*|.* on cpu, .*|thinking o.*|For study .*|  .*: \d+\.\d s|stopping after this step, .*|  .*; retry 1 of 1 in 1 s|"
)


def assert_told(script, code, *wanted):
    """The script ended with this exit code and told why in one line, in which all of `wanted` stand."""
    assert script.end() == code, (script.out, script.err)
    told = [line for line in script.err.split("\n") if not NOTES.fullmatch(line)]
    assert len(told) == 1 and told[0].startswith("error: "), script.err
    assert all(words in told[0] for words in wanted), told[0]


def contents(folder):
    """{path: sha256} of the files under a folder, but for locks and what is hidden because it is half done."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != ".lock"
        and not re.search(r"__pycache__|\.part(ial-\w+/.*)?$", path.as_posix())
    }


def assert_same(world, name, output):
    """Where a script always writes the same, `output` has it to the byte."""
    paths = list((world / MADE[name]).glob(SAME[name]))
    assert paths and all((output / path.name).read_bytes() == path.read_bytes() for path in paths)


# ---- What the user gave: refused before anything is imported, computed or written

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
    ("wrong kind", "convert --input-files {w}/broken.parquet", "broken.parquet is not a whole Parquet file"),
    ("wrong kind", "convert --input-files {w}/folder.jsonl", "no data file"),
    (
        "wrong kind",
        "convert --input-files {w}/notes.json",
        "no row could be used (1 fields not recognised); fields found: title",
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
    ("wrong kind", "compare --exam-file {w}/raw/rows.jsonl", "rows.jsonl: no single-choice question in it"),
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
    assert_told(run(world, command, ready=command == "chat --model {w}/cut"), 2, words.format(w=world))
    assert contents(world) == before


# ---- Permissions, full disks, little memory


def copy_of(world, name, tmp_path):
    """A copy of the earlier results of a script, for a case that may change them; of downloads, all but one file."""
    output = shutil.copytree(world / MADE[name], tmp_path / "copy")
    if name in ("data", "model"):  # whole, there would be nothing to do
        max(output.iterdir(), key=lambda path: path.stat().st_size).unlink()
    return output


def assert_nothing_lost(world, name, before, output):
    """What was there is as it was, and a file that is new is just as a run without a fault made it: none is half done."""
    now, whole = contents(output), contents(world / MADE[name])
    assert {path: now.get(path) for path in before} == before
    assert all(now[path] == whole.get(path) for path in now.keys() - before.keys())


def assert_works_again(world, name, output, hub, *more):
    script = run(world, name, *more, "--output-dir", output, hub=hub, ready=name in HEAVY)
    assert script.end() == 0, script.err
    assert not [path for path in output.rglob("*") if ".part" in path.name]
    return script


@pytest.mark.parametrize("name", MADE)
def test_no_permission_to_write(world, hub, tmp_path, name):
    """The folder with the results of an earlier run is write-protected."""
    output = copy_of(world, name, tmp_path)
    before, more = contents(output), ["--fresh"] if name in (*TRAINERS, "compare") else []
    output.chmod(0o500)
    try:
        script = run(
            world,
            name,
            *more,
            "--output-dir",
            output,
            hub=hub,
            ready=name in HEAVY,
            before=[(obey_permissions,)],
        )
        assert_told(
            script,
            1,
            f"no permission to write or read ({output}",
            "; choose another folder or change its owner",
        )
        assert contents(output) == before
    finally:
        output.chmod(0o700)
    if name not in HEAVY:
        assert_works_again(world, name, output, hub)


@pytest.mark.parametrize(
    "command, kept",
    [
        ("convert --input-files {w}/locked.jsonl", "locked.jsonl"),
        ("pairs --kind facts --terms-file {w}/locked.jsonl", "locked.jsonl"),
        ("sft --train-file {w}/locked.jsonl", "locked.jsonl"),
        ("compare --eval-file {w}/locked.jsonl", "locked.jsonl"),
        ("lora --model {w}/locked", "locked"),
        ("chat --model {w}/locked", "locked"),
    ],
)
def test_no_permission_to_read(world, command, kept):
    (world / "locked.jsonl").touch(0)
    (world / "locked").mkdir(0)
    try:
        assert_told(
            run(world, command, before=[(obey_permissions,)]),
            1,
            f"no permission to write or read ({world / kept}",
        )
    finally:
        (world / "locked").rmdir()
        (world / "locked.jsonl").unlink()


# Network disks and quotas say that they are full when they are asked to keep what was written: here at the {n}-th time.
FULL_DISK = """import errno, os
def keep(file, times=iter(range({n} - 1))):
    if next(times, None) is None:
        raise OSError(errno.{error}, os.strerror(errno.{error}))
os.fsync = keep
"""


@pytest.mark.parametrize(
    "name, n, error",
    [
        ("sample", 2, "EDQUOT"),
        ("data", 1, "ENOSPC"),
        ("convert", 2, "EDQUOT"),
        ("pairs", 1, "ENOSPC"),
        ("model", 2, "ENOSPC"),
    ],
)
def test_disk_full(world, hub, tmp_path, name, n, error):
    output = copy_of(world, name, tmp_path)
    before = contents(output)
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK.format(n=n, error=error), encoding="utf-8")
    script = run(world, name, "--output-dir", output, hub=hub, environment={"PYTHONPATH": str(tmp_path)})
    assert_told(script, 1, "the disk is full", "; free some space and run the same command again")
    assert_nothing_lost(world, name, before, output)
    assert_works_again(world, name, output, hub)


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("convert", 4000, "takes no file so large"),
        ("pairs", 4000, "takes no file so large"),
        ("pretrain", 100_000, "takes no file so large"),
        ("sft", 700_000, "the disk is full"),
        ("lora", 100_000, "takes no file so large"),
        ("dpo", 100_000, "takes no file so large"),
        ("compare", 3000, "takes no file so large"),
    ],
)
def test_disk_that_takes_no_file_of_that_size(world, hub, tmp_path, name, size, words):
    """As FAT32 does at 4 GB, here at `size` bytes, whoever writes: Python, safetensors, or torch, which cannot say why."""
    output = tmp_path / "new" if name in TRAINERS else copy_of(world, name, tmp_path)
    before, more = (
        contents(output),
        {"compare": ["--generate", "1"], **dict.fromkeys(TRAINERS, ["--max-steps", "2"])}.get(name, []),
    )
    script = run(
        world,
        name,
        *more,
        "--output-dir",
        output,
        ready=name in HEAVY,
        before=[(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))],
    )
    assert_told(script, 1, words)
    assert {path: contents(output).get(path) for path in before} == before
    assert not [path for path in output.glob("*.safetensors") if Path(path.name) not in before]
    assert not list(
        output.glob(".partial-checkpoint/*")
    )  # 7 GB for Qwen3-0.6B, which would keep the disk full
    if name != "dpo":  # its pictures take seconds
        assert_works_again(world, name, output, hub, *more)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS limits memory on Linux only")
@pytest.mark.parametrize("name", ["sft", "compare", "chat"])
def test_memory_too_small(world, tmp_path, name):
    output = [] if name == "chat" else ["--output-dir", tmp_path / "out"]
    assert_told(
        run(world, name, *output, ready=True, before=[(little_memory, 1 << 20)]), 1, "not enough memory"
    )


# ---- Networks


@pytest.mark.parametrize(
    "command",
    [
        "data --dataset tcm/other",
        "model --model tcm/other",
        "sft --model Qwen/Nowhere",
        "compare --models {w}/base Qwen/Nowhere",
        "chat --model Qwen/Nowhere",
        "pairs --kind model --model Qwen/Nowhere",
    ],
)
def test_no_network(world, command):
    before = contents(world)
    script = run(world, command, environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None})
    assert_told(
        script, 1, "cannot connect to 127.0.0.1", "check the network and HF_ENDPOINT (http://127.0.0.1:9)"
    )
    assert contents(world) == before


@pytest.mark.parametrize("command", ["lora --model Qwen/Nowhere", "model --model tcm/other"])
def test_hub_switched_off(world, command):
    script = run(world, command, environment={"HF_HUB_OFFLINE": "1"})
    assert_told(script, 2, "HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it")


@pytest.mark.parametrize(
    "name, where, action, words",
    [
        (
            "data",
            "/revision/",
            {"status": 200},
            "did not answer in JSON; is a login page of this network in the way",
        ),
        ("data", "/resolve/", {"status": 500}, "answered 500 (Internal Server Error); gave up"),
        ("data", "/storage/", {"corrupt": True}, "arrived damaged twice"),
        ("model", "/tree/", {"status": 200}, "did not answer in JSON"),
        ("model", "/storage/", {"cut": 1000}, "the connection to localhost broke"),
        (
            "chat --model tcm/small",
            "/revision/",
            {"status": 500},
            "answered 500 (Internal Server Error); gave up",
        ),
    ],
)
def test_broken_mirror(world, hub, tmp_path, name, where, action, words):
    hub.fault(where, **action)
    try:
        output = [] if name.startswith("chat") else ["--output-dir", tmp_path / "new"]
        assert_told(run(world, name, *output, hub=hub), 1, words)
    finally:
        hub.faults.clear()
    if output:
        assert not [
            path
            for path in output[1].glob("*")
            if path.suffix not in (".part", ".json") or path.name == "train.json"
        ]
        assert_works_again(world, name, output[1], hub)


def stopped_half_way(world, hub, tmp_path, name, number):
    """The download, ended by a signal after 100,000 bytes of its largest file; the folder that it writes."""
    hub.fault("/storage/", cut=100_000, hang=60, times=1)
    output = tmp_path / "new"
    script = run(world, name, "--output-dir", output, hub=hub)
    script.wait_for(lambda: any(path.stat().st_size >= 100_000 for path in output.glob("*.part")))
    script.kill(number)
    return script, output


@pytest.mark.parametrize("name", ["data", "model"])
def test_killed_download(world, hub, tmp_path, name):
    script, output = stopped_half_way(world, hub, tmp_path, name, signal.SIGKILL)
    assert script.end() == -signal.SIGKILL
    assert "going on at 97.7 KiB" in assert_works_again(world, name, output, hub).out
    assert_same(world, name, output)


# ---- Stopped: Ctrl-C at each stage, kill -9, two at once


@pytest.mark.parametrize("name", ["data", "model"])
def test_ctrl_c_in_a_download(world, hub, tmp_path, name):
    script, output = stopped_half_way(world, hub, tmp_path, name, signal.SIGINT)
    assert_told(script, 130, "stopped by Ctrl-C; the same command starts it again")
    assert_works_again(world, name, output, hub)


# Enough work to be stopped in, and the words on stdout that say that it has begun
AT_WORK = {
    "pairs": ("--input-dir {w}/many", "settings"),
    "pretrain": ("--epochs 100000", "parameters"),
    "sft": ("--epochs 1000", "evaluation after step 0"),
    "lora": ("--epochs 1000", "evaluation after step 0"),
    "dpo": ("--epochs 1000", "evaluation after step 0"),
    "compare": ("--max-new-tokens 900 --batch-size 1", "1/2 base"),
    "chat": ("--max-new-tokens 900", ""),
}


@pytest.fixture(scope="module")
def many(world):
    """As many rows as keep a script busy for seconds, in {w}/many."""
    (world / "many").mkdir()
    for split in ("train", "eval"):
        rows = (world / "qwen3" / f"sft_{split}.jsonl").read_text(encoding="utf-8")
        (world / "many" / f"sft_{split}.jsonl").write_text(
            rows * (100_000 // rows.count("\n")), encoding="utf-8"
        )


def at_work(world, name, *more):
    """The script, in the middle of work that would go on for long."""
    command, words = AT_WORK[name]
    script = run(
        world, f"{name} {command}", *more, ready=name in HEAVY, environment={"PYTHONUNBUFFERED": "1"}
    )
    script.wait_for(lambda: script.out and (words in script.out or "going on from" in script.out))
    return script


@pytest.mark.parametrize("name", AT_WORK)
def test_ctrl_c(world, many, tmp_path, name):
    output = (
        []
        if name == "chat"
        else ["--output-dir", tmp_path / "new" if name in TRAINERS else copy_of(world, name, tmp_path)]
    )
    before = contents(output[1]) if output else {}
    script = at_work(world, name, *output)
    script.kill(signal.SIGINT)
    assert_told(
        script,
        130,
        "the same command goes on" if name in (*TRAINERS, "compare") else "the same command starts it again",
    )
    if name in TRAINERS:
        assert list(output[1].glob("checkpoint-*"))
        script = at_work(world, name, *output)
        assert "going on from" in script.out
        script.kill()
        script.end()
    elif output:
        assert contents(output[1]) == before
        if name != "pretrain":  # goes on with nothing: the next begins anew
            assert_works_again(world, name, output[1], None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_stopped_conversion(world, tmp_path, number):
    """It waits for rows from a pipe, which never come."""
    pipe, output, writers = tmp_path / "rows.jsonl", copy_of(world, "convert", tmp_path), []
    before = contents(output)
    os.mkfifo(pipe)
    script = run(world, "convert", "--input-files", pipe, "--output-dir", output)

    def reads():
        with contextlib.suppress(OSError):  # nobody has opened it for reading yet
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return writers

    script.wait_for(reads)
    script.kill(number)
    if number == signal.SIGINT:
        assert_told(script, 130, "stopped by Ctrl-C; the same command starts it again")
    assert script.end() in (130, -signal.SIGKILL)
    os.close(writers[0])
    assert contents(output) == before
    assert_works_again(world, "convert", output, None)


def test_ctrl_c_while_libraries_are_imported(world, tmp_path):
    script = run(world, "sft", "--output-dir", tmp_path / "new", environment={"PYTHONUNBUFFERED": "1"})
    script.wait_for(lambda: "FRESH" in script.out)  # the last word before `import torch`
    script.kill(signal.SIGINT)
    assert_told(script, 130, "stopped by Ctrl-C; the same command starts it again")
    assert not (tmp_path / "new").exists()


def test_killed_trainer(world, tmp_path):
    output = tmp_path / "new"
    script = run(world, "sft", "--output-dir", output, "--epochs", 5, ready=True)
    script.wait_for(lambda: list(output.glob("checkpoint-*")))
    script.kill()
    assert script.end() == -signal.SIGKILL
    assert "going on from" in assert_works_again(world, "sft", output, None, "--epochs", 5).out


def test_killed_comparison(world, tmp_path):
    """The model that was measured is not measured again."""
    output, more = tmp_path / "new", ["--max-new-tokens", "100", "--batch-size", "1"]
    script = run(world, "compare", *more, "--output-dir", output, ready=True)
    script.wait_for(lambda: "2/2 sft" in script.out)
    script.kill()
    assert script.end() == -signal.SIGKILL
    assert assert_works_again(world, "compare", output, None, *more).out.count("measured before") == 1


def test_two_trainers_in_one_folder(world, tmp_path):
    first = at_work(world, "sft", "--output-dir", tmp_path / "new")
    second = run(world, "lora", "--output-dir", tmp_path / "new", ready=True)
    assert_told(
        second,
        2,
        f"is in use by another run (process {first.process.pid}); wait for it, or choose another --output-dir",
    )
    first.kill()
    first.end()
    assert_works_again(
        world, "lora", tmp_path / "new", None, "--fresh", "--max-steps", 1
    )  # the lock went with its process


def test_two_conversions_into_one_folder(world, tmp_path):
    scripts = [run(world, "convert", "--output-dir", tmp_path / "new") for _ in range(2)]
    assert [script.end() for script in scripts] == [0, 0], [script.err for script in scripts]
    assert_same(world, "convert", tmp_path / "new")


def test_two_downloads_into_one_folder(world, hub, tmp_path):
    """The first is kept waiting by the server until the second has finished the file that is both of theirs."""
    hub.fault("/storage/", stall=1.5, times=1)
    first = run(world, "model", "--output-dir", tmp_path / "new", hub=hub)
    first.wait_for(lambda: hub.faults[-1]["times"] == 0)  # the server has its request
    assert_works_again(world, "model", tmp_path / "new", hub)
    assert first.end() == 0, first.err
    assert_same(world, "model", tmp_path / "new")


# ---- Places, locales, homes, terminals


@pytest.mark.parametrize("name", ["data", "pairs"])
def test_started_from_the_repository_through_a_link(world, hub, tmp_path, name):
    """As `python data_prepare/...`, from another drive that is linked in."""
    (tmp_path / "链接 link").symlink_to(world / "tcm")
    script = run(
        world,
        name,
        "--output-dir",
        tmp_path / "new",
        hub=hub,
        repository=Path("."),
        cwd=tmp_path / "链接 link",
    )
    assert script.end() == 0, script.err
    assert_same(world, name, tmp_path / "new")


def test_started_from_a_folder_that_is_gone(world, tmp_path):
    (tmp_path / "gone").mkdir()
    script = run(world, "convert", cwd=tmp_path / "gone", before=[(os.rmdir, tmp_path / "gone")])
    assert_told(
        script, 2, "the folder that this was started in has been deleted; go to one that is there, with cd"
    )


PLAIN_C = {
    "LANG": "C",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": None,
    "PYTHONCOERCECLOCALE": "0",
}


@pytest.mark.parametrize("name", ["sample", "data", "convert", "pairs", "model"])
def test_locale_without_utf8(world, hub, tmp_path, name):
    """Chinese in the path, in the data and on the way to the terminal."""
    script = run(
        world,
        name,
        "--output-dir",
        tmp_path / "中药",
        hub=hub if name in ("data", "model") else None,
        environment=PLAIN_C,
    )
    assert (script.end(), script.err) == (0, "")
    assert f"{tmp_path}/中药" in script.out
    assert_same(world, name, tmp_path / "中药")


def test_a_fault_in_a_locale_without_utf8(world):
    assert_told(
        run(world, "convert --input-files {w}/没有", environment=PLAIN_C),
        2,
        "没有 does not exist; make it with",
    )


@pytest.mark.parametrize("name", ["convert", "model", "sft"])
def test_no_home(world, hub, tmp_path, name):
    """Where libraries keep caches and settings nothing can be written, or even be; and for good measure a locale without UTF-8."""
    home = dict.fromkeys(
        ("HOME", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
        str(world / "photo.png/home"),
    )
    script = run(
        world,
        name,
        "--output-dir",
        tmp_path / "new",
        hub=hub if name == "model" else None,
        environment=home | PLAIN_C,
    )
    assert (script.end(), script.err) == (0, "")


@pytest.mark.parametrize("command", ["convert", "sft", "compare", "chat"])
def test_reader_of_stdout_has_left(world, tmp_path, command):
    """`script | head -1`, in the middle of its work."""
    output = ["--output-dir", tmp_path / "new"] if command in MADE else []
    script = run(
        world,
        command,
        *output,
        environment={"PYTHONUNBUFFERED": "1"},
        before=[(nobody_reads,)],
        ready=command in HEAVY,
    )
    assert_told(
        script,
        1,
        "stopped, because the program that read this output has ended; the same command without it does the rest",
    )
    if output:
        assert_works_again(world, command, tmp_path / "new", None)


@pytest.mark.parametrize("command", ["convert", "sft --help"])
def test_reader_of_stdout_has_left_after_the_work(world, tmp_path, command):
    """Only the last lines went unread, when all was done: that is no fault."""
    script = run(world, command, "--output-dir", tmp_path / "new", before=[(nobody_reads,)])
    assert (script.end(), script.err) == (0, "")
    assert "--help" in command or list((tmp_path / "new").glob("*.jsonl"))


@pytest.mark.parametrize("number", [1, 2], ids=["stdout", "stderr"])
def test_closed_by_who_started_it(world, tmp_path, number):
    """As by cron, or `>&-`: the file that is opened next must not get the number, and with it what was meant for the terminal."""
    script = run(world, "convert", "--output-dir", tmp_path / "new", before=[(os.close, number)])
    assert (script.end(), script.err) == (0, "")
    assert_same(world, "convert", tmp_path / "new")


def test_stderr_closed_and_a_fault(world):
    script = run(world, "convert --input-files {w}/nowhere", before=[(os.close, 2)])
    assert script.end() == 2 and "error" not in script.out


@pytest.mark.parametrize("before", [[], [(os.close, 0)]], ids=["/dev/null", "closed"])
def test_chat_without_a_terminal_and_without_a_question(world, before):
    script = Script(
        ["model_download/load_local_model.py", world / "base"],
        world / "tcm",
        world.parent / "no terminal",
        before=before,
        ready=True,
    )
    assert_told(script, 2, "no question on stdin, wanted one a line; or ask with --prompt")


def test_chat_reads_questions_where_there_is_no_terminal(world, tmp_path):
    (tmp_path / "questions.txt").write_text("甘草\n\n麻黄\n", encoding="utf-8")
    script = Script(
        ["model_download/load_local_model.py", str(world / "base"), "--json", "--max-new-tokens", "3"],
        world / "tcm",
        tmp_path / "ran",
        stdin=tmp_path / "questions.txt",
        ready=True,
    )
    assert script.end() == 0, script.err
    assert [json.loads(line)["question"] for line in script.out.splitlines()] == ["甘草", "麻黄"]
