"""What a run shows while it trains: a line of progress, training_log.jsonl, a loss curve that is redrawn, and Ctrl-C obeyed."""

import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from utils.files import atomic_write, read_log, show_path
from utils.plots import plot_training
from utils.text import PLAIN_SECONDS, duration
from utils.training.best import best_of
from utils.training.forecast import RunSize
from utils.training.pace import SETTLED, Pace, done_at
from utils.training.run_folder import RunFolder
from utils.training.schedule import Schedule

WORTH_TELLING = 0.1  # of the steps that were left: a change of the plan that is told
LONG = 60  # seconds left from which on the time of day is worth telling
REDRAW_SECONDS = 30  # the PNG takes about half a second to draw


class RunLog(TrainerCallback):
    """Log, picture and progress line of one run. Only the main process writes.

    On resuming, entries after the checkpoint are dropped: those steps are done again, with the same result.
    """

    def __init__(self, run: RunFolder, schedule: Schedule, pace: Pace, tokens_per_step: float, title: str):
        self.run, self.schedule, self.pace = run, schedule, pace
        self.tokens_per_step, self.title = tokens_per_step, title
        self.path, self.picture = run.folder / "training_log.jsonl", run.folder / "loss_curve.png"
        self.entries: list[dict] = []
        self.step_seconds = self.last_drawn = self.last_line = 0.0  # the last two: monotonic seconds

    def on_train_begin(self, args, state, control, **kwargs):
        if self.path.is_file() and state.global_step:
            self.entries = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step]
        self.first_step = state.global_step
        self.last_drawn = time.monotonic()  # a picture of the first step alone shows nothing
        if state.is_world_process_zero:
            with atomic_write(self.path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in self.entries)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds += time.monotonic() - self.step_began

    def on_log(self, args, state, control, logs, **kwargs):
        if "train_runtime" in logs:
            return
        entry = {"step": state.global_step, **{name: _short(value) for name, value in logs.items()}}
        self.entries.append(entry)
        if not state.is_world_process_zero:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._show(state, entry)
        if time.monotonic() - self.last_drawn > REDRAW_SECONDS:
            self.draw()

    def evaluations(self) -> list[dict]:
        """The evaluations of this run, in order, but for the one before its first step."""
        return [
            entry for entry in self.entries if "eval_loss" in entry and entry["step"] > self.schedule.start
        ]

    def before(self) -> dict:
        """The evaluation before this run's first step."""
        entries = [entry for entry in self.entries if "eval_loss" in entry]
        return next((entry for entry in entries if entry["step"] == self.schedule.start), entries[0])

    def losses(self) -> list[float]:
        """The training losses of this run's steps, in order."""
        return [
            entry["loss"] for entry in self.entries if "loss" in entry and entry["step"] > self.schedule.start
        ]

    def tell_plan(self, state: TrainerState, size: RunSize) -> None:
        """Print what fits into HOURS."""
        steps = state.max_steps - self.schedule.start
        epochs = state.max_steps / size.steps_per_epoch
        left = self.pace.seconds_left(self.schedule, state.global_step)
        all_of_it = " (all that was asked for)" if state.max_steps == size.steps else ""
        self.tell(
            f"{duration(self.pace.limit)} are {steps:,} steps{all_of_it}: {min(1, epochs):.1%} of the rows, {epochs:.2f} epochs; done at "
            f"{done_at(left)}"
        )

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        if self.run.main:
            self._print(text, keep=True)

    def draw(self) -> None:
        """Redraw the picture now, if there is anything to draw."""
        if self.run.main and any("loss" in entry for entry in self.entries):
            self.last_drawn = time.monotonic()
            try:
                best = best_of(self.evaluations())["step"] if self.evaluations() else None
                plot_training(self.entries, self.picture, self._picture_title(), best)
            except PermissionError as error:  # on Windows, while a picture viewer has it open
                self._print(
                    f"{show_path(self.picture)} cannot be redrawn now ({error.strerror}); training goes on",
                    keep=True,
                )

    def _picture_title(self):
        """The method, with the model, the data and the day."""
        settings = self.run.record["settings"]
        model, data = Path(settings["MODEL"]).name, Path(settings["TRAIN_FILE"]).name
        return f"{self.title} of {model} on {data}, {self.run.record['started'][:10]}"

    def tokens_per_second(self, state: TrainerState) -> float:
        """Real (unpadded) tokens a second over the steps of this process, evaluations and checkpoints left out."""
        return (state.global_step - self.first_step) * self.tokens_per_step / max(self.step_seconds, 1e-9)

    def _show(self, state, entry):
        if "eval_loss" in entry:
            more = (
                f", margin > 0 in {entry['eval_reward_accuracy']:.1%}"
                if "eval_reward_accuracy" in entry
                else ""
            )
            self._print(
                f"evaluation after step {entry['step']}: loss {entry['eval_loss']:.4f}{more}", keep=True
            )
            if chosen_fell(self.entries):
                self._print(
                    "warning: the chosen answers are losing probability as well; lower LEARNING_RATE, or raise SFT_WEIGHT",
                    keep=True,
                )
            return
        last = entry["step"] == state.max_steps
        left = self.pace.seconds_left(self.schedule, state.global_step)
        if state.global_step == self.first_step + SETTLED and left > LONG and self.pace.limit == math.inf:
            self._print(f"about {duration(left)} to go, done at {done_at(left)}", keep=True)
        elif not sys.stdout.isatty() and not last and time.monotonic() - self.last_line < PLAIN_SECONDS:
            return
        self._print(
            f"step {entry['step']}/{state.max_steps}  loss {entry['loss']:.4f}  "
            f"{self.tokens_per_second(state):,.0f} tokens/s  {duration(left)} left",
            keep=last,
        )

    def _print(self, text, keep):
        terminal = sys.stdout.isatty()
        print(f"\r\033[K{text}" if terminal else text, end="\n" if keep or not terminal else "", flush=True)
        self.last_line = time.monotonic()


