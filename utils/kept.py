"""Results that are kept between runs: each under the identity that it was made for, and whole by its checksum, or made again.

An identity is a dict of everything that decides the result (digests of data and model, settings, versions). A small result is
one JSON file that holds both (write_kept, read_kept); a large file or a folder gets a record beside it, written after it (seal,
is_kept).
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write, read_json, sha256_of, show_path

Files = dict[str, dict[str, Any]]  # {name inside the folder: {"size": bytes, "sha256": hex digits}}


def digest(value: object) -> str:
    """The sha256 of a JSON value (dicts have texts as keys, in any order), as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_kept(path: Path, identity: dict[str, Any], value: object) -> None:
    """Keep a JSON value for `identity`."""
    with atomic_write(path) as file:
        file.write(json.dumps({"identity": identity, "sha256": digest(value), "value": value}) + "\n")


def read_kept(path: Path, identity: dict[str, Any]) -> Any | None:
    """The value that was kept for `identity`, else None. One line says why a file that is there is of no use."""
    if not path.is_file():
        return None
    why, value = _judge(path, identity)
    return value if _is_of_use(path, why) else None


def seal(path: Path, identity: dict[str, Any]) -> None:
    """Record that the file or folder at `path` is whole and was made for `identity`. Its data reach the disk first."""
    folder, files = (path, sorted(path.iterdir())) if path.is_dir() else (path.parent, [path])
    listed = {}
    for file in files:
        if file.is_file() and file != record_path(path):
            with open(file, "r+b") as data:  # Windows flushes only what is open for writing
                os.fsync(data.fileno())
            listed[file.name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    write_kept(record_path(path), identity, listed)


def is_kept(path: Path, identity: dict[str, Any]) -> bool:
    """Tell whether `path` is there, whole, and was made for `identity`. One line says why what is there is of no use."""
    return record_path(path).is_file() and _is_of_use(path, damage(path, identity))


def damage(path: Path, identity: dict[str, Any]) -> str:
    """Say what is wrong with a sealed file or folder: "damaged (optimizer.pt)", "of other data"; "" if nothing is. Reads all of it."""
    why, files = _judge(record_path(path), identity)
    changed = "" if why else changed_file(path if path.is_dir() else path.parent, files)
    return f"damaged ({changed})" if changed else why


def record_path(path: Path) -> Path:
    """The path of the record of a sealed file, beside it, or of a folder, inside it, so that both move together."""
    return path / "MANIFEST.json" if path.is_dir() else path.with_name(f"{path.name}.json")


def changed_file(folder: Path, files: Files) -> str:
    """The first of the recorded files that is not as it was recorded; "" if all are. Reads those whose sizes are right."""
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded.get("size"):
            return name
        if sha256_of(path) != recorded.get("sha256"):
            return name
    return ""


def _judge(path, identity):
    """(why the record at `path` is of no use for `identity`, or ""; its value)"""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):
        record = read_json(path)
        before, value = record["identity"], record["value"]
        if record["sha256"] == digest(value):
            names = [
                name for name in identity | before if digest(before.get(name)) != digest(identity.get(name))
            ]
            return f"of other {', '.join(names)}" if names else "", value
    return "damaged", None


def _is_of_use(path, why):
    if why:
        print(f"{show_path(path)} is {why}; making it again", flush=True)
    return not why
