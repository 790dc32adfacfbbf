"""report.html: a training run on one page that needs nothing else: no network, no scripts, pictures inside.

Whatever comes from elsewhere (names, settings, rows, answers) is escaped, and a Content-Security-Policy forbids the page to load
anything.
"""

import base64
import datetime
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write, read_json, show_path
from utils.model.folder import read_record
from utils.settings import ROOT
from utils.text import duration, format_bytes, printable

NAME = "report.html"

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; color: #222;
       font-family: system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { border: 1px solid #ddd; padding: .25rem .6rem; text-align: left;
       vertical-align: top; overflow-wrap: anywhere; white-space: pre-wrap; } th { background: #f5f5f5; }
img { max-width: 100%; }
"""

# The policy allows what is inside the page, and nothing else.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_report_page(folder: Path, comparison: Path | None = None) -> Path:
    """Write report.html of a run folder and return its path.

    comparison: the folder of a comparison.json that this run is part of; its figures and answers come into the page.
    UserError where run.json is damaged.
    """
    record = read_record(folder, {"settings": dict})
    if record is None:
        raise UserError(f"{show_path(folder)} holds no run.json: it is no training folder")
    settings = record["settings"]
    model, data = Path(str(settings.get("MODEL"))).name, Path(str(settings.get("TRAIN_FILE"))).name
    parts = [
        _section("Result", _table(_results(record)), _picture(folder / "loss_curve.png", "the loss curve")),
        _section("Data", _table(_data(settings))),
        _section("Forecast and measured", _table(_forecasts(record), ("", "forecast", "measured"))),
        *_comparison(folder, comparison),
        _section("Settings", _table(settings.items())),
        _section(
            "Made with", _table([("device", record.get("device")), *record.get("versions", {}).items()])
        ),
    ]
    page = PAGE.format(
        title=_text(f"{folder.resolve().name}: {model} trained on {data}"),
        style=STYLE,
        body="\n".join(filter(None, parts)),
    )
    path = folder / NAME
    with atomic_write(path) as file:
        file.write(page)
    return path


def _results(record):
    results = record.get("results", {})
    shown = {
        "eval_loss_before": "held-out loss before",
        "eval_loss": "held-out loss of the finished model",
        "eval_loss_last": "held-out loss after the last step",
        "kept_step": "step of the finished model",
        "best_step": "best step",
        "steps": "steps",
        "tokens": "tokens trained on",
        "tokens_per_second": "tokens a second",
    }
    return [
        ("status", record.get("status")),
        ("started", record.get("started")),
        ("finished", record.get("finished")),
        *((label, _number(results[name])) for name, label in shown.items() if name in results),
    ]


def _data(settings):
    """Counts of the conversion's report, where it lies beside the rows that were trained on."""
    rows = [(name, settings.get(name)) for name in ("TRAIN_FILE", "EVAL_FILE")]
    report = ROOT / Path(str(settings.get("TRAIN_FILE"))).parent / "report.json"
    if not report.is_file():
        return rows
    found = read_json(report)
    rows += [(name, _number(found.get(name))) for name in ("rows_in", "rows_kept", "rows_set_aside")]
    for group in ("outputs", "set_aside", "tokens"):
        rows += [(f"{group}: {name}", _number(count)) for name, count in (found.get(group) or {}).items()]
    return rows


def _forecasts(record):
    """[(what, forecast, measured), ...] of what is known."""
    results = record.get("results", {})
    rows = [("memory", _bytes(record.get("memory_forecast_bytes")), _bytes(results.get("peak_memory_bytes")))]
    if record.get("started") and record.get("finished"):
        began, ended = (datetime.datetime.fromisoformat(record[name]) for name in ("started", "finished"))
        seconds = record["settings"].get("HOURS", 0) * 3600 or record.get("time_forecast_seconds")
        rows.append(
            (
                "time, start to end",
                duration(seconds) if seconds else "-",
                duration((ended - began).total_seconds()),
            )
        )
    return rows


def _comparison(folder, place):
    """The sections of a comparison that the run is part of: figures, and answers before and after."""
    if place is None or not (place / "comparison.json").is_file():
        return []
    found = read_json(place / "comparison.json")
    models = found["models"]
    names = list(dict.fromkeys(name for figures in models.values() for name in figures))
    numbers = [
        name
        for name in names
        if all(isinstance(figures.get(name, 0), int | float) for figures in models.values())
    ]
    rows = [(name, *(_number(figures.get(name, "-")) for figures in models.values())) for name in numbers]
    sections = [
        _section(
            "Comparison",
            _picture(place / "comparison.png", "the figures as bars"),
            _picture(place / "curves.png", "the curves of all runs"),
            _table(rows, ("", *models)),
        )
    ]
    mine = [name for name, figures in models.items() if figures.get("folder") == show_path(folder)]
    columns = [next(iter(models)), *mine]
    answers = [
        (sample["question"], *(sample["answers"].get(name, "-") for name in ("reference", *columns)))
        for sample in found.get("samples", [])
    ]
    if answers:
        titles = ("question", "reference", *columns)
        sections.append(_section("Answers before and after", _table(answers, titles)))
    return sections


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{_text(title)}</h2>", *filter(None, parts)])


def _picture(path: Path, description: str) -> str:
    """The picture itself in the page; nothing where there is none."""
    if not path.is_file():
        return ""
    inside = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{_text(description)}" src="data:image/png;base64,{inside}"></p>'


def _table(rows: Iterable[tuple], titles: tuple = ()) -> str:
    head = "<tr>" + "".join(f"<th>{_text(title)}</th>" for title in titles) + "</tr>" if titles else ""
    lines = [
        f"<tr><th>{_text(first)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    return f"<table>{head}{''.join(lines)}</table>"


def _text(value: Any) -> str:
    return escape(printable(str("-" if value is None else value)))


def _number(value):
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _bytes(count):
    return format_bytes(count) if count else "-"
