"""How an optimizer step is computed follows from the memory, and changes nothing but rounding; the course of a run."""

import re

import pytest
from small_runs import train, weights

from utils.files import read_json, read_jsonl, write_json
from utils.training import log, loop
from utils.training import plan as planning
from utils.training.memory import StepPlan, ways
from utils.training.plan import Schedule, choose, plan_evaluations

NEEDED = dict(zip(ways(4), (40, 20, 10, 5)))


def test_ways_of_a_step():
    assert ways(4) == [
        StepPlan(4, 1, False),
        StepPlan(2, 2, False),
        StepPlan(1, 4, False),
        StepPlan(1, 4, True),
    ]
    assert ways(3) == [StepPlan(3, 1, False), StepPlan(1, 3, False), StepPlan(1, 3, True)]


@pytest.mark.parametrize(
    "free, enough, chosen",
    [(99, 32, 0), (39, 32, 1), (19, 32, 2), (9, 32, 3), (4, 32, None), (99, 1, 2), (99, 2, 1), (7, 2, 3)],
)
def test_the_fewest_passes_that_fit_and_bring_speed_are_chosen(free, enough, chosen):
    assert choose(NEEDED, free, enough) == (None if chosen is None else list(NEEDED)[chosen])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, number_format", [("sft", "bf16"), ("sft", "fp32"), ("lora", "bf16"), ("dpo", "fp32")]
)
def test_every_way_gives_the_same_weights(place, tmp_path, monkeypatch, kind, number_format):
    """Within rounding: losses of three steps, and the weights after them. Where activations are recomputed, every pass gives the
    heap's memory back."""
    found, losses, given_back, rough = [], [], [], number_format == "bf16"
    monkeypatch.setattr(loop, "release_memory", lambda: given_back.append(way))
    for number, way in enumerate(ways(2)):
        monkeypatch.setattr(planning, "choose", lambda *_, way=way: way)
        output = tmp_path / str(number)
        more = ["--max-steps", 3, "--evaluations", 1]
        assert train(kind, place, output, *more, precision=number_format) == 0
        assert read_json(output / "run.json")["plan"] == [[0, *way]]
        found.append(weights(output))
        losses.append(
            [entry["loss"] for entry in read_jsonl(output / "training_log.jsonl") if "loss" in entry]
        )
    assert given_back == [way for way in ways(2) if way.recompute for _ in range(3 * way.passes)]
    for other, again in zip(found[1:], losses[1:]):
        assert again == pytest.approx(losses[0], rel=1e-2 if rough else 1e-4)
        for name, one in found[0].items():
            assert (one - other[name]).norm() <= (5e-2 if rough else 1e-3) * one.norm(), name


def test_a_run_that_goes_on_keeps_its_plan(place, tmp_path, monkeypatch, capsys):
    """Although there is less memory now: other batches would end in other bits."""
    monkeypatch.setattr(planning, "choose", lambda *_: StepPlan(2, 1, False))
    assert train("sft", place, tmp_path / "out", "--max-steps", 2) == 0
    record = read_json(tmp_path / "out/run.json")
    write_json(tmp_path / "out/run.json", record | {"status": "running"})
    monkeypatch.setattr(planning, "choose", lambda *_: StepPlan(1, 2, True))
    capsys.readouterr()
    assert train("sft", place, tmp_path / "out", "--max-steps", 2) == 0
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


def test_the_estimate_lists_every_way_tells_the_time_and_touches_nothing(place, tmp_path, capsys, method):
    assert train(method, place, tmp_path / "out", "--estimate", "--rows-per-step", 4) == 0
    said = capsys.readouterr().out
    assert all(str(way) in said for way in ways(4)) and said.count("chosen") == 1
    assert "memory: " in said and "disk: " in said and not (tmp_path / "out").exists()
    part = r"[\w, /]+ [\d.]+ (s|min|h)"
    judged = "judged by a forward pass( while other programs use .* cores)?, the first steps will tell better"
    last = said.splitlines()[-1]
    assert re.fullmatch(
        rf"time: about [\d.]+ (s|min|h), done at \d\d:\d\d( on \S+)? \(({part}, )+{part}; {judged}\)", last
    )
    assert ("reference" in last) == (method == "dpo")


@pytest.mark.parametrize(
    "settings, advice",
    [
        ([], "set ROWS_PER_STEP to 1 and EPOCHS to 3; more rows are better"),
        (["--epochs", 3, "--rows-per-step", 4], "set ROWS_PER_STEP to 1"),
        (["--epochs", 6], ""),
    ],
)
def test_few_steps_are_warned_of_with_what_gives_more(place, tmp_path, capsys, settings, advice):
    assert train("sft", place, tmp_path / "out", *settings, "--estimate") == 0
    said = capsys.readouterr().out
    assert advice in said and ("warning: too few optimizer steps" in said) == bool(advice)


def test_half_an_epoch_without_an_evaluation_file(place, tmp_path, capsys, monkeypatch):
    """Nothing says that its evaluations were on held-out rows."""
    drawn = []
    monkeypatch.setattr(log, "plot_training", lambda *given: drawn.append(given[-1]))
    assert train("sft", place, tmp_path / "out", "--epochs", 0.5, "--eval-file", "") == 0
    results = read_json(tmp_path / "out/run.json")["results"]
    assert (
        results["steps"] == 3 and results["measured_on"] == "sft_train.jsonl" and drawn == ["training rows"]
    )
    assert "no evaluation file: the loss is measured on rows that are trained" in capsys.readouterr().out


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_no_step_is_wasted_at_a_rate_of_zero(warmup):
    course = Schedule(100, warmup, 10)
    found = [course.rate(step, step / 100) for step in range(100)]
    assert 0 < found[0] <= 1 and 0 < found[-1] < 0.001
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert Schedule(1, 1, 1).rate(0, 0.0) == 0.5  # a run of one step learns


@pytest.mark.parametrize("total, evaluations", [(100, 10), (7, 3), (160, 10), (6, 10), (1000, 7)])
def test_evaluations_come_evenly_and_at_the_end(total, evaluations):
    course = Schedule(total, 3, evaluations)
    due = [course.evaluations_due(step / total) for step in range(total + 1)]
    steps = [step for step in range(1, total + 1) if due[step] > due[step - 1]]
    assert steps[-1] == total and len(steps) == min(total, evaluations)
    gaps = [after - before for before, after in zip([0, *steps], steps)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("tokens", [1e5, 4e5, 1e6, 5e6, 1e8, 1e10])
def test_evaluations_take_five_percent_of_the_run_at_most(tokens):
    """An evaluation's token takes half the time of one in training."""
    rows, times = plan_evaluations(0, 10, tokens, 100)
    assert 8 <= rows <= 500 and 1 <= times <= 10 and 0.5 * rows * 100 * (times + 1) / tokens <= 0.051
    assert rows >= 50 or times == 1  # fewer evaluations before ones that say nothing
    assert plan_evaluations(2000, 10, tokens, 100) == (2000, 10)  # as the user asks
