"""One training folder and the run that owns it: begin, go on where it stopped, keep the best weights, finish.

`run.json` says what a folder holds. Its "identity" is everything that decides the weights: the settings that matter, the
fingerprints of data and base model, device and number format. The same command finds the same identity and goes on; a
different one is refused with the differences named. A checkpoint is a model folder with the optimizer's moments beside it.
"""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors.torch import load_file, save_file

from utils.device import Device
from utils.errors import UserError
from utils.files import read_json, sha256_of, show_path, write_folder, write_json
from utils.kept import damage, record_path, seal
from utils.model.folder import RECORD, model_sha256, read_record
from utils.text import duration, format_bytes
from utils.training.log import Clock, RunLog, best_of, cpu_seconds, write_page
from utils.training.memory import StepPlan

# Settings that decide where and how a run is shown, not what it computes.
NOT_IDENTITY = set(
    "OUTPUT_DIR FRESH ESTIMATE SHOW_EXAMPLE DEVICE PRECISION KEEP_CHECKPOINTS CHECKPOINT_MINUTES TRACKER".split()
)
LOCK, HOLDER = ".lock", ".lock.pid"  # the lock file, and the number of the process that holds it
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for each weight
LAST_MEETING = []  # keeps gloo's last barrier: let go of by gloo's own thread, it hung 2 of 30 processes at their end (torch 2.13)


