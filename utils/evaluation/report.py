"""The comparison in words and tables: for the terminal, and as Markdown for someone who was not there."""

import datetime
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from utils.evaluation.compare import Results
from utils.files import atomic_write, read_log, show_path, write_json
from utils.model.folder import read_record
from utils.plots import Run, plot_comparison, plot_runs
from utils.text import printable, text_width
from utils.training.report_page import write_report_page

LONGEST = 300  # characters of a sample answer that are shown


class Metric(NamedTuple):
    """`key` in comparison.json; its interval's key is this one, less _accuracy, plus _interval."""

    key: str
    label: str
    form: str
    meaning: str


# fmt: off
METRICS = [
    Metric("heldout_loss", "held-out loss", "{:.3f}",
           "mean cross-entropy of the reference answers to held-out questions, in nats a token, every token counted once; "
           "lower is better"),
    Metric("perplexity", "perplexity", "{:.2f}",
           "e to the held-out loss: among how many equally likely tokens the model hesitates"),
    Metric("exam_accuracy", "exam by option text", "{:.1%}",
           "single-choice questions whose right option is the likeliest as an answer, per character; the options are not "
           "shown, so their order plays no part; chance is {chance:.0%}"),
    Metric("exam_letter_accuracy", "exam by option letter", "{:.1%}",
           "the same questions asked as CMMLU asks them: options listed, the likeliest letter counts; each is asked once for "
           "every rotation of its options and the scores are averaged, so that a favourite letter gains nothing; chance is "
           "{chance:.0%}. A model that never saw such questions stays near chance"),
    Metric("exam_true_false_accuracy", "true or false, by text", "{:.1%}",
           "statements of which the likelier of both words (right, wrong) is the true one; both are named in the question; "
           "chance is {chance:.0%}, and a model that always says the same word gets the share of statements it fits"),
    Metric("exam_true_false_letter_accuracy", "true or false, by letter", "{:.1%}",
           "the same statements with both words as options A and B, asked and averaged as the exam by option letter; chance "
           "is {chance:.0%}"),
    Metric("exam_multiple_accuracy", "exam, several answers", "{:.1%}",
           "questions with several right options: the model writes the letters, and the set of them has to be exactly the "
           "right one, as in CMB; asked once, in the order of the file; guessing among all sets of options is right in "
           "{chance:.1%}"),
    Metric("exam_multiple_named", "answers naming options", "{:.0%}",
           "share of the answers to these that name any option by its letter; the others count as wrong"),
    Metric("preference_accuracy", "preference pairs", "{:.1%}",
           "held-out pairs of which the better answer is the likelier one; chance is 50%"),
    Metric("facts_accuracy", "facts stated right", "{:.1%}",
           "generated answers that state exactly the terms (herbs, actions, channels, ...) of the reference, about what the "
           "question names, where the reference repeats that name"),
    Metric("names_accuracy", "names right", "{:.1%}",
           "of the answers that have to repeat a name of the question, such as a herb's, those that do; the others speak of "
           "something else, or garble the name"),
    Metric("general_accuracy", "general questions right", "{:.1%}",
           "generated answers to everyday questions that have nothing to do with Chinese medicine: what falls here was "
           "forgotten. A model that never learned such things has nothing to forget"),
    Metric("general_loss", "general loss", "{:.3f}",
           "cross-entropy of the short reference answers to them, in nats a token"),
    Metric("ended_share", "answers that end", "{:.0%}",
           "share of generated answers that ended by themselves within the limit"),
    Metric("repetition", "repetition", "{:.1%}", "share of runs of four tokens that the same answer said before"),
    Metric("mean_tokens", "mean answer, tokens", "{:.1f}", "mean length of the generated answers"),
    Metric("tokens_per_second", "tokens/s", "{:.0f}",
           "speed of generating, all answers of a batch together, on this machine"),
]
# fmt: on

LABELS = {metric.key.removesuffix("_accuracy"): metric.label for metric in METRICS}


def write_report(models, pairs, measured, settings, device, left_out) -> None:
    """comparison.png, comparison.md and comparison.json in OUTPUT_DIR. Arguments as for `markdown_lines`."""
    place = settings.OUTPUT_DIR
    plot_comparison(models, place / "comparison.png")
    with atomic_write(place / "comparison.md") as file:
        file.write("\n".join(markdown_lines(models, pairs, measured, settings, device, left_out)) + "\n")
    write_json(
        place / "comparison.json",
        {
            "models": models,
            "differences": pairs,
            "settings": settings.as_dict(),
            "samples": [
                {"question": question, "answers": answers}
                for question, answers in _samples(measured, settings.SHOW)
            ],
            "device": str(device),
            "exam_rows_left_out": left_out,
        },
    )


