"""Pictures: the curves of training, and the comparison of models.

Labels are English, and what comes from elsewhere is put into ASCII: no font has to hold Chinese.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from utils.files import atomic_write

SMOOTHING = 0.05  # the smoothed curve averages over about this share of the run
MOST_VALUES = 12  # evaluations with their values beside them; of more, only the first, the best and the last have theirs
LONGEST_NAME = 20  # characters of a model's name beside its bars
TEXT = {"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 12}  # readable on a slide

Entry = dict[str, Any]  # a line of training_log.jsonl

# If the home folder cannot be written to, matplotlib's cache goes to a temporary one: nothing for the user to do.
NOTES = ("mkdir -p failed", "Matplotlib created a temporary cache")
logging.getLogger("matplotlib").addFilter(lambda record: not str(record.msg).startswith(NOTES))


class Panel(NamedTuple):
    """One measure of the comparison: per model a value and its 95 % interval. A share is drawn from 0 to 100 %.

    `chance`: the share that guessing gets; 0: none is drawn.
    """

    title: str
    values: list[float]
    intervals: list[list[float] | None]
    is_share: bool
    chance: float = 0


def _figure(width, height):
    """An empty figure of so many inches, which is drawn to a file and needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _save(figure, path):
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def label_text(text: str, instead: str = "") -> str:
    """A name for a picture: what the font may not hold as question marks, or `instead`, and no dollar sign begins a formula."""
    shown = text if text.isascii() else instead or text.encode("ascii", "replace").decode()
    return shown.replace("$", r"\$")


# ---- The comparison of models


