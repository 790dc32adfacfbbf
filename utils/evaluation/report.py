"""The comparison in words and tables: for the terminal, and as Markdown for someone who was not there."""

import datetime

from utils.files import show_path
from utils.text import printable, text_width

# Key in comparison.json, label, form, what it means. The interval's key is this one, less _accuracy, plus _interval.
METRICS = [
    (
        "heldout_loss",
        "held-out loss",
        "{:.3f}",
        "mean cross-entropy of the reference answers to held-out questions, in nats a "
        "token, every token counted once; lower is better",
    ),
    (
        "perplexity",
        "perplexity",
        "{:.2f}",
        "e to the held-out loss: among how many equally likely tokens the model hesitates",
    ),
    (
        "exam_accuracy",
        "exam by option text",
        "{:.1%}",
        "single-choice questions whose right option is the likeliest as an "
        "answer, per character; the options are not shown, so their order plays no part; chance is {chance:.0%}",
    ),
    (
        "exam_letter_accuracy",
        "exam by option letter",
        "{:.1%}",
        "the same questions asked as CMMLU asks them: options listed, "
        "the likeliest letter counts; each is asked once for every rotation of its options and the scores are averaged, so that "
        "a favourite letter gains nothing; chance is {chance:.0%}. A model that never saw such questions stays near chance",
    ),
    (
        "preference_accuracy",
        "preference pairs",
        "{:.1%}",
        "held-out pairs of which the better answer is the likelier one; chance is 50%",
    ),
    (
        "facts_accuracy",
        "facts stated right",
        "{:.1%}",
        "generated answers that state exactly the terms (herbs, actions, channels, ...) of the reference",
    ),
    (
        "general_accuracy",
        "general questions right",
        "{:.1%}",
        "generated answers to everyday questions that have nothing to do "
        "with Chinese medicine: what falls here was forgotten. A model that never learned such things has nothing to forget",
    ),
    (
        "general_loss",
        "general loss",
        "{:.3f}",
        "cross-entropy of the short reference answers to them, in nats a token",
    ),
    (
        "ended_share",
        "answers that end",
        "{:.0%}",
        "share of generated answers that ended by themselves within the limit",
    ),
    ("repetition", "repetition", "{:.1%}", "share of runs of four tokens that the same answer said before"),
    ("mean_tokens", "mean answer, tokens", "{:.1f}", "mean length of the generated answers"),
    (
        "tokens_per_second",
        "tokens/s",
        "{:.0f}",
        "speed of generating, all answers of a batch together, on this machine",
    ),
]


LABELS = {key.removesuffix("_accuracy"): label for key, label, _, _ in METRICS}


LONGEST = 300  # characters of a sample answer that are shown


def terminal_lines(models, pairs, measured, show):
    """The figures, the differences in words, and `show` sample answers. Arguments as for `markdown_lines`."""
    lines = [*_figures(models), ""]
    if pairs:
        lines += [
            *(f"{name}: {verdict}" for name, verdict in _verdicts(models, pairs)),
            "(each difference with its interval and p: comparison.md)",
            "",
        ]
    for question, answers in _samples(measured, show):
        width = max(map(text_width, answers))
        lines += [f"> {question}"]
        lines += [
            f"  {name}{' ' * (width - text_width(name))}  {answer}" for name, answer in answers.items()
        ] + [""]
    return lines