def draw_curves(folders: dict[str, str], place: Path) -> bool:
    """Draw the curves of the training folders among {name: folder} to curves.png and curves.svg; False where there is none."""
    runs = []
    for name, folder in folders.items():
        log = Path(folder) / "training_log.jsonl"
        if entries := read_log(log) if log.is_file() else []:
            results = (read_record(folder) or {}).get("results", {})
            steps, tokens = results.get("steps", 0), results.get("tokens", 0)
            runs.append(Run(name, entries, tokens / steps if steps else 0))
    if runs:
        plot_runs(runs, place / "curves.png")
    return bool(runs)


def write_pages(folders: dict[str, str], place: Path) -> list[Path]:
    """report.html of each training folder among {name: folder}, with the comparison in `place`; returns their paths."""
    pages = []
    for folder in folders.values():
        record = read_record(folder) if Path(folder).is_dir() else None
        if record and record.get("status") == "finished":
            pages.append(write_report_page(Path(folder), place))
    return pages


def terminal_lines(models: dict, pairs: list, measured: dict[str, Results], show: int) -> list[str]:
    """The metrics, the differences in words, and `show` sample answers. Arguments as for `markdown_lines`."""
    lines = [*_metrics_table(models), ""]
    if pairs:
        lines += [f"{name}: {verdict}" for name, verdict in _verdicts(models, pairs)]
        lines += ["(each difference with its interval and p: comparison.md)", ""]
    for question, answers in _samples(measured, show):
        width = max(map(text_width, answers))
        lines += [f"> {question}"]
        lines += [f"  {name}{' ' * (width - text_width(name))}  {text}" for name, text in answers.items()]
        lines += [""]
    return lines


def markdown_lines(
    models: dict[str, dict],
    pairs: list[dict],
    measured: dict[str, Results],
    settings: Any,
    device: Any,
    left_out: Counter[str],
) -> list[str]:
    """The lines of comparison.md. `models`, `pairs`: as in comparison.json; `left_out`: {reason: rows of the exam file}."""
    return [
        f"# Comparison of {', '.join(models)}",
        "",
        f"Made on {datetime.date.today()} by `model_finetune/compare_models.py` on {device}.",
        "",
        *(f"- **{name}**: `{found['folder']}`" for name, found in models.items()),
        "",
        *_in_short(models, pairs),
        *_metrics_section(models),
        *_differences_section(pairs),
        *_samples_section(_samples(measured, settings.SHOW)),
        *_method_section(next(iter(models.values())), settings, left_out),
    ]


def _in_short(models, pairs):
    if not pairs:
        return []
    return [
        "## In short",
        "",
        *(f"- **{name}**: {verdict}" for name, verdict in _verdicts(models, pairs)),
        "",
    ]


def _metrics_section(models):
    first = next(iter(models.values()))
    return [
        "## Figures",
        "",
        "In brackets: 95 % intervals (shares: Wilson; losses: ratio estimate).",
        "",
        *_metrics_table(models),
        "",
        "![the figures as bars](comparison.png)",
        "",
        *(f"- *{metric.label}*: {_meaning(metric, first)}." for metric in _present(models)),
        "",
    ]


def _meaning(metric, found):
    return metric.meaning.format(chance=found.get(f"{metric.key.removesuffix('_accuracy')}_chance", 0))


def _differences_section(pairs):
    if not pairs:
        return []
    names = _compared(pairs)
    rows = [
        [f"{pair['to']} - {pair['from']}", *(_difference(pair.get(name)) for name in names)] for pair in pairs
    ]
    return [
        "## Differences",
        "",
        "Every two models on the same items: `b - a` is the figure of b minus that of a. Shares: above zero is better for b; "
        "losses: below zero.",
        "",
        *_table([["", *(LABELS[name] for name in names)], *rows]),
        "",
        "In brackets: 95 % interval (shares: Agresti and Min 2005; losses: ratio estimate). p: McNemar's exact test, how "
        "often equally good models would differ as much. A star marks p < 0.05, for losses an interval without 0: about "
        "one in twenty comparisons of equally good models gets one. A dash: not measured, or losses a token of models with "
        "different tokenizers, which cannot be compared.",
        "",
    ]


