"""The comparison in words, tables and pictures: for the terminal, as comparison.md, and as comparison.json for what reads it."""

import datetime
import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from utils.evaluation.metrics import METRICS, Results, difference_cell, differences, is_clear, metrics
from utils.files import atomic_write, render, write_json
from utils.plots import Panel, plot_comparison
from utils.text import printable, shorten, text_width

LONGEST = 300  # characters of a sample answer that are shown
OTHERS = ("second", "wanted", "unasked", "general")  # `about` of the answers of which one sample is shown
TEMPLATE = Path(__file__).with_name("comparison.md.jinja")


def make_comparison(
    measured: dict[str, Results], settings: Any, device: Any, left_out: Counter[str], warnings: list[str]
) -> dict[str, Any]:
    """The content of comparison.json. `left_out`: {reason: rows of the exam file}; `warnings`: sentences about the test files.

    "table" has the figures as people read them, one row per metric: {"label", "n", "on_card", "meaning", "cells": {model:
    text}}; "verdicts" the differences in words: {"sft against base": "better in ...; worse in ..."}.
    """
    models = {name: metrics(results) for name, results in measured.items()}
    first, table, pairs = next(iter(models.values())), [], []
    for metric in METRICS:
        if any(metric.key in figures for figures in models.values()):
            count, chance = (first.get(f"{metric.name}_{part}", 0) for part in ("n", "chance"))
            row = {"label": metric.label, "n": f"{count:,}", "on_card": metric.main}
            row |= {"meaning": metric.meaning.format(chance=chance)}
            table.append(row | {"cells": {name: metric.cell(figures) for name, figures in models.items()}})
    for one, other in itertools.combinations(measured, 2):
        pairs.append({"from": one, "to": other, **differences(measured[one], measured[other])})
    base = next(iter(models))
    from_base = {pair["to"]: pair for pair in pairs if pair["from"] == base}
    return {
        "models": models,
        "table": table,
        "differences": pairs,
        "verdicts": {f"{name} against {base}": _verdict(pair) for name, pair in from_base.items()},
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
        if metric.main and shown:
            count = shown[0][f"{metric.name}_n"]
            title = f"{metric.label}{' (lower is better)' * metric.lower}, n = {count:,}"
            values = [figures.get(metric.key, 0.0) for figures in models.values()]
            intervals = [figures.get(f"{metric.name}_interval") for figures in models.values()]
            chance = shown[0].get(f"{metric.name}_chance", 0)
            panels.append(Panel(title, values, intervals, "%" in metric.form, chance))
    plot_comparison(panels, list(models), place / "comparison.png")
    pairs = comparison["differences"]
    compared = [metric for metric in METRICS if any(metric.name in pair for pair in pairs)]
    changes = [["", *(metric.label for metric in compared)]]
    for pair in pairs:
        cells = [difference_cell(pair.get(metric.name)) for metric in compared]
        changes.append([f"{pair['to']} - {pair['from']}", *cells])
    text = render(
        TEMPLATE,
        **comparison,
        first=next(iter(models.values())),
        date=datetime.date.today(),
        figures_table="\n".join(_figures_table(comparison)),
        differences_table="\n".join(_table(changes)),
    )
    with atomic_write(place / "comparison.md") as file:
        file.write(text)
    write_json(place / "comparison.json", comparison)


def terminal_lines(comparison: dict[str, Any]) -> list[str]:
    """The metrics, the differences in words, and the sample answers."""
    lines = [*_figures_table(comparison), ""]
    if comparison["verdicts"]:
        lines += [f"{name}: {verdict}" for name, verdict in comparison["verdicts"].items()]
        lines += ["(each difference with its interval and p: comparison.md)", ""]
    for sample in comparison["samples"]:
        width = max(map(text_width, sample["answers"]))
        lines += [f"> {sample['question']}"]
        for name, text in sample["answers"].items():
            lines += [f"  {name}{' ' * (width - text_width(name))}  {text}"]
        lines += [""]
    return lines


def _figures_table(comparison):
    rows = [[row["label"], *row["cells"].values()] for row in comparison["table"]]
    return _table([["", *comparison["models"]], *rows])


def _verdict(pair):
    groups = {"better in": [], "worse in": [], "no clear difference in": []}
    for metric in METRICS:
        if found := pair.get(metric.name):
            word = "better in" if (found["difference"] > 0) != metric.lower else "worse in"
            groups[word if is_clear(found) else "no clear difference in"].append(metric.label)
    return "; ".join(f"{word} {', '.join(labels)}" for word, labels in groups.items() if labels) + "."


def _table(rows):
    """Rows of cells as an aligned Markdown table, which reads well in a terminal too."""
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    lines = [
        "| " + " | ".join(cell + " " * (width - text_width(cell)) for cell, width in zip(row, widths)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _samples(measured, count):
    """[{"question", "answers": {"reference" or model name: answer}}, ...]: `count` held-out questions, the first of each kind of
    fact before the second ones, and the first of each of OTHERS; beside a question, how many of its kind each model has right."""
    kinds = defaultdict(list)  # {(about, kind of fact): [{model: result}, ...]}
    for items in zip(*([item for item in found.items if "about" in item] for found in measured.values())):
        kinds[items[0]["about"], items[0]["kind"]].append(dict(zip(measured, items)))
    groups = [group for (about, _), group in kinds.items() if about == "heldout"]
    turns = itertools.zip_longest(*groups)
    chosen = [(found, group) for turn in turns for found, group in zip(turn, groups) if found][:count]
    others = [kinds[about, ""] for about in OTHERS if count and (about, "") in kinds]
    samples = []
    for found, group in chosen + [(group[0], group) for group in others]:
        asked = next(iter(found.values()))
        notes = [f"second question, after {asked['before'][-1]}"] if asked["about"] == "second" else []
        if asked["right"] is not None:
            counts = [f"{name} {sum(each[name]['right'] for each in group)}" for name in measured]
            notes.append(f"right of {len(group)} of its kind: {', '.join(counts)}")
        question = f"{asked['question']} ({'; '.join(notes)})" if notes else asked["question"]
        answers = {"reference": asked["reference"], **{name: item["answer"] for name, item in found.items()}}
        answers = {name: printable(shorten(text, LONGEST)) for name, text in answers.items()}
        samples.append({"question": printable(shorten(question, LONGEST)), "answers": answers})
    return samples
