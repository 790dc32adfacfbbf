"""How an optimizer step is computed follows from the memory, and changes nothing but rounding."""

import re

import pytest
from small_runs import train, weights

from utils.device import Device
from utils.files import read_json, read_jsonl, write_json
from utils.training import loop
from utils.training import plan as planning
from utils.training.memory import StepPlan, ways
from utils.training.plan import choose

CUDA, CPU = Device("cuda", True, "test", equal_rows=True), Device("cpu", True, "test")
NEEDED = {
    StepPlan(4, 1, False): 40,
    StepPlan(2, 2, False): 20,
    StepPlan(1, 4, False): 10,
    StepPlan(1, 4, True): 5,
}


def test_ways_of_a_step():
    assert ways(4) == list(NEEDED)
    assert ways(3) == [StepPlan(3, 1, False), StepPlan(1, 3, False), StepPlan(1, 3, True)]


@pytest.mark.parametrize("free, chosen", [(99, 0), (39, 1), (19, 2), (9, 3), (4, None)])
def test_the_fewest_passes_that_fit_are_chosen(free, chosen):
    expected = None if chosen is None else list(NEEDED)[chosen]
    assert choose(list(NEEDED), NEEDED, free, 1024, CUDA) == expected


def test_a_cpu_takes_no_more_at_once_than_brings_speed():
    assert choose(list(NEEDED), NEEDED, 99, 1024, CPU) == StepPlan(1, 4, False)
    assert choose(list(NEEDED), NEEDED, 99, 512, CPU) == StepPlan(2, 2, False)
    assert choose(list(NEEDED), NEEDED, 7, 512, CPU) == StepPlan(1, 4, True)


@pytest.mark.slow
def test_every_way_gives_the_same_weights(place, tmp_path, monkeypatch, method, precision):
    """Within rounding: losses of three steps, and the weights after them. Where activations are recomputed, every pass gives the
    heap's memory back."""
    found, losses, given_back = [], [], []
    monkeypatch.setattr(loop, "release_memory", lambda: given_back.append(way))
    for number, way in enumerate(ways(4)):
        monkeypatch.setattr(planning, "choose", lambda *_, way=way: way)
        output = tmp_path / str(number)
        more = ["--max-steps", 3, "--rows-per-step", 4]
        assert train(method, place, output, *more, precision=precision) == 0
        assert read_json(output / "run.json")["plan"] == [[0, *way]]
        found.append(weights(output))
        losses.append(
            [entry["loss"] for entry in read_jsonl(output / "training_log.jsonl") if "loss" in entry]
        )
    assert given_back == [way for way in ways(4) if way.recompute for _ in range(3 * way.passes)]
    for other, again in zip(found[1:], losses[1:]):
        assert again == pytest.approx(losses[0], rel=1e-2 if precision == "bf16" else 1e-4)
        for name, one in found[0].items():
            assert (one - other[name]).norm() <= (5e-2 if precision == "bf16" else 1e-3) * one.norm(), name


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_plan(place, tmp_path, monkeypatch, capsys):
    """Although there is less memory now: other batches would end in other bits."""
    monkeypatch.setattr(planning, "choose", lambda *_: StepPlan(2, 1, False))
    assert train("sft", place, tmp_path / "out") == 0
    record = read_json(tmp_path / "out/run.json")
    write_json(tmp_path / "out/run.json", record | {"status": "running"})
    monkeypatch.setattr(planning, "choose", lambda *_: StepPlan(1, 2, True))
    capsys.readouterr()
    assert train("sft", place, tmp_path / "out") == 0
    assert "; 2 rows at once, 1 pass a step\n" in capsys.readouterr().out
    assert read_json(tmp_path / "out/run.json")["plan"] == [[0, 2, 1, False]]


def test_what_cannot_fit_is_refused_before_it_starts(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 511 * 2**20)
    assert train("sft", place, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "even with one row at once and activations recomputed" in said and "511.0 MiB are free" in said
    assert not (tmp_path / "out/run.json").exists()


def test_a_disk_too_small_is_refused(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 1000}))
    assert train("sft", place, tmp_path / "out") == 2
    assert "of disk and 1000 B are free" in capsys.readouterr().err


def test_the_estimate_lists_every_way(place, tmp_path, capsys):
    assert train("sft", place, tmp_path / "out", "--estimate", "--rows-per-step", 4) == 0
    said = capsys.readouterr().out
    assert all(str(way) in said for way in ways(4)) and said.count("chosen") == 1


def test_the_estimate_tells_the_time_and_leaves_no_gradient(place, tmp_path, capsys, method):
    assert train(method, place, tmp_path / "out", "--estimate") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    part = r"[\w, /]+ [\d.]+ (s|min|h)"
    assert re.fullmatch(
        rf"time: about [\d.]+ (s|min|h), done at \d\d:\d\d( on \S+)? \(({part}, )+{part}; judged by a forward pass, the first steps will tell better\)",
        said,
    )
    assert ("reference" in said) == (method == "dpo")
