"""Metrics and differences follow from the results of the items; intervals have known values and hold the truth."""

import random

import pytest

from utils.evaluation.metrics import Results, differences, mean_per_token, metrics, share_difference, wilson


def test_metrics_and_differences_follow_from_the_items():
    def made(right, loss):
        exam = {"test": "exam", "answer": "A", "letter_choice": "B", "options": {"A": "温", "B": "寒"}}
        items = [exam | {"text_choice": "A" if n < right else "B"} for n in range(20)]
        items += [{"test": "heldout", "loss": loss * (n + 1), "tokens": n + 1} for n in range(4)]
        judged = [("A", "B"), ("A", "A"), ("B", "B")]  # by text, by letter
        items += [exam | {"kind": "true_false", "text_choice": a, "letter_choice": b} for a, b in judged]
        answer = {"test": "answer", "about": "heldout", "alone": None, "tokens": 10, "ended": True}
        items += [answer | {"right": right, "repetition": 0.5} for right in (True, False, None)]
        return Results("x", items)

    one, other = made(8, 2.0), made(18, 1.5)
    found = metrics(one)
    assert (found["exam_accuracy"], found["exam_letter_accuracy"], found["exam_chance"]) == (0.4, 0.0, 0.5)
    assert found["exam_true_false_accuracy"] == pytest.approx(2 / 3)
    assert found["exam_true_false_letter_accuracy"] == pytest.approx(1 / 3)
    assert (found["heldout_loss"], found["heldout_loss_n"]) == (2.0, 4)
    assert (found["facts_accuracy"], found["facts_n"]) == (0.5, 2)
    assert (found["ended_share"], found["repetition"], found["mean_tokens"]) == (1.0, 0.5, 10)
    change = differences(one, other)
    assert change["exam"]["difference"] == pytest.approx(0.5)
    assert change["exam"]["p"] == pytest.approx(2 / 2**10) and "repetition" not in change
    assert change["heldout_loss"]["difference"] == pytest.approx(-0.5)
    other.items[20]["tokens"] += 1  # another tokenizer: a loss a token is of something else
    assert "heldout_loss" not in differences(one, other)


# ---- How sure a figure is


def test_intervals_of_shares_have_known_values():
    # statsmodels proportion_confint(method="wilson")
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)
    ends = {f"{wilson(0, n)[0]:.1%} {wilson(n, n)[1]:.1%}" for n in range(1, 99)}
    assert ends == {"0.0% 100.0%"}  # no -0.0%


def test_p_counts_the_items_that_only_one_has_right():
    def p(one, other):
        return share_difference(one, other)["p"]

    one, other = [True] * 1 + [False] * 9 + [True] * 50, [False] * 1 + [True] * 9 + [True] * 50
    # scipy.stats.binomtest(1, 10)
    assert p(one, other) == p(other, one) == pytest.approx(2 * (1 + 10) / 2**10)
    assert p(one, one) == 1 and p([True, False], [False, True]) == 1
    assert p([False] * 3000, [True] * 3000) == pytest.approx(0)


def test_intervals_hold_the_truth_about_95_times_in_100():
    rng, held = random.Random(0), {"share": 0, "loss": 0}
    for _ in range(1000):
        one = [rng.random() < 0.7 for _ in range(80)]
        # 0.6 x 0.7 + 0.4 x 0.8 = 0.74
        other = [right if rng.random() < 0.6 else rng.random() < 0.8 for right in one]
        change, (low, high), _ = share_difference(one, other).values()
        assert low <= change <= high
        held["share"] += low <= 0.04 <= high
        tokens = [rng.randint(1, 30) for _ in range(80)]
        # One answer is easy from end to end, another hard.
        mean, (low, high) = mean_per_token([rng.gauss(2, 0.5) * count for count in tokens], tokens)
        held["loss"] += low <= 2 <= high
    assert all(930 <= count <= 970 for count in held.values()), held


def test_losses_count_every_token_once():
    assert mean_per_token([1.0, 9.0], [1, 3])[0] == 2.5
    assert mean_per_token([2.0], [4]) == (0.5, None)
