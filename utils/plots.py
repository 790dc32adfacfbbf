"""Pictures: loss curves of a training run, and the comparison of models. Labels are English: no font has to hold Chinese."""

import logging
from pathlib import Path
from types import ModuleType

from utils.files import atomic_write


def draw_lengths(path: Path, characters: list[int], tokens: list[int], max_length: int) -> None:
    """A histogram of the conversations' lengths: in tokens where they were counted, else in characters."""
    pyplot = load_pyplot()
    unit = "tokens" if tokens else "characters"
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.hist(tokens or characters, bins=60)
    axes.set_xlabel(f"length of a conversation, {unit}")
    axes.set_ylabel(f"conversations, of {len(tokens or characters):,}")
    if tokens:
        axes.axvline(max_length, color="tab:red", label=f"MAX_LENGTH {max_length:,}")
        axes.legend()
    figure.tight_layout()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


SMOOTHING = 0.05  # the smoothed curve averages over about this share of the run


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, which draws to files and needs no screen."""
    logging.getLogger("matplotlib").addFilter(_not_about_its_cache)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _not_about_its_cache(record):
    """Where the home folder cannot be written to, the cache goes to a temporary one: seconds lost, nothing for the user to do."""
    return not str(record.msg).startswith(("mkdir -p failed", "Matplotlib created a temporary cache"))


def plot_training(log: list[dict], path: Path, title: str) -> None:
    """Draw a run from its log (list of dicts as in training_log.jsonl) to a PNG at `path`.

    SFT and LoRA: training loss (raw and smoothed), evaluation loss, learning rate. DPO runs get two more panels: reward margin
    and accuracy, and the log-probabilities of the chosen and the rejected answers.
    """
    pyplot = load_pyplot()
    steps = [entry for entry in log if "loss" in entry]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    preference = any("reward_margin" in entry for entry in steps)
    figure, axes = pyplot.subplots(
        1, 3 if preference else 1, figsize=(15 if preference else 8, 5), squeeze=False
    )
    _draw(axes[0][0], steps, evaluations, "loss", "loss", "C0")
    rate = axes[0][0].twinx()
    rate.plot(
        [e["step"] for e in steps],
        [e["learning_rate"] for e in steps],
        color="grey",
        linewidth=0.8,
        linestyle=":",
    )
    rate.set_ylabel("learning rate (dotted)", color="grey")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if preference:
        _draw(axes[0][1], steps, evaluations, "reward_margin", "reward margin", "C0")
        accuracy = axes[0][1].twinx()
        accuracy.plot(
            [e["step"] for e in evaluations],
            [e["eval_reward_accuracy"] for e in evaluations],
            "s--",
            color="C2",
        )
        accuracy.set_ylim(0, 1.05)
        accuracy.set_ylabel("evaluation: share of pairs with margin > 0 (squares)", color="C2")
        _draw(
            axes[0][2], steps, evaluations, "chosen_logps", "log-probability of the answer", "C0", "chosen, "
        )
        _draw(
            axes[0][2],
            steps,
            evaluations,
            "rejected_logps",
            "log-probability of the answer",
            "C3",
            "rejected, ",
        )
    for axis in axes[0]:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _draw(axis, steps, evaluations, name, label, colour, prefix=""):
    """Training values, raw and smoothed, and evaluation points of one quantity."""
    x, y = [entry["step"] for entry in steps], [entry[name] for entry in steps]
    reach = max(1, round(SMOOTHING * len(y) / 2))
    # centred, so that the curve does not lag behind
    windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
    smooth = [sum(window) / len(window) for window in windows]
    axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8, label=f"{prefix}training, each step")
    axis.plot(x, smooth, color=colour, linewidth=1.8, label=f"{prefix}training, smoothed")
    axis.plot(
        [e["step"] for e in evaluations],
        [e[f"eval_{name}"] for e in evaluations],
        "o--",
        color="black" if not prefix else colour,
        markersize=5,
        label=f"{prefix}evaluation",
    )
    axis.set_ylabel(label)


def plot_comparison(models: dict[str, dict], path: Path) -> None:
    """Draw the comparison (dict name -> figures, as in comparison.json) to a PNG: a panel a measure, a bar a model."""
    pyplot = load_pyplot()
    panels = [
        ("heldout_loss", "held-out loss, nats a token (lower is better)"),
        ("exam_accuracy", "exam by option text"),
        ("exam_letter_accuracy", "exam by option letter"),
        ("preference_accuracy", "preference pairs"),
        ("facts_accuracy", "facts stated right"),
        ("general_loss", "loss on general questions (lower is better)"),
    ]
    panels = [panel for panel in panels if any(panel[0] in figures for figures in models.values())]
    rows = (len(panels) + 2) // 3
    figure, axes = pyplot.subplots(rows, min(len(panels), 3), figsize=(15, 4.3 * rows), squeeze=False)
    names = [name if name.isascii() else f"model {number}" for number, name in enumerate(models, 1)]
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, title) in zip(axes.flat, panels):
        share = key.endswith("accuracy")
        values = [figures.get(key, 0.0) for figures in models.values()]
        intervals = [
            figures.get(f"{key.removesuffix('_accuracy')}_interval") or [value, value]
            for figures, value in zip(models.values(), values)
        ]
        # at 0 % and 100 % the interval begins at the share itself, give or take a rounding error
        below_above = [
            [max(0.0, value - low) for value, (low, _) in zip(values, intervals)],
            [max(0.0, high - value) for value, (_, high) in zip(values, intervals)],
        ]
        axis.bar(names, values, color=[f"C{index}" for index in range(len(names))], alpha=0.8)
        axis.errorbar(names, values, yerr=below_above, fmt="none", ecolor="black", capsize=4)
        for name, value, (_, high) in zip(names, values, intervals):
            axis.annotate(
                f"{value:.1%}" if share else f"{value:.3f}",
                (name, max(high, value)),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        if share:
            axis.set_ylim(0, 1.25)
            axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
            exam = next(iter(models.values())).get("exam_chance")
            chance = {"exam_accuracy": exam, "exam_letter_accuracy": exam, "preference_accuracy": 0.5}.get(
                key
            )
            if chance:
                axis.axhline(chance, color="grey", linestyle=":", label=f"chance {chance:.0%}")
                axis.legend(loc="upper left", fontsize=8)
        else:
            axis.margins(y=0.15)
        count = max(figures.get(f"{key.removesuffix('_accuracy')}_n", 0) for figures in models.values())
        axis.set_title(f"{title}, n = {count:,}", fontsize=10)
    figure.suptitle("Black: 95 % interval")
    figure.tight_layout()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
