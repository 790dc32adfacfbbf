"""Pictures: what is drawn and what is marked."""

import pytest

from utils import plots
from utils.plots import Panel, plot_comparison, plot_training, smooth


def log_of(steps, evaluations, preference=False):
    """A log of a run: losses that fall, and evaluations at these steps."""
    names = ["reward_margin", "reward_accuracy", "chosen_logps", "rejected_logps"] if preference else []
    more = dict.fromkeys(names, 0.5)
    entries = []
    for step in range(steps + 1):
        if step:
            entries.append({"step": step, "loss": 3.0 / step, "learning_rate": 1e-5, **more})
        if step in evaluations:
            entries.append({"step": step, "eval_loss": 4.0 / (step + 1)} | {f"eval_{n}": 0.5 for n in names})
    return entries


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, before they are let go."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


def test_evaluations_are_points_with_their_values_and_the_best_is_ringed(tmp_path, figures):
    plot_training(log_of(20, {0, 10, 20}), tmp_path / "loss_curve.png", "SFT of $a$ on 药.jsonl", 20)
    loss = figures[0].axes[0]
    lines = {line.get_label(): line for line in loss.get_lines()}
    held_out = lines["held-out rows"]
    assert held_out.get_linestyle() == "None" and list(held_out.get_xdata()) == [0, 10, 20]
    assert list(lines["best: step 20"].get_xdata()) == [20]
    assert {text.get_text() for text in loss.texts} == {"4.000", "0.364", "0.190"}
    assert figures[0].get_suptitle() == r"SFT of \$a\$ on ?.jsonl"
    assert not loss.get_legend() and figures[0].legends  # beside the curves, not over them


def test_of_many_evaluations_the_first_the_best_and_the_last_are_written_out(tmp_path, figures):
    plot_training(log_of(40, set(range(41))), tmp_path / "loss_curve.png", "SFT", 20)
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["4.000", "0.190", "0.098"]


@pytest.mark.parametrize("preference, panels", [(False, 2), (True, 5)])
@pytest.mark.parametrize("steps, evaluations", [(1, {0}), (1, {0, 1}), (30, set(range(0, 31, 3)))])
@pytest.mark.filterwarnings("error")
def test_runs_of_any_length_can_be_drawn(tmp_path, figures, preference, panels, steps, evaluations):
    plot_training(
        log_of(steps, evaluations, preference), tmp_path / "loss_curve.png", "run", max(evaluations)
    )
    assert len(figures[0].axes) == panels


def test_a_curve_is_a_png_and_its_smoothed_line_a_centred_mean(tmp_path):
    plot_training(log_of(3, {0, 3}), tmp_path / "loss_curve.png", "SFT", 3)
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(smooth(plots.numpy.array([0.0, 3.0, 6.0, 0.0]))) == [1.5, 3.0, 3.0, 3.0]


def test_bars_have_names_and_values_beside_them_and_shares_go_to_100_percent(tmp_path, figures):
    names = ["base", "中医", "lora_rank_8_of_all_layers_at_1e-4", "lora_rank_8_of_all_layers_at_2e-4"]
    ends = [[-1e-17, 0.01], [0.9, 0.99], [0.99, 1 - 1e-16], None]  # of 0 and of 1 with a rounding error
    panels = [Panel("exam", [0.0, 0.97, 1.0, 0.5], ends, True, 0.25), Panel("loss", [2.0] * 4, ends, False)]
    plot_comparison(panels, names, tmp_path)
    shares, losses = figures[0].axes[:2]
    assert shares.get_xlim() == (0, 1) and losses.get_xlim()[1] > 2
    assert [label.get_text() for label in shares.get_yticklabels()] == [
        "base  0.0%", "model 2  97.0%", "lora_rank_...rs_at_1e-4  100.0%", "lora_rank_...rs_at_2e-4  50.0%"
    ]  # fmt: skip
    assert losses.get_yticklabels()[0].get_text() == "base  2.000"


def test_rewards_are_drawn_from_the_first_update_on(tmp_path, figures):
    plot_training(log_of(5, {0, 5}, preference=True), tmp_path / "loss_curve.png", "run", 5)
    panels = {axis.get_title(loc="left"): axis for axis in figures[0].axes}
    first = {
        title: min(min(line.get_xdata()) for line in axis.lines) for title, axis in panels.items() if title
    }
    assert first["reward margin"] == 2 and first["loss"] == 0