def markdown_lines(models, pairs, measured, settings, device, left_out):
    """The lines of comparison.md. `models`, `pairs`: as in comparison.json; `measured`: {name: results}; `left_out`:
    {reason: rows of the exam file}."""
    first = next(iter(models.values()))
    lines = [
        f"# Comparison of {', '.join(models)}",
        "",
        f"Made on {datetime.date.today()} by `model_finetune/compare_models.py` on {device}.",
        "",
        *(f"- **{name}**: `{figures['folder']}`" for name, figures in models.items()),
        "",
    ]
    if pairs:
        lines += [
            "## In short",
            "",
            *(f"- **{name}**: {verdict}" for name, verdict in _verdicts(models, pairs)),
            "",
        ]
    chance = first.get("exam_chance", 0)
    lines += [
        "## Figures",
        "",
        "In brackets: 95 % intervals (shares: Wilson; losses: ratio estimate).",
        "",
        *_figures(models),
        "",
        "![the figures as bars](comparison.png)",
        "",
        *(f"- *{label}*: {meaning.format(chance=chance)}." for _, label, _, meaning in _present(models)),
        "",
    ]
    if pairs:
        names = _compared(pairs)
        lines += [
            "## Differences",
            "",
            "Every two models on the same items: `b - a` is the figure of b minus that of a. Shares: above zero is better "
            "for b; losses: below zero.",
            "",
            *_table(
                [
                    ["", *(LABELS[name] for name in names)],
                    *(
                        [f"{pair['to']} - {pair['from']}", *(_difference(pair.get(name)) for name in names)]
                        for pair in pairs
                    ),
                ]
            ),
            "",
            "In brackets: 95 % interval (shares: Agresti and Min 2005; losses: ratio estimate). p: McNemar's exact test, how "
            "often equally good models would differ as much. A star marks p < 0.05, for losses an interval without 0: about "
            "one in twenty comparisons of equally good models gets one. A dash: not measured, or losses a token of models with "
            "different tokenizers, which cannot be compared.",
            "",
        ]
    lines += ["## Sample answers", ""]
    for question, answers in _samples(measured, settings.SHOW):
        cells = [
            answer.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
            for answer in answers.values()
        ]
        lines += [
            f"**{question}**",
            "",
            f"| {' | '.join(answers)} |",
            "|---" * len(answers) + "|",
            f"| {' | '.join(cells)} |",
            "",
        ]
    files = [
        ("heldout_loss_n", "held-out answers", settings.EVAL_FILE),
        ("exam_n", "exam questions", settings.EXAM_FILE),
        ("preference_n", "preference pairs", settings.PAIRS_FILE),
        ("general_loss_n", "general questions", settings.GENERAL_FILE),
    ]
    lines += [
        "## How it was measured",
        "",
        *(f"- {first[key]:,} {what} from `{show_path(path)}`" for key, what, path in files if key in first),
        *(f"- {count:,} rows of the exam file were left out: {reason}" for reason, count in left_out.items()),
    ]
    if "answers_n" in first:
        lines += [
            f"- {first['answers_n']:,} answers generated: always the likeliest token, thinking {settings.THINKING}, "
            f"at most {settings.MAX_NEW_TOKENS} tokens each"
        ]
    return lines + [
        "- held-out answers and pairs are those that the conversion kept apart from the training rows",
        "- the scores of every single item are in `comparison/`, one JSON object a line",
    ]


def _present(models):
    return [measure for measure in METRICS if any(measure[0] in figures for figures in models.values())]


def _figures(models):
    return _table(
        [["", *models]]
        + [
            [label, *(_figure(figures, key, form) for figures in models.values())]
            for key, label, form, _ in _present(models)
        ]
    )


def _verdicts(models, pairs):
    """[("sft against base", "better in ...; worse in ..."), ...]: every model against the first."""
    base = next(iter(models))
    return [(f"{pair['to']} against {base}", _verdict(pair)) for pair in pairs if pair["from"] == base]


def _figure(figures, key, form):
    if key not in figures:
        return "-"
    interval = figures.get(f"{key.removesuffix('_accuracy')}_interval")
    return form.format(figures[key]) + (
        f" ({' to '.join(form.format(end).rstrip('%') for end in interval)})" if interval else ""
    )


def _difference(found):
    if not found:
        return "-"
    scale, digits, sign = (100, 1, "%") if "p" in found else (1, 3, "")
    ends = (
        " to ".join(f"{scale * end:+.{digits}f}" for end in found["interval"])
        if found["interval"]
        else "no interval"
    )
    p = f", p {'< 0.001' if found['p'] < 0.001 else format(found['p'], '.3f')}" if "p" in found else ""
    return f"{scale * found['difference']:+.{digits}f}{sign} ({ends}){p}{' *' if _clear(found) else ''}"


def _clear(found):
    """Whether chance alone is an unlikely reason for a difference."""
    if "p" in found:
        return found["p"] < 0.05
    return bool(found["interval"]) and found["interval"][0] * found["interval"][1] > 0


def _compared(pairs):
    return [name for name in LABELS if any(name in pair for pair in pairs)]


def _verdict(pair):
    better, worse, same = [], [], []
    for name in _compared([pair]):
        rises = pair[name]["difference"] > 0
        group = same if not _clear(pair[name]) else better if rises != name.endswith("_loss") else worse
        group.append(LABELS[name])
    return (
        "; ".join(
            f"{word} {', '.join(group)}"
            for word, group in (("better in", better), ("worse in", worse), ("no clear difference in", same))
            if group
        )
        + "."
    )


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
    answers = {name: [item for item in items if item["test"] == "answer"] for name, items in measured.items()}
    some = next(iter(answers.values()))
    picked = [
        number
        for about in ("heldout", "general")
        for number in [number for number, item in enumerate(some) if item["about"] == about][:count]
    ]
    return [
        (
            _one_line(some[number]["question"]),
            {
                "reference": _one_line(some[number]["reference"]),
                **{name: _one_line(items[number]["answer"]) for name, items in answers.items()},
            },
        )
        for number in picked
    ]


def _one_line(text):
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
