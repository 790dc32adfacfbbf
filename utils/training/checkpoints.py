"""Checkpoints of a run: which there are, whether each is as it was written, and writing one that is whole before it is seen."""

import json
import os
import shutil
from pathlib import Path

from utils.files import sha256_of, show_path
from utils.text import progress

MANIFEST = "MANIFEST.json"  # {file: [bytes, sha256]}, the last file of a checkpoint
NEEDED = {"trainer_state.json", "optimizer.pt", "scheduler.pt"}  # to go on from it, beside the weights


class HiddenCheckpoint:
    """A checkpoint written under a hidden name. `with` writes it, `publish` gives it its real name.

    `main`: whether this is the process that writes; the others only pass by.
    """

    def __init__(self, run_dir: Path, name: str, main: bool):
        self.run_dir, self.name, self.main = run_dir, name, main
        self.folder = run_dir / ".partial-checkpoint"
        if main:
            print(f"writing {name}", flush=True)  # 7 GB take a while
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "HiddenCheckpoint":
        return self

    def __exit__(self, failed, *_) -> None:
        if failed and self.main:  # a full disk, above all: the half that was written must not keep it full
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Move it into place: the data reach the disk before the name does, so that a power cut leaves no half checkpoint."""
        written, final = self.folder / self.name, self.run_dir / self.name
        write_manifest(written)
        for file in written.iterdir():
            with open(file, "r+b") as opened:  # Windows flushes only what is open for writing
                os.fsync(opened.fileno())
        shutil.rmtree(final, ignore_errors=True)  # there only if it was found damaged
        os.replace(written, final)
        self.folder.rmdir()


def write_manifest(checkpoint: Path) -> None:
    """Write the MANIFEST of a checkpoint folder."""
    files = {
        path.name: [path.stat().st_size, sha256_of(path)]
        for path in sorted(Path(checkpoint).iterdir())
        if path.is_file()
    }
    (Path(checkpoint) / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that are as they were written, oldest first; damaged ones are named and passed over."""
    whole = []
    for path in list_checkpoints(folder):
        if damage := _damage(path):
            print(f"{show_path(path)} is damaged ({damage}); going back to the one before")
        else:
            whole.append(path)
    return whole


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; "" if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if not NEEDED <= set(files) or not any(name.endswith(".safetensors") for name in files):
            return f"{MANIFEST} does not list a whole checkpoint"
        for name, (size, digest) in progress(f"checking {checkpoint.name}", "files")(list(files.items())):
            if (checkpoint / name).stat().st_size != size or sha256_of(checkpoint / name) != digest:
                return name
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return str(error)
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = (path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
