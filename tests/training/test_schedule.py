"""The course of a run as a function of its progress: rates above 0, evaluations evenly, changes without a jump."""

import pytest

from utils.training.schedule import Change, Schedule, evaluation_count, evaluation_rows


def schedule(total=100, warmup=3, evaluations=10, start=0):
    return Schedule(start, warmup, evaluations, [Change(start, total, "as asked for")])


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_no_step_is_wasted_at_a_rate_of_zero(warmup):
    rates = [schedule(warmup=warmup).rate(step) for step in range(100)]
    assert 0 < rates[0] <= 1 and 0 < rates[-1] < 0.001
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_a_run_of_one_step_learns():
    assert schedule(total=1, warmup=1).rate(0) == 0.5


@pytest.mark.parametrize("total, evaluations", [(100, 10), (7, 3), (160, 10), (6, 10), (1000, 7)])
def test_evaluations_come_evenly_and_at_the_end(total, evaluations):
    course = schedule(total=total, evaluations=evaluations)
    steps = [step for step in range(total + 1) if course.evaluates(step)]
    assert steps[0] == 0 and steps[-1] == total and len(steps) == min(total, evaluations) + 1
    gaps = [after - before for before, after in zip(steps, steps[1:])]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("total", [60, 90, 200, 51])
def test_a_change_goes_down_the_rest_of_the_same_curve(total):
    course = schedule()
    before = course.rate(50)
    course.change(50, total, "slower than planned")
    assert course.rate(50) == before and course.total == total
    rates = [course.rate(step) for step in range(50, total)]
    assert rates == sorted(rates, reverse=True) and course.progress(total) == 1
    assert sum(course.evaluates(step) for step in range(51, total + 1)) == min(5, total - 50)
    assert all(course.progress(step) == schedule().progress(step) for step in range(50))


def test_changes_follow_one_another():
    course = schedule()
    course.change(20, 200, "faster than planned")
    course.change(60, 100, "slower than planned")
    progress = [course.progress(step) for step in range(101)]
    assert progress == sorted(progress) and progress[-1] == 1 and progress[99] < 1
    assert max(after - before for before, after in zip(progress, progress[1:])) < 0.02


def test_a_change_to_now_ends_the_run():
    course = schedule()
    course.change(40, 40, "out of time")
    assert course.progress(40) == 1 and course.evaluates(40)


def test_a_prolonged_run_has_a_schedule_of_its_own():
    course = schedule(start=50, total=90)
    assert course.evaluates(50) and course.progress(50) == 0 and course.rate(50) == 0.25
    assert [step for step in range(50, 91) if course.evaluates(step)] == list(range(50, 91, 4))


def share(rows, evaluations, tokens, per_row=100):
    """Of the time of training, an evaluation's token at half the cost of one in training."""
    return 0.5 * rows * per_row * (evaluations + 1) / tokens


@pytest.mark.parametrize("tokens", [1e5, 4e5, 1e6, 5e6, 1e8, 1e10])
def test_evaluations_take_five_percent_of_the_run_at_most(tokens):
    rows = evaluation_rows(0, tokens, 100, 10)
    times = evaluation_count(0, tokens, rows * 100, 10)
    assert 8 <= rows <= 500 and 1 <= times <= 10 and share(rows, times, tokens) <= 0.051
    assert rows >= 50 or times == 1  # fewer evaluations before ones that say nothing


def test_what_the_user_asks_for_is_taken():
    assert evaluation_rows(2000, 1e5, 100, 10) == 2000 and evaluation_count(2000, 1e5, 200_000, 10) == 10
