"""Intervals and tests of significance: known values, and how often they hold the truth."""

import random

import pytest

from utils.evaluation.statistics import mcnemar, mean_per_token, share_difference, wilson


def test_intervals_of_shares_have_known_values():
    # statsmodels proportion_confint(method="wilson")
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)
    ends = {f"{wilson(0, n)[0]:.1%} {wilson(n, n)[1]:.1%}" for n in range(1, 99)}
    assert ends == {"0.0% 100.0%"}  # no -0.0%


def test_mcnemar_counts_the_items_that_only_one_has_right():
    one, other = [True] * 1 + [False] * 9 + [True] * 50, [False] * 1 + [True] * 9 + [True] * 50
    # scipy.stats.binomtest(1, 10)
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(one, one) == 1 and mcnemar([True, False], [False, True]) == 1
    assert mcnemar([False] * 3000, [True] * 3000) == pytest.approx(0)


def test_intervals_hold_the_truth_about_95_times_in_100():
    rng = random.Random(0)
    held = {"share": 0, "loss": 0}
    for _ in range(1000):
        one = [rng.random() < 0.7 for _ in range(80)]
        # 0.6 x 0.7 + 0.4 x 0.8 = 0.74
        other = [right if rng.random() < 0.6 else rng.random() < 0.8 for right in one]
        change, (low, high) = share_difference(one, other)
        assert low <= change <= high
        held["share"] += low <= 0.04 <= high
        tokens = [rng.randint(1, 30) for _ in range(80)]
        # One answer is easy from end to end, another hard.
        sums = [rng.gauss(2, 0.5) * count for count in tokens]
        mean, (low, high) = mean_per_token(sums, tokens)
        held["loss"] += low <= 2 <= high
    assert all(930 <= count <= 970 for count in held.values()), held


def test_losses_count_every_token_once():
    assert mean_per_token([1.0, 9.0], [1, 3])[0] == 2.5
    assert mean_per_token([2.0], [4]) == (0.5, None)
