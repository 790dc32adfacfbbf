"""What a run shows: a line of progress, training_log.jsonl, a loss curve that is redrawn, and report.html at its end."""

import base64
import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from utils.errors import UserError
from utils.files import atomic_write, read_json, read_log, render, show_path
from utils.model.folder import read_record
from utils.plots import plot_training
from utils.settings import ROOT
from utils.text import PLAIN_SECONDS, duration, format_bytes

ENDING = 2.0  # seconds: the last picture, run.json, the interpreter's end
AIM = 0.99  # share of HOURS that is planned with
DISK = 200e6  # bytes written per second, with their checksum, until a checkpoint was timed
LONG = 60  # seconds left from which on the time of day is worth telling
REDRAW_SECONDS = 30  # the PNG takes about half a second to draw
SETTLED = 3  # steps after which the speed is compared with the planned one
SLOWER, BUSY = 1.5, 0.25  # times the planned seconds of a step; share of the cores that other programs use
WORSE_LOSS, WORSE_ACCURACY = 0.02, 0.03  # a loss higher by this share, or an accuracy lower by so much
CHANCE, ENOUGH_PAIRS = 0.5, 100  # of preferring the chosen answer; pairs from which on that says something
TEMPLATE = Path(__file__).with_name("report.html.jinja")

Entry = dict[str, Any]  # a line of training_log.jsonl


class Clock:
    """The time that a run has taken, in this process and in those before it (`before`), and the `seconds` of its latest parts.

    settings: HOURS and CHECKPOINT_MINUTES, 0: no limit; weights: bytes of a checkpoint and of the finished model.
    """

    def __init__(self, settings, weights: tuple[int, int]):
        checkpoint, model = weights
        self.began, self.before, self.limit = settings.began, 0.0, AIM * 3600 * settings.HOURS or math.inf
        self.seconds = {"step": 0.0, "evaluation": 0.0, "checkpoint": checkpoint / DISK}
        self.saving, self.interval = model / checkpoint, 60 * settings.CHECKPOINT_MINUTES or math.inf
        self.mark = self.last_save = time.monotonic()

    def elapsed(self) -> float:
        """Seconds that the run has run."""
        return self.before + time.monotonic() - self.began

    def start(self) -> None:
        """Time what comes next from now on."""
        self.mark = time.monotonic()

    def ended(self, part: str) -> None:
        """A step, an evaluation or a checkpoint has ended. It took the time since the one before."""
        now = time.monotonic()
        self.seconds[part], self.mark = now - self.mark, now
        if part == "checkpoint":
            self.last_save = now

    @property
    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.last_save > self.interval

    def progress(self) -> float:
        """The share of HOURS that is over; 1 if no further step fits in before evaluation and saving. 0 without a limit."""
        ending = (1 + self.saving) * self.seconds["checkpoint"] + ENDING
        training = self.limit - self.seconds["evaluation"] - ending
        return 1.0 if self.elapsed() + self.seconds["step"] > training else self.elapsed() / training