def plot_comparison(panels: list[Panel], models: list[str], path: Path) -> None:
    """Draw the comparison to a PNG: one panel per measure, one bar per model, its name and value beside it."""
    rows, height = (len(panels) + 2) // 3, 1.2 + 0.45 * len(models)
    figure = _figure(15, height * rows + 0.4)
    axes = figure.subplots(rows, min(len(panels), 3), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    names = [label_text(name, f"model {n}") for n, name in enumerate(models, 1)]
    half = LONGEST_NAME // 2  # names of like runs differ at their ends
    names = [name if len(name) <= LONGEST_NAME else f"{name[:half]}...{name[-half:]}" for name in names]
    for axis, panel in zip(axes.flat, panels):
        _draw_bars(axis, panel, names)
    figure.suptitle("Black: 95 % interval")
    _save(figure, path)


def _draw_bars(axis, panel, names):
    places, values = range(len(names)), numpy.array(panel.values)
    ends = numpy.array([interval or [value, value] for value, interval in zip(values, panel.intervals)])
    # At 0 % and 100 % the interval begins at the share itself, give or take a rounding error.
    reach = numpy.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
    axis.barh(places, values, color=[f"C{place}" for place in places], alpha=0.8)
    axis.errorbar(values, places, xerr=reach, fmt="none", ecolor="black", capsize=4)
    shown = [f"{value:.1%}" if panel.is_share else f"{value:.3f}" for value in values]
    axis.set_yticks(places, [f"{name}  {value}" for name, value in zip(names, shown)])
    axis.invert_yaxis()  # the first model on top
    if panel.is_share:
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    chance = ""
    if panel.chance:
        chance = f" (dotted: chance {panel.chance:.{0 if panel.chance > 0.1 else 1}%})"
        axis.axvline(panel.chance, color="grey", linestyle=":")
    axis.set_title(panel.title + chance, fontsize=10, loc="right")


# ---- Curves of training


def plot_training(
    log: list[Entry], path: Path, title: str, best_step: int | None = None, evaluated: str = "held-out rows"
) -> None:
    """Draw a run from its log (entries as in training_log.jsonl) to a PNG at `path`.

    Training loss, each step and smoothed; evaluations as points with their values, that of `best_step` ringed; the learning
    rate below. DPO has three more panels: pairs told apart, the reward margin, and the log-probabilities of both answers.
    `evaluated` names the rows of the evaluations.
    """
    from matplotlib import rc_context

    mosaic, heights, size = [["loss"], ["rate"]], [5, 1], (11, 6.2)
    drawn = [("loss", "loss", "loss", "C0")]  # panel, its title, quantity, colour
    if any("reward_margin" in entry for entry in log):  # a run of DPO
        mosaic = [["loss", "accuracy"], ["margin", "logps"], ["rate", "rate"]]
        heights, size = [5, 5, 1.4], (16, 9)
        both = "log-probability of the answers: chosen blue, rejected red"
        drawn += [("accuracy", "share of pairs with a margin above 0", "reward_accuracy", "C0")]
        drawn += [("margin", "reward margin", "reward_margin", "C0")]
        drawn += [("logps", both, "chosen_logps", "C0"), ("logps", both, "rejected_logps", "C3")]
    first, last = log[0]["step"], log[-1]["step"]
    room = max(0.05 * (last - first), 0.5)  # for the values beside the outermost points
    with rc_context(TEXT):
        figure = _figure(*size)
        panels = figure.subplot_mosaic(mosaic, height_ratios=heights)
        for panel, its_title, quantity, colour in drawn:
            _draw_quantity(panels[panel], log, quantity, best_step, colour, evaluated)
            panels[panel].set_title(its_title, loc="left")
        if "accuracy" in panels:
            panels["accuracy"].set_ylim(-0.05, 1.18)
        rate = panels["rate"]
        _draw_line(rate, *points(log, "learning_rate"), color="grey", linewidth=1.5)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_ylim(bottom=0)
        rate.set(ylabel="rate", xlabel="optimizer step; below the curves: the learning rate")
        for panel in panels.values():
            panel.grid(alpha=0.3)
            panel.set_xlim(first - room, last + room)
            panel.xaxis.get_major_locator().set_params(integer=True)  # there is no half step
        figure.legend(*panels["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(label_text(title))
        _save(figure, path)


def _draw_quantity(axis, log, name, best_step, colour, evaluated):
    """Training values, raw and smoothed, and the evaluations of one quantity as points with their values."""
    if name.startswith("reward"):  # before the first update they are 0 by definition: a jump that is none
        log = [entry for entry in log if entry["step"] > ("loss" in entry)]
    steps, values = points(log, name)
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8, label="training, each step")
    _draw_line(axis, steps, smooth(values), color=colour, linewidth=2.2, label="training, smoothed")
    steps, values = points(log, f"eval_{name}")
    points_colour = colour if "logps" in name else "black"
    axis.plot(steps, values, "o", color=points_colour, markersize=6, label=evaluated, zorder=4)
    best = [index for index, step in enumerate(steps) if step == best_step]
    if best:
        ring = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2, "color": "C2", "zorder": 5}
        axis.plot(steps[best], values[best], "o", label=f"best: step {best_step:,}", **ring)
    axis.margins(y=0.18)
    last = len(steps) - 1
    for index in range(len(steps)) if last < MOST_VALUES else sorted({0, *best, last}):
        text = f"{values[index]:.3g}" if abs(values[index]) >= 10 else f"{values[index]:.3f}"
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 11, "zorder": 6}
        axis.annotate(text, (steps[index], values[index]), (0, 11), color=points_colour, **place)


def _draw_line(axis, steps, values, **form):
    """A line, with its points where they are a handful: a line through one point is nothing to see."""
    axis.plot(steps, values, marker="." if len(steps) < 4 else "", markersize=8, **form)


def points(log: list[Entry], name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(steps, values) of the entries that have a value of this name."""
    found = [(entry["step"], entry[name]) for entry in log if name in entry]
    return numpy.array([step for step, _ in found]), numpy.array([value for _, value in found], dtype=float)


def smooth(values: numpy.ndarray) -> numpy.ndarray:
    """A centred moving mean, which does not lag behind, over SMOOTHING of all values; at the ends over what there is."""
    reach = max(1, round(SMOOTHING * len(values) / 2))
    around = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return numpy.array([part.mean() for part in around])
