"""What a converted data set looks like: lengths in characters and tokens, a histogram, and the table a person reads."""

import heapq
import json
import random
from collections import Counter
from pathlib import Path

import numpy

from utils.data.convert import Recognised
from utils.data.dedup import EVAL, TRAIN, Row, mixed
from utils.data.inputs import InputFile
from utils.data.schemas import OUTPUTS
from utils.files import sha256_of
from utils.model.chat_format import encode_turns
from utils.model.folder import load_tokenizer, quiet_offline
from utils.settings import Settings
from utils.text import say, shorten

POINTS = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
EXAMPLES = 5  # rows shown
NEARLY_ALL = 0.95  # of the conversations: a system text that so many share is the model's own
FEW_EVAL_ROWS = 30  # below that, figures on the held-out rows mean little


def count_tokens(model: str, examples: list[dict]) -> list[int]:
    """The tokens of each example as a trainer sees it (the longest turn, with all before it); [] if `model` is no folder."""
    if not model or not Path(model).is_dir() or not examples:
        return []
    quiet_offline()
    tokenizer = load_tokenizer(model)
    turns = (encode_turns(tokenizer, example["messages"]) for example in examples)
    return [max(len(prompt) + len(answer) for prompt, answer in pairs) for pairs in turns]


def conversations(rows: list[Row]) -> list[Row]:
    """The rows that are kept as conversations."""
    return [row for row in rows if row.kind == "sft" and not row.reason]


def sample_examples(found: Recognised, count: int, seed: int) -> list[dict]:
    """`count` of the conversations (all, if fewer), in their order; random, but the same for the same rows."""
    mine = conversations(found.rows)
    drawn = heapq.nsmallest(count, range(len(mine)), key=lambda number: mixed(mine[number].content, seed))
    return [json.loads(found.line(mine[number])) for number in sorted(drawn)]


def build_report(
    sources: list[InputFile],
    skipped: list[tuple[str, str]],
    found: Recognised,
    written: Counter,
    examples: list[dict],
    tokens: list[int],
    settings: Settings,
) -> dict:
    """report.json. `written`: rows of each output file; `examples`: conversations, `tokens`: the number that each has."""
    rows = found.rows
    reasons = found.reasons + Counter(row.reason for row in rows if row.kind and row.reason)
    trained = conversations(rows)
    outputs = [name for name in OUTPUTS if written[name]]
    by_file = Counter(row.file for row in rows)
    # Held-out answers, if they are long, that stand word for word in training
    answers = {row.rest for row in trained if row.long_rest and row.split == TRAIN}
    repeated = sum(row.long_rest and row.split == EVAL and row.rest in answers for row in trained)
    # The mode in which a model is trained on these conversations
    thought = sum(row.reasoning for row in trained)
    mode = "on" if 2 * thought > len(trained) else "off" if 2 * thought < len(trained) else "tie"
    thinking = {"mode": mode, "with_reasoning": thought, "conversations": len(trained)}
    system, count = max(found.systems.items(), key=lambda item: item[1], default=("", 0))
    return {
        "rows_in": len(rows),
        "rows_kept": written.total(),
        "rows_set_aside": reasons.total(),
        "set_aside": dict(reasons.most_common()),
        "outputs": {name: written[name] for name in outputs},
        "files": [
            {
                "file": source.name,
                "encoding": source.encoding,
                "split": source.split,
                "rows": by_file[number],
                "sha256": sha256_of(source.path),
            }
            for number, source in enumerate(sources)
        ],
        "skipped": dict(skipped),
        "schemas": dict(found.schemas.most_common()),
        "conversations_trimmed": found.trimmed,
        "eval_answers_in_training": repeated,
        "characters": _spread([row.characters for row in trained]),
        "tokens": _spread(tokens),
        "tokens_counted_in": len(tokens),
        "max_length": settings.MAX_LENGTH,
        "kept_by_max_length": _share([count <= settings.MAX_LENGTH for count in tokens]),
        "reasoning_share": _share([row.reasoning for row in trained]),
        "thinking": thinking if trained else {},
        "system": system if count >= NEARLY_ALL * found.systems.total() else "",
        "fields": _fields(found),
        "fingerprints": {name: sha256_of(settings.OUTPUT_DIR / f"{name}.jsonl") for name in outputs},
        "examples": random.Random(settings.SEED).sample(examples, min(EXAMPLES, len(examples))),
        "settings": settings.as_dict(),
    }


