"""The life of a training folder: begin, go on where it stopped, finish; one run at a time, and no run mixed with another.

`run.json` says what a folder holds. Its "identity" is everything that decides the weights: the settings that matter, the
fingerprints of data and base model, device and number format. The same command finds the same identity and goes on; a
different one is refused with the differences named.
"""

import datetime
import importlib.metadata
import math
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from utils.device import Device
from utils.errors import UserError
from utils.files import sha256_of, show_path, write_folder
from utils.model.folder import RECORD, RECORD_FIELDS, model_sha256, read_record, write_record
from utils.training import lock
from utils.training.checkpoints import remove_old_checkpoints, whole_checkpoints

# Settings that decide where and how a run is shown, not what it computes.
NOT_IDENTITY = {
    "OUTPUT_DIR",
    "FRESH",
    "ESTIMATE",
    "SHOW_EXAMPLE",
    "DEVICE",
    "PRECISION",
    "KEEP_CHECKPOINTS",
    "CHECKPOINT_MINUTES",
}


# What a finished run may be given more of; it goes on then. 0 is no limit.
LENGTH = ("EPOCHS", "MAX_STEPS", "HOURS")
BEST = "best"  # the folder of the best weights so far (utils/training/best.py)
PACKAGES = ("torch", "transformers", "peft", "accelerate")


# The last barrier's record, kept until the interpreter ends. Gloo's thread lets go of it a moment after the barrier; were
# that the last reference, the thread would wait for the interpreter's lock, while the main thread, holding it, waits for
# the thread to end: 2 of 30 runs ended well and then hung for ever (torch 2.13; pytorch issue 190489).
LAST_MEETING = []


