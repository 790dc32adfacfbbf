"""The model card (README.md) of an export, written from what the run and the comparison recorded. No path of this machine."""

from pathlib import Path

from utils.errors import UserError
from utils.files import read_json, render, sha256_of
from utils.model.export.folders import Export, Source
from utils.model.folder import model_sha256, run_folder
from utils.settings import ROOT

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def model_card(source: Source, export: Export, notes: list[str]) -> str:
    """The card as Markdown. `notes`: what the export cost, how it is used."""
    weights = [path for path in sorted(export.place.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    columns, table = _scores_of(source.folder)
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


def _scores_of(folder):
    """(the first model compared and this one, the table) of the comparison beside a run, if it measured these very weights;
    else ([], [])."""
    path = run_folder(folder).parent / "comparison.json"
    try:
        models, wanted = read_json(path)["models"] if path.is_file() else {}, model_sha256(folder)
        for name, figures in models.items():
            if figures["weights"] == wanted:
                return list(dict.fromkeys([*list(models)[:1], name])), read_json(path)["table"]
    except (UserError, KeyError, AttributeError, TypeError):  # damaged, or of an earlier version
        return [], []
    return [], []
