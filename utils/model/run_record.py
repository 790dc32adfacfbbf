"""run.json: what a training folder says of itself. The trainers write it; whatever loads, exports or compares models reads it."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json, show_path, write_json

NAME = "run.json"
# The fields that a run needs to go on, and of what type they are.
FIELDS: dict[str, type] = {"status": str, "identity": dict, "settings": dict}


def read_record(folder: str | Path, fields: dict[str, type] | None = None) -> dict[str, Any] | None:
    """The record of a training folder; None where it has none. UserError where it is damaged or lacks one of `fields`."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{show_path(path)} is damaged: it holds no object")
    wanted = dict(fields or {})
    if fields and record.get("status") == "finished":
        wanted["results"] = dict
    for name, kind in wanted.items():
        if not isinstance(record.get(name), kind):
            raise UserError(
                f"{show_path(path)} is damaged: its {name} is no {kind.__name__}; restore the file, or start over with --fresh"
            )
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a training folder."""
    write_json(folder / NAME, record)
