"""The model card (README.md) of an export, written from what the run and the comparison recorded. No path of this machine."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json, render, sha256_of
from utils.model.export.source import Export, Source, run_folder
from utils.model.folder import model_sha256
from utils.settings import ROOT

TEMPLATE = Path(__file__).with_name("card.md.jinja")

# Settings of a run that say how it was trained; paths and settings of the display are left out.
SHOWN = "LEARNING_RATE EPOCHS MAX_STEPS MAX_LENGTH ROWS_PER_STEP WARMUP WEIGHT_DECAY RANK ALPHA BETA SFT_WEIGHT SEED".split()


def model_card(source: Source, export: Export, notes: list[str]) -> str:
    """The card as Markdown. `notes`: what the export cost, how it is used."""
    weights = [path for path in sorted(export.place.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    columns, table = scores_of(source.folder)
    return render(
        TEMPLATE,
        export=export,
        base=export.base or Path(source.base).name,
        thinking=source.thinking,
        system=source.system,
        notes=notes,
        runs=[_described(run) for run in reversed(source.runs)],
        columns=columns,
        table=table,
        files=[(path.name, sha256_of(path)) for path in weights],
    )


def _described(run):
    """The words for one training: {"method", "model", "settings", "results", "file", "digest", "origins"}."""
    settings, results, identity = run["settings"], run.get("results", {}), run["identity"]
    adapter = " with a LoRA adapter" if settings.get("LORA", "RANK" in settings) else ""
    words = ""
    if {"steps", "eval_loss_before", "eval_loss"} <= results.keys():
        versions = ", ".join(f"{package} {version}" for package, version in run.get("versions", {}).items())
        losses = f"{results['eval_loss_before']:.4f} -> {results['eval_loss']:.4f}"
        words = f"{results['steps']:,} steps, held-out loss {losses}; {run.get('device')}; {versions}"
    path = ROOT / str(settings.get("TRAIN_FILE"))
    digest = str(identity.get("TRAIN_FILE")).removeprefix("sha256 ")
    unchanged = path.is_file() and sha256_of(path) == digest
    return {
        "method": ("DPO" if "BETA" in settings else "SFT") + adapter,
        "model": Path(settings["MODEL"]).name,
        "settings": ", ".join(f"{name} {settings[name]}" for name in SHOWN if name in settings),
        "results": words,
        "file": path.name,
        "digest": digest,
        "origins": _origins(path.parent) if unchanged else None,
    }


def _origins(folder):
    """Files that the report of a data folder names, with what raw/ beside it knows of them."""
    report = folder / "report.json"
    known = {}
    for path in sorted((folder.parent / "raw").glob("*.source.json")):
        source = read_json(path)
        known[source["sha256"]] = source
    origins = []
    for file in read_json(report)["files"] if report.is_file() else []:
        source, where = known.get(file["sha256"]), "origin not recorded"
        if source:
            revision = f" at {source['revision']}" if source.get("revision") else ""
            where = f"{source['repo']}{revision}, licence: {source['licence']}"
        origins.append({**file, "file": Path(file["file"]).name, "where": where})
    return origins


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