def _fields(found):
    """{schema: {"used": [field, ...], "unused": {field: rows in which it holds something}}}."""
    fields = {schema: {"used": [], "unused": Counter()} for schema, _, _ in found.fields}
    for (schema, names, unused), rows in found.fields.items():
        mine = fields[schema]
        mine["used"] += [name for name in map(str, names) if name not in (*unused, *mine["used"])]
        mine["unused"].update(dict.fromkeys(unused, rows))
    return fields


def _share(values):
    """The share of true values, or None of no values."""
    return round(float(numpy.mean(values)), 4) if len(values) else None


def _spread(values):
    if not len(values):
        return {}
    return {name: int(numpy.percentile(values, point)) for name, point in POINTS.items()}


def show(report: dict, found: Recognised) -> None:
    """Print the report as a compact table."""

    def line(count, text, before=""):
        say(f"{before}{count if isinstance(count, str) else format(count, ','):>12}  {text}")

    line("rows", "input", "\n")
    for file in report["files"]:
        line(
            file["rows"],
            f"{file['file']} ({file['encoding']}{', evaluation by its name' * bool(file['split'])})",
        )
    for name, reason in report["skipped"].items():
        line("skipped", f"{name}: {reason}")
    schemas = ", ".join(f"{name} {count:,}" for name, count in report["schemas"].items())
    line(report["rows_in"], f"in all; recognised as {schemas or 'nothing'}")
    for title, total, counts in (
        ("kept", "rows_kept", "outputs"),
        ("set aside", "rows_set_aside", "set_aside"),
    ):
        line(report[total], title, "\n")
        for name, count in report[counts].items():
            line(count, f"  {name}")
    if count := report["conversations_trimmed"]:
        line(count, "conversations without turns before the first question, or after the last answer", "\n")
    if count := report["eval_answers_in_training"]:
        stand = "held-out answers stand" if count > 1 else "held-out answer stands"
        line(count, f"{stand} word for word in training: the loss on them says little", "\n")
    counted = {"characters": "", "tokens": f" (counted in {report['tokens_counted_in']:,} conversations)"}
    for unit, where in counted.items():
        if values := ", ".join(f"{name} {value:,}" for name, value in report[unit].items()):
            say(f"\nlength in {unit}{where}: {values}")
    if report["tokens"]:
        say(f"MAX_LENGTH {report['max_length']:,} keeps {report['kept_by_max_length']:.1%} of them")
    elif report["characters"]:
        say("no tokens counted: TOKENIZER_MODEL is not there yet")
    for note in _notes(report, found):
        say(note)
    for example in report["examples"]:
        say("\n" + example["source"])
        for message in example["messages"]:
            say(f"  {message['role']:<10}{shorten(message['content'])}")


def _notes(report, found):
    """Lines on what a user should know before training."""
    if thinking := report["thinking"]:
        tie = "; keep the rows of one mode" if thinking["mode"] == "tie" else ""
        counts = f"{thinking['with_reasoning']:,} of {thinking['conversations']:,}"
        yield f"thinking {thinking['mode']}: {counts} conversations end with reasoning{tie}"
    if report["system"]:
        yield f"system text of nearly all conversations: {shorten(report['system'])}"
    for schema, fields in report["fields"].items():
        examples = {
            name: json.dumps(found.unused[schema, name], ensure_ascii=False, default=str)
            for name in fields["unused"]
        }
        unused = [
            f"{name} ({rows:,} row{'s' * (rows > 1)}, such as {shorten(examples[name], 40)})"
            for name, rows in fields["unused"].items()
        ]
        if unused:
            yield f"not used, of {schema}: {'; '.join(unused)}"
    held_out = report["outputs"].get("sft_eval", report["outputs"].get("dpo_eval", 0))
    if 0 < held_out < FEW_EVAL_ROWS:
        yield f"few rows are held out ({held_out}): figures on them mean little"
