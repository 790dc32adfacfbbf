"""The comparison in words and tables: for the terminal, and as Markdown for someone who was not there."""

import datetime

from utils.files import show_path
from utils.terminal import printable, text_width

# key in comparison.json, label, form, what it means. An interval is under the key with _accuracy left off and _interval put on.
MEASURES = [
    ("heldout_loss", "held-out loss", "{:.3f}", "mean cross-entropy of the reference answers to held-out questions, in nats a "
     "token, every token counted once; lower is better"),
    ("perplexity", "perplexity", "{:.2f}", "e to the held-out loss: among how many equally likely tokens the model hesitates"),
    ("exam_accuracy", "exam by option text", "{:.1%}", "single-choice questions whose right option is the likeliest as an "
     "answer, per character; the options are not shown, so their order plays no part; chance is {chance:.0%}"),
    ("exam_letter_accuracy", "exam by option letter", "{:.1%}", "the same questions asked as CMMLU asks them: options listed, the "
     "likeliest letter counts; each is asked once for every rotation of its options and the scores are averaged, so that a "
     "favourite letter gains nothing; chance is {chance:.0%}. A model that never saw such questions stays near chance"),
    ("preference_accuracy", "preference pairs", "{:.1%}", "held-out pairs of which the better answer is the likelier one; "
     "chance is 50%"),
    ("facts_accuracy", "facts stated right", "{:.1%}", "generated answers that state exactly the terms (herbs, actions, "
     "channels, ...) of the reference"),
    ("general_accuracy", "general questions right", "{:.1%}", "generated answers to everyday questions that have nothing to do "
     "with Chinese medicine: what falls here was forgotten. A model that never learned such things has nothing to forget"),
    ("general_loss", "general loss", "{:.3f}", "cross-entropy of the short reference answers to them, in nats a token"),
    ("ended_share", "answers that end", "{:.0%}", "share of generated answers that ended by themselves within the limit"),
    ("repetition", "repetition", "{:.1%}", "share of runs of four tokens that the same answer said before"),
    ("mean_tokens", "mean answer, tokens", "{:.1f}", "mean length of the generated answers"),
    ("tokens_per_second", "tokens/s", "{:.0f}", "speed of generating, all answers of a batch together, on this machine"),
]
LABELS = {key.removesuffix("_accuracy"): label for key, label, _, _ in MEASURES}
LONGEST = 300       # characters of a sample answer that are shown


