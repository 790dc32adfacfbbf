"""The model card (README.md) of an export, written from what the run and the comparison recorded. No path of this machine."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json, read_jsonl, sha256_of
from utils.model.export.source import Export, Source, run_folder
from utils.model.folder import model_sha256
from utils.settings import ROOT

# Metrics of comparison.json that the card shows: key, label, form. The interval's key is this one, less _accuracy, plus _interval.
SCORES = (
    ("heldout_loss", "held-out loss, nats a token", "{:.3f}"),
    ("exam_accuracy", "exam by option text", "{:.1%}"),
    ("exam_letter_accuracy", "exam by option letter", "{:.1%}"),
    ("exam_true_false_accuracy", "true or false, by text", "{:.1%}"),
    ("exam_true_false_letter_accuracy", "true or false, by letter", "{:.1%}"),
    ("exam_multiple_accuracy", "exam, several answers", "{:.1%}"),
    ("preference_accuracy", "preference pairs", "{:.1%}"),
    ("facts_accuracy", "facts stated right", "{:.1%}"),
    ("names_accuracy", "names right", "{:.1%}"),
    ("general_accuracy", "general questions right", "{:.1%}"),
)

# Settings of a run that say what was done; paths and settings of the display are left out.
SHOWN = "LEARNING_RATE EPOCHS MAX_STEPS MAX_LENGTH ROWS_PER_STEP WARMUP WEIGHT_DECAY RANK ALPHA BETA SFT_WEIGHT SEED".split()

LIMITS = (
    "For study and research only. **This is not medical advice**, and the model is no source for any: a model of this size "
    "states wrong facts fluently. It was made to answer short questions about Traditional Chinese Medicine in Chinese; what "
    "it does elsewhere was not examined beyond the scores above."
)


def model_card(source: Source, export: Export, notes: list[str]) -> str:
    """The card as Markdown. `notes`: what the export cost, how it is used."""
    weights = [path for path in sorted(export.place.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    base = export.base or Path(source.base).name
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "language: [zh]"]
    lines += [f"base_model: {export.base}"] if export.base else []
    lines += ["tags: [qwen3, traditional-chinese-medicine]", "---", "", f"# {export.name}", ""]
    made = f"fine-tuned for Traditional Chinese Medicine from {base}"
    lines += [f"A Qwen3 model {made if base else 'whose training is not recorded'}."]
    mode = "on" if source.thinking else "off"
    lines += [f"Trained with thinking {mode}; its chat template keeps to that.", ""]
    for title, part in (
        ("Use", ["In this folder:", "", *(f"- {note}" for note in notes)]),
        ("Training", _training(source.runs)),
        ("Data", _data(source.runs)),
        ("Scores", _scores(source)),
        ("Limits", [LIMITS]),
        ("Files", [f"- `{path.name}`: sha256 `{sha256_of(path)}`" for path in weights]),
    ):
        lines += [f"## {title}", "", *(part or ["Not recorded."]), ""]
    return "\n".join(lines)


def _training(runs):
    lines = []
    for run in reversed(runs):
        settings, results = run["settings"], run.get("results", {})
        method = "DPO" if "BETA" in settings else "SFT"
        adapter = " with a LoRA adapter" if settings.get("LORA", "RANK" in settings) else ""
        shown = ", ".join(f"{name} {settings[name]}" for name in SHOWN if name in settings)
        lines += [f"- {method}{adapter} from {Path(settings['MODEL']).name}: {shown}"]
        if results:
            lines += [
                f"  {results['steps']:,} steps, held-out loss {results['eval_loss_before']:.4f} -> {results['eval_loss']:.4f}; "
                f"{run['device']}; {', '.join(f'{package} {version}' for package, version in run['versions'].items())}"
            ]
    return lines


def _data(runs):
    """Each training file with its checksum, and, where its folders still hold them, the files it was made from with licences."""
    lines = []
    for run in reversed(runs):
        path = ROOT / run["settings"]["TRAIN_FILE"]
        digest = run["identity"]["TRAIN_FILE"].removeprefix("sha256 ")
        lines += [f"- `{path.name}`: sha256 `{digest}`"]
        if not path.is_file() or sha256_of(path) != digest:
            lines += ["  (the file is not here any more, or has changed; its sources are not known)"]
            continue
        lines += [f"  - made from {text}" for text in _origins(path.parent)]
    return lines


def _origins(folder):
    """Files that the report of a data folder names, with what raw/ beside it knows of them."""
    report = folder / "report.json"
    known = {}
    for path in sorted((folder.parent / "raw").glob("*.source.json")):
        source = read_json(path)
        known[source["sha256"]] = source
    for file in read_json(report)["files"] if report.is_file() else []:
        source, where = known.get(file["sha256"]), "origin not recorded"
        if source:
            revision = f" at {source['revision']}" if source.get("revision") else ""
            where = f"{source['repo']}{revision}, licence: {source['licence']}"
        yield f"`{Path(file['file']).name}`: {where}; {file['rows']:,} rows, sha256 `{file['sha256']}`"


def _scores(source):
    """The row of this very model in the comparison beside its folder, with that of the first model compared."""
    found = comparison_of(run_folder(source.folder), source.folder)
    if not found:
        return ["These weights have not been compared yet (model_finetune/compare_models.py)."]
    name, models = found
    first = next(iter(models))
    columns = [name] if name == first else [first, name]
    lines = [f"|  | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for key, label, form in SCORES:
        if key in models[name]:
            count = models[name][f"{key.removesuffix('_accuracy')}_n"]
            cells = [_cell(models[column], key, form) for column in columns]
            lines += [f"| {label} (n = {count:,}) | {' | '.join(cells)} |"]
    return [*lines, "", "On items that no training row asked about; in brackets 95 % intervals."]


def _cell(metrics, key, form):
    if key not in metrics:
        return "-"
    interval = metrics.get(f"{key.removesuffix('_accuracy')}_interval")
    return form.format(metrics[key]) + (f" ({' to '.join(map(form.format, interval))})" if interval else "")


def comparison_of(run: Path, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """(the model's name in comparison.json, its "models"), where that was measured on these very weights; else None."""
    place, weights = run.parent, model_sha256(folder)
    if not (place / "comparison.json").is_file():
        return None
    for path in (place / "comparison").glob("*.jsonl"):
        try:
            first = next(read_jsonl(path, ["identity", "folder"]))
        except UserError:
            continue  # compare_models.py measures such a one again
        if first["identity"]["model"][0] == weights:
            models = read_json(place / "comparison.json")["models"]
            for name, metrics in models.items():
                if metrics["folder"] == first["folder"]:
                    return name, models
    return None
