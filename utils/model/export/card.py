"""The model card (README.md) of an export, written from what the run and the comparison recorded. No path of this machine."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json, render, sha256_of
from utils.model.export.source import Export, Source, run_folder
from utils.model.folder import model_sha256
from utils.settings import ROOT

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def model_card(source: Source, export: Export, notes: list[str]) -> str:
    """The card as Markdown. `notes`: what the export cost, how it is used."""
    weights = [path for path in sorted(export.place.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    columns, table = scores_of(source.folder)
    runs = []
    for run in reversed(source.runs):
        path = ROOT / str(run["settings"].get("TRAIN_FILE"))
        digest = str(run["identity"].get("TRAIN_FILE")).removeprefix("sha256 ")
        unchanged = path.is_file() and sha256_of(path) == digest
        results, numbers = run.get("results", {}), ("steps", "eval_loss_before", "eval_loss")
        whole = all(isinstance(results.get(name), int | float) for name in numbers)
        more = {"results": results if whole and isinstance(run.get("versions"), dict) else None}
        more |= {"model": Path(run["settings"]["MODEL"]).name, "file": path.name, "digest": digest}
        runs.append({**run, **more, "origins": _origins(path.parent) if unchanged else None})
    return render(
        TEMPLATE,
        export=export,
        base=export.base or Path(source.base).name,
        source=source,
        notes=notes,
        runs=runs,
        columns=columns,
        table=table,
        files=[(path.name, sha256_of(path)) for path in weights],
    )


def _origins(folder):
    """The files that the report of a data folder names, with the sources that raw/ beside it knows."""
    report, known = folder / "report.json", {}
    for path in sorted((folder.parent / "raw").glob("*.source.json")):
        source = read_json(path)
        known[source["sha256"]] = source
    files = read_json(report)["files"] if report.is_file() else []
    return [{**file, "file": Path(file["file"]).name, "source": known.get(file["sha256"])} for file in files]


def scores_of(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """(the first model compared and this one, the table) of the comparison beside a run, if it measured these very weights;
    else ([], [])."""
    path = run_folder(folder).parent / "comparison.json"
    try:
        found = read_json(path) if path.is_file() else {}
        weights = {name: figures["weights"] for name, figures in found.get("models", {}).items()}
        table = found.get("table", [])
    except (
        UserError,
        KeyError,
        AttributeError,
        TypeError,
    ):  # damaged, or of an earlier version: to be made again
        return [], []
    wanted = model_sha256(folder)
    for name in [name for name, digest in weights.items() if digest == wanted]:
        return list(dict.fromkeys([next(iter(weights)), name])), table
    return [], []