def comparison_report(models, pairs, measured, settings, device, left_out):
    """(lines for the terminal, lines of comparison.md). `models`, `pairs` as in comparison.json, `measured`: {name: results}."""
    present = [measure for measure in MEASURES if any(measure[0] in figures for figures in models.values())]
    first, n = next(iter(models.values())), {}
    exam = [item for item in next(iter(measured.values())) if item["test"] == "exam"]
    chance = sum(1 / len(item["text"]) for item in exam) / len(exam) if exam else 0
    figures = _table([["", *models]] + [[label, *(_figure(of, key, form) for of in models.values())]
                                        for key, label, form, _ in present])
    against = _table([["", *(LABELS[name] for name in _compared(pairs))]] + [
        [f"{pair['to']} - {pair['from']}", *(_difference(pair.get(name)) for name in _compared(pairs))] for pair in pairs])
    short = [f"- **{pair['to']}** against **{pair['from']}**: {_verdict(pair)}" for pair in pairs
             if pair["from"] == next(iter(models))]
    samples = _samples(measured, settings.SHOW)
    counts = {key: first[f"{key}_n"] for key in ("heldout_loss", "exam", "preference", "facts", "general", "answers") if f"{key}_n" in first}
    told = "Differences, with their 95 % interval; * where chance alone is an unlikely reason (p < 0.05):"
    tables = [*figures, "", *([told, "", *against, ""] if pairs else []), *(line for sample in samples for line in _plain(*sample))]
    return tables, [
        f"# Comparison of {', '.join(models)}", "",
        f"Made on {datetime.date.today()} by `model_finetune/compare_models.py` on {device}. In brackets: 95 % intervals.", "",
        *[f"- **{name}**: `{of['folder']}`" for name, of in models.items()], "",
        *(["## In short", "", *short, ""] if short else []),
        "## Figures", "", *figures, "", "![the figures as bars](comparison.png)", "",
        *[f"- *{label}*: {meaning.format(chance=chance)}." for _, label, _, meaning in present], "",
        *(["## Differences", "", "Row by row, the second model's figure taken from the first one's, on the same items. "
           "For losses below zero is better, for shares above zero.", "", *against, "",
           "Brackets: 95 % interval (shares: Agresti and Min 2005; losses: ratio estimate). `p`: McNemar's exact test, the chance "
           "of a difference as large between equally good models. A star marks p < 0.05, for losses an interval without 0; "
           "of twenty comparisons of equal models, one gets a star.", ""] if pairs else []),
        "## Sample answers", "", *(line for sample in samples for line in _markdown(*sample)),
        "## How it was measured", "",
        *[f"- {label}: {counts[key]:,}{where}" for key, label, where in (
            ("heldout_loss", "held-out answers", f", from `{show_path(settings.EVAL_FILE)}`"),
            ("exam", "exam questions", f", from `{show_path(settings.EXAM_FILE or '')}`"),
            ("preference", "preference pairs", f", from `{show_path(settings.PAIRS_FILE or '')}`"),
            ("general", "general questions", f", from `{show_path(settings.GENERAL_FILE or '')}`"),
            ("answers", "answers generated", f", greedily, thinking {settings.THINKING}, at most {settings.MAX_NEW_TOKENS} tokens each")
        ) if key in counts],
        *[f"- exam rows left out: {count:,}, {reason}" for reason, count in left_out.items()],
        "- held-out rows and pairs are those that the conversion kept apart from the training rows",
        "- the scores of every single item are in `comparison/`, one JSON object a line",
    ]


def _figure(of, key, form):
    if key not in of:
        return "-"
    interval = of.get(f"{key.removesuffix('_accuracy')}_interval")
    return form.format(of[key]) + (f" ({' to '.join(form.format(end).rstrip('%') for end in interval)})" if interval else "")


def _difference(found):
    if not found:
        return "-"
    scale, digits, sign = (100, 1, "%") if "p" in found else (1, 3, "")
    ends = " to ".join(f"{scale * end:+.{digits}f}" for end in found["interval"]) if found["interval"] else "no interval"
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
    return "; ".join(f"{word} {', '.join(group)}" for word, group in (
        ("better in", better), ("worse in", worse), ("no clear difference in", same)) if group) + "."


def _table(rows):
    """Rows of cells as an aligned Markdown table, which reads well in a terminal too."""
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell + " " * (width - text_width(cell)) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _samples(measured, count):
    """[(question, {"reference" or model name: answer}), ...]: the first held-out and the first general ones."""
    answers = {name: [item for item in items if item["test"] == "answer"] for name, items in measured.items()}
    some = next(iter(answers.values()))
    picked = [number for about in ("heldout", "general")
              for number in [number for number, item in enumerate(some) if item["about"] == about][:count]]
    return [(some[number]["question"], {"reference": some[number]["reference"],
                                        **{name: items[number]["answer"] for name, items in answers.items()}})
            for number in picked]


def _plain(question, answers):
    width = max(map(text_width, answers))
    return [f"> {_one_line(question)}", *(f"  {name}{' ' * (width - text_width(name))}  {_one_line(answer)}"
                                          for name, answer in answers.items()), ""]


def _markdown(question, answers):
    """Side by side: a column for each model."""
    cells = [_one_line(answer).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for answer in answers.values()]
    return [f"**{_one_line(question)}**", "", "| " + " | ".join(answers) + " |", "|---" * len(answers) + "|",
            "| " + " | ".join(cells) + " |", ""]


def _one_line(text):
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
