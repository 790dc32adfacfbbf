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
from utils.training.schedule import SETTLED, Clock, Schedule, done_at

NAME = "training_log.jsonl"
LONG = 60  # seconds left from which on the time of day is worth telling
REDRAW_SECONDS = 30  # the PNG takes about half a second to draw
MUCH_SLOWER = 1.5  # times the planned seconds of a step: worth a look at other programs
BUSY = 0.25  # share of the cores that other programs use: worth telling
CLEARLY = 0.02  # a loss that is higher by this share is clearly worse
CLEARLY_FEWER = 0.03  # and an accuracy that is lower by this much
CHANCE = 0.5  # of preferring the chosen answer
ENOUGH_PAIRS = 100  # for a verdict

Entry = dict[str, Any]  # a line of training_log.jsonl


class RunLog:
    """Log, picture and progress line of one run, in the process that writes (`main`); elsewhere only the entries."""

    def __init__(self, folder: Path, main: bool, title: str):
        self.path, self.picture = folder / NAME, folder / "loss_curve.png"
        self.main, self.title = main, title
        self.entries: list[Entry] = []
        self.last_drawn = self.last_line = time.monotonic()  # a picture of the first step alone shows nothing

    def begin(self, step: int, clock: Clock, schedule: Schedule, tokens_per_step: float, planned_rate: float):
        """Training begins after `step` steps. Later entries are dropped, as those steps are done again: they are returned.

        planned_rate: tokens a second that the plan expects.
        """
        found = read_log(self.path) if step and self.path.is_file() else []
        self.entries = [entry for entry in found if entry["step"] <= step]
        self.clock, self.schedule, self.first_step = clock, schedule, step
        self.tokens_per_step, self.planned_rate = tokens_per_step, planned_rate
        self.step_seconds, self.since, self.busy = 0.0, time.monotonic(), _busy_seconds()
        if self.main:
            with atomic_write(self.path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in self.entries)
        return [entry for entry in found if entry["step"] > step]

    def add(self, entry: Entry, progress: float) -> Entry:
        """Add the entry of a step or of an evaluation: to the file, and as a line at the terminal. Return it as it is kept."""
        entry = {
            name: float(f"{value:.8g}") if isinstance(value, float) else value
            for name, value in entry.items()
        }
        self.entries.append(entry)
        if self.main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            if "eval_loss" in entry:
                self._show_evaluation(entry)
            else:
                self._show_step(entry, progress)
            if time.monotonic() - self.last_drawn > REDRAW_SECONDS:
                self.draw()
        return entry

    def evaluations(self) -> list[Entry]:
        """The evaluations of the run, in order, but for the one before its first step."""
        return [entry for entry in self.entries if "eval_loss" in entry and entry["step"]]

    def before(self) -> Entry:
        """The evaluation before the first step."""
        return next(entry for entry in self.entries if "eval_loss" in entry)

    def losses(self) -> list[float]:
        """The training losses of the steps, in order."""
        return [entry["loss"] for entry in self.entries if "loss" in entry]

    def tokens_per_second(self) -> float:
        """Real (unpadded) tokens a second over the steps of this process, evaluations and checkpoints left out."""
        steps = sum(entry["step"] > self.first_step for entry in self.entries if "loss" in entry)
        return steps * self.tokens_per_step / max(self.step_seconds, 1e-9)

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

    def _show_evaluation(self, entry):
        accuracy = entry.get("eval_reward_accuracy")
        more = "" if accuracy is None else f", margin > 0 in {accuracy:.1%}"
        self.tell(f"evaluation after step {entry['step']}: loss {entry['eval_loss']:.4f}{more}")
        if chosen_fell(self.entries):
            self.tell(
                "warning: the chosen answers are losing probability as well; lower LEARNING_RATE, or raise SFT_WEIGHT"
            )

    def _show_step(self, entry, progress):
        step, last = entry["step"], progress >= 1
        left = self.clock.seconds_left(self.schedule, step, progress)
        if step == self.first_step + SETTLED:
            if left > LONG:
                self.tell(f"about {duration(left)} to go, done at {done_at(left)}")
            self._tell_if_others_compute()
        now = time.monotonic()
        if not last and now - self.last_line < (1 if sys.stdout.isatty() else PLAIN_SECONDS):
            return
        of = (
            f"step {step}/{self.schedule.steps}" if progress <= step / self.schedule.steps else f"step {step}"
        )
        rate = self.tokens_per_second()
        self.tell(
            f"{of}  loss {entry['loss']:.4f}  {rate:,.0f} tokens/s  {duration(left)} left ({progress:.0%})",
            last,
        )

    def _tell_if_others_compute(self):
        """One line if steps are much slower than planned while other programs use the cores."""
        (own, everyone), (own_before, before) = _busy_seconds(), self.busy
        seconds = max(time.monotonic() - self.since, 1e-9)
        others = max(0.0, everyone - before - (own - own_before)) / seconds
        if self.tokens_per_second() * MUCH_SLOWER < self.planned_rate and others > BUSY * psutil.cpu_count():
            self.tell(
                f"steps are {self.planned_rate / self.tokens_per_second():.1f} times as slow as planned: other programs use "
                f"{others:.1f} of {psutil.cpu_count()} cores"
            )