def done_at(seconds: float) -> str:
    """The time of day in so many seconds; with the date if that is not today."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M on %Y-%m-%d}"


class RunLog:
    """Log, picture and progress line of one run, in the process that writes (`main`); elsewhere only the entries."""

    def __init__(self, folder: Path, main: bool, title: str, evaluated: str = "held-out rows"):
        """title: of the picture; evaluated: the rows that evaluations are on, for its legend."""
        self.path, self.picture = folder / "training_log.jsonl", folder / "loss_curve.png"
        self.main, self.title, self.evaluated, self.entries = main, title, evaluated, []
        self.last_drawn = self.last_line = time.monotonic()  # a picture of the first step alone shows nothing

    def begin(self, step: int, progress: float, plan) -> list[Entry]:
        """Training begins after `step` steps. Later entries are dropped, as those steps are done again: they are returned."""
        found = read_log(self.path) if step and self.path.is_file() else []
        self.entries = [entry for entry in found if entry["step"] <= step]
        self.plan, self.first_step, self.step_seconds = plan, step, 0.0
        self.began, self.first, self.used = time.monotonic(), progress, cpu_seconds()
        if self.main:
            with atomic_write(self.path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in self.entries)
        return [entry for entry in found if entry["step"] > step]

    def add(self, entry: Entry, progress: float) -> None:
        """Add the entry of a step or of an evaluation: to the file, and as a line at the terminal."""
        for name, value in entry.items():
            entry[name] = float(f"{value:.8g}") if isinstance(value, float) else value
        self.entries.append(entry)
        if not self.main:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if "loss" in entry:
            self._show_step(entry, progress)
        else:
            accuracy = entry.get("eval_reward_accuracy") if entry["step"] else None  # 0 before training
            more = "" if accuracy is None else f", margin > 0 in {accuracy:.1%}"
            self.tell(f"evaluation after step {entry['step']}: loss {entry['eval_loss']:.4f}{more}")
            if chosen_fell(self.entries):
                advice = "lower LEARNING_RATE, or raise SFT_WEIGHT"
                self.tell(f"warning: the chosen answers are losing probability as well; {advice}")
        if time.monotonic() - self.last_drawn > REDRAW_SECONDS:
            self.draw()

    def evaluations(self) -> list[Entry]:
        """The evaluations of the run, in order, but for the one before its first step."""
        return [entry for entry in self.entries if "eval_loss" in entry and entry["step"]]

    def losses(self) -> list[float]:
        """The training losses of the steps, in order."""
        return [entry["loss"] for entry in self.entries if "loss" in entry]

    def tokens_per_second(self) -> float:
        """Real (unpadded) tokens a second over the steps of this process, evaluations and checkpoints left out."""
        steps = len(self.losses()) - self.first_step
        return steps * self.plan.tokens_per_step / max(self.step_seconds, 1e-9)

    def draw(self) -> None:
        """Redraw the picture now, if there is anything to draw."""
        if not self.main or not self.losses():
            return
        self.last_drawn = time.monotonic()
        best = best_of(self.evaluations())["step"] if self.evaluations() else None
        try:
            plot_training(self.entries, self.picture, self.title, best, self.evaluated)
        except PermissionError as error:  # on Windows, while a picture viewer has it open
            self.tell(f"{show_path(self.picture)} cannot be redrawn now ({error.strerror}); training goes on")

    def tell(self, text: str, keep: bool = True) -> None:
        """Print a line that stays, or (keep=False) one that the next takes the place of at a terminal."""
        if self.main:
            terminal = sys.stdout.isatty()
            end = "\n" if keep or not terminal else ""
            print(f"\r\033[K{text}" if terminal else text, end=end, flush=True)
            self.last_line = time.monotonic()

    def _show_step(self, entry, progress):
        if entry["step"] == self.first_step + SETTLED:
            slower, others = self.plan.train_rate / self.tokens_per_second(), other_programs(self.used)
            if slower > SLOWER and others:
                self.tell(f"steps are {slower:.1f} times as slow as planned: {others}")
        pause = 1 if sys.stdout.isatty() else PLAIN_SECONDS
        if progress < 1 and time.monotonic() - self.last_line < pause:
            return
        step, steps = entry["step"], self.plan.schedule.steps
        left = (time.monotonic() - self.began) * (1 - progress) / max(progress - self.first, 1e-6)
        # With HOURS nobody knows the number of the last step.
        of = f"/{steps}" if progress <= step / steps else f" ({progress:.0%})"
        end = f", done at {done_at(left)}" if left > LONG else ""
        text = f"step {step}{of}  loss {entry['loss']:.4f}  {self.tokens_per_second():,.0f} tokens/s"
        self.tell(f"{text}  {duration(left)} left{end}", progress >= 1)


def cpu_seconds() -> tuple[float, float]:
    """Seconds of all cores so far, and those of them in which they were idle or computed for this process."""
    own, all_cores = psutil.Process().cpu_times(), psutil.cpu_times()
    free = all_cores.idle + getattr(all_cores, "iowait", 0.0)
    return sum(all_cores), own.user + own.system + free


def other_programs(before: tuple[float, float]) -> str:
    """The cores that other programs have used since cpu_seconds() gave `before`, in words; "" if hardly any."""
    total, ours = (now - then for now, then in zip(cpu_seconds(), before))
    share, cores = 1 - ours / max(total, 1e-9), psutil.cpu_count()
    return f"other programs use {share * cores:.1f} of {cores} cores" if share > BUSY else ""


def best_of(evaluations: list[Entry]) -> Entry:
    """The best evaluation, the earlier one of two equals: most pairs with a margin above 0 (DPO), then the lowest loss."""
    return min(evaluations, key=lambda entry: (-entry.get("eval_reward_accuracy", 0.0), entry["eval_loss"]))


def chosen_fell(entries: list[Entry]) -> bool:
    """Tell whether DPO has cost the chosen answers a tenth of their log-probability, and a nat, since the first evaluation."""
    values = [entry["eval_chosen_logps"] for entry in entries if "eval_chosen_logps" in entry]
    return len(values) > 1 and values[-1] < values[0] - max(1.0, 0.1 * abs(values[0]))


def verdict(
    start: Entry, evaluations: list[Entry], losses: list[float], kept: Entry, count: int
) -> list[str]:
    """The step that the finished model is of, in words, and a warning if the run should have been another.

    start: the evaluation before training; kept: that of the finished model; count: examples of each. Of fewer than 100 pairs nothing
    follows.
    """
    best, last, accuracy = best_of(evaluations), evaluations[-1], "eval_reward_accuracy"
    told, pairs = [], accuracy in last
    for name, entry in {"kept": kept, "best": best, "last": last}.items():
        if name == "kept" or entry is not kept:
            share = f"{entry[accuracy]:.1%} of the pairs, loss " if pairs else ""
            told.append(f"{name}: step {entry['step']}, {share}{entry['eval_loss']:.4f}")
    told = ["; ".join(told)]
    if pairs and count < ENOUGH_PAIRS:
        return told
    no_better, than = best["eval_loss"] >= start["eval_loss"], "before training"
    worse = last["eval_loss"] > (1 + WORSE_LOSS) * best["eval_loss"]
    if pairs:
        no_better, than = best[accuracy] <= CHANCE, "chance"
        worse = last[accuracy] < best[accuracy] - WORSE_ACCURACY
    few = max(1, len(losses) // 10)
    change = "did not fall either: try another LEARNING_RATE (a tenth first), then more EPOCHS"
    if sum(losses[-few:]) < sum(losses[:few]):
        change = "fell, so it learns the training rows by heart: lower LEARNING_RATE, or give it more rows"
    if no_better:
        told.append(f"warning: the best evaluation is no better than {than}; the training loss {change}")
    elif worse:
        take = "" if kept is best else ", or take --keep best"
        told.append(
            f"warning: the last step is clearly worse than the best: lower EPOCHS or LEARNING_RATE{take}"
        )
    return told


# ---- report.html: a run on one page that needs nothing else: no network, no scripts, pictures inside


def write_page(
    folder: Path, comparison: dict[str, Any] | None = None, name: str = "", pictures: Path | None = None
) -> Path:
    """Write report.html of a run folder and return its path. UserError if run.json is damaged.

    `comparison`: the content of a comparison.json that this run is part of under `name`, with its pictures in the folder
    `pictures`. The template escapes whatever comes from elsewhere: names, settings, rows, answers.
    """
    record, path = read_record(folder), folder / "report.html"
    settings, data = record["settings"], ROOT / str(record["settings"].get("TRAIN_FILE"))
    report = data.with_name("dpo_report.json" if "BETA" in settings else "report.json")
    try:
        told = read_json(report) if report.is_file() else {}
    except UserError as damaged:  # the model is finished, and needs it not
        print(f"left out of report.html: {damaged}")
        told = {}
    text = render(
        TEMPLATE,
        title=f"{folder.resolve().name}: {Path(settings['MODEL']).name} trained on {data.name}",
        record=record,
        report=told,
        curve=_picture(folder / "loss_curve.png"),
        comparison=comparison,
        name=name,
        bars=_picture(pictures / "comparison.png") if pictures else "",
        duration=duration,
        format_bytes=format_bytes,
    )
    with atomic_write(path) as file:
        file.write(text)
    return path


def _picture(path):
    """The bytes of a picture as base64; "" if there is none."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
