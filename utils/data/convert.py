"""The stages of the conversion: recognise every row, and once each row's status is known, write its line where it belongs."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy

from utils.data.dedup import KEPT, REASONS, Decisions
from utils.data.readers import Reject, Source, batches, parse_row
from utils.data.row_index import EVAL, IndexedBatch, RowIndex, content_key, index_rows
from utils.data.schemas import Item, RowOptions, convert_row
from utils.data.text_store import TextStore
from utils.data.workers import map_tasks
from utils.files import atomic_write
from utils.progress import ByteProgress

OUTPUTS = ("sft_train", "sft_eval", "dpo_train", "dpo_eval", "exam")
RUN = 1000  # rows written at a time, at most
LARGE = 32e6  # bytes: from here up, several processes are worth their start

# One encoder for all rows, where json.dumps would make one a call; what was just read from JSON holds no circles to check for.
_ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


class Batch(NamedTuple):
    """What a worker is given: rows (line, raw) of one file, the file's number, and how to read them."""

    file: int
    source: Source
    rows: list
    options: RowOptions


class Examined(NamedTuple):
    """What a worker gives back. Of a usable row `lines` holds its output line, of any other its line in the ledger."""

    file: int
    lines: bytes
    lengths: list  # bytes of each line
    index: IndexedBatch
    schemas: Counter
    reasons: Counter
    unknown: (
        dict  # {field names: lengths of the first such row's fields}, of rows whose fields are not recognised
    )


class Recognised(NamedTuple):
    """All rows after the first pass; the lines of both stores are in the order of `index.rows`."""

    index: RowIndex
    lines: TextStore  # as in Examined
    originals: TextStore  # the rows as they were given, a JSON text each
    schemas: Counter
    reasons: Counter
    unknown: dict


class Written(NamedTuple):
    """Rows by output file, rows set aside as duplicates and leaks by reason, and the sampled output rows."""

    outputs: Counter
    set_aside: Counter
    sampled: list


def recognise(sources: list[Source], options: RowOptions, folder: Path, workers: int) -> Recognised:
    """Read and recognise every row. Texts wait in temporary files in `folder`; `workers` 0: as the size suggests."""
    size = sum(source.path.stat().st_size for source in sources)
    workers = workers or (1 if size < LARGE else min(os.cpu_count() or 1, 8))
    found = Recognised(RowIndex(folder), TextStore(folder), TextStore(folder), Counter(), Counter(), {})
    tasks = _tasks(sources, options, found.originals)
    with ByteProgress("rows recognised", 0, size, always=False) as meter:
        for examined in map_tasks(examine, tasks, workers):
            found.lines.add(examined.lines, examined.lengths)
            found.index.add(examined.file, examined.index)
            found.schemas.update(examined.schemas)
            found.reasons.update(examined.reasons)
            if not found.unknown:  # those of the first batch that has some
                found.unknown.update(examined.unknown)
            # About: the same rows take more or less as tables and arrays than as JSON lines.
            meter.show(min(found.originals.ends[-1], size - 1))
        meter.show(size)
    found.index.finish()
    return found


def _tasks(sources, options, originals) -> Iterator[Batch]:
    """A task of `examine` for every batch of rows, which goes to the store `originals` as it was given."""
    for file, rows in batches(sources):
        texts = [_as_json(raw, sources[file].encoding) for _, raw in rows]
        originals.add(b"".join(texts), map(len, texts))
        yield Batch(file, sources[file], rows, options)


