"""Read any data file row by row, so that memory does not grow with the file, and say what cannot be read and where.

A row leaves the reader as `(line, raw)`: `raw` is the JSON text of one row (bytes or str), the dict of one table row, or a
Reject that already knows why the row cannot be used. `parse_row` turns the text into a dict; it is apart from the reading
because it is the slow half, which worker processes share.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import show_path

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BLOCK = 1 << 20  # characters read at a time from a JSON array
LARGEST_ELEMENT = 64 << 20  # characters; an array element that has not ended by then is not JSON
BATCH_ROWS, BATCH_CHARACTERS = 2000, 4 << 20  # what one worker gets at a time
ENCODING_LINES = 1000  # non-ASCII lines looked at to tell UTF-8 from GB18030
BOM = b"\xef\xbb\xbf"
_NEXT_OBJECT = re.compile(r"\}(?=\s*,\s*\{)")
_BETWEEN = re.compile(r"[\s,]*")


class Source(NamedTuple):
    """A data file and its encoding, as `detect_encoding` tells it."""

    path: Path
    encoding: str


class Reject(Exception):
    """Why a row is set aside: `reason` is one of few, to count by, `detail` about this row, `row` what was read of it."""

    def __init__(self, reason: str, detail: str = "", row: object = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.row = reason, detail, row


def data_files(inputs: list[Path], made_by: str) -> list[Path]:
    """The data files among `inputs` (files, or folders of them), each once. UserError names `made_by`, which makes them."""
    files = []
    for given in inputs:
        if given.is_dir():
            files += sorted(
                path
                for path in given.iterdir()
                if path.suffix.lower() in KINDS
                and path.is_file()
                and not path.name.startswith(".")
                and not path.name.endswith(".source.json")
            )
        elif not given.exists():
            raise UserError(f"{show_path(given)} does not exist; make it with: {made_by}")
        elif given.suffix.lower() not in KINDS:
            raise UserError(
                f"{show_path(given)}: cannot read {given.suffix or 'a file without extension'}; "
                f"wanted {', '.join(KINDS)}"
            )
        else:
            files.append(given)
    if not files:
        places = ", ".join(map(show_path, inputs))
        raise UserError(f"no data file ({', '.join(KINDS)}) in {places}; make one with: {made_by}")
    for path in files:
        if not _encodes(path.name):
            raise UserError(
                f"{ascii(path.name)}: the file's name is not UTF-8; rename it and run the same command again"
            )
    return list({path.resolve(): path for path in files}.values())


def _encodes(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def detect_encoding(path: Path) -> str:
    """ "utf-8", "utf-8-sig" (with a BOM), "gb18030", or "parquet" for a file that is no text.

    A UTF-8 file with damaged lines stays UTF-8: GB18030 is chosen only where most non-ASCII lines are not UTF-8 and more of
    them are GB18030 (which accepts most byte pairs, so it cannot be asked first).
    """
    if path.suffix.lower() == ".parquet":
        return "parquet"
    with open(path, "rb") as lines:
        first = lines.read(4)
        if first.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{show_path(path)} is UTF-16; save it as UTF-8 and run the same command again")
        if first.startswith(BOM):
            return "utf-8-sig"
        lines.seek(0)
        seen, failing = 0, {"utf-8": 0, "gb18030": 0}
        for line in lines:
            if line.isascii():
                continue
            seen += 1
            for encoding in failing:
                failing[encoding] += not _decodes(line, encoding)
            if seen == ENCODING_LINES:
                break
    return "gb18030" if 2 * failing["utf-8"] > seen and failing["gb18030"] < failing["utf-8"] else "utf-8"


def read_rows(path: Path, encoding: str) -> Iterator[tuple]:
    """Yield `(line, raw)` for every row of a file, blank lines left out; `line`: where it starts, in Parquet its number."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind in (".csv", ".tsv"):
        return _table_rows(path, encoding, "," if kind == ".csv" else "\t")
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    array = start.startswith(b"[") if kind == ".json" else re.match(rb"\[\s*(\{|$)", start)
    return _array_rows(path, encoding) if array else _lines(path)


def batches(sources: list[Source]) -> Iterator[tuple[int, list]]:
    """Yield `(number of the source, [(line, raw), ...])`: at most BATCH_ROWS rows and about BATCH_CHARACTERS characters."""
    for number, source in enumerate(sources):
        batch, size = [], 0
        for line, raw in read_rows(*source):
            batch.append((line, raw))
            size += _characters(raw)
            if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
                yield number, batch
                batch, size = [], 0
        if batch:
            yield number, batch


def _characters(raw):
    if isinstance(raw, dict):
        return sum(len(str(value)) for value in raw.values())
    return 0 if isinstance(raw, Reject) else len(raw)


