"""What a run shows while it trains: a line of progress, training_log.jsonl, and a loss curve that is redrawn."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from utils.files import atomic_write, read_log, show_path
from utils.plots import plot_training
from utils.text import PLAIN_SECONDS, duration
from utils.training.schedule import SETTLED, Clock, done_at

LONG = 60  # seconds left from which on the time of day is worth telling
REDRAW_SECONDS = 30  # the PNG takes about half a second to draw
MUCH_SLOWER, BUSY = (
    1.5,
    0.25,
)  # times the planned seconds of a step; share of the cores that other programs use
CLEARLY, CLEARLY_FEWER = (
    0.02,
    0.03,
)  # a loss higher by this share, an accuracy lower by so much, is clearly worse
CHANCE, ENOUGH_PAIRS = 0.5, 100  # of preferring the chosen answer; pairs from which on that says something

Entry = dict[str, Any]  # a line of training_log.jsonl


class RunLog:
    """Log, picture and progress line of one run, in the process that writes (`main`); elsewhere only the entries."""

    def __init__(self, folder: Path, main: bool, title: str):
        self.path, self.picture = folder / "training_log.jsonl", folder / "loss_curve.png"
        self.main, self.title, self.entries = main, title, []
        self.last_drawn = self.last_line = time.monotonic()  # a picture of the first step alone shows nothing

    def begin(self, step: int, clock: Clock, plan) -> list[Entry]:
        """Training begins after `step` steps. Later entries are dropped, as those steps are done again: they are returned."""
        found = read_log(self.path) if step and self.path.is_file() else []
        self.entries = [entry for entry in found if entry["step"] <= step]
        self.clock, self.plan, self.first_step = clock, plan, step
        self.step_seconds, self.since, self.busy = 0.0, time.monotonic(), _busy_seconds()
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
            more = (
                f", margin > 0 in {entry['eval_reward_accuracy']:.1%}"
                if "eval_reward_accuracy" in entry and entry["step"]  # margins are 0 before training
                else ""
            )
            self.tell(f"evaluation after step {entry['step']}: loss {entry['eval_loss']:.4f}{more}")
            if chosen_fell(self.entries):
                self.tell(
                    "warning: the chosen answers are losing probability as well; lower LEARNING_RATE, or raise SFT_WEIGHT"
                )
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
            plot_training(self.entries, self.picture, self.title, best)
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
        step, steps, rate = entry["step"], self.plan.schedule.steps, self.tokens_per_second()
        left = self.clock.seconds_left(self.plan.schedule, step, progress)
        if step == self.first_step + SETTLED:
            if left > LONG:
                self.tell(f"about {duration(left)} to go, done at {done_at(left)}")
            own, everyone = (now - before for now, before in zip(_busy_seconds(), self.busy))
            others = (everyone - own) / max(time.monotonic() - self.since, 1e-9)  # cores
            if rate * MUCH_SLOWER < self.plan.train_rate and others > BUSY * psutil.cpu_count():
                self.tell(
                    f"steps are {self.plan.train_rate / rate:.1f} times as slow as planned: other programs use "
                    f"{others:.1f} of {psutil.cpu_count()} cores"
                )
        pause = 1 if sys.stdout.isatty() else PLAIN_SECONDS
        if progress >= 1 or time.monotonic() - self.last_line >= pause:
            of = (
                f"/{steps}" if progress <= step / steps else f" ({progress:.0%})"
            )  # with HOURS nobody knows the last
            text = f"step {step}{of}  loss {entry['loss']:.4f}  {rate:,.0f} tokens/s  {duration(left)} left"
            self.tell(text, progress >= 1)


def _busy_seconds() -> tuple[float, float]:
    """Seconds that cores have computed so far: for this process, and for all."""
    own, everyone = psutil.Process().cpu_times(), psutil.cpu_times()
    return own.user + own.system, sum(everyone) - everyone.idle - getattr(everyone, "iowait", 0.0)


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
    """The step that the finished model is of, in words, and warnings if the run should have been another.

    start: the evaluation before training; evaluations: those after it; kept: that of the finished model; losses: of the training
    steps; count: examples that were evaluated on. From fewer than 100 pairs follows nothing.
    """
    best, last = best_of(evaluations), evaluations[-1]
    preference = "eval_reward_accuracy" in last

    def value(entry: Entry) -> str:
        loss = f"{entry['eval_loss']:.4f}"
        return f"{entry['eval_reward_accuracy']:.1%} of held-out pairs, loss {loss}" if preference else loss

    others = {"best": best, "last": last}
    others = "".join(
        f"; {name}: step {entry['step']}, {value(entry)}"
        for name, entry in others.items()
        if entry is not kept
    )
    lines = [f"kept: step {kept['step']}, {value(kept)}{others}"]
    if preference and count < ENOUGH_PAIRS:
        return lines
    worse = last["eval_loss"] > (1 + CLEARLY) * best["eval_loss"]
    no_better = best["eval_loss"] >= start["eval_loss"]
    if preference:
        worse = last["eval_reward_accuracy"] < best["eval_reward_accuracy"] - CLEARLY_FEWER
        no_better = best["eval_reward_accuracy"] <= CHANCE
    few = max(1, len(losses) // 10)
    if no_better:
        change = "the training loss did not fall either: try another LEARNING_RATE (a tenth first), then more EPOCHS"
        if sum(losses[-few:]) < sum(losses[:few]):
            change = "the training loss fell, so it learns the training rows by heart: lower LEARNING_RATE, or give it more rows"
        than = "at chance" if preference else "no better than before training"
        lines.append(f"warning: the best evaluation is {than} ({value(best)}); {change}")
    elif worse:
        take = "" if kept is best else ", or take --keep best"
        lines.append(
            f"warning: the last step is clearly worse than the best: the run was too long or too fast; "
            f"lower EPOCHS or LEARNING_RATE{take}"
        )
    return lines
