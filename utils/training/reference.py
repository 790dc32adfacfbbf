"""DPO's reference: log-probabilities of all answers under the starting model, computed once and kept beside the run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy

from utils.device import Device
from utils.errors import UserError
from utils.files import read_json, show_path, write_json
from utils.model.logprobs import answer_logps
from utils.model.packing import PackedRows
from utils.text import progress
from utils.training.run_folder import RunFolder

NAME = "reference_logps.json"


def add_reference(model, splits: dict[str, PackedRows], device: Device, run: RunFolder) -> None:
    """Give every item its "reference_chosen" and "reference_rejected", log-probabilities under `model` before training.

    The main process computes them and keeps them in reference_logps.json, with the identity of the run (the sha256 of model
    and pairs, number format, ...) and a checksum: what was kept for another run, or has been changed, is computed again. No
    second model is ever in memory.
    """
    path, identity = run.folder / NAME, run.record["identity"]
    with run.processes.main_process_first():
        kept, damage = _read(path, identity)
        if kept is None:
            again = f" again ({damage})" if damage else ", once"
            print(f"computing the reference log-probabilities{again}", flush=True)
            kept = {
                name: answer_logps(model, rows, device, progress(f"reference, {name} pairs", "rows"))
                for name, rows in splits.items()
            }
            write_json(path, {"identity": identity, "sha256": _checksum(kept), "logps": kept})
    for name, rows in splits.items():
        chosen, rejected = numpy.array(kept[name]).reshape(len(rows.items), 2).T
        rows.numbers.update(reference_chosen=chosen, reference_rejected=rejected)


def _read(path: Path, identity: dict[str, Any]) -> tuple[dict[str, list] | None, str]:
    """(what is kept for this identity, or None; why what there is cannot be used)."""
    if not path.is_file():
        return None, ""
    try:
        found = read_json(path)
        if found["identity"] != identity:
            return None, f"{show_path(path)} is of another model, other pairs or other settings"
        if found["sha256"] == _checksum(found["logps"]):
            return found["logps"], ""
    except (UserError, KeyError, TypeError, ValueError):
        pass  # not JSON, or not as we write it
    return None, f"{show_path(path)} is damaged"


def _checksum(logps: dict[str, list]) -> str:
    return hashlib.sha256(json.dumps(logps, sort_keys=True).encode()).hexdigest()