def parse_row(raw: "bytes | str | dict | Reject", encoding: str) -> dict:
    """The dict of one raw row; raises Reject where it is none."""
    if isinstance(raw, Reject):
        raise raw
    if isinstance(raw, dict):
        return raw
    if isinstance(raw, bytes):
        try:
            raw = raw.decode(encoding)
        except UnicodeDecodeError as error:
            text = raw.decode(encoding, "backslashreplace")
            raise Reject("undecodable bytes", f"byte {error.start + 1} is not {encoding}", text) from None
    elif not raw.isascii() and re.search("[\udc80-\udcff]", raw):
        text = raw.encode(encoding, "surrogateescape").decode(encoding, "backslashreplace")
        raise Reject("undecodable bytes", f"not {encoding}", text)
    try:
        row = _DECODER.decode(raw)
    except Reject as problem:
        problem.row = raw
        raise
    except RecursionError:
        raise Reject("not JSON", "nested too deep", raw) from None
    except ValueError as error:  # JSONDecodeError, and numbers of more than 4,300 digits
        raise Reject("not JSON", str(error), raw) from None
    if not isinstance(row, dict):
        raise Reject("not an object", f"the line holds a {type(row).__name__}", row)
    return row


def _unique_keys(pairs):
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise Reject("duplicate keys", ", ".join(sorted({name for name in names if names.count(name) > 1})))
    return fields


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder(strict=False, parse_int=str)  # finds where an element ends; parse_row judges it


def _decodes(line, encoding):
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _lines(path):
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.startswith(BOM):  # any line may carry one: files are joined with `cat`
                line = line[len(BOM) :]
            line = line.rstrip()
            if line:
                yield number, line


def _array_rows(path, encoding):
    """The elements of a JSON array as texts, one at a time. After a damaged one, goes on at the next object."""
    with open(path, encoding=encoding, errors="surrogateescape", newline="\n") as file:
        text, line, ended = file.read(BLOCK), 1, False
        at = text.index("[") + 1
        line += text.count("\n", 0, at)
        while True:
            start = _BETWEEN.match(text, at).end()
            line += text.count("\n", at, start)
            at = start
            end = _element_end(text, start, ended or len(text) - start > LARGEST_ELEMENT)
            if end is None:
                more = file.read(
                    max(BLOCK, len(text) - start)
                )  # doubling: a long element is scanned a few times only
                text, at, ended = text[start:] + more, 0, not more
            elif text[start:end] in ("", "]"):
                return
            else:
                yield line, text[start:end]
                line += text.count("\n", start, end)
                at = end


def _element_end(text, start, final):
    """Where the array element that starts at `start` ends; None if that needs more text than there is yet (not `final`)."""
    if text.startswith("]", start) or start == len(text):
        return len(text.rstrip()) if final else None
    try:
        end = _LENIENT.raw_decode(text, start)[1]
    except json.JSONDecodeError as error:
        if not final and (error.msg.startswith("Unterminated") or error.pos > len(text) - 16):
            return None
        return _next_object(text, error.pos, final)
    except RecursionError:
        return _next_object(text, start, final)
    return end if final or _BETWEEN.match(text, end).end() < len(text) else None


def _next_object(text, damaged, final):
    found = _NEXT_OBJECT.search(text, damaged)
    return found.end() if found else len(text) if final else None


def _table_rows(path, encoding, delimiter):
    csv.field_size_limit(1 << 30)  # the default, 131,072 characters, stops at long answers
    with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
        table = csv.reader(file, delimiter=delimiter)
        names, line = None, 1
        while True:
            try:
                cells = next(table, None)
                if cells is None:
                    return
                if names is None:
                    names = cells or None
                elif cells:
                    yield line, _table_row(names, cells, encoding)
            except csv.Error as error:
                yield line, Reject("not a table row", str(error))
            line = table.line_num + 1


def _table_row(names, cells, encoding):
    if len(set(names)) != len(names):
        return Reject("duplicate keys", "the header names a column twice", cells)
    if len(cells) != len(names):
        return Reject("not a table row", f"{len(cells)} cells under {len(names)} columns", cells)
    if any(not cell.isascii() and re.search("[\udc80-\udcff]", cell) for cell in cells):
        cells = [
            cell.encode(encoding, "surrogateescape").decode(encoding, "backslashreplace") for cell in cells
        ]
        return Reject("undecodable bytes", f"not {encoding}", dict(zip(names, cells)))
    return dict(zip(names, cells))


def _parquet_rows(path):
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_row(batch.slice(index, 1))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{show_path(path)} is not a whole Parquet file ({str(error).splitlines()[0]})"
        ) from None


def _parquet_row(one):
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:  # Arrow does not check its text columns
        return Reject(
            "undecodable bytes", str(error), {name: repr(one.column(name)) for name in one.schema.names}
        )
