"""Metrics and differences follow from the results of the items; shares of none and all can be drawn."""

import pytest

from utils.evaluation.compare import Results, differences, metrics
from utils.evaluation.statistics import wilson
from utils.plots import plot_comparison


def test_metrics_and_differences_follow_from_the_items():
    def made(right, loss):
        exam = [
            {
                "test": "exam",
                "id": str(n),
                "answer": "A",
                "text_choice": "A" if n < right else "B",
                "letter_choice": "B",
                "text": {"A": 0, "B": 0},
            }
            for n in range(20)
        ]
        heldout = [
            {"test": "heldout", "id": str(n), "loss": loss * (n + 1), "tokens": n + 1} for n in range(4)
        ]
        answers = [
            {
                "test": "answer",
                "about": "heldout",
                "right": right,
                "tokens": 10,
                "ended": True,
                "repetition": 0.5,
            }
            for right in (True, False, None)
        ]
        return Results("x", 1.0, 2.0, [*exam, *heldout, *answers])

    one, other = made(8, 2.0), made(18, 1.5)
    found = metrics(one)
    assert (found["exam_accuracy"], found["exam_letter_accuracy"], found["exam_chance"]) == (0.4, 0.0, 0.5)
    assert (found["heldout_loss"], found["facts_accuracy"], found["facts_n"], found["tokens_per_second"]) == (
        2.0,
        0.5,
        2,
        15.0,
    )
    change = differences(one, other)
    assert change["exam"]["difference"] == pytest.approx(0.5) and change["exam"]["p"] == pytest.approx(
        2 / 2**10
    )
    assert change["heldout_loss"]["difference"] == pytest.approx(-0.5)
    other.items[-4]["tokens"] += 1  # another tokenizer: a loss a token is of something else
    assert "heldout_loss" not in differences(one, other)


@pytest.mark.parametrize("right", [0, 401])
def test_shares_of_none_and_all_can_be_drawn(tmp_path, right):
    models = {
        name: {
            "heldout_loss": 1.0,
            "heldout_loss_interval": None,
            "preference_accuracy": right / 401,
            "preference_interval": wilson(right, 401),
        }
        for name in ("base", "中医")
    }
    plot_comparison(models, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
