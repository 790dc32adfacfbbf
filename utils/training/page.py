"""report.html: a training run on one page that needs nothing else: no network, no scripts, pictures inside.

The template escapes whatever comes from elsewhere (names, settings, rows, answers), and a Content-Security-Policy forbids the
page to load anything.
"""

import base64
import datetime
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write, read_json, render, show_path
from utils.model.folder import read_record
from utils.settings import ROOT
from utils.text import duration, format_bytes

TEMPLATE = Path(__file__).with_name("report.html.jinja")
RESULTS = {  # of run.json, and how they are called
    "eval_loss_before": "held-out loss before",
    "eval_loss": "held-out loss of the finished model",
    "eval_loss_last": "held-out loss after the last step",
    "kept_step": "step of the finished model",
    "best_step": "best step",
    "steps": "steps",
    "tokens": "tokens trained on",
    "tokens_per_second": "tokens a second",
}


def write_page(
    folder: Path, comparison: dict[str, Any] | None = None, name: str = "", pictures: Path | None = None
) -> Path:
    """Write report.html of a run folder and return its path. UserError if it is no run, or run.json is damaged.

    `comparison`: the content of a comparison.json that this run is part of under `name`; its figures and answers come into the
    page, and the pictures beside it, which lie in the folder `pictures`.
    """
    record = read_record(folder)
    if record is None:
        raise UserError(f"{show_path(folder)} holds no run.json: it is no training folder")
    settings, results = record["settings"], record.get("results", {})
    model, data = Path(str(settings.get("MODEL"))).name, Path(str(settings.get("TRAIN_FILE"))).name
    text = render(
        TEMPLATE,
        title=f"{folder.resolve().name}: {model} trained on {data}",
        results=[
            *((name, record.get(name)) for name in ("status", "started", "finished")),
            *((label, _number(results[key])) for key, label in RESULTS.items() if key in results),
        ],
        curve=_picture(folder / "loss_curve.png"),
        data=_data_rows(settings),
        forecasts=_forecasts(record),
        settings=list(settings.items()),
        versions=[("device", record.get("device")), *record.get("versions", {}).items()],
        **_compared(comparison, name, pictures),
    )
    path = folder / "report.html"
    with atomic_write(path) as file:
        file.write(text)
    return path


def _data_rows(settings):
    """The files, and the counts of the conversion's report if it lies beside the rows that were trained on."""
    rows = [(name, settings.get(name)) for name in ("TRAIN_FILE", "EVAL_FILE")]
    report = ROOT / Path(str(settings.get("TRAIN_FILE"))).parent / "report.json"
    if report.is_file():
        found = read_json(report)
        rows += [(name, _number(found.get(name))) for name in ("rows_in", "rows_kept", "rows_set_aside")]
        for group in ("outputs", "set_aside", "tokens"):
            counts = found.get(group) or {}
            rows += [(f"{group}: {name}", _number(count)) for name, count in counts.items()]
    return rows


def _forecasts(record):
    """[(quantity, forecast, measured), ...] of what is known."""
    peak = record.get("results", {}).get("peak_memory_bytes")
    sizes = [format_bytes(size) if size else "-" for size in (record.get("memory_forecast_bytes"), peak)]
    rows = [("memory", *sizes)]
    if record.get("started") and record.get("finished"):
        began, ended = (datetime.datetime.fromisoformat(record[name]) for name in ("started", "finished"))
        planned = record["settings"].get("HOURS", 0) * 3600 or record.get("time_forecast_seconds")
        taken = duration((ended - began).total_seconds())
        rows.append(("time, start to end", duration(planned) if planned else "-", taken))
    return rows


def _compared(comparison, name, pictures):
    """What the template shows of a comparison."""
    if comparison is None:
        return {"comparison": None}
    models = list(comparison["models"])
    columns = list(dict.fromkeys([models[0], name]))
    return {
        "comparison": comparison,
        "models": models,
        "columns": columns,
        "figures": [
            (row["label"], *(row["cells"][model] for model in models)) for row in comparison["table"]
        ],
        "answers": [
            (sample["question"], *(sample["answers"].get(column) for column in ("reference", *columns)))
            for sample in comparison["samples"]
        ],
        "bars": _picture(pictures / "comparison.png"),
        "curves": _picture(pictures / "curves.png"),
    }


def _picture(path):
    """The bytes of a picture as base64; "" if there is none."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


def _number(value):
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else value
