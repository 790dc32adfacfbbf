"""A run that was killed ends in the same weights and the same log, bit for bit, as one that was never stopped."""

import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from small_runs import METHODS, arguments, no_picture, same_weights

from utils.errors import run
from utils.files import read_json, read_jsonl
from utils.training import log as log_module

if not hasattr(os, "fork"):
    pytest.skip("stops trainings in forked processes", allow_module_level=True)

from processes import fork

pytestmark = pytest.mark.slow  # every test starts processes, and kills some


def unequal_memory(folder):
    """The second of two processes has memory for one row at once only; every process notes the rows of its steps."""
    from utils.training import loop, plan

    choose, rank = plan.choose, int(os.environ["RANK"])
    plan.free_memory = lambda device: 2 - rank
    plan.choose = lambda possible, needed, free, *more: choose(
        possible, {way: way.rows_at_once for way in possible}, free, *more
    )
    backward = loop.Learner.backward

    def noted(learner, batches, way):
        with open(f"{folder}.rows{rank}", "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for batch in batches for name in batch["ids"])
        return backward(learner, batches, way)

    loop.Learner.backward = noted


def script(method, given, output, environment, prepare=None):
    """In a process of its own: the finetune script, its messages in the files said and errors beside `output`."""
    os.environ.update(environment)
    log_module.plot_training = no_picture
    if prepare:
        prepare(output)
    place = f"{output}{environment.get('RANK', '')}"
    with (
        open(f"{place}.said", "w", encoding="utf-8") as sys.stdout,
        open(f"{place}.errors", "w", encoding="utf-8") as sys.stderr,
    ):
        code = run(lambda: importlib.import_module(f"model_finetune.finetune_{method}").main(given))
    sys.exit(code)


def start(method, place, output, *more, environment=None, precision="fp32", prepare=None):
    given = arguments(method, place, output, *more, precision=precision)
    return fork(script, method, given, output, environment or {}, prepare)


def start_two(method, place, output, *more, prepare=None):
    """Two processes joined by gloo, each with half of a step's rows, as accelerate launch would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        start(
            method,
            place,
            output,
            *more,
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            prepare=prepare,
        )
        for rank in range(2)
    ]


def wait_until(process, happened):
    while process.is_alive() and not happened():
        time.sleep(0.001)
    assert process.is_alive(), "it ended before its time"


def said(processes, output):
    """What the (first) process printed, once all have ended well."""
    for process in processes:
        process.join(200)
        assert process.exitcode == 0, [
            path.read_text(encoding="utf-8") for path in output.parent.glob(f"{output.name}*.errors")
        ]
    return Path(f"{output}{0 if len(processes) > 1 else ''}.said").read_text(encoding="utf-8")


def to_the_end(method, place, output, precision="fp32"):
    return said([start(method, place, output, precision=precision)], output)


@pytest.fixture(scope="module")
def finished(place):
    """finished(method, precision) -> the folder of a run that was never stopped, trained at the first call."""
    folders = {}

    def folder(method, precision="fp32"):
        if (method, precision) not in folders:
            folders[method, precision] = place / f"{method}_{precision}_whole"
            to_the_end(method, place, folders[method, precision], precision)
        return folders[method, precision]

    return folder


def same_run(one, other):
    return (
        same_weights(one, other)
        and (one / "training_log.jsonl").read_bytes() == (other / "training_log.jsonl").read_bytes()
    )


def test_a_killed_run_ends_in_the_same_weights(finished, place, method, precision):
    """kill -9 four times: twice after a random step, once while a checkpoint is written, once while the final model is."""
    output, draw = place / f"{method}_{precision}_killed", random.Random(method + precision)
    whole, log = finished(method, precision), output / "training_log.jsonl"
    lines = len(list(read_jsonl(whole / "training_log.jsonl")))
    early, late = sorted(draw.sample(range(2, lines - 2), 2))
    moments = [
        lambda: log.is_file() and log.read_bytes().count(b"\n") >= early,
        (output / ".partial-checkpoint").is_dir,
        lambda: log.is_file() and log.read_bytes().count(b"\n") >= late,
        (output / ".partial-model").is_dir,
    ]
    for moment in moments:
        process = start(method, place, output, precision=precision)
        wait_until(process, moment)
        process.kill()
        process.join()
    assert "going on from" in to_the_end(method, place, output, precision)
    assert same_run(output, whole)
    assert not [path.name for path in output.iterdir() if "partial" in path.name]


def test_a_killed_run_in_float16_keeps_its_loss_scale(finished, place):
    test_a_killed_run_ends_in_the_same_weights(finished, place, "sft", "fp16")


def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(finished, place):
    output = place / "interrupted"
    process, log = start("sft", place, output), output / "training_log.jsonl"
    wait_until(process, lambda: log.is_file() and log.read_bytes().count(b"\n") >= 3)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    errors = Path(f"{output}.errors").read_text(encoding="utf-8")
    assert process.exitcode == 130, errors
    assert "checkpoint written; the same command goes on" in errors and "Traceback" not in errors
    assert list(output.glob("checkpoint-*"))
    to_the_end("sft", place, output)
    assert same_run(output, finished("sft"))


def losses(folder):
    return [
        (entry["step"], entry[name])
        for entry in read_jsonl(folder / "training_log.jsonl")
        for name in ("loss", "eval_loss")
        if name in entry
    ]


@pytest.fixture(scope="module")
def by_two(place):
    """{method: (folder finished by two processes, what they said)}; SFT through the real launcher."""
    done = {
        method: (
            place / f"{method}_two",
            said(start_two(method, place, place / f"{method}_two"), place / f"{method}_two"),
        )
        for method in METHODS[1:]
    }
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        ROOT / "model_finetune/finetune_sft.py",
        *arguments("sft", place, place / "sft_two"),
    ]
    launched = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )
    assert launched.returncode == 0, launched.stderr
    return {**done, "sft": (place / "sft_two", launched.stdout)}


def test_two_processes_compute_what_one_does(finished, by_two, method):
    """Sums are taken in another order, so the losses agree to float32's accuracy, 1e-5 relative, not to the bit."""
    folder, printed = by_two[method]
    assert "on 2 processes" in printed and printed.count("finished in") == 1  # one of them speaks
    (steps, one), (also, two) = zip(*losses(finished(method))), zip(*losses(folder))
    assert steps == also and two == pytest.approx(one, rel=1e-5)


def test_two_processes_go_on_after_a_kill(by_two, place):
    output = place / "killed_two"
    processes = start_two("sft", place, output)
    wait_until(processes[0], (output / "checkpoint-6").is_dir)
    for process in processes:
        process.kill()
        process.join()
    assert "going on from" in said(start_two("sft", place, output), output)
    assert same_run(output, by_two["sft"][0])


def test_two_processes_end_together_when_time_is_over(place):
    """The main process has the clock: with hardly any time they stop after the first steps that could be timed."""
    output = place / "hours_two"
    more = ["--epochs", 1000, "--hours", 0.001, "--evaluations", 2]
    assert "finished in" in said(start_two("sft", place, output, *more), output)
    record = read_json(output / "run.json")
    assert 0 < record["results"]["steps"] < 200


def test_two_processes_of_unequal_memory_train_each_example_once_an_epoch(place):
    """The smallest memory decides for both. Each by itself would give some rows to both processes, and others to none."""
    output = place / "unequal"
    more = ["--rows-per-step", 4, "--max-length", 128, "--epochs", 1]
    said(start_two("sft", place, output, *more, prepare=unequal_memory), output)
    assert read_json(output / "run.json")["plan"] == [[0, 1, 2, False]]
    rows = [Path(f"{output}.rows{rank}").read_text(encoding="utf-8").split() for rank in range(2)]
    assert all(rows) and sorted(rows[0] + rows[1]) == sorted(str(number) for number in range(56))
