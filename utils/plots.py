"""Pictures: loss curves of a training run, and the comparison of models. Labels are English: no font has to hold Chinese."""

import logging
from pathlib import Path
from types import ModuleType

from utils.files import atomic_write

SMOOTHING = 0.05  # the smoothed curve averages over about this share of the run

PANELS = {  # of the comparison: the figure shown, and its title
    "heldout_loss": "held-out loss, nats a token (lower is better)",
    "exam_accuracy": "exam by option text",
    "exam_letter_accuracy": "exam by option letter",
    "exam_true_false_accuracy": "true or false, by text",
    "exam_true_false_letter_accuracy": "true or false, by letter",
    "exam_multiple_accuracy": "exam, several answers",
    "preference_accuracy": "preference pairs",
    "facts_accuracy": "facts stated right",
    "general_loss": "loss on general questions (lower is better)",
}

CHANCE = {"preference": 0.5}  # that of the exams follows from their options and is among the figures


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, which draws to files and needs no screen."""
    logging.getLogger("matplotlib").addFilter(_not_about_its_cache)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _not_about_its_cache(record):
    """Where the home folder cannot be written to, the cache goes to a temporary one: nothing for the user to do."""
    return not str(record.msg).startswith(("mkdir -p failed", "Matplotlib created a temporary cache"))


def draw_lengths(path: Path, characters: list[int], tokens: list[int], max_length: int) -> None:
    """A histogram of the conversations' lengths: in tokens where they were counted, else in characters."""
    pyplot = load_pyplot()
    lengths, unit = (tokens, "tokens") if tokens else (characters, "characters")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.hist(lengths, bins=60)
    axes.set_xlabel(f"length of a conversation, {unit}")
    axes.set_ylabel(f"conversations, of {len(lengths):,}")
    if tokens:
        axes.axvline(max_length, color="tab:red", label=f"MAX_LENGTH {max_length:,}")
        axes.legend()
    _save(pyplot, figure, path)


def plot_training(log: list[dict], path: Path, title: str) -> None:
    """Draw a run from its log (list of dicts as in training_log.jsonl) to a PNG at `path`.

    SFT and LoRA: training loss (raw and smoothed), evaluation loss, learning rate. DPO runs get two more panels: reward margin
    and accuracy, and the log-probabilities of the chosen and the rejected answers.
    """
    pyplot = load_pyplot()
    steps = [entry for entry in log if "loss" in entry]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    preference = any("reward_margin" in entry for entry in steps)
    count, width = (3, 15) if preference else (1, 8)
    figure, [panels] = pyplot.subplots(1, count, figsize=(width, 5), squeeze=False)
    _draw_curve(panels[0], steps, evaluations, "loss", "loss", "C0")
    _draw_rate(panels[0].twinx(), steps)
    if preference:
        _draw_curve(panels[1], steps, evaluations, "reward_margin", "reward margin", "C0")
        _draw_reward_accuracy(panels[1].twinx(), evaluations)
        for side, colour in (("chosen", "C0"), ("rejected", "C3")):
            label = "log-probability of the answer"
            _draw_curve(panels[2], steps, evaluations, f"{side}_logps", label, colour, f"{side}, ")
    for panel in panels:
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        panel.legend(loc="best", fontsize=8)
    figure.suptitle(title)
    _save(pyplot, figure, path)


def _draw_rate(axis, steps):
    x, y = _points(steps, "learning_rate")
    axis.plot(x, y, color="grey", linewidth=0.8, linestyle=":")
    axis.set_ylabel("learning rate (dotted)", color="grey")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_reward_accuracy(axis, evaluations):
    x, y = _points(evaluations, "eval_reward_accuracy")
    axis.plot(x, y, "s--", color="C2")
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("evaluation: share of pairs with margin > 0 (squares)", color="C2")


def _draw_curve(axis, steps, evaluations, name, label, colour, prefix=""):
    """Training values, raw and smoothed, and evaluation points of one quantity."""
    x, y = _points(steps, name)
    reach = max(1, round(SMOOTHING * len(y) / 2))
    # centred, so that the curve does not lag behind
    windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
    smooth = [sum(window) / len(window) for window in windows]
    axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8, label=f"{prefix}training, each step")
    axis.plot(x, smooth, color=colour, linewidth=1.8, label=f"{prefix}training, smoothed")
    x, y = _points(evaluations, f"eval_{name}")
    style = {"color": colour if prefix else "black", "markersize": 5, "label": f"{prefix}evaluation"}
    axis.plot(x, y, "o--", **style)
    axis.set_ylabel(label)


def _points(entries, name):
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def plot_comparison(models: dict[str, dict], path: Path) -> None:
    """Draw the comparison (name -> figures, as in comparison.json) to a PNG: a panel a measure, a bar a model."""
    pyplot = load_pyplot()
    keys = [key for key in PANELS if any(key in figures for figures in models.values())]
    rows = (len(keys) + 2) // 3
    figure, axes = pyplot.subplots(rows, min(len(keys), 3), figsize=(15, 4.3 * rows), squeeze=False)
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, keys):
        _draw_bars(axis, key, models)
    figure.suptitle("Black: 95 % interval")
    _save(pyplot, figure, path, dpi=110)


def _draw_bars(axis, key, models):
    """One measure: a bar a model with its interval; a share is drawn from 0 to 100 %, with the level of chance."""
    share, measure = key.endswith("accuracy"), key.removesuffix("_accuracy")
    names = [name if name.isascii() else f"model {number}" for number, name in enumerate(models, 1)]
    values = [figures.get(key, 0.0) for figures in models.values()]
    pairs = list(zip(values, models.values()))
    intervals = [figures.get(f"{measure}_interval") or [value, value] for value, figures in pairs]
    # at 0 % and 100 % the interval begins at the share itself, give or take a rounding error
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals)]
    axis.bar(names, values, color=[f"C{index}" for index in range(len(names))], alpha=0.8)
    axis.errorbar(names, values, yerr=[below, above], fmt="none", ecolor="black", capsize=4)
    for name, value, (_, high) in zip(names, values, intervals):
        text = f"{value:.1%}" if share else f"{value:.3f}"
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
        axis.annotate(text, (name, max(high, value)), (0, 3), **place)
    if share:
        axis.set_ylim(0, 1.25)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        _draw_chance(axis, CHANCE.get(measure, next(iter(models.values())).get(f"{measure}_chance")))
    else:
        axis.margins(y=0.15)
    count = max(figures.get(f"{measure}_n", 0) for figures in models.values())
    axis.set_title(f"{PANELS[key]}, n = {count:,}", fontsize=10)


def _draw_chance(axis, chance):
    if chance:
        axis.axhline(
            chance, color="grey", linestyle=":", label=f"chance {chance:.{0 if chance > 0.1 else 1}%}"
        )
        axis.legend(loc="upper left", fontsize=8)


def _save(pyplot, figure, path, dpi=120):
    figure.tight_layout()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=dpi)
    pyplot.close(figure)