class SaveAndStop(TrainerCallback):
    """When to evaluate, to save and to end: by the schedule, by the clock, and when Ctrl-C or SIGTERM asks to stop.

    The first Ctrl-C finishes the present step, writes a checkpoint and stops; an evaluation is left off, and made when the run goes
    on. A second one stops at once.
    """

    def __init__(self, run: RunFolder, schedule: Schedule, pace: Pace, log: RunLog, size: RunSize):
        self.run, self.schedule, self.pace, self.log, self.size = run, schedule, pace, log, size
        self.saved_step = None
        self.requested: float | None = None  # when, in monotonic seconds
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._request)

    def _request(self, number, frame):
        # A launcher hands the same Ctrl-C on once more, at once.
        if self.requested and time.monotonic() - self.requested > 1:
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last checkpoint")
        if self.requested:
            return
        self.requested = time.monotonic()
        print(
            "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once",
            file=sys.stderr,
            flush=True,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        state.max_steps = self.schedule.total
        measured = any(
            entry["step"] == state.global_step for entry in self.log.entries if "eval_loss" in entry
        )
        args.eval_on_start = self.schedule.evaluates(state.global_step) and not measured
        self.pace.begin(self.run.record.get("pace", {}).get(str(state.global_step)))

    def on_step_end(self, args, state, control, **kwargs):
        self.pace.ended("step")
        # the main process has the clock
        total = self.pace.new_total(self.schedule, state.global_step, self.size.steps) if self.run.main else 0
        due = self.run.main and self.pace.checkpoint_due
        stop, save, total = self._agree(args, [bool(self.requested), due, total])
        if total:
            self._change(state, total)
        last = state.global_step >= state.max_steps
        control.should_evaluate = not stop and self.schedule.evaluates(state.global_step)
        control.should_save = bool(stop or save or last)
        control.should_training_stop = bool(stop or last)

    def _change(self, state, total):
        """The run ends after `total` steps, whatever was planned."""
        before, first = state.max_steps, len(self.schedule.plan) == 1
        reason = "faster than planned" if total > before else "slower than planned"
        self.schedule.change(state.global_step, total, "the first steps were timed" if first else reason)
        state.max_steps = total
        self.run.record["schedule"] = self.schedule.as_dict()
        self.run.write()
        if first:
            self.log.tell_plan(state, self.size)
        elif abs(total - before) > WORTH_TELLING * (before - state.global_step):
            self.log.tell(f"{reason}: {total:,} steps instead of {before:,}, to end in time")

    def agree_to_stop(self, args) -> bool:
        """Whether one of the processes was asked to stop; all of them have to call this."""
        return bool(self._agree(args, [bool(self.requested)])[0])

    def _agree(self, args, wishes):
        """What one process wishes, all do, after the same step."""
        if args.world_size == 1:
            return wishes
        joined = torch.tensor(wishes, dtype=torch.int64, device=args.device)
        torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX)
        return joined.tolist()

    def on_log(self, args, state, control, **kwargs):
        self.pace.hold()

    def on_evaluate(self, args, state, control, **kwargs):
        self.pace.ended("evaluation")

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        self.pace.ended("checkpoint")
        kept = {**self.run.record.get("pace", {}), str(state.global_step): self.pace.as_dict()}
        self.run.record["pace"] = {
            step: kept[step] for step in sorted(kept, key=int)[-args.save_total_limit :]
        }
        self.run.write()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.saved_step == state.global_step:  # done a moment ago, at the step's end
            control.should_save = False


def chosen_fell(entries: list[dict]) -> bool:
    """Whether DPO has cost the chosen answers a tenth of their log-probability, and a nat, since the first evaluation."""
    values = [entry["eval_chosen_logps"] for entry in entries if "eval_chosen_logps" in entry]
    return len(values) > 1 and values[-1] < values[0] - max(1.0, 0.1 * abs(values[0]))


def _short(value):
    return float(f"{value:.8g}") if isinstance(value, float) else value
