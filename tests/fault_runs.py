"""Run every script through a fault and checks how it ends: for the tests in tests/faults/.

Everything happens in a copy of the repository in a folder with a space and Chinese characters in its name, from a working
directory elsewhere. That folder is the `world`, {w} in the commands below; it holds the results of an earlier run of
most scripts. All cases want the same: one clear line, the right exit code (2: what was given, 1: failed underway, 130: Ctrl-C),
nothing lost of what was there before, nothing half done under a real name. Where the fault can be mended, the same command
then works.
"""

import hashlib
import itertools
import json
import os
import re
import shutil

import pytest
from conftest import ROOT
from fake_hub import TOKEN

if not hasattr(os, "fork"):
    pytest.skip("makes faults with POSIX signals, limits and permissions", allow_module_level=True)

from processes import Script, fork

# Every script, as it was run to make what is there (MADE). A case repeats one and adds words to it.
COMMANDS = {
    "sample": "data_prepare/sample/make_sample.py --output-dir {w}/made",
    "data": "data_prepare/download_tcm_data.py --dataset tcm/rows --output-dir {w}/got-data",
    "convert": "data_prepare/convert_to_qwen3_format.py --input-files {w}/raw --output-dir {w}/qwen3 --tokenizer-model none",
    "pairs": "data_prepare/build_preference_pairs.py --kind facts --input-dir {w}/qwen3 --output-dir {w}/qwen3",
    "model": "model_download/download_model.py --model tcm/small --output-dir {w}/got-model",
    "pretrain": "model_download/pretrain_tiny_model.py --statements-file {w}/statements.jsonl --terms-file {w}/terms.jsonl --output-dir {w}/pretrained "
    "--vocabulary 600 --width 32 --layers 1 --epochs 1 --copies 20 --greetings 1 --refusals 3 --cards 1 --invented 3",
    **{
        method: f"model_finetune/finetune_{method}.py --model {{w}}/base --train-file {{w}}/{data}_train.jsonl "
        f"--eval-file {{w}}/{data}_eval.jsonl --output-dir {{w}}/{method} --epochs 1 --max-length 256 --rows-per-step 2 "
        "--device cpu --precision fp32"
        for method, data in (("sft", "sft"), ("lora", "sft"), ("dpo", "dpo"))
    },
    "compare": "model_finetune/compare_models.py --models {w}/base {w}/sft --eval-file {w}/sft_eval.jsonl --exam-rows 2 --generate 2 "
    "--general-file {w}/general.jsonl --max-new-tokens 4 --device cpu --output-dir {w}/compared",
    "talk": "model_download/load_local_model.py {w}/base",
    "chat": "model_download/load_local_model.py --model {w}/base --prompt 甘草 --greedy --max-new-tokens 8 --device cpu",
}
NOT_MADE = ("sample", "data", "talk", "chat")  # are refused or leave nothing
MADE = {  # the folder of {w} that holds the results of each of the others
    name: command.rpartition("--output-dir {w}/")[2].split()[0]
    for name, command in COMMANDS.items()
    if name not in NOT_MADE
}
# The results that are the same to the byte, whenever they are made
SAME = {"convert": "sft_*.jsonl", "pairs": "dpo_*.jsonl", "model": "[!s]*"}
TRAINERS = ("sft", "lora", "dpo")
GOOD = "发汗解表", "利水消肿", "活血调经", "清热解毒", "祛风止痛"
ROWS = [{"instruction": f"第{n}味药有什么功效？", "output": f"它的功效是{GOOD[n % 5]}。"} for n in range(60)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FILES = {  # inputs, and things that are no inputs
    "raw/rows.jsonl": lines(ROWS),
    "statements.jsonl": lines({"text": row["output"]} for row in ROWS),
    "terms.jsonl": lines(
        {"kind": kind, "term": "麻黄桂枝"} for kind in ("herb", "formula", "acupoint", "syndrome")
    ),
    "photo.png": b"\x89PNG\r\n\x1a\n\0",
    "photo.jsonl": b"\x89PNG\r\n\x1a\n\0",
    "notes.json": '{"title": "no data"}',
    "notes.jsonl": '{"title": "no data"}\n',
    "general.jsonl": '{"id": "1", "question": "1+1=?", "answer": "2", "accept": ["2"]}\n',
    "empty.jsonl": "",
    "folder.jsonl/inside": "",
    "pickled/config.json": "{}",
    "pickled/pytorch_model.bin": b"\x80\x04",
    "bare/config.json": "{}",
    "bare/model.safetensors": "no weights",
    "orphan/adapter_config.json": '{"base_model_name_or_path": "/gone/base"}',
    "orphan/adapter_model.safetensors": "",
    "unanswered/sft_train.jsonl": '{"id": "1", "messages": []}\n',
    "broken.parquet": "PAR1",
}


def fill_world(world, hub):
    """Put the repository and all inputs into the folder `world`, and run the scripts of MADE there."""
    for folder in ("data_prepare/sample", "model_download/tiny_qwen3_tcm", "model_finetune", "utils"):
        shutil.copytree(ROOT / folder, world / "tcm" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in (*ROOT.glob("data_prepare/*.py"), *ROOT.glob("model_download/*.py")):
        shutil.copy(script, world / "tcm" / script.parent.name)
    maker = fork(make_inputs, world)
    for name, content in FILES.items():
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (world / "empty").mkdir()
    maker.join()
    shutil.copytree(world / "base", world / "cut")
    (world / "cut/model.safetensors").write_bytes((world / "base/model.safetensors").read_bytes()[:9000])
    for name in MADE:
        done = start(world, name, hub=hub)
        assert (done.end(), done.err if name != "compare" else "") == (0, ""), (name, done.out)


def make_inputs(folder):
    """The base model, rows and pairs. Runs in a process that has imported torch already."""
    from small_runs import make_place

    make_place(folder)


def start(world, command, *more, hub=None, **how):
    """Start one of COMMANDS (its name, and what the case adds), in a folder of its own outside of the world.

    A script starts where its imports are done already (`ready`). What asks the Hub does not: its packages read the environment.
    """
    name, *added = command.split()
    words = [word.format(w=world) for word in (*COMMANDS[name].split(), *added)]
    environment = {"PYTHONUNBUFFERED": None, "PYTHONDONTWRITEBYTECODE": None}  # as in most shells
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": None, "HF_TOKEN": TOKEN} if hub else {}
    environment |= how.pop("environment", {})
    how.setdefault("ready", name not in ("data", "model"))
    repository, folder = how.pop("repository", world / "tcm"), world.parent / f"started {next(STARTS)}"
    return Script([*words, *more], repository, folder, environment=environment, **how)


STARTS = itertools.count(1)

# What may stand on stderr beside the line about the fault: what chat and compare say while they work
NOTES = re.compile(
    r"\[.*|.* on cpu, .*|thinking o.*|For study .*|  .*: \d+\.\d s|stopping after.*|warning: .* among the training.*|"
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
        and not path.name.startswith(".lock")
        and not re.search(r"__pycache__|\.part(ial-\w+/.*)?$", path.as_posix())
    }


def assert_same(world, name, output):
    """Where a script always writes the same, `output` has it to the byte."""
    paths = list((world / MADE[name]).glob(SAME[name]))
    assert paths and all((output / path.name).read_bytes() == path.read_bytes() for path in paths)


def copy_of(world, name, tmp_path):
    """A copy of the earlier results of a script, for a case that may change them; of a download, all but one file."""
    output = shutil.copytree(world / MADE[name], tmp_path / "copy")
    if name == "model":  # whole, there would be nothing to do
        max(output.iterdir(), key=lambda path: path.stat().st_size).unlink()
    return output


def assert_nothing_lost(world, name, before, output):
    """What was there is as it was, and a new file is as a run without a fault made it: none is half done."""
    now, whole = contents(output), contents(world / MADE[name])
    assert {path: now.get(path) for path in before} == before
    assert all(now[path] == whole.get(path) for path in now.keys() - before.keys())


def assert_works_again(world, name, output, hub, *more):
    """The same command, without the fault, does its work; returns its ended Script."""
    script = start(world, name, *more, "--output-dir", output, hub=hub)
    assert script.end() == 0, script.err
    assert not [path for path in output.rglob("*") if ".part" in path.name]
    return script
