"""Turn batches of rows into the lines of the output files; once every row's fate is known, put each line in its place."""

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from utils.files import atomic_write
from utils.near_duplicates import EVAL, REASONS, content_key, fingerprint
from utils.raw_rows import Reject, parse_row
from utils.schemas import convert_row

OUTPUTS = ("sft_train", "sft_eval", "dpo_train", "dpo_eval", "exam")
# One encoder for all rows, where json.dumps would make one a call; what was just read from JSON holds no circles to check for.
_ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def examine(task):
    """One batch: (file index, lines made, lines given, fingerprint, schemas and reasons counted, {unfit fields: lengths}).

    Made of a usable row is its output line, and given the row as it was; made of any other is its line in the ledger.
    """
    index, name, encoding, batch, options = task
    items, made, given, schemas, reasons, fields = [], [], [], Counter(), Counter(), {}
    for line, raw in batch:
        item = row = None
        try:
            row = parse_row(raw, encoding)
            item = convert_row(row, **options)
            key = content_key(item)
            output = {"id": f"{key:016x}", **item.body, "source": f"{name}:{line}"}
            if item.kind == "exam" and not output["subject"]:
                output["subject"] = Path(name).stem
            items.append((line, key, item))
            schemas[item.schema] += 1
            if options["columns"] and item.schema != "--columns":
                fields.setdefault(tuple(row), _lengths(row))
            made.append(_ENCODE(output))
            given.append(_as_json(raw, row, encoding))
        except Reject as problem:
            items.append((line, 0, None))
            reasons[problem.reason] += 1
            if problem.reason == "fields not recognised":
                fields.setdefault(tuple(row), _lengths(row))
            made.append(_aside_line(name, line, problem.reason, problem.detail, problem.row if row is None else row))
            given.append(b"")
    made, given = "\n".join([*made, ""]).encode(), b"\n".join([*given, b""])
    return index, made, given, fingerprint(items), schemas, reasons, fields


def _lengths(row):
    """The length of each field of a row; 0 for what is no text."""
    return [len(value) if isinstance(value, str) else 0 for value in row.values()]


def _as_json(raw, row, encoding):
    """The row as given, in one line of JSON (UTF-8): the text it was read from, or a table row written as an object."""
    if isinstance(raw, dict):
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    if isinstance(raw, str):
        return raw.replace("\n", " ").encode()
    return raw.decode(encoding).encode() if encoding == "gb18030" else raw


def _aside_line(name, line, reason, detail, row):
    """One line of the ledger; what UTF-8 cannot hold (lone surrogates) is written as \\u escapes."""
    aside = {"file": name, "line": line, "reason": reason, "detail": detail, "row": row}
    text = json.dumps(aside, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(aside, default=str)
    return text


def place(made, given, folder, names, rows, side, fate, twin, drawn):
    """Write every line made to its file, and the rows given of duplicates and leaks to the ledger.

    Returns (rows by output, rows set aside here by reason, the drawn output lines).
    """
    target = (rows["kind"].astype(int) - 1) * 2 + (side == EVAL)        # an index into OUTPUTS; negative: for the ledger
    counts, aside, examples, opened = Counter(), Counter(), [], {}
    file, number = rows["file"], rows["line"]
    fates = zip(target.tolist(), fate.tolist(), drawn.tolist())
    with ExitStack() as stack:
        ledger = stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))
        for index, (line, row, (output, reason, example)) in enumerate(zip(made, given, fates)):
            if output < 0:
                ledger.write(line)
            elif reason:
                aside[REASONS[reason]] += 1
                found = {"file": names[file[index]], "line": int(number[index]), "reason": REASONS[reason],
                         "detail": f"of {names[file[twin[index]]]}:{number[twin[index]]}"}
                ledger.write(_ENCODE(found)[:-1].encode() + b', "row": ' + row.rstrip() + b"}\n")
            else:
                name = OUTPUTS[output]
                if name not in opened:
                    opened[name] = stack.enter_context(atomic_write(folder / f"{name}.jsonl", "wb"))
                opened[name].write(line)
                counts[name] += 1
                if example:
                    examples.append(json.loads(line))
    return counts, aside, examples
