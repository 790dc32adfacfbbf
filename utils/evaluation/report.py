"""The comparison in words, tables and pictures: for the terminal, as comparison.md, and as comparison.json for what reads it."""

import datetime
import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from utils.evaluation.metrics import (
    COMPARED,
    METRICS,
    Results,
    difference_cell,
    differences,
    is_clear,
    metrics,
)
from utils.files import atomic_write, render, show_path, write_json
from utils.model.folder import usable_record
from utils.plots import Panel, plot_comparison
from utils.text import printable, shorten, text_width
from utils.training.log import write_page

LONGEST = 300  # characters of a sample answer that are shown
OTHERS = ("second", "wanted", "unasked", "general")  # `about` of the answers of which one sample is shown
TEMPLATE = Path(__file__).with_name("comparison.md.jinja")


def make_comparison(
    measured: dict[str, Results], settings: Any, device: Any, left_out: Counter[str], warnings: list[str]
) -> dict[str, Any]:
    """The content of comparison.json. `left_out`: {reason: rows of the exam file}; `warnings`: sentences about the test files.

    "table" has the figures as people read them, one row per metric: {"label", "n", "on_card", "meaning", "cells": {model:
    text}}.
    """
    models = {name: metrics(results) for name, results in measured.items()}
    first, table = next(iter(models.values())), []
    for metric in METRICS:
        if any(metric.key in figures for figures in models.values()):
            count, chance = (first.get(f"{metric.name}_{part}", 0) for part in ("n", "chance"))
            row = {"label": metric.label, "n": f"{count:,}", "on_card": "card" in metric.shown}
            row |= {"meaning": metric.meaning.format(chance=chance)}
            table.append(row | {"cells": {name: metric.cell(figures) for name, figures in models.items()}})
    return {
        "models": models,
        "table": table,
        "differences": [
            {"from": one, "to": other, **differences(measured[one], measured[other])}
            for one, other in itertools.combinations(measured, 2)
        ],
        "settings": settings.as_dict(),
        "samples": _samples(measured, settings.SHOW),
        "device": str(device),
        "exam_rows_left_out": left_out,
        "warnings": warnings,
    }


def write_report(comparison: dict[str, Any], place: Path) -> None:
    """comparison.png, comparison.md and comparison.json in `place`."""
    models, panels = comparison["models"], []
    for metric in METRICS:
        shown = [figures for figures in models.values() if metric.key in figures]
        if "panel" in metric.shown and shown:
            count = max(figures.get(f"{metric.name}_n", 0) for figures in shown)
            title = f"{metric.label}{' (lower is better)' if metric.lower else ''}, n = {count:,}"
            values = [figures.get(metric.key, 0.0) for figures in models.values()]
            intervals = [figures.get(f"{metric.name}_interval") for figures in models.values()]
            chance = shown[0].get(f"{metric.name}_chance", metric.chance)
            panels.append(Panel(title, values, intervals, bool(metric.right), chance))
    plot_comparison(panels, list(models), place / "comparison.png")
    pairs = comparison["differences"]
    names = [name for name in COMPARED if any(name in pair for pair in pairs)]
    changes = [["", *(COMPARED[name].label for name in names)]]
    for pair in pairs:
        cells = [difference_cell(pair.get(name)) for name in names]
        changes.append([f"{pair['to']} - {pair['from']}", *cells])
    text = render(
        TEMPLATE,
        **comparison,
        first=next(iter(models.values())),
        date=datetime.date.today(),
        verdicts=_verdicts(comparison),
        figures_table="\n".join(_figures_table(comparison)),
        differences_table="\n".join(_table(changes)),
    )
    with atomic_write(place / "comparison.md") as file:
        file.write(text)
    write_json(place / "comparison.json", comparison)


def write_pages(folders: dict[str, str], comparison: dict[str, Any], place: Path) -> list[Path]:
    """report.html of each finished run among {name: folder}, with the comparison and its pictures in `place`; their paths."""
    pages = []
    for name, folder in folders.items():
        if (usable_record(folder) or {}).get("status") == "finished":
            try:
                pages.append(write_page(Path(folder), comparison, name, place))
            except (AttributeError, KeyError, TypeError, ValueError):
                print(f"left out: report.html of {name}, because {show_path(folder)}/run.json is damaged")
    return pages