def _samples_section(samples):
    lines = ["## Sample answers", ""]
    for question, answers in samples:
        cells = [
            text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for text in answers.values()
        ]
        lines += [f"**{question}**", "", f"| {' | '.join(answers)} |", "|---" * len(answers) + "|"]
        lines += [f"| {' | '.join(cells)} |", ""]
    return lines


def _method_section(first, settings, left_out):
    """`first`: the metrics of one model; how many items there were is the same for all."""
    files = [
        ("heldout_loss_n", "held-out answers", settings.EVAL_FILE),
        ("exam_n", "single-choice questions", settings.EXAM_FILE),
        ("exam_true_false_n", "statements, true or false,", settings.EXAM_FILE),
        ("exam_multiple_n", "questions with several right answers", settings.EXAM_FILE),
        ("preference_n", "preference pairs", settings.PAIRS_FILE),
        ("general_loss_n", "general questions", settings.GENERAL_FILE),
    ]
    lines = ["## How it was measured", ""]
    lines += [
        f"- {first[key]:,} {what} from `{show_path(path)}`" for key, what, path in files if key in first
    ]
    lines += [
        f"- {count:,} rows of the exam file were left out: {reason}" for reason, count in left_out.items()
    ]
    if "answers_n" in first:
        lines += [
            f"- {first['answers_n']:,} answers generated: always the likeliest token, thinking {settings.THINKING}, "
            f"at most {settings.MAX_NEW_TOKENS} tokens each"
        ]
    if {"exam_letter_n", "exam_true_false_letter_n", "exam_multiple_n"} & first.keys():
        lines += ["- the exam by letter in float32, whatever the number format of the rest"]
    return lines + [
        "- held-out answers and pairs are those that the conversion kept apart from the training rows",
        "- the scores of every single item are in `comparison/`, one JSON object a line",
    ]


def _present(models):
    return [metric for metric in METRICS if any(metric.key in found for found in models.values())]


def _metrics_table(models):
    rows = [
        [metric.label, *(_cell(found, metric) for found in models.values())] for metric in _present(models)
    ]
    return _table([["", *models], *rows])


def _cell(found, metric):
    if metric.key not in found:
        return "-"
    interval = found.get(f"{metric.key.removesuffix('_accuracy')}_interval")
    ends = [metric.form.format(end).rstrip("%") for end in interval or []]
    return metric.form.format(found[metric.key]) + (f" ({' to '.join(ends)})" if ends else "")


def _difference(found):
    if not found:
        return "-"
    scale, digits, sign = (100, 1, "%") if "p" in found else (1, 3, "")
    numbers = [f"{scale * value:+.{digits}f}" for value in (found["difference"], *(found["interval"] or []))]
    ends = " to ".join(numbers[1:]) or "no interval"
    p = f", p {'< 0.001' if found['p'] < 0.001 else format(found['p'], '.3f')}" if "p" in found else ""
    return f"{numbers[0]}{sign} ({ends}){p}{' *' if _clear(found) else ''}"


def _clear(found):
    """Whether chance alone is an unlikely reason for a difference."""
    if "p" in found:
        return found["p"] < 0.05
    return bool(found["interval"]) and found["interval"][0] * found["interval"][1] > 0


def _compared(pairs):
    return [name for name in LABELS if any(name in pair for pair in pairs)]


def _verdicts(models, pairs):
    """[("sft against base", "better in ...; worse in ..."), ...]: every model against the first."""
    base = next(iter(models))
    return [(f"{pair['to']} against {base}", _verdict(pair)) for pair in pairs if pair["from"] == base]


def _verdict(pair):
    groups = {"better in": [], "worse in": [], "no clear difference in": []}
    for name in _compared([pair]):
        better = (pair[name]["difference"] > 0) != name.endswith("_loss")
        word = "no clear difference in" if not _clear(pair[name]) else "better in" if better else "worse in"
        groups[word].append(LABELS[name])
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
    """[(question, {"reference" or model name: answer}), ...]: the first held-out and the first general ones, all on one line."""
    answers = {name: results.of("answer") for name, results in measured.items()}
    some = next(iter(answers.values()))
    samples = []
    for about in ("heldout", "general"):
        for number in [number for number, item in enumerate(some) if item["about"] == about][:count]:
            texts = {"reference": some[number]["reference"]}
            texts |= {name: items[number]["answer"] for name, items in answers.items()}
            samples.append(
                (_one_line(some[number]["question"]), {name: _one_line(text) for name, text in texts.items()})
            )
    return samples


def _one_line(text):
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
