"""The best weights of a run, by its evaluations, kept apart from the checkpoints until the run is finished.

best/step-N.safetensors holds the weights that are trained, best/step-N.json, written after it, says of which run and step they are,
with their checksum. At most two are kept: the best of all, and the best at the last checkpoint, for a run that goes on from there.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from utils.errors import UserError
from utils.files import read_json, sha256_of, show_path, write_json
from utils.training.run_folder import BEST, RunFolder

CLEARLY = 0.02  # a loss that is higher by this share is clearly worse
CLEARLY_FEWER = 0.03  # and an accuracy that is lower by this much
CHANCE = 0.5  # of preferring the chosen answer


def best_of(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The best evaluation, the earlier one of two equals: most pairs with a margin above 0 (DPO), then the lowest loss."""
    return min(evaluations, key=lambda entry: (-entry.get("eval_reward_accuracy", 0.0), entry["eval_loss"]))


class BestWeights(TrainerCallback):
    """Writes the weights of each evaluation that is the best so far, and loads the best of all when the run has ended.

    `log` holds the evaluations. With KEEP = "last" nothing is written or loaded.
    """

    def __init__(self, run: RunFolder, log, keep: str):
        self.run, self.log, self.active = run, log, keep == "best"
        self.folder = run.folder / BEST
        self.needed = None  # the step of the best evaluation at the last checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        evaluations = self.log.evaluations()
        self.needed = best_of(evaluations)["step"] if evaluations else None
        self._remove_all_but(self.needed)

    def on_evaluate(self, args, state, control, model, **kwargs):
        evaluations = self.log.evaluations()
        # after the last step the best is what is in memory, and in the last checkpoint
        if not evaluations or state.global_step >= state.max_steps:
            return
        if best_of(evaluations)["step"] == state.global_step and self.active and self.run.main:
            self._remove_all_but(self.needed)
            self._write(model, evaluations[-1])

    def on_save(self, args, state, control, **kwargs):
        if evaluations := self.log.evaluations():
            self.needed = best_of(evaluations)["step"]
            self._remove_all_but(self.needed)

    def load(self, model, step: int) -> bool:
        """Put the weights of `step` into `model`; False, said, where they are not there as they were written."""
        weights, label = self._paths(step)
        try:
            written = read_json(label)
            whole = written["identity"] == self.run.record["identity"] and written["sha256"] == sha256_of(
                weights
            )
        except (OSError, UserError, KeyError, TypeError):
            whole = False
        if not whole:
            print(
                f"{show_path(weights)} is missing or damaged; the weights of the last step are kept instead"
            )
            return False
        tensors = load_file(weights)
        with torch.no_grad():
            for name, weight in trained_weights(model).items():
                weight.copy_(tensors[name])
        return True

    def _write(self, model, entry):
        weights, label = self._paths(entry["step"])
        self.folder.mkdir(exist_ok=True)
        partial = weights.with_name(f".{weights.name}.part")
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in trained_weights(model).items()},
            partial,
        )
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, weights)
        write_json(label, {**entry, "identity": self.run.record["identity"], "sha256": sha256_of(weights)})

    def _paths(self, step) -> tuple[Path, Path]:
        return self.folder / f"step-{step}.safetensors", self.folder / f"step-{step}.json"

    def _remove_all_but(self, step):
        if not self.run.main or not self.folder.is_dir():
            return
        keep = {path.name for path in self._paths(step)}
        for path in list(self.folder.iterdir()):
            if path.name not in keep:
                path.unlink()


def trained_weights(model) -> dict[str, torch.nn.Parameter]:
    """{name: weight} of what training changes."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def verdict(
    start: dict[str, Any], evaluations: list[dict[str, Any]], losses: list[float], kept: int
) -> list[str]:
    """Which step the finished model is of, in words, and warnings where the run should have been another.

    start: the evaluation before training; evaluations: those after it, in order; losses: of the training steps;
    kept: the step whose weights the finished model has.
    """
    best, last = best_of(evaluations), evaluations[-1]
    preference = "eval_reward_accuracy" in last
    value, what = (
        (_pairs, "most held-out pairs told apart") if preference else (_loss, "lowest held-out loss")
    )
    if best is last:
        lines = [f"kept: the last step, {last['step']}, with the {what} ({value(last)})"]
    elif kept == best["step"]:
        lines = [
            f"kept: step {best['step']}, with the {what} ({value(best)}; the last step, {last['step']}: {value(last)})"
        ]
    else:
        lines = [
            f"kept: the last step, {last['step']} ({value(last)}; the best was step {best['step']}: {value(best)})"
        ]
    worse = last["eval_loss"] > (1 + CLEARLY) * best["eval_loss"]
    if preference:
        worse = last["eval_reward_accuracy"] < best["eval_reward_accuracy"] - CLEARLY_FEWER
    if _no_better(best, start, preference):
        lines.append(_what_to_change(value(best), preference, losses))
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


def _no_better(best, start, preference):
    if preference:
        return best["eval_reward_accuracy"] <= CHANCE
    return best["eval_loss"] >= start["eval_loss"]


def _what_to_change(value, preference, losses):
    few = max(1, len(losses) // 10)
    learnt = sum(losses[-few:]) < sum(losses[:few])
    change = (
        "the training loss fell, so it learns the training rows by heart: lower LEARNING_RATE, or give it more rows"
        if learnt
        else "the training loss did not fall either: try another LEARNING_RATE (a tenth first), then more EPOCHS"
    )
    than = "at chance" if preference else "no better than before training"
    return f"warning: the best evaluation is {than} ({value}); {change}"