def _busy_seconds() -> tuple[float, float]:
    """Seconds that cores have computed so far: for this process, and for all."""
    own, everyone = psutil.Process().cpu_times(), psutil.cpu_times()
    idle = everyone.idle + getattr(everyone, "iowait", 0.0)
    return own.user + own.system, sum(everyone) - idle


def best_of(evaluations: list[Entry]) -> Entry:
    """The best evaluation, the earlier one of two equals: most pairs with a margin above 0 (DPO), then the lowest loss."""
    return min(evaluations, key=lambda entry: (-entry.get("eval_reward_accuracy", 0.0), entry["eval_loss"]))


def chosen_fell(entries: list[Entry]) -> bool:
    """Tell whether DPO has cost the chosen answers a tenth of their log-probability, and a nat, since the first evaluation."""
    values = [entry["eval_chosen_logps"] for entry in entries if "eval_chosen_logps" in entry]
    return len(values) > 1 and values[-1] < values[0] - max(1.0, 0.1 * abs(values[0]))


def verdict(start: Entry, evaluations: list[Entry], losses: list[float], kept: int, count: int) -> list[str]:
    """The step that the finished model is of, in words, and warnings if the run should have been another.

    start: the evaluation before training; evaluations: those after it, in order; losses: of the training steps;
    kept: the step whose weights the finished model has; count: examples that were evaluated on. From fewer than 100 pairs follows nothing.
    """
    best, last = best_of(evaluations), evaluations[-1]
    preference = "eval_reward_accuracy" in last
    value, praise = (
        (_pairs, "most held-out pairs told apart") if preference else (_loss, "lowest held-out loss")
    )
    if best is last:
        lines = [f"kept: the last step, {last['step']}, with the {praise} ({value(last)})"]
    elif kept == best["step"]:
        lines = [
            f"kept: step {kept}, with the {praise} ({value(best)}; the last step, {last['step']}: {value(last)})"
        ]
    else:
        lines = [
            f"kept: the last step, {last['step']} ({value(last)}; the best was step {best['step']}: {value(best)})"
        ]
    if preference and count < ENOUGH_PAIRS:
        return lines
    worse = last["eval_loss"] > (1 + CLEARLY) * best["eval_loss"]
    no_better = best["eval_loss"] >= start["eval_loss"]
    if preference:
        worse = last["eval_reward_accuracy"] < best["eval_reward_accuracy"] - CLEARLY_FEWER
        no_better = best["eval_reward_accuracy"] <= CHANCE
    if no_better:
        few = max(1, len(losses) // 10)
        change = "the training loss did not fall either: try another LEARNING_RATE (a tenth first), then more EPOCHS"
        if sum(losses[-few:]) < sum(losses[:few]):
            change = "the training loss fell, so it learns the training rows by heart: lower LEARNING_RATE, or give it more rows"
        than = "at chance" if preference else "no better than before training"
        lines.append(f"warning: the best evaluation is {than} ({value(best)}); {change}")
    elif worse:
        take = "" if kept == best["step"] else ", or take --keep best"
        lines.append(
            f"warning: the last step is clearly worse than the best ({value(last)} against {value(best)}): the run was too long "
            f"or too fast; lower EPOCHS or LEARNING_RATE{take}"
        )
    return lines


def _loss(entry):
    return f"{entry['eval_loss']:.4f}"


def _pairs(entry):
    return f"{entry['eval_reward_accuracy']:.1%}, loss {entry['eval_loss']:.4f}"
