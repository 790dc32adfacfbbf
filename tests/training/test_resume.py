"""A run that was killed ends in the same weights and the same log, bit for bit, as one that was never stopped."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from small_runs import arguments, no_picture, same_run, train

from utils.files import read_json, read_jsonl

if not hasattr(os, "fork"):
    pytest.skip("stops trainings in forked processes", allow_module_level=True)

from processes import Script, delay

pytestmark = pytest.mark.slow  # every test starts processes, and kills some


def draw_nothing():
    from utils.training import log

    log.plot_training = no_picture


def unequal_memory(folder):
    """The second of two processes has memory for one row at once only; every process notes the rows of its steps."""
    from utils.training import loop, memory, plan

    rank, backward = int(os.environ["RANK"]), loop.Learner.backward
    plan.free_memory = lambda device: 2 - rank
    memory.MemoryForecast.parts = lambda forecast, way: {"rows": way.rows_at_once}

    def noted(learner, batches, way):
        with open(f"{folder}.rows{rank}", "a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for batch in batches for name in batch["ids"])
        return backward(learner, batches, way)

    loop.Learner.backward = noted


def start(method, place, output, *more, precision="fp32", environment=None, before=()):
    """The finetune script in a process of its own."""
    words = [
        f"model_finetune/finetune_{method}.py",
        *arguments(method, place, output, *more, precision=precision),
    ]
    folder = Path(f"{output}.said{(environment or {}).get('RANK', '')}")
    before = [(draw_nothing,), *before]
    return Script(words, ROOT, folder, environment=environment, before=before, ready=True)


RESERVED = []  # sockets: the system gives their ports to nobody who does not ask for the number, as torch does


def start_two(method, place, output, *more, before=()):
    """Two processes joined by gloo, each with half of a step's rows, as accelerate launch would start them."""
    RESERVED.append(free := socket.socket())
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    free.bind(("localhost", 0))
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2)]
    return [start(method, place, output, *more, environment=joined | rank, before=before) for rank in ranks]


def said(*scripts):
    """The text that the first one printed, once all have ended well."""
    for script in scripts:
        assert script.end() == 0, script.err
    return scripts[0].out


# Of each method and number format: where the run is killed, one after the other.
KILLS = {
    ("sft", "fp32"): ["first epoch", "checkpoint", "second epoch", "finished model"],
    ("sft", "bf16"): ["first epoch", "finished model"],
    ("sft", "fp16"): ["second epoch"],  # keeps its loss scale
    ("lora", "fp32"): ["second epoch"],
    ("lora", "bf16"): ["second epoch", "checkpoint"],
    ("dpo", "fp32"): ["second epoch"],
    ("dpo", "bf16"): ["first epoch", "finished model"],
}


def lines_of(log):
    return log.read_bytes().count(b"\n") if log.is_file() else 0


@pytest.mark.parametrize("kind", KILLS, ids="-".join)
def test_a_killed_run_ends_in_the_same_weights(runs, place, kind):
    """kill -9 after a random step of an epoch, while a checkpoint is written, and while the final model is."""
    method, precision = kind
    output, draw = place / f"{method}_{precision}_killed", random.Random(method + precision)
    whole, log = runs(method, precision), output / "training_log.jsonl"
    early, late = (
        draw.randrange(2, 9),
        draw.randrange(10, lines_of(whole / log.name) - 2),
    )  # checkpoint-6 comes after line 9
    logged, saved = ("utils.training.log", "RunLog.add"), ("utils.model.folder", "save_model")
    for moment in KILLS[kind]:
        models = 3 - len(list(output.glob("checkpoint-*")))  # that it is still to save, the finished one last
        stays, calls, reached = {
            "first epoch": (logged, early, lambda: lines_of(log) >= early),
            "checkpoint": (saved, 1, (output / ".partial-checkpoint").is_dir),
            "second epoch": (logged, late, lambda: lines_of(log) >= late),
            "finished model": (saved, models, (output / ".partial-model").is_dir),
        }[moment]
        script = start(method, place, output, precision=precision, before=[(delay, *stays, 600, calls)])
        script.wait_for(reached)
        script.kill()
        script.end()
    assert "going on from" in said(start(method, place, output, precision=precision))
    assert same_run(output, whole)
    assert not [path.name for path in output.iterdir() if "partial" in path.name]