def _as_json(raw, encoding):
    """UTF-8, in one line; a table row is written as an object."""
    if isinstance(raw, dict):
        return json.dumps(raw, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    if isinstance(raw, str):
        return raw.replace("\n", " ").encode("utf-8", "backslashreplace")
    if isinstance(raw, Reject):  # never asked for: such a row already has its line in the ledger
        return b""
    return raw.decode(encoding, "backslashreplace").encode() if encoding == "gb18030" else raw


def examine(batch: Batch) -> Examined:
    """Recognise the rows of one batch."""
    name = batch.source.path.name
    indexed, lines, schemas, reasons, unknown = [], [], Counter(), Counter(), {}
    for number, raw in batch.rows:
        row = None
        try:
            row = parse_row(raw, batch.source.encoding)
            item = convert_row(row, batch.options)
            key = content_key(item)
            indexed.append((number, key, item))
            schemas[item.schema] += 1
            if batch.options.columns and item.schema != "--columns":
                unknown.setdefault(tuple(row), _lengths(row))
            lines.append(_output_line(name, number, key, item))
        except Reject as problem:
            indexed.append((number, 0, None))
            reasons[problem.reason] += 1
            if problem.reason == "fields not recognised":
                unknown.setdefault(tuple(row), _lengths(row))
            lines.append(_ledger_line(name, number, problem, problem.row if row is None else row))
    lengths = [len(line) for line in lines]
    return Examined(batch.file, b"".join(lines), lengths, index_rows(indexed), schemas, reasons, unknown)


def _output_line(name: str, line: int, key: int, item: Item) -> bytes:
    body, source = item.body, _ENCODE(f"{name}:{line}")
    if item.kind == "exam":
        body["subject"] = body["subject"] or Path(name).stem
    if item.kind == "sft":  # nearly every row: put together here in half the time of the encoder
        fields = (
            ", ".join([f'"{field}": {_ENCODE(value)}' for field, value in turn.items()])
            for turn in body["messages"]
        )
        text = '"messages": [{' + "}, {".join(fields) + "}]"
    else:
        text = _ENCODE(body)[1:-1]
    return f'{{"id": "{key:016x}", {text}, "source": {source}}}\n'.encode()


def _lengths(row):
    """The length of each field of a row; 0 for what is no text."""
    return [len(value) if isinstance(value, str) else 0 for value in row.values()]


def _ledger_line(name, line, problem, row):
    """One line of the ledger; what UTF-8 cannot hold (lone surrogates) is written as \\u escapes."""
    entry = {"file": name, "line": line, "reason": problem.reason, "detail": problem.detail, "row": row}
    try:
        text = json.dumps(entry, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        text = json.dumps(entry, default=str).encode()
    return text + b"\n"


class Run(NamedTuple):
    """Rows number `start` to `end` - 1, which go to one file together. `output`: an index into OUTPUTS, negative: ledger."""

    start: int
    end: int
    output: int
    status: int
    sampled: bool


def write_outputs(
    found: Recognised, decisions: Decisions, sampled: numpy.ndarray, sources: list[Source], folder: Path
) -> Written:
    """Write every line to its file, and the originals of duplicates and leaks to the ledger. `sampled`: a mask of rows."""
    written = Written(Counter(), Counter(), [])
    with ExitStack() as stack:
        ledger = stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))
        files: dict[str, BinaryIO] = {}
        for run in _runs(found.index.rows, decisions, sampled):
            if run.output < 0:
                ledger.write(found.lines.read(run.start, run.end))
            elif run.status != KEPT:
                written.set_aside[REASONS[run.status]] += 1
                ledger.write(_repeat_line(run.start, found, decisions, sources))
            else:
                name = OUTPUTS[run.output]
                if name not in files:
                    files[name] = stack.enter_context(atomic_write(folder / f"{name}.jsonl", "wb"))
                lines = found.lines.read(run.start, run.end)
                files[name].write(lines)
                written.outputs[name] += run.end - run.start
                if run.sampled:
                    written.sampled.append(json.loads(lines))
    return written


def _runs(rows, decisions, sampled) -> Iterator[Run]:
    output = (rows["kind"].astype(int) - 1) * 2 + (decisions.split == EVAL)
    alone = (decisions.status != KEPT) | sampled  # these need a look each, the others go by runs
    alone[::RUN] = True
    bounds = numpy.flatnonzero((numpy.diff(output) != 0) | alone[1:] | alone[:-1]) + 1
    starts = numpy.concatenate(([0], bounds)) if len(rows) else bounds
    of_run = (values[starts].tolist() for values in (output, decisions.status, sampled))
    return map(Run, starts.tolist(), [*bounds.tolist(), len(rows)], *of_run)


def _repeat_line(row, found, decisions, sources):
    """The ledger's line of a row that repeats or leaks another."""
    rows, other = found.index.rows, decisions.duplicate_of[row]

    def name_of(number):
        return sources[rows["file"][number]].path.name

    entry = {
        "file": name_of(row),
        "line": int(rows["line"][row]),
        "reason": REASONS[decisions.status[row]],
        "detail": f"of {name_of(other)}:{rows['line'][other]}",
    }
    return _ENCODE(entry)[:-1].encode() + b', "row": ' + found.originals.read(row) + b"}\n"


def remove_stale(folder: Path, outputs: Counter) -> None:
    """Remove the evaluation file of an earlier run that the new training file does not belong to."""
    for name in OUTPUTS:
        if not outputs[name] and outputs[name.replace("_eval", "_train")]:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