def terminal_lines(comparison: dict[str, Any]) -> list[str]:
    """The metrics, the differences in words, and the sample answers."""
    lines = [*_figures_table(comparison), ""]
    if verdicts := _verdicts(comparison):
        lines += [f"{name}: {verdict}" for name, verdict in verdicts]
        lines += ["(each difference with its interval and p: comparison.md)", ""]
    for sample in comparison["samples"]:
        width = max(map(text_width, sample["answers"]))
        lines += [f"> {sample['question']}"]
        for name, text in sample["answers"].items():
            lines += [f"  {name}{' ' * (width - text_width(name))}  {text}"]
        lines += [""]
    return lines


def _figures_table(comparison):
    models = list(comparison["models"])
    rows = [[row["label"], *(row["cells"][name] for name in models)] for row in comparison["table"]]
    return _table([["", *models], *rows])


def _verdicts(comparison):
    """[("sft against base", "better in ...; worse in ..."), ...]: every model against the first."""
    base, verdicts = next(iter(comparison["models"])), []
    for pair in comparison["differences"]:
        if pair["from"] != base:
            continue
        groups = {"better in": [], "worse in": [], "no clear difference in": []}
        for name, metric in COMPARED.items():
            if name in pair:
                word = "better in" if (pair[name]["difference"] > 0) != metric.lower else "worse in"
                groups[word if is_clear(pair[name]) else "no clear difference in"].append(metric.label)
        words = "; ".join(f"{word} {', '.join(labels)}" for word, labels in groups.items() if labels)
        verdicts.append((f"{pair['to']} against {base}", f"{words}."))
    return verdicts


def _table(rows):
    """Rows of cells as an aligned Markdown table, which reads well in a terminal too."""
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    lines = [
        "| " + " | ".join(cell + " " * (width - text_width(cell)) for cell, width in zip(row, widths)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _samples(measured, count):
    """[{"question", "answers": {"reference" or model name: answer}}, ...], right or wrong as most of their kind.

    `count` held-out questions that ask for as many kinds of fact as there are, and one of each of OTHERS that was asked. Of a kind,
    the outcome (which models are right, which name a caution) that most of its questions have is shown, with its count.
    """
    answers = {name: [item for item in found.items if "about" in item] for name, found in measured.items()}
    kinds = defaultdict(lambda: defaultdict(list))  # {(about, kind): {outcome: numbers of the questions}}
    for number, items in enumerate(zip(*answers.values())):
        asked = items[0]
        kind = (asked["about"], asked["kind"] if asked["about"] == "heldout" else "")
        kinds[kind][tuple((item["right"], item["caution"]) for item in items)].append(number)
    heldout, others = [], {}
    for (about, _), outcomes in kinds.items():
        usual = max(outcomes.values(), key=len)
        share = f"as {len(usual)} of {sum(map(len, outcomes.values()))} of its kind"
        others[about] = (usual[0], share)
        if about == "heldout":  # the first of every kind come before the second ones
            heldout += [(rank, number, share) for rank, number in enumerate(usual)]
    chosen = [(number, share) for _, number, share in sorted(heldout)[:count]]
    chosen += [others[about] for about in OTHERS if count and about in others]
    samples = []
    for number, share in chosen:
        shown = {name: items[number] for name, items in answers.items()}
        asked = next(iter(shown.values()))
        if asked["test"] == "follow_up":
            share = f"{asked['about']} question, after {asked['before'][-1]}; {share}"
        texts = {"reference": asked["reference"], **{name: item["answer"] for name, item in shown.items()}}
        texts = {name: printable(shorten(text, LONGEST)) for name, text in texts.items()}
        question = printable(shorten(f"{asked['question']} ({share})", LONGEST))
        samples.append({"question": question, "answers": texts})
    return samples