class Run:
    """One training folder, held by this process until it ends.

    `checkpoint`: to go on from, None: from the start; `step`: the number of its steps; `finished`: there is nothing left to do,
    which was said. `title`: the method. UserError if another process holds the folder, or if it holds something else than this run.
    """

    def __init__(self, settings, device: Device, title: str):
        print(f"device: {device}")
        settings.EVAL_FILE = settings.EVAL_FILE or settings.TRAIN_FILE  # the plan says so
        self.settings, self.device = settings, device
        self.began, self.folder = settings.began, settings.OUTPUT_DIR
        self.accelerator = _accelerator(settings, device)
        self.main, self.processes = self.accelerator.is_main_process, self.accelerator.num_processes
        self.checkpoint, self.step, self.finished = None, 0, False
        self.asked_to_stop: float | None = None  # when, in monotonic seconds
        self.record: dict[str, Any] = {}
        title = f"{title} of {Path(settings.MODEL).name} on {settings.TRAIN_FILE.name}, {_now()[:10]}"
        evaluated = "training rows" if settings.EVAL_FILE == settings.TRAIN_FILE else "held-out rows"
        self.log, self.used = RunLog(self.folder, self.main, title, evaluated), cpu_seconds()
        torch.manual_seed(settings.SEED)  # of an adapter's initial weights
        if settings.ESTIMATE or settings.SHOW_EXAMPLE:  # looks, and touches nothing
            return
        identity = _identity(settings, device) | {"processes": self.processes}
        with self.accelerator.main_process_first():
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = _hold(self.folder)
                if settings.FRESH:
                    _move_aside(settings)
            self._open(identity)

    def _open(self, identity):
        record, checkpoints = read_record(self.folder), list_checkpoints(self.folder)
        place = show_path(self.folder)
        self.finished = bool(record) and record["status"] == "finished"
        if not record and (checkpoints or any(self.folder.glob("*.safetensors"))):
            raise UserError(f"{place} holds a model that this script did not train; --fresh moves it aside")
        if record and (checkpoints or self.finished):  # else there is nothing to go on from or to lose
            _refuse_changes(record["identity"], identity, place)
            self.record = record
        if self.finished:
            print(
                f"{place} is finished already (loss {record['results']['eval_loss']:.4f}). Chat with it: python "
                f"model_download/load_local_model.py {place}; train it further: --model {place} and another --output-dir; again: --fresh"
            )
            return
        for path in reversed(checkpoints):
            if not (why := damage(path, identity)):
                self.checkpoint, self.step = path, step_of(path)
                return
            then = "starting over" if path == checkpoints[0] else "going back to the one before"
            print(f"{show_path(path)} is {why}; {then}")
        packages = ("torch", "transformers", "peft", "accelerate")
        versions = {name: importlib.metadata.version(name) for name in packages}
        self.record = {
            "status": "running",
            "identity": identity,
            "settings": self.settings.as_dict(),
            "device": str(self.device),
            "versions": versions | {"python": platform.python_version()},
            "started": _now(),
        }

    def keep(self, name: str, value: Any) -> Any:
        """`value`, which run.json keeps under this name; what it has kept already, if the run goes on."""
        return self.record.setdefault(name, value)

    def write(self) -> None:
        if self.main:
            write_json(self.folder / RECORD, self.record)

    def way(self, step: int) -> StepPlan:
        """How the step that follows `step` finished ones is computed: the plan has a new entry from where memory ran out."""
        return StepPlan(*[way for since, *way in self.record["plan"] if since <= step][-1])

    def agree(self, *wishes: float) -> list[float]:
        """The largest that any process has of each of these numbers: what one wishes, all do. All have to call it."""
        if self.processes == 1:
            return list(wishes)
        joined = torch.tensor(wishes, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX)
        return joined.tolist()

    def begin(self, plan, learner) -> None:
        """Training starts now, from the checkpoint if there is one: from here on the folder is this run's.

        `done`: the progress so far; `evaluation_owed`: whether an evaluation comes before the next step.
        """
        settings, self.done, self.evaluation_owed = self.settings, 0.0, True  # the evaluation before training
        self.clock = Clock(settings, plan.weights)
        if self.checkpoint:
            print(f"going on from {show_path(self.checkpoint)}")
            kept = read_json(self.checkpoint / "state.json")
            self._load_checkpoint(learner, kept)
            self.clock.before, self.clock.seconds = kept["elapsed"], kept["seconds"]
            self.done, self.evaluation_owed = kept["progress"], kept["evaluation_owed"]
        again = self.log.begin(self.step, self.done, plan)
        # HOURS: steps that are done again take the rates that they had.
        self.replayed = {entry["step"]: entry["progress"] for entry in again if "progress" in entry}
        self.write()
        if settings.TRACKER != "none":
            config = {name: str(value) for name, value in settings.as_dict().items()}
            self.accelerator.init_trackers(self.folder.name, config)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        """Ctrl-C, or SIGTERM: the first one stops after this step, the second at once."""
        if self.asked_to_stop and time.monotonic() - self.asked_to_stop > 1:  # a launcher hands it on at once
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last checkpoint")
        if not self.asked_to_stop:
            self.asked_to_stop = time.monotonic()
            text = "stopping after this step, with a checkpoint; Ctrl-C again stops at once"
            print(f"\n{text}", file=sys.stderr, flush=True)

    def add(self, entry: dict[str, Any], progress: float) -> None:
        """Log an entry of a step or of an evaluation, also in the TRACKER."""
        if self.settings.TRACKER != "none":
            self.accelerator.log({**entry}, step=entry["step"])
        self.log.add(entry, progress)

    def progress(self, step: int, before: float, steps: int) -> float:
        """The progress after `step` steps of at most `steps`, which was `before`; 1 ends the run. All processes have to call it."""
        if self.settings.HOURS == 0:
            return step / steps
        (now,) = self.agree(self.clock.progress() if self.main else 0.0)  # the main process has the clock
        return self.replayed.get(step, float(f"{min(1.0, max(before, step / steps, now)):.8g}"))

    def save_checkpoint(
        self, step: int, progress: float, owed: bool, learner, save: Callable[[Path], None]
    ) -> None:
        """Write checkpoint-`step`, whole before it has its name, and remove old ones. owed: an evaluation was left off."""
        self.accelerator.wait_for_everyone()
        name, place = f"checkpoint-{step}", self.folder / ".partial-checkpoint"
        if self.main:
            print(f"writing {name}", flush=True)  # 7 GB take a while
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            try:
                save(place)
                moments = {
                    f"{kind}.{weight_name}": learner.optimizer.state[weight][kind].cpu().contiguous()
                    for weight_name, weight in trained_weights(learner.model).items()
                    for kind in MOMENTS
                }
                save_file(moments, place / "optimizer.safetensors")
                state = {
                    "progress": progress,
                    "evaluation_owed": owed,
                    "elapsed": self.clock.elapsed(),
                    "seconds": self.clock.seconds,
                    # the steps that changed the weights, which in float16 are not all
                    "updates": max(int(state["step"]) for state in learner.optimizer.state.values()),
                }
                if folded := learner.folded:
                    state |= {"loss_scale": folded.scale.item(), "good_steps": folded.good.item()}
                write_json(place / "state.json", state)
                seal(place, self.record["identity"])
                shutil.rmtree(self.folder / name, ignore_errors=True)  # there only if it was found damaged
                os.replace(place, self.folder / name)
            finally:  # a full disk, above all: the half that was written must not keep it full
                shutil.rmtree(place, ignore_errors=True)
            for old in list_checkpoints(self.folder)[: -self.settings.KEEP_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.clock.ended("checkpoint")

    def _load_checkpoint(self, learner, kept):
        (file,) = self.checkpoint.glob("*model.safetensors")
        load_weights(learner.model, file)
        moments = load_file(self.checkpoint / "optimizer.safetensors")  # mapped: Windows keeps such a file
        for name, weight in trained_weights(learner.model).items():
            learner.optimizer.state[weight] = {
                "step": torch.tensor(float(kept["updates"]), device=weight.device),
                **{kind: moments[f"{kind}.{name}"].to(weight.device, copy=True) for kind in MOMENTS},
            }
        if learner.folded:
            learner.folded.scale.fill_(kept["loss_scale"])
            learner.folded.good.fill_(kept["good_steps"])

    def keep_if_best(self, step: int, model) -> None:
        """Write best/step-N.safetensors if the latest evaluation is the best so far.

        The best at the last checkpoint stays beside it: a run that goes on from there may not come by the newer one again.
        """
        evaluations = self.log.evaluations()
        if self.settings.KEEP == "best" and best_of(evaluations)["step"] == step and self.main:
            path, saved = self._best(step), max(map(step_of, list_checkpoints(self.folder)), default=0)
            path.parent.mkdir(exist_ok=True)
            earlier = [entry for entry in evaluations if entry["step"] <= saved]
            stays = self._best(best_of(earlier)["step"]) if earlier else path
            for old in set(path.parent.iterdir()) - {stays, record_path(stays)}:
                old.unlink()
            tensors = trained_weights(model).items()
            save_file({name: weight.detach().cpu().contiguous() for name, weight in tensors}, path)
            seal(path, self.record["identity"])

    def load_best(self, model) -> dict[str, Any]:
        """Put the best weights into the model, and return their evaluation; the last one, said, if they are not as they were written."""
        evaluations = self.log.evaluations()
        best = best_of(evaluations) if self.settings.KEEP == "best" else evaluations[-1]
        if best is evaluations[-1] or not self.main:  # only the main process writes the model
            return best
        path = self._best(best["step"])
        if not path.is_file() or damage(path, self.record["identity"]):
            print(f"{show_path(path)} is missing or damaged; the weights of the last step are kept instead")
            return evaluations[-1]
        load_weights(model, path)
        return best

    def _best(self, step):
        return self.folder / "best" / f"step-{step}.safetensors"

    def finish(self, save: Callable[[Path], None], results: dict[str, Any]) -> None:
        """Write the finished model: `save(folder)` fills a hidden folder, whose entries move to the root; run.json says it last."""
        place, memory = show_path(self.folder), format_bytes(results["peak_memory_bytes"])
        if self.main:
            print(f"saving the finished model to {place}", flush=True)
            write_folder(self.folder, save)
            self.record.update(status="finished", finished=_now(), results=results)
            self.write()
            shutil.rmtree(self.folder / "best", ignore_errors=True)  # the finished model has them now
            write_page(self.folder)
            self._lock.release()
        print(
            f"finished in {duration(time.monotonic() - self.began)}: loss on {results['measured_on']} {results['eval_loss_before']:.4f} -> "
            f"{results['eval_loss']:.4f}, {results['tokens_per_second']:,.0f} tokens/s, peak memory {memory}\n"
            f"model: {place}   loss curve: {place}/loss_curve.png   report: {place}/report.html\n"
            f"chat with it: python model_download/load_local_model.py {place}"
        )
        if self.processes > 1:
            device = [self.accelerator.local_process_index]
            LAST_MEETING.append(torch.distributed.barrier(async_op=True, device_ids=device))
            LAST_MEETING[-1].wait()
            self.accelerator.state.destroy_process_group()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*[0-9]"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def trained_weights(model) -> dict[str, torch.nn.Parameter]:
    """{name: weight} of what training changes."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def load_weights(model, file: Path) -> None:
    """Put the weights of a file of this run into those of `model` that are trained."""
    tensors = load_file(file)
    for name, weight in trained_weights(model).items():
        weight.copy_(tensors[name] if name in tensors else tensors[name.replace(".default.", ".")])  # by peft


def _accelerator(settings, device):
    """accelerate's view of this run: its processes, their device, and the TRACKER."""
    tracker = None if settings.TRACKER == "none" else settings.TRACKER
    if tracker and not importlib.util.find_spec(tracker):
        raise UserError(f"--tracker {tracker} needs its package: pip install {tracker}")
    accelerator = Accelerator(
        cpu=device.name == "cpu",
        log_with=tracker,
        project_dir=str(settings.OUTPUT_DIR),
        kwargs_handlers=[
            # a day, because the others wait while the first process computes DPO's reference log-probabilities
            InitProcessGroupKwargs(timeout=datetime.timedelta(days=1)),
            # gradients are kept once, not also in the buckets they travel in
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    count = torch.cuda.device_count()
    if device.name == "cuda" and accelerator.num_processes == 1 < count:
        print(
            f"one of {count} GPUs is used; all: accelerate launch --num_processes {count} {' '.join(sys.argv)}"
        )
    return accelerator


def _hold(folder):
    """Hold the folder's lock until the process ends or the lock is let go of. UserError if that cannot be."""
    lock, holder = filelock.FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        owner = f"process {holder.read_text(encoding='utf-8').strip()}" if holder.is_file() else "unknown"
        what = f"{show_path(folder)} is in use by another run ({owner})"
        raise UserError(f"{what}; wait for it, or choose another --output-dir") from None
    except NotImplementedError:
        raise UserError("this disk knows no locks; choose another --output-dir") from None
    holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock


def _move_aside(settings):
    """--fresh: move an earlier run beside its folder. UserError if that would move something that this run reads."""
    folder = settings.OUTPUT_DIR.resolve()  # it may be a link to another disk
    for name in ("MODEL", "TRAIN_FILE", "EVAL_FILE"):
        path = Path(getattr(settings, name))
        if path.exists() and path.resolve().is_relative_to(folder):
            move = f"--fresh would move {name}, {show_path(path)}, which this run reads"
            raise UserError(f"{move}; choose another --output-dir")
    if moving := [path for path in folder.iterdir() if path.name not in (LOCK, HOLDER)]:
        aside = folder.with_name(f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}")
        aside.mkdir()
        for path in moving:
            shutil.move(path, aside / path.name)
        print(f"--fresh: the earlier run is kept in {show_path(aside)}")


def _identity(settings, device):
    """All that decides the weights, and so must not change while a run goes on."""
    identity = {name: value for name, value in settings.as_dict().items() if name not in NOT_IDENTITY}
    identity["MODEL"] = f"sha256 {model_sha256(settings.MODEL)}"
    for name in ("TRAIN_FILE", "EVAL_FILE"):
        identity[name] = f"sha256 {sha256_of(getattr(settings, name))}"
    return {**identity, "device": f"{device.name} {device.format}"}


def _refuse_changes(before, now, place):
    changed = []
    for name in {**before, **now}:
        if (was := before.get(name)) != (value := now.get(name)):
            hashed = str(value).startswith("sha256")
            changed.append(f"{name} has other content" if hashed else f"{name}: {was} -> {value}")
    if changed:
        raise UserError(
            f"{place} holds a run with other settings or data ({'; '.join(changed)}); restore them, train it further into another "
            f"--output-dir with --model {place}, or start over with --fresh"
        )


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
