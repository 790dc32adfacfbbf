"""Turn batches of rows into the lines of the output files; once every row's fate is known, put each line in its place."""

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy

from utils.data.dedup import EVAL, REASONS, content_key, sketch_rows
from utils.data.readers import Reject, batches, parse_row
from utils.data.schemas import convert_row
from utils.files import atomic_write

RUN = 1000  # rows written at a time, at most


OUTPUTS = ("sft_train", "sft_eval", "dpo_train", "dpo_eval", "exam")


# One encoder for all rows, where json.dumps would make one a call; what was just read from JSON holds no circles to check for.
_ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def tasks(files, encodings, options, given):
    """Yield a task of `examine` for every batch of rows; as they were given they go to the Spool `given`, a JSON text each."""
    for index, batch in batches(files, encodings):
        texts = [_as_json(raw, encodings[index]) for _, raw in batch]
        given.add(b"".join(texts), map(len, texts))
        yield index, files[index].name, encodings[index], batch, options


def _as_json(raw, encoding):
    """UTF-8, in one line; a table row is written as an object."""
    if isinstance(raw, dict):
        return json.dumps(raw, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    if isinstance(raw, str):
        return raw.replace("\n", " ").encode("utf-8", "backslashreplace")
    if isinstance(raw, Reject):  # never asked for: such a row already has its line in the ledger
        return b""
    return raw.decode(encoding, "backslashreplace").encode() if encoding == "gb18030" else raw


def examine(task):
    """One batch: (file index, lines made, joined, their lengths, sketch_rows, schemas and reasons counted, {unfit fields: lengths}).

    Made of a usable row is its output line; of any other, its line in the ledger.
    """
    index, name, encoding, batch, options = task
    items, made, schemas, reasons, fields = [], [], Counter(), Counter(), {}
    for line, raw in batch:
        item = row = None
        try:
            row = parse_row(raw, encoding)
            item = convert_row(row, **options)
            key = content_key(item)
            items.append((line, key, item))
            schemas[item.schema] += 1
            if options["columns"] and item.schema != "--columns":
                fields.setdefault(tuple(row), _lengths(row))
            made.append(_output_line(name, line, key, item))
        except Reject as problem:
            items.append((line, 0, None))
            reasons[problem.reason] += 1
            if problem.reason == "fields not recognised":
                fields.setdefault(tuple(row), _lengths(row))
            made.append(
                _aside_line(name, line, problem.reason, problem.detail, problem.row if row is None else row)
            )
    return index, b"".join(made), [*map(len, made)], sketch_rows(items), schemas, reasons, fields


def _output_line(name, line, key, item):
    body, source = item.body, _ENCODE(f"{name}:{line}")
    if item.kind == "exam":
        body["subject"] = body["subject"] or Path(name).stem
    if item.kind == "sft":  # nearly every row: put together here in half the time of the encoder
        text = ", ".join(
            [
                "{" + ", ".join([f'"{field}": {_ENCODE(said)}' for field, said in turn.items()]) + "}"
                for turn in body["messages"]
            ]
        )
        text = f'"messages": [{text}]'
    else:
        text = _ENCODE(body)[1:-1]
    return f'{{"id": "{key:016x}", {text}, "source": {source}}}\n'.encode()


def _lengths(row):
    """The length of each field of a row; 0 for what is no text."""
    return [len(value) if isinstance(value, str) else 0 for value in row.values()]


def _aside_line(name, line, reason, detail, row):
    """One line of the ledger; what UTF-8 cannot hold (lone surrogates) is written as \\u escapes."""
    aside = {"file": name, "line": line, "reason": reason, "detail": detail, "row": row}
    text = json.dumps(aside, ensure_ascii=False, default=str)
    try:
        line = text.encode()
    except UnicodeEncodeError:
        line = json.dumps(aside, default=str).encode()
    return line + b"\n"


def write_outputs(made, given, folder, names, rows, side, fate, twin, drawn):
    """Write every line made to its file, and the rows given of duplicates and leaks to the ledger.

    Returns (rows by output, rows set aside here by reason, the drawn output lines).
    """
    target = (rows["kind"].astype(int) - 1) * 2 + (
        side == EVAL
    )  # an index into OUTPUTS; negative: for the ledger
    alone = (fate > 0) | drawn  # these need a look each, the others go by runs
    alone[::RUN] = True
    bounds = numpy.flatnonzero((numpy.diff(target) != 0) | alone[1:] | alone[:-1]) + 1
    starts = numpy.concatenate(([0], bounds)) if len(rows) else bounds
    runs = zip(
        starts.tolist(),
        [*bounds.tolist(), len(rows)],
        *(values[starts].tolist() for values in (target, fate, drawn)),
    )
    counts, aside, examples, opened = Counter(), Counter(), [], {}
    file, number = rows["file"], rows["line"]
    with ExitStack() as stack:
        ledger = stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))
        for start, end, output, reason, example in runs:
            if output < 0:
                ledger.write(made.read(start, end))
            elif reason:
                aside[REASONS[reason]] += 1
                found = {
                    "file": names[file[start]],
                    "line": int(number[start]),
                    "reason": REASONS[reason],
                    "detail": f"of {names[file[twin[start]]]}:{number[twin[start]]}",
                }
                ledger.write(_ENCODE(found)[:-1].encode() + b', "row": ' + given.read(start) + b"}\n")
            else:
                name = OUTPUTS[output]
                if name not in opened:
                    opened[name] = stack.enter_context(atomic_write(folder / f"{name}.jsonl", "wb"))
                lines = made.read(start, end)
                opened[name].write(lines)
                counts[name] += end - start
                if example:
                    examples.append(json.loads(lines))
    return counts, aside, examples
