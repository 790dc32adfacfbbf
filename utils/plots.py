"""Pictures: the lengths of a data set, the comparison of models, and what every picture needs. Labels are English: no font has
to hold Chinese."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.files import atomic_write

NEAR = 1.5  # a limit up to so many times the longest text is drawn; one that is further away is told in words

PANELS = {  # of the comparison: the figure shown, and its title
    "heldout_loss": "held-out loss, nats a token (lower is better)",
    "exam_accuracy": "exam by option text",
    "exam_letter_accuracy": "exam by option letter",
    "exam_true_false_accuracy": "true or false, by text",
    "exam_true_false_letter_accuracy": "true or false, by letter",
    "exam_multiple_accuracy": "exam, several answers",
    "preference_accuracy": "preference pairs",
    "facts_accuracy": "facts stated right",
    "names_accuracy": "names right",
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


def label_text(text: str, instead: str = "") -> str:
    """A name for a picture: what the font may not hold as question marks, or `instead`, and no dollar sign begins a formula."""
    shown = text if text.isascii() else instead or text.encode("ascii", "replace").decode()
    return shown.replace("$", r"\$")


def draw_lengths(path: Path, characters: list[int], tokens: list[int], max_length: int) -> None:
    """A histogram of the conversations' lengths: in tokens where they were counted, else in characters.

    MAX_LENGTH is a line where it is near the longest; else the legend says where it lies.
    """
    pyplot = load_pyplot()
    lengths, unit = (tokens, "tokens") if len(tokens) else (characters, "characters")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.hist(lengths, bins=min(60, max(1, len(set(lengths)))))
    axes.set_xlabel(f"length of a conversation, {unit}")
    axes.set_ylabel(f"conversations, of {len(lengths):,}")
    axes.grid(alpha=0.3)
    if len(tokens):
        _mark_limit(axes, max(tokens), max_length)
    save_figure(pyplot, figure, path)


def _mark_limit(axes, longest, limit):
    if limit <= NEAR * longest:
        axes.axvline(limit, color="tab:red", label=f"MAX_LENGTH {limit:,}")
    else:
        axes.plot([], [], " ", label=f"longest {longest:,}, far below MAX_LENGTH {limit:,}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


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
    save_figure(pyplot, figure, path, dpi=110)


def _draw_bars(axis, key, models):
    """One measure: a bar a model with its interval; a share is drawn from 0 to 100 %, with the level of chance."""
    share, measure = key.endswith("accuracy"), key.removesuffix("_accuracy")
    names = [label_text(name, f"model {number}") for number, name in enumerate(models, 1)]
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


def save_figure(
    pyplot: ModuleType, figure: Any, path: Path, dpi: int = 120, more: Sequence[Path] = ()
) -> None:
    """Write a figure to `path` and to the paths in `more`, each whole and in the format of its name, and let go of it."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    for target in (path, *more):
        with atomic_write(target, "wb") as file:
            figure.savefig(file, format=target.suffix[1:], dpi=dpi)
    pyplot.close(figure)