class RunFolder:
    """One training folder, held by this process until it ends.

    `checkpoint` is the checkpoint to go on from (None: from the start); `finished` whether there is nothing left to do.
    """

    def __init__(self, settings, device: Device):
        self.folder = settings.OUTPUT_DIR
        # where accelerate launch or torchrun started several processes, they meet here; a day, because the others wait at
        # a barrier while the first computes DPO's reference log-probabilities
        self.processes = PartialState(cpu=device.name == "cpu", timeout=datetime.timedelta(days=1))
        self.main = self.processes.is_main_process  # the one writer
        self.checkpoint, self.finished, self.first_step = None, False, 0
        self.record: dict[str, Any] = {}
        self._earlier = ""  # the name under which the model of a run that is prolonged is kept
        if settings.ESTIMATE:  # looks, and touches nothing
            return
        identity = _identity(settings, device) | {"processes": self.processes.num_processes}
        with self.processes.main_process_first():
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock.lock_folder(self.folder)
                if settings.FRESH:
                    self._move_aside()
            self._open(settings, device, identity)

    def _open(self, settings, device, identity):
        record = read_record(self.folder, RECORD_FIELDS)
        self.finished = bool(record) and record["status"] == "finished"
        prolonged = self.finished and _asks_for_more(record["identity"], identity)
        found = [] if self.finished and not prolonged else whole_checkpoints(self.folder)
        if prolonged:
            return self._prolong(record, found, settings, device, identity)
        if not record and (found or any(self.folder.glob("*.safetensors"))):
            raise UserError(
                f"{show_path(self.folder)} holds a model that this script did not train; "
                "choose another --output-dir, or --fresh to move it aside"
            )
        if record and not found and not self.finished:
            record = None  # stopped before its first checkpoint: there is nothing to go on from or to lose
        if record:
            _refuse_changes(record["identity"], identity, self.folder)
        self.checkpoint = found[-1] if found else None
        self.record = record or _new_record(settings, device, identity)
        self.first_step = self.record.get("schedule", {}).get("start", 0)

    def _prolong(self, record, checkpoints, settings, device, identity):
        """Go on from the last state of a finished run, as a new run that names it; its folder is this run's at `begin`."""
        self.finished, self.first_step = False, record["results"]["steps"]
        if not checkpoints or self.last_step(checkpoints) != self.first_step:
            raise UserError(
                f"{show_path(self.folder)} cannot be prolonged: the checkpoint of its last step, {self.first_step}, is not there; "
                "choose another --output-dir, or --fresh"
            )
        self.checkpoint = checkpoints[-1]
        self.record = _new_record(settings, device, identity)
        self.record["continues"] = {
            name: record[name]
            for name in ("started", "finished", "identity", "results", "continues")
            if name in record
        }
        # steps are computed as they were, and evaluations can be compared
        self.record |= {name: record[name] for name in ("plan", "eval_rows") if name in record}
        self._earlier = f"{self.folder.resolve().name}.{_stamp(record['finished'])}"

    @staticmethod
    def last_step(checkpoints: list[Path]) -> int:
        return int(checkpoints[-1].name.rpartition("-")[2])

    def seconds_given(self, hours: float) -> float:
        """Seconds that HOURS leaves to this run: those that a run took which it prolongs are over."""
        return max(
            0.0, 3600 * hours - self.record.get("continues", {}).get("results", {}).get("seconds", 0.0)
        )

    def from_main(self, value: Any) -> Any:
        """The value that the main process has, in all processes."""
        return broadcast_object_list([value])[0] if self.processes.num_processes > 1 else value

    def kept(self, name: str, value: Any) -> Any:
        """`value`, which run.json keeps under this name; what it has kept already, where a run goes on."""
        return self.record.setdefault(name, value)

    def write(self) -> None:
        """Write run.json."""
        if self.main:
            write_record(self.folder, self.record)

    @property
    def checkpoint_step(self) -> int:
        """The step of the checkpoint to go on from; 0 without one."""
        return self.last_step([self.checkpoint]) if self.checkpoint else 0

    def begin(self) -> None:
        """Training starts now: from here on the folder is this run's. The model of a run that it prolongs is moved aside."""
        if self.main and self._earlier:
            aside = self._aside(self._earlier)
            aside.mkdir(exist_ok=True)
            for path in self._entries():
                if path.name in (RECORD, "training_log.jsonl", "reference_logps.json"):
                    shutil.copy(path, aside)
                elif not path.name.startswith("checkpoint-"):
                    os.replace(path, aside / path.name)
            remove_old_checkpoints(self.folder, 1)  # those before the state that it goes on from
            self.record["continues"]["folder"] = show_path(aside)
            print(
                f"prolonging the run that was finished after step {self.first_step}; its model is kept in {show_path(aside)}"
            )
        self._earlier = ""
        self.write()

    def finish(self, save: Callable[[Path], None], results: dict[str, Any]) -> None:
        """Write the finished model: `save(folder)` fills a hidden folder, whose entries then move to the run's root.

        run.json says "finished" last, so a kill before that leaves a run that goes on from its last checkpoint.
        """
        if self.main:
            print(f"saving the finished model to {show_path(self.folder)}", flush=True)
            write_folder(self.folder, save)
            self.record.update(status="finished", finished=_now(), results=results)
            write_record(self.folder, self.record)
            shutil.rmtree(self.folder / BEST, ignore_errors=True)  # the finished model has them now
        if self.processes.num_processes > 1:
            LAST_MEETING.append(
                torch.distributed.barrier(async_op=True, device_ids=[self.processes.local_process_index])
            )
            LAST_MEETING[-1].wait()
            self.processes.destroy_process_group()

    def say_finished(self) -> None:
        """Tell that this very run is done."""
        place = show_path(self.folder)
        print(
            f"{place} is finished already (held-out loss {self.record['results']['eval_loss']:.4f}); nothing to do. Chat with it: "
            f"python model_download/load_local_model.py {place}; train it further: "
            "more --epochs; train again: --fresh"
        )

    def _move_aside(self) -> None:
        """Move an earlier run beside its folder."""
        aside = self._aside(f"{self.folder.resolve().name}.{datetime.datetime.now():%Y%m%d-%H%M%S}")
        if moving := self._entries():
            aside.mkdir()
            for path in moving:
                os.replace(path, aside / path.name)
            print(f"--fresh: the earlier run is kept in {show_path(aside)}")

    def _aside(self, name: str) -> Path:
        """A folder beside this one; inside it where it is a disk of its own (a mount point)."""
        folder = self.folder.resolve()  # it may be a link to another disk
        if _device(folder) != _device(folder.parent):
            return folder / name.replace(folder.name, "earlier", 1)
        return folder.with_name(name)

    def _entries(self) -> list[Path]:
        """What is in the folder, but for the lock and earlier runs."""
        return [
            path
            for path in self.folder.resolve().iterdir()
            if path.name != lock.NAME and not path.name.startswith("earlier.")
        ]


def _device(path: Path) -> int:
    return path.stat().st_dev


def _identity(settings, device):
    identity = {}
    for name, value in settings.as_dict().items():
        if name in NOT_IDENTITY:
            continue
        if name.endswith("_FILE"):
            value = f"sha256 {sha256_of(getattr(settings, name))}"
        elif name.endswith("MODEL"):
            value = f"sha256 {model_sha256(getattr(settings, name))}"
        identity[name] = value
    return {**identity, "device": f"{device.name} {'bf16' if device.bf16 else 'fp32'}"}


def _new_record(settings, device: Device, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "status": "running",
        "identity": identity,
        "settings": settings.as_dict(),
        "device": str(device),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "started": _now(),
    }


def _asks_for_more(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two identities differ in the length of the run only, and the second run is the longer one."""

    def length(identity):
        values = (identity.get(name, 0) for name in LENGTH)
        return [value or math.inf for value in values]  # 0: no limit

    rest = [{name: value for name, value in one.items() if name not in LENGTH} for one in (before, now)]
    more = [new - old if new != old else 0 for old, new in zip(length(before), length(now))]
    return rest[0] == rest[1] and max(more) > 0 and min(more) >= 0


def _stamp(moment: str) -> str:
    return datetime.datetime.fromisoformat(moment).astimezone().strftime("%Y%m%d-%H%M%S")


def _refuse_changes(before, now, folder):
    changed = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{show_path(folder)} holds a run with other settings or data ({'; '.join(changed)}); restore them to go "
            "on, choose another --output-dir, or start over with --fresh"
        )


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
