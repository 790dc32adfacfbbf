"""The stages of the conversion: recognise every row, and once each row's status is known, write its line where it belongs."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy
import psutil

from utils.data.columns import UnknownRow
from utils.data.dedup import KEPT, REASONS, Decisions
from utils.data.inputs import InputFile
from utils.data.messages import Reject
from utils.data.readers import batches, parse_row
from utils.data.row_index import EVAL, KIND, IndexedBatch, RowIndex, content_key, index_rows
from utils.data.schemas import OUTPUT_FILES, OUTPUTS, ConvertedRow, RowOptions, convert_row
from utils.data.text_store import TextStore
from utils.data.workers import map_tasks
from utils.errors import UserError
from utils.files import atomic_write
from utils.text import ByteProgress, format_bytes

RUN = 1000  # rows written at a time, at most
LARGE = 32e6  # bytes: from here up, several processes are worth their start
BYTES_A_ROW = 1000  # of memory: 300 measured for mixed questions, 1,000 where all are one long template
FORECAST_ROWS = 50_000  # rows after which the memory is forecast for the first time
UNKNOWN_ROWS, UNKNOWN_CHARACTERS = 200, 300  # kept of a batch to suggest columns by: rows, and of each text

# One encoder for all rows, where json.dumps would make one a call; what was just read from JSON holds no circles to check for.
_ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


class Batch(NamedTuple):
    """What a worker is given: rows (line, raw) of one file, the file's number, and how to read them."""

    file: int
    source: InputFile
    rows: list
    options: RowOptions


class FirstReject(NamedTuple):
    """The first row of a file that cannot be used."""

    line: int
    reason: str
    detail: str


class Examined(NamedTuple):
    """What a worker gives back. Of a usable row `lines` holds its output line, of any other its line in the ledger."""

    file: int
    lines: bytes
    lengths: list  # bytes of each line
    indexed: IndexedBatch
    schemas: Counter
    reasons: Counter
    trimmed: int  # conversations of which turns at an end were left out
    rejects: list  # [FirstReject] or []
    unknown: list  # [UnknownRow, ...]: the first rows whose fields are not recognised


class Recognised(NamedTuple):
    """All rows after the first pass; the lines of both stores are in the order of `row_index.rows`."""

    row_index: RowIndex
    lines: TextStore  # as in Examined
    originals: TextStore  # the rows as they were given, a JSON text each
    schemas: Counter
    reasons: Counter
    trimmed: list  # counts of Examined
    rejects: dict  # {file: FirstReject}
    unknown: dict  # {file: [UnknownRow, ...]}, of the first batch that has some


class Written(NamedTuple):
    """Rows by output file, rows set aside as duplicates and leaks by reason, and the sampled output rows."""

    outputs: Counter
    set_aside: Counter
    sampled: list


def recognise(sources: list[InputFile], options: RowOptions, folder: Path, workers: int) -> Recognised:
    """Read and recognise every row. Texts wait in temporary files in `folder`; `workers` 0: as the size suggests."""
    size = sum(source.size for source in sources)
    workers = workers or (1 if size < LARGE else min(os.cpu_count() or 1, 8))
    stores = RowIndex(folder), TextStore(folder), TextStore(folder)
    found = Recognised(*stores, Counter(), Counter(), [], {}, {})
    tasks = _tasks(sources, options, found.originals)
    forecast_at = FORECAST_ROWS
    with ByteProgress("rows recognised", 0, size, always=False) as meter:
        for examined in map_tasks(examine, tasks, workers):
            found.lines.add(examined.lines, examined.lengths)
            found.row_index.add(examined.file, examined.indexed)
            found.schemas.update(examined.schemas)
            found.reasons.update(examined.reasons)
            found.trimmed.append(examined.trimmed)
            for reject in examined.rejects:
                found.rejects.setdefault(examined.file, reject)
            if examined.unknown:
                found.unknown.setdefault(examined.file, examined.unknown)
            # About: the same rows take more or less as tables and arrays than as JSON lines.
            done = min(found.originals.ends[-1], size - 1)
            meter.show(done)
            if found.row_index.count >= forecast_at:
                refuse_too_many(found.row_index.count, done / size)
                forecast_at *= 2
        meter.show(size)
    found.row_index.finish()
    return found


