"""The life of a training folder: begin, go on where it stopped, finish; one run at a time, and no run mixed with another.

`run.json` says what a folder holds. Its "identity" is everything that decides the weights: the settings that matter, the
fingerprints of data and base model, device and number format. The same command finds the same identity and goes on; a
different one is refused with the differences named.
"""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from utils.device import Device
from utils.errors import UserError
from utils.files import sha256_of, show_path, write_folder
from utils.model.folders import model_sha256
from utils.model.run_record import FIELDS, read_record, write_record
from utils.training import lock
from utils.training.checkpoints import whole_checkpoints

# Settings that decide where and how a run is shown, not what it computes.
NOT_IDENTITY = {"OUTPUT_DIR", "FRESH", "ESTIMATE", "SHOW_EXAMPLE", "DEVICE", "PRECISION", "KEEP_CHECKPOINTS"}


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
        self.checkpoint, self.finished = None, False
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
        record = read_record(self.folder, FIELDS)
        self.finished = bool(record) and record["status"] == "finished"
        found = [] if self.finished else whole_checkpoints(self.folder)
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
        self.record = record or {
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

    def begin(self) -> None:
        """Training starts now: from here on the folder is this run's."""
        if self.main:
            write_record(self.folder, self.record)

    def finish(self, save: Callable[[Path], None], results: dict[str, Any]) -> None:
        """Write the finished model: `save(folder)` fills a hidden folder, whose entries then move to the run's root.

        run.json says "finished" last, so a kill before that leaves a run that goes on from its last checkpoint.
        """
        if self.main:
            print(f"saving the finished model to {show_path(self.folder)}", flush=True)
            write_folder(self.folder, save)
            self.record.update(status="finished", finished=_now(), results=results)
            write_record(self.folder, self.record)
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
            f"python model_download/load_local_model.py {place}; train again: --fresh"
        )

    def _move_aside(self) -> None:
        """Move an earlier run beside its folder; inside it where the folder is a disk of its own (a mount point)."""
        folder = self.folder.resolve()  # it may be a link to another disk
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        aside = folder.with_name(f"{folder.name}.{stamp}")
        if _device(folder) != _device(folder.parent):
            aside = folder / f"earlier.{stamp}"
        moving = [
            path
            for path in folder.iterdir()
            if path.name != lock.NAME and not path.name.startswith("earlier.")
        ]
        if moving:
            aside.mkdir()
            for path in moving:
                os.replace(path, aside / path.name)
            print(f"--fresh: the earlier run is kept in {show_path(aside)}")


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
