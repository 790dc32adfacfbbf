"""Results that are kept between runs: each under the identity that it was made for, and whole by its checksum, or made again.

An identity is a dict of everything that decides the result (digests of data and model, settings, versions). A small result is
one JSON file that holds both; a file or a folder too large for JSON gets a record beside it, written after it:

    scores = read_kept(path, identity)          if not is_kept(tokens, identity):
    if scores is None:                              make(tokens)
        scores = measure()                          seal(tokens, identity)
        write_kept(path, identity, scores)
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write, read_json, sha256_of, show_path, write_json

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
    record = _read_record(path)
    why = _not_for(identity, record)
    if not why and record.get("sha256") != digest(record.get("value")):
        why = "damaged"
    return record["value"] if _is_of_use(path, why) else None


def seal(path: Path, identity: dict[str, Any]) -> None:
    """Record that the file or folder at `path` is whole and was made for `identity`. Its data reach the disk first."""
    files, folder = list_files(path), path if path.is_dir() else path.parent
    for name in files:
        with open(folder / name, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
    write_json(record_path(path), {"identity": identity, "files": files})


def is_kept(path: Path, identity: dict[str, Any]) -> bool:
    """Tell whether `path` is there, whole, and was made for `identity`. One line says why what is there is of no use."""
    return record_path(path).is_file() and _is_of_use(path, damage(path, identity))


def damage(path: Path, identity: dict[str, Any]) -> str:
    """Say what is wrong with a sealed file or folder: "damaged (optimizer.pt)", "of other data"; "" if nothing is. Reads all of it."""
    record = _read_record(record_path(path))
    name = changed_file(path if path.is_dir() else path.parent, record.get("files"))
    return _not_for(identity, record) or (f"damaged ({name})" if name else "")


def record_path(path: Path) -> Path:
    """The path of the record of a sealed file, beside it, or of a folder, inside it, so that both move together."""
    return path / "MANIFEST.json" if path.is_dir() else path.with_name(f"{path.name}.json")


def list_files(path: Path) -> Files:
    """The files of a folder (not of folders in it), or the one file, with their sizes and checksums."""
    files = [file for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else [path]
    found = [file for file in files if file != record_path(path)]
    return {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in found}


def changed_file(folder: Path, files: Files, since: float = 0) -> str:
    """The first of the recorded files that is not as it was recorded; "" if all are.

    With `since`, a time as in st_mtime, a file that is older counts as unchanged if its size is right, and is not read.
    """
    if not isinstance(files, dict) or not files:
        return "its record"
    for name, recorded in files.items():
        path, wanted = folder / name, recorded if isinstance(recorded, dict) else {}
        if not path.is_file() or path.stat().st_size != wanted.get("size"):
            return name
        if path.stat().st_mtime >= since and sha256_of(path) != wanted.get("sha256"):
            return name
    return ""


def _read_record(path):
    try:
        found = read_json(path)
    except (UserError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _not_for(identity, record):
    """Why a record does not belong to `identity`, or ""."""
    before = record.get("identity")
    if not isinstance(before, dict):
        return "damaged"
    names = [name for name in identity | before if digest(before.get(name)) != digest(identity.get(name))]
    return f"of other {', '.join(names)}" if names else ""


def _is_of_use(path, why):
    if why:
        print(f"{show_path(path)} is {why}; making it again", flush=True)
    return not why
