"""The course of a run as a function of its progress: rates above 0, evaluations evenly and at the end."""

import pytest

from utils.training.plan import Schedule, plan_evaluations


def rates(total, warmup):
    course = Schedule(total, warmup, 10)
    return [course.rate(step, step / total) for step in range(total)]


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_no_step_is_wasted_at_a_rate_of_zero(warmup):
    found = rates(100, warmup)
    assert 0 < found[0] <= 1 and 0 < found[-1] < 0.001
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_a_run_of_one_step_learns():
    assert rates(1, 1) == [0.5]


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