def refuse_too_many(rows: int, share: float) -> None:
    """UserError with the forecast where all rows, of which `rows` are this share, would not fit into the memory."""
    needed, free = BYTES_A_ROW * rows / share, psutil.virtual_memory().available + BYTES_A_ROW * rows
    if needed > free:
        raise UserError(
            f"about {rows / share:,.0f} rows are to be compared with one another, which takes {format_bytes(needed)} of memory "
            f"({BYTES_A_ROW} bytes a row); {format_bytes(free)} are free, enough for {free / BYTES_A_ROW:,.0f} rows: "
            "convert the files in parts, each to its own --output-dir"
        )


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
    source, options = batch.source, batch.options
    indexed: list[tuple[int, int, ConvertedRow | None]] = []
    lines: list[bytes] = []
    rejects: list[FirstReject] = []
    unknown: list[UnknownRow] = []
    schemas: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    trimmed = 0
    for number, raw in batch.rows:
        row = None
        try:
            row = parse_row(raw, source.encoding)
            item = convert_row(row, options)
            item = item if item.split else item._replace(split=source.split)
            key = content_key(item)
            indexed.append((number, key, item))
            schemas[item.schema] += 1
            trimmed += item.trimmed
            strange = options.columns and item.schema != "--columns"
            lines.append(_output_line(source.name, number, key, item))
        except Reject as problem:
            indexed.append((number, 0, None))
            reasons[problem.reason] += 1
            rejects = rejects or [FirstReject(number, problem.reason, problem.detail)]
            strange = problem.reason == "fields not recognised"
            lines.append(_ledger_line(source.name, number, problem, problem.row if row is None else row))
        if strange and len(unknown) < UNKNOWN_ROWS:
            unknown.append(UnknownRow(number, {name: _shortened(value) for name, value in row.items()}))
    lengths = [len(line) for line in lines]
    index = index_rows(indexed)
    return Examined(batch.file, b"".join(lines), lengths, index, schemas, reasons, trimmed, rejects, unknown)


def _shortened(value):
    return value[:UNKNOWN_CHARACTERS] if isinstance(value, str) else None


def _output_line(name: str, line: int, key: int, item: ConvertedRow) -> bytes:
    body, source = item.body, _ENCODE(f"{name}:{line}")
    if item.kind == "exam":
        body["subject"] = body["subject"] or Path(name.removesuffix(".gz")).stem
    if item.kind == "sft":  # nearly every row: put together here in half the time of the encoder
        fields = (
            ", ".join([f'"{field}": {_ENCODE(value)}' for field, value in turn.items()])
            for turn in body["messages"]
        )
        text = '"messages": [{' + "}, {".join(fields) + "}]"
    else:
        text = _ENCODE(body)[1:-1]
    return f'{{"id": "{key:016x}", {text}, "source": {source}}}\n'.encode()


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
    found: Recognised, decisions: Decisions, sampled: numpy.ndarray, sources: list[InputFile], folder: Path
) -> Written:
    """Write every line to its file, and the originals of duplicates and leaks to the ledger. `sampled`: a mask of rows."""
    written = Written(Counter(), Counter(), [])
    with ExitStack() as stack:
        ledger = stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))
        files: dict[str, IO[bytes]] = {}
        for run in _runs(found.row_index.rows, decisions, sampled):
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
                if found.row_index.rows["kind"][run.start] == KIND["bad"]:
                    lines = _pair_line(lines, found.lines.read(decisions.duplicate_of[run.start]))
                files[name].write(lines)
                written.outputs[name] += run.end - run.start
                if run.sampled:
                    written.sampled.append(json.loads(lines))
    return written


def _runs(rows, decisions, sampled) -> Iterator[Run]:
    bad = rows["kind"] == KIND["bad"]  # written as a pair with the good answer, which is read for each
    files = [(OUTPUTS.index(kind.trained), OUTPUTS.index(kind.held_out)) for kind in OUTPUT_FILES.values()]
    output = numpy.array([(-1, -1), *files])[rows["kind"], (decisions.split == EVAL).astype(int)]
    alone = (decisions.status != KEPT) | sampled | bad  # these need a look each, the others go by runs
    alone[::RUN] = True
    bounds = numpy.flatnonzero((numpy.diff(output) != 0) | alone[1:] | alone[:-1]) + 1
    starts = numpy.concatenate(([0], bounds)) if len(rows) else bounds
    of_run = (values[starts].tolist() for values in (output, decisions.status, sampled))
    return map(Run, starts.tolist(), [*bounds.tolist(), len(rows)], *of_run)


def _pair_line(bad: bytes, good: bytes) -> bytes:
    """The preference pair of a bad answer's line and the line of the conversation that answers the same prompt well."""
    pair, chosen = json.loads(bad), json.loads(good)["messages"][-1:]
    turns = {"prompt": pair["prompt"], "chosen": chosen, "rejected": pair["rejected"]}
    pair = {"id": pair["id"], **turns, "kind": "given", "source": pair["source"]}
    return _ENCODE(pair).encode() + b"\n"


def _repeat_line(row, found, decisions, sources):
    """The ledger's line of a row that repeats or leaks another, or is a bad answer alone."""
    rows, other = found.row_index.rows, decisions.duplicate_of[row]

    def name_of(number):
        return sources[rows["file"][number]].name

    entry = {
        "file": name_of(row),
        "line": int(rows["line"][row]),
        "reason": REASONS[decisions.status[row]],
        "detail": f"of {name_of(other)}:{rows['line'][other]}" if other >= 0 else "",
    }
    return _ENCODE(entry)[:-1].encode() + b', "row": ' + found.originals.read(row) + b"}\n"


def remove_stale(folder: Path, outputs: Counter) -> None:
    """Remove the evaluation file of an earlier run that the new training file does not belong to."""
    for kind in OUTPUT_FILES.values():
        if outputs[kind.trained] and not outputs[kind.held_out]:
            (folder / f"{kind.held_out}.jsonl").unlink(missing_ok=True)
