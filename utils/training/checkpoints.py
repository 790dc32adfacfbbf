"""Checkpoints of a run: which there are, and whether each is as it was written."""

import json
from pathlib import Path

from utils.files import sha256_of, show_path
from utils.progress import progress


def write_manifest(checkpoint):
    """Write MANIFEST.json, {file: [bytes, sha256]}, as the last file of a checkpoint."""
    files = {
        path.name: [path.stat().st_size, sha256_of(path)]
        for path in sorted(Path(checkpoint).iterdir())
        if path.is_file()
    }
    (Path(checkpoint) / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


MANIFEST = "MANIFEST.json"


def whole_checkpoints(folder):
    """The checkpoints that are as they were written, oldest first; damaged ones are named and passed over."""
    whole = []
    for path in list_checkpoints(folder):
        try:
            files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            damaged = [
                name
                for name, (size, digest) in progress(f"checking {path.name}", "files")(list(files.items()))
                if (path / name).stat().st_size != size or sha256_of(path / name) != digest
            ]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if damaged:
            print(f"{show_path(path)} is damaged ({damaged[0]}); going back to the one before")
        else:
            whole.append(path)
    return whole


def list_checkpoints(folder):
    """The checkpoint folders of a run, oldest first."""
    found = (path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