def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on(runs, place):
    output = place / "interrupted"
    stays = (delay, "utils.training.log", "RunLog.add", 0.3, 3)
    script = start("sft", place, output, before=[stays])
    script.wait_for(lambda: lines_of(output / "training_log.jsonl") >= 3)
    script.kill(signal.SIGINT)
    assert script.end() == 130
    assert "checkpoint written; the same command goes on" in script.err and "Traceback" not in script.err
    said(start("sft", place, output))
    assert same_run(output, runs("sft"))


@pytest.fixture(scope="module")
def by_two(place):
    """{method: (folder finished by two processes, text that they printed)}; SFT through the real launcher, LoRA inside DPO."""
    folders = {method: place / f"{method}_two" for method in ("sft", "dpo")}
    printed = said(*start_two("dpo", place, folders["dpo"], "--lora"))
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0".split()
    script = [str(ROOT / "model_finetune/finetune_sft.py"), *arguments("sft", place, folders["sft"])]
    how = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 600}
    launched = subprocess.run(
        [sys.executable, *launch, *script], env=os.environ | {"OMP_NUM_THREADS": "1"}, **how
    )
    assert launched.returncode == 0, launched.stderr
    return {"sft": (folders["sft"], launched.stdout), "dpo": (folders["dpo"], printed)}


def test_two_processes_compute_what_one_does(runs, by_two, place):
    """Sums are taken in another order, so the losses agree to float32's accuracy, 1e-5 relative, not to the bit."""
    assert train("dpo", place, place / "dpo_one", "--lora") == 0
    for method, alone in (("sft", runs("sft")), ("dpo", place / "dpo_one")):
        folder, printed = by_two[method]
        assert "on 2 processes" in printed and printed.count("finished in") == 1  # one of them speaks
        found = []
        for run in (alone, folder):
            log = list(read_jsonl(run / "training_log.jsonl"))
            found.append([(entry["step"], entry.get("loss", entry.get("eval_loss"))) for entry in log])
        (steps, one), (also, two) = (zip(*numbers) for numbers in found)
        assert steps == also and two == pytest.approx(one, rel=1e-5)


def test_two_processes_go_on_after_a_kill(by_two, place):
    output = place / "killed_two"
    scripts = start_two(
        "sft", place, output, before=[(delay, "utils.training.run", "Run.save_checkpoint", 600)]
    )
    scripts[0].wait_for((output / "checkpoint-6").is_dir)
    for script in scripts:
        script.kill()
        script.end()
    assert "going on from" in said(*start_two("sft", place, output))
    assert same_run(output, by_two["sft"][0])


def test_two_processes_end_together_when_time_is_over(place):
    """The main process has the clock: with hardly any time they stop after the first steps that could be timed."""
    output = place / "hours_two"
    more = ["--epochs", 1000, "--hours", 0.001, "--evaluations", 2]
    assert "finished in" in said(*start_two("sft", place, output, *more))
    assert 0 < read_json(output / "run.json")["results"]["steps"] < 200


def test_two_processes_of_unequal_memory_train_each_example_once_an_epoch(place):
    """The smallest memory decides for both. Each by itself would give some rows to both processes, and others to none."""
    output = place / "unequal"
    more = ["--rows-per-step", 4, "--max-length", 128, "--epochs", 1]
    said(*start_two("sft", place, output, *more, before=[(unequal_memory, output)]))
    assert read_json(output / "run.json")["plan"] == [[0, 1, 2, False]]
    rows = [Path(f"{output}.rows{rank}").read_text(encoding="utf-8").split() for rank in range(2)]
    assert all(rows) and sorted(rows[0] + rows[1]) == sorted(str(number) for number in range(56))
