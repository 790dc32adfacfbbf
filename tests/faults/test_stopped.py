"""Stopped: Ctrl-C at each stage, kill -9, two runs at once."""

import contextlib
import os
import signal

import pytest
from fault_runs import TRAINERS, assert_same, assert_told, assert_works_again, contents, copy_of, start
from processes import delay

pytestmark = pytest.mark.slow
AGAIN = "stopped by Ctrl-C; the same command starts it again"


def test_ctrl_c_in_a_download(world, hub, tmp_path):
    """The server stops sending within the largest file. A download that is killed: tests/test_hub.py."""
    hub.fault("/storage/", cut=100_000, hang=600, times=1)
    output, waits = tmp_path / "new", {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    script = start(world, "model", "--output-dir", output, hub=hub, environment=waits)
    script.wait_for(lambda: size_of_parts(output) >= 60_000)
    script.kill(signal.SIGINT)
    assert_told(script, 130, AGAIN)
    assert_works_again(world, "model", output, hub)


def size_of_parts(folder):
    """Bytes in the .part files of a folder, from which small files move to their names at any moment."""
    size = 0
    for part in folder.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            size += part.stat().st_size
    return size


# What makes the work of a script long, and the words on stdout that say it has begun
LONG = {
    "pairs": ("--kind model --model {w}/base --max-new-tokens 900", "settings"),
    "pretrain": ("--epochs 9 --tokens-per-step 128", "parameters"),
    **dict.fromkeys(TRAINERS, ("--epochs 1000", "evaluation after step 0")),
    "compare": ("--max-new-tokens 900 --batch-size 1", "1/2 base"),
    "chat": ("--max-new-tokens 900", ""),
}
SLOW = (delay, "torch.nn.functional", "embedding", 0.05)  # with which every forward pass begins


def at_work(world, name, *more):
    """A script in the middle of long work."""
    command, words = LONG[name]
    before = [] if name in TRAINERS else [SLOW]
    script = start(world, f"{name} {command}", *more, before=before, environment={"PYTHONUNBUFFERED": "1"})
    script.wait_for(lambda: script.out and words in script.out)
    return script


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c(world, tmp_path, name):
    """That a trainer goes on after it: tests/training/test_resume.py."""
    place = tmp_path / "new" if name in (*TRAINERS, "chat") else copy_of(world, name, tmp_path)
    output, before = [] if name == "chat" else ["--output-dir", place], contents(place)
    script = at_work(world, name, *output)
    script.kill(signal.SIGINT)
    assert_told(script, 130, "the same command goes on" if name in (*TRAINERS, "compare") else AGAIN)
    if name in TRAINERS:
        assert list(place.glob("checkpoint-*"))
    elif output:
        assert contents(place) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_stopped_conversion(world, tmp_path, number):
    """It waits for rows from a pipe, which never come."""
    pipe, output, writers = tmp_path / "rows.jsonl", copy_of(world, "convert", tmp_path), []
    before = contents(output)
    os.mkfifo(pipe)
    script = start(world, "convert", "--input-files", pipe, "--output-dir", output)

    def reads():
        with contextlib.suppress(OSError):  # nobody has opened it for reading yet
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return writers

    script.wait_for(reads)
    script.kill(number)
    if number == signal.SIGINT:
        assert_told(script, 130, AGAIN)
    assert script.end() in (130, -signal.SIGKILL)
    os.close(writers[0])
    assert contents(output) == before
    assert_works_again(world, "convert", output, None)


def test_ctrl_c_while_libraries_are_imported(world, tmp_path):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n", encoding="utf-8")
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(tmp_path)}
    script = start(world, "sft", "--output-dir", tmp_path / "new", environment=environment, ready=False)
    script.wait_for(lambda: "the rest as in the script" in script.out)  # the last word before `import torch`
    script.kill(signal.SIGINT)
    assert_told(script, 130, AGAIN)
    assert not (tmp_path / "new").exists()


# at other moments, and in bf16: tests/training/test_resume.py
@pytest.mark.parametrize("name", TRAINERS)
def test_killed_trainer(world, tmp_path, name):
    """The run that was killed ends in the weights, bit for bit, of one that was not."""
    output, stays = tmp_path / "new", (delay, "utils.training.run", "Run.save_checkpoint", 600)
    script = start(world, name, "--output-dir", output, before=[stays])
    script.wait_for(lambda: list(output.glob("checkpoint-*")))
    script.kill()
    assert script.end() == -signal.SIGKILL
    assert "going on from" in assert_works_again(world, name, output, None).out
    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert (output / weights).read_bytes() == (world / name / weights).read_bytes()


def test_killed_comparison(world, tmp_path):
    """The model that was measured is not measured again."""
    output, stays = tmp_path / "new", (delay, "utils.evaluation.measure", "write_kept", 600)
    script = start(world, "compare", "--output-dir", output, before=[stays])
    script.wait_for(lambda: list(output.rglob("*.json")))
    script.kill()
    assert script.end() == -signal.SIGKILL
    assert assert_works_again(world, "compare", output, None).out.count("measured before") == 1


def test_two_trainers_in_one_folder(world, tmp_path):
    first = at_work(world, "sft", "--output-dir", tmp_path / "new")
    second = start(world, "lora", "--output-dir", tmp_path / "new")
    assert_told(second, 2, f"is in use by another run (process {first.process.pid}); wait for it, or choose")
    first.kill()
    first.end()
    # the lock went with its process
    assert_works_again(world, "lora", tmp_path / "new", None, "--fresh", "--max-steps", 1)


def test_two_conversions_into_one_folder(world, tmp_path):
    scripts = [start(world, "convert", "--output-dir", tmp_path / "new") for _ in range(2)]
    assert [script.end() for script in scripts] == [0, 0], [script.err for script in scripts]
    assert_same(world, "convert", tmp_path / "new")


def test_two_downloads_into_one_folder(world, hub, tmp_path):
    """The server keeps the first waiting, so that the second finishes the same file before it."""
    hub.fault("/storage/", stall=1, times=1)
    first = start(world, "model", "--output-dir", tmp_path / "new", hub=hub)
    first.wait_for(lambda: hub.faults[-1]["times"] == 0)  # the server has its request
    second = start(world, "model", "--output-dir", tmp_path / "new", hub=hub)
    assert (second.end(), first.end()) == (0, 0), second.err + first.err
    assert_same(world, "model", tmp_path / "new")
