"""Turn batches of rows into the lines of the output files; once every row's fate is known, put each line in its place."""

import gc
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
    """One batch: (file index, its waiting lines, its fingerprint, schemas and reasons counted, {unfit fields: lengths}).

    The waiting line of a usable row is its output line, a tab, and the row as given; of any other, its line in the ledger.
    """
    index, name, encoding, batch, options = task
    items, lines, schemas, reasons, fields = [], [], Counter(), Counter(), {}
    gc.disable()                      # thousands of small objects and no cycle among them: looking for one costs a quarter
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
            lines.append(b"%b\t%b\n" % (_ENCODE(output).encode(), _as_json(raw, row, encoding)))
        except Reject as problem:
            items.append((line, 0, None))
            reasons[problem.reason] += 1
            if problem.reason == "fields not recognised":
                fields.setdefault(tuple(row), _lengths(row))
            lines.append(_aside_line(name, line, problem.reason, problem.detail, problem.row if row is None else row))
    gc.enable()
    return index, b"".join(lines), fingerprint(items), schemas, reasons, fields


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
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(aside, default=str).encode() + b"\n"


def place(waiting, folder, names, rows, side, fate, twin, drawn):
    """Write every waiting line to its file: (rows by output, rows set aside here by reason, the drawn output lines)."""
    target = (rows["kind"].astype(int) - 1) * 2 + (side == EVAL)        # an index into OUTPUTS; negative: for the ledger
    counts, aside, examples, opened = Counter(), Counter(), [], {}
    with ExitStack() as stack:
        ledger = stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))
        for index, (line, output, reason) in enumerate(zip(waiting, target.tolist(), fate.tolist())):
            if output < 0:
                ledger.write(line)
                continue
            ready, _, row = line.partition(b"\t")
            if reason:
                aside[REASONS[reason]] += 1
                found = {"file": names[rows["file"][index]], "line": int(rows["line"][index]), "reason": REASONS[reason],
                         "detail": f"of {names[rows['file'][twin[index]]]}:{rows['line'][twin[index]]}"}
                ledger.write(_ENCODE(found)[:-1].encode() + b', "row": ' + row.rstrip() + b"}\n")
                continue
            name = OUTPUTS[output]
            if name not in opened:
                opened[name] = stack.enter_context(atomic_write(folder / f"{name}.jsonl", "wb"))
            opened[name].write(ready + b"\n")
            counts[name] += 1
            if drawn[index]:
                examples.append(json.loads(ready))
    return counts, aside, examples
