"""What a run shows while it trains: a line of progress, training_log.jsonl, a loss curve that is redrawn, and Ctrl-C obeyed."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from utils.files import atomic_write, show_path
from utils.plots import plot_training
from utils.progress import PLAIN_SECONDS
from utils.text import duration
from utils.training.run_folder import RunFolder

REDRAW_SECONDS = 30  # the PNG takes about half a second to draw


class RunLog(TrainerCallback):
    """Log, picture and progress line of one run. Only the main process writes.

    On resuming, entries after the checkpoint are dropped: those steps are done again, with the same result.
    """

    def __init__(self, run: RunFolder, tokens_per_step: float, title: str):
        self.run, self.tokens_per_step, self.title = run, tokens_per_step, title
        self.path, self.picture = run.folder / "training_log.jsonl", run.folder / "loss_curve.png"
        self.entries: list[dict] = []
        self.step_seconds = self.last_drawn = self.last_line = 0.0  # the last two: monotonic seconds

    def on_train_begin(self, args, state, control, **kwargs):
        if self.path.is_file() and state.global_step:
            self.entries = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step]
        self.began, self.first_step = time.monotonic(), state.global_step
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

    def draw(self) -> None:
        """Redraw the picture now, if there is anything to draw."""
        if self.run.main and any("loss" in entry for entry in self.entries):
            self.last_drawn = time.monotonic()
            try:
                plot_training(self.entries, self.picture, self.title)
            except PermissionError as error:  # on Windows, while a picture viewer has it open
                self._print(
                    f"{show_path(self.picture)} cannot be redrawn now ({error.strerror}); training goes on",
                    keep=True,
                )

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
        if not sys.stdout.isatty() and not last and time.monotonic() - self.last_line < PLAIN_SECONDS:
            return
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
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
    """When to evaluate and save beside every epoch's end: at the last step, and when Ctrl-C or SIGTERM asks to stop.

    The first Ctrl-C finishes the present step, writes a checkpoint and stops; a second one stops at once.
    """

    def __init__(self):
        self.requested, self.saved_step = None, None  # requested: when, in monotonic seconds
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._request)

    def _request(self, number, frame):
        if (
            self.requested and time.monotonic() - self.requested > 1
        ):  # a launcher hands the same Ctrl-C on once more
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last checkpoint")
        if self.requested:
            return
        self.requested = time.monotonic()
        print(
            "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once",
            file=sys.stderr,
            flush=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        stop = bool(self.requested)
        if args.world_size > 1:  # all processes stop after the same step
            wish = torch.tensor(int(stop), device=args.device)
            torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX)
            stop = bool(wish)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        elif stop:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.saved_step == state.global_step:  # done a moment ago, at the step's end
            control.should_evaluate = control.should_save = False


def read_log(path: Path) -> list[dict]:
    """The entries of a training_log.jsonl. Lines that are no entry, such as one that a kill has cut, are left out, which is said."""
    entries, damaged = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines[:-1]:  # after the last line break: nothing, or a line cut by a kill
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += 1
    if damaged:
        print(f"{show_path(path)}: {damaged} damaged lines are left out of the curve")
    return entries


def chosen_fell(entries: list[dict]) -> bool:
    """Whether DPO has cost the chosen answers a tenth of their log-probability, and a nat, since the first evaluation."""
    values = [entry["eval_chosen_logps"] for entry in entries if "eval_chosen_logps" in entry]
    return len(values) > 1 and values[-1] < values[0] - max(1.0, 0.1 * abs(values[0]))


def _short(value):
    return float(f"{value:.8g}") if isinstance(value, float) else value
