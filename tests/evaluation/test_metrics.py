"""Metrics and differences follow from the results of the items; shares of none and all can be drawn."""

import pytest

from utils.evaluation.compare import Results, differences, metrics
from utils.evaluation.statistics import wilson
from utils.plots import plot_comparison

LOSS = {"test": "heldout", "id": "0", "loss": 1.0, "tokens": 2}


def test_metrics_and_differences_follow_from_the_items():
    def made(right, loss):
        exam = [
            {
                "test": "exam",
                "id": str(n),
                "answer": "A",
                "text_choice": "A" if n < right else "B",
                "letter_choice": "B",
                "options": {"A": "温", "B": "寒"},
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
                "named": right,
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
    assert (found["names_accuracy"], found["names_n"]) == (0.5, 2)
    change = differences(one, other)
    assert change["exam"]["difference"] == pytest.approx(0.5) and change["exam"]["p"] == pytest.approx(
        2 / 2**10
    )
    assert change["heldout_loss"]["difference"] == pytest.approx(-0.5)
    other.items[-4]["tokens"] += 1  # another tokenizer: a loss a token is of something else
    assert "heldout_loss" not in differences(one, other)


def test_kinds_of_question_are_told_apart():
    def item(kind, answer, **choices):
        options = dict(zip("ABCDE" if kind == "multiple" else "AB", "温凉平寒热"))
        return {"test": "exam", "kind": kind, "answer": answer, "options": options, **choices}

    several = [("ABD", "ABD"), ("AB", "ABD"), ("ABDE", "ABD"), ("", "ABD"), ("C", "C")]
    items = [item("multiple", answer, letter_choice=named, said="") for named, answer in several]
    judged = [("A", "B"), ("A", "A"), ("B", "B")]  # by text, by letter
    items += [item("true_false", "A", text_choice=text, letter_choice=letter) for text, letter in judged]
    found = metrics(Results("x", 1.0, 0.0, [*items, LOSS]))
    assert (found["exam_multiple_accuracy"], found["exam_multiple_n"]) == (0.4, 5)
    assert (found["exam_multiple_chance"], found["exam_multiple_named"]) == (pytest.approx(1 / 31), 0.8)
    assert found["exam_true_false_accuracy"] == pytest.approx(2 / 3)
    assert found["exam_true_false_letter_accuracy"] == pytest.approx(1 / 3)
    assert found["exam_true_false_chance"] == 0.5 and "exam_accuracy" not in found


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
