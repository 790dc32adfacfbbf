"""What a converted data set looks like: lengths in characters and tokens, a histogram, and the table a person reads."""

from pathlib import Path

import numpy

from utils.model.chat_format import encode_turns
from utils.model.load import load_tokenizer, quiet_offline
from utils.text import shorten

POINTS = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}


def count_tokens(model, examples):
    """The tokens of each example as a trainer sees it (the longest turn, with all before it); [] if `model` is no folder."""
    if not model or not Path(model).is_dir() or not examples:
        return []
    quiet_offline(model)
    tokenizer = load_tokenizer(model)
    turns = (encode_turns(tokenizer, example["messages"]) for example in examples)
    return [max(len(prompt) + len(answer) for prompt, answer in pairs) for pairs in turns]


def lengths(characters, tokens, max_length):
    """The report's fields about length; `tokens` may be counted in a part of the conversations only, or in none."""
    return {
        "characters": _spread(characters),
        "tokens": _spread(tokens),
        "tokens_counted_in": len(tokens),
        "max_length": max_length,
        "kept_by_max_length": share(numpy.array(tokens) <= max_length),
    }


def share(values):
    """The share of true values, or None of no values."""
    return round(float(numpy.mean(values)), 4) if len(values) else None


def show(report):
    """Print the report as a compact table."""
    print(f"\n{'rows':>12}  input")
    for file in report["files"]:
        print(f"{file['rows']:>12,}  {file['file']} ({file['encoding']})")
    print(
        f"{report['rows_in']:>12,}  in all; recognised as "
        + (", ".join(f"{name} {count:,}" for name, count in report["schemas"].items()) or "nothing")
    )
    for title, counts, total in (
        ("kept", report["outputs"], report["rows_kept"]),
        ("set aside", report["set_aside"], report["rows_set_aside"]),
    ):
        print(f"\n{total:>12,}  {title}")
        for name, count in counts.items():
            print(f"{count:>12,}    {name}")
    counted = {"characters": "", "tokens": f" (counted in {report['tokens_counted_in']:,} conversations)"}
    for unit, of in counted.items():
        if report[unit]:
            print(
                f"\nlength in {unit}{of}: "
                + ", ".join(f"{name} {value:,}" for name, value in report[unit].items())
            )
    if report["tokens"]:
        print(f"MAX_LENGTH {report['max_length']:,} keeps {report['kept_by_max_length']:.1%} of them")
    elif report["characters"]:
        print("no tokens counted: TOKENIZER_MODEL is not there yet")
    if report["reasoning_share"] is not None:
        print(f"with reasoning: {report['reasoning_share']:.1%}")
    for example in report["examples"]:
        print("\n" + example["source"])
        for message in example["messages"]:
            print(f"  {message['role']:<10}{shorten(message['content'])}")


def _spread(values):
    return (
        {name: int(numpy.percentile(values, point)) for name, point in POINTS.items()} if len(values) else {}
    )
