"""Reads any data file row by row, and names the place of every row that cannot be read.

A place is the line where the row starts (in Parquet, Arrow and columns of lists its number); the third of several rows that
start in line 1 has "1#3", and row 4 of one of several sheets "Sheet2!4".
"""

import collections
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterator

from utils.data.inputs import SURROGATES, InputFile, says_evaluation, told_if_damaged
from utils.data.messages import Reject
from utils.errors import UserError
from utils.files import show_path

Place = int | str

PARQUET_ROWS = 500  # read together
LONGEST_CELL = 64 << 20  # characters; the default of csv, 131,072, stops at long answers
TITLES = 3  # rows above the names of the columns that may be titles
LONGEST_NAME = 20  # characters of a field's name in a table

# Lists that belong to a row: an object with one of these and none of the others is a row, not a wrapper of rows.
ROW_LISTS = set(
    "messages conversations options option choices history chosen rejected prompt completion 选项 content tools qa_pairs".split()
)
_BETWEEN = re.compile(r"[\s,]*")
_BOM = "\ufeff"


def read_rows(file: InputFile) -> Iterator[tuple[Place, dict | Reject]]:
    """Yield (place, row, or why it is none) for every row of a file but blank lines; UserError if the file is broken."""
    return _READERS[file.ending](file)


def _unique_keys(pairs):
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = collections.Counter(name for name, _ in pairs) - collections.Counter(fields.keys())
        raise Reject("duplicate keys", ", ".join(sorted(twice)))
    return fields


# NaN and Infinity, which are no JSON, are what pandas writes for an empty field.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=lambda name: None)
_LENIENT = json.JSONDecoder(strict=False, parse_int=str)  # finds where a value ends


def parse(text: str) -> object:
    """The value of a JSON text, or a Reject."""
    if not text.isascii() and SURROGATES.search(text):
        return _undecodable(text)
    try:
        return _DECODER.decode(text)
    except Reject as problem:
        return Reject(problem.reason, problem.detail, text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, and numbers of more than 4,300 digits
        return Reject("not JSON", str(error), text)


def _undecodable(text):
    shown = SURROGATES.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:x}", text)
    return Reject("undecodable bytes", "shown as \\x and two digits", shown)


def _json_rows(file):
    """The rows of JSON lines, of an array, or of an object of arrays, whatever the file's name says."""
    lines = filter(None, (line.removeprefix(_BOM).strip() for line in file.lines()))
    first, second = next(lines, ""), next(lines, "")
    if first.startswith("["):
        whole = not second or not first.endswith("]")
    else:  # an object in one line that has another below it is a row, however damaged
        whole = first.startswith("{") and (not second or first.endswith(("{", "[", ",", ":")))
    before, count = 0, 0  # the line of the row before, and how many rows began in it
    for line, text, alone in _values(file) if whole else _lines(file):
        for row in _rows_of(parse(text), file, alone):
            before, count = line, count + 1 if line == before else 1
            yield (line if count == 1 else f"{line}#{count}"), row


def _lines(file):
    """(line, its text, False) of every line."""
    for number, line in enumerate(file.lines(), 1):
        if line := line.removeprefix(_BOM).rstrip():  # any line may have one: files are joined with `cat`
            yield number, line, False


def _values(file):
    """(line, text, True if it is in no array) of every JSON value of a file. An array takes twice its bytes of memory."""
    text = "".join(file.lines())
    line, counted, inside, at = 1, 0, False, 0
    while (at := _BETWEEN.match(text, at).end()) < len(text) or inside:
        if text[at : at + 1] == ("]" if inside else "["):
            inside, at = not inside, at + 1
            continue
        try:
            end = _LENIENT.raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            advice = "mend that place, or get the file again"
            raise UserError(f"{show_path(file.path)}: broken JSON: {error}; {advice}") from None
        line, counted = line + text.count("\n", counted, at), at
        yield line, text[at:end], not inside
        at = end


def _rows_of(value, file, alone):
    """The rows in a JSON value: itself, those of a list, or those of an object that stands `alone`."""
    rows = _rows_of_list(value)
    if isinstance(value, dict):
        rows = _rows_of_object(value, file) if alone else []
    elif not isinstance(value, Reject):
        value = Reject("not an object", f"the line holds a {type(value).__name__}", value)
    return rows or [value]


def _rows_of_list(values):
    """The rows in a list: objects are a row each, turns or texts one conversation; [] of anything else."""
    if not isinstance(values, list) or not values:
        return []
    if all(isinstance(value, list) for value in values):
        found = [_rows_of_list(value) for value in values]
        return list(itertools.chain(*found)) if all(found) else []
    if all(isinstance(value, dict) for value in values):
        turns = all("role" in value or "from" in value for value in values)
        return [{"messages": values}] if turns else values
    return [{"messages": values}] if all(isinstance(value, str) for value in values) else []


def _rows_of_object(value, file):
    """The rows of {"data": [...]} (those under "test" say their split with that), of columns, {"question": [...], ...}, which
    pandas writes by row number too, and of rows by name; [] of a row."""
    parts = list(value.values())
    lists = {key: part for key, part in value.items() if isinstance(part, list) and part}
    lists = {key: part for key, part in lists.items() if all(isinstance(row, dict | list) for row in part)}
    if lists and ROW_LISTS.isdisjoint(map(str.lower, lists)):
        found = {key: _rows_of_list(part) for key, part in lists.items()}
        split = {key: {"split": "eval"} if says_evaluation(key) and not file.split else {} for key in found}
        return [split[key] | row for key in found for row in found[key]] if all(found.values()) else []
    if len(parts) < 2:
        return []
    if all(isinstance(part, list) for part in parts) and len(set(map(len, parts))) == 1:
        return [dict(zip(value, cells)) for cells in zip(*parts)]
    if not all(isinstance(part, dict) for part in parts) or len(set(map(tuple, parts))) > 1:
        return []
    if all(map(str.isdecimal, parts[0])):
        return [{name: column[number] for name, column in value.items()} for number in parts[0]]
    return parts


def _csv_rows(file):
    signs = "\t,;" if file.ending == ".tsv" else ",\t;"  # the first that the header has
    header = next((line for line in file.lines("") if re.search(f"[{signs}]", line)), "")
    delimiter = next((sign for sign in signs if sign in header), signs[0])
    return _under_names(_csv_records(file, delimiter, header.count(delimiter)), file)


def _csv_records(file, delimiter, delimiters):
    """(line, cells or Reject) of a table. If a quote swallows lines or does not close, each line is judged by itself."""
    csv.field_size_limit(LONGEST_CELL)
    taken, line = [], 1  # the lines of a record, as far as they are read; its first line's number

    def lines():
        for text in file.lines(""):
            taken.append(text)
            yield text

    table = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(table, None)
        except csv.Error:
            cells = []
        if cells is None:
            return
        # A cell of several lines is none, if each of them has the cells of a whole row.
        full = all(text.count(delimiter) == delimiters for text in taken if text.strip())
        if not cells or delimiters and len(taken) > 1 and full:
            yield from ((number, _cells_alone(text, delimiter)) for number, text in enumerate(taken, line))
        else:
            yield line, cells
        line += len(taken)
        taken.clear()


def _cells_alone(text, delimiter):
    """The cells of one line, or a Reject; between tabs, quotes are seldom more than signs of the text."""
    if text.count('"') % 2 == 0:
        with contextlib.suppress(csv.Error):
            return next(csv.reader([text], delimiter=delimiter, strict=True), [])
        if delimiter == "\t":
            return text.rstrip("\r\n").split("\t")
    return Reject("a quote out of place", "it does not close, or would swallow lines", text)


def _xlsx_rows(file):
    """The rows of all sheets, each under the first row of its sheet."""
    import openpyxl

    def records(sheet):
        with told_if_damaged(file.path):
            sheet.reset_dimensions()  # WPS writes a size of its sheets that may be wrong
            for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                cells = ["" if cell is None else str(cell) for cell in cells]
                yield f"{sheet.title}!{number}" if len(sheets) > 1 else number, cells

    with told_if_damaged(file.path):
        sheets = openpyxl.load_workbook(file.path, read_only=True, data_only=True).worksheets
    for sheet in sheets:
        yield from _under_names(records(sheet), file)


def _under_names(records, file):
    """(place, row or Reject) of the records of a table, (place, cells or Reject), under the first one, or that below titles."""
    records = (
        (place, cells) for place, cells in records if isinstance(cells, Reject) or any(map(str.strip, cells))
    )
    head = list(itertools.islice(records, TITLES + 1))
    below = list(itertools.dropwhile(_is_title, head))
    if below and isinstance(below[0][1], list) and not any(map(looks_like_data, below[0][1])):
        head = below
    if not head:
        return
    line, names = head[0]
    if isinstance(names, Reject):
        raise UserError(f"{show_path(file.path)}, line {line}: {names.reason} in the names of columns")
    while not names[-1].strip():
        names.pop()
    for place, cells in itertools.chain(head[1:], records):
        yield place, cells if isinstance(cells, Reject) else _table_row(names, cells, file)


def _is_title(record):
    """True of a record of which only the first cell is filled."""
    cells = record[1]
    return isinstance(cells, list) and bool(cells[0].strip()) and not any(map(str.strip, cells[1:]))


def looks_like_data(name: object) -> bool:
    """True if a text that should be the name of a field reads like a cell of a table."""
    text = str(name).strip()
    return len(text) > LONGEST_NAME or bool(re.search("[？?。！，；]", text)) or text.isdecimal()


def _table_row(names, cells, file):
    if len(set(names)) != len(names):
        return Reject("duplicate keys", "the header names a column twice", cells)
    if file.ending == ".xlsx":
        cells = cells + [""] * (len(names) - len(cells))
    while len(cells) > len(names) and not cells[-1]:
        cells = cells[:-1]
    if len(cells) != len(names):
        return Reject("not a table row", f"{len(cells)} cells under {len(names)} columns", cells)
    if any(not cell.isascii() and SURROGATES.search(cell) for cell in cells):
        return _undecodable("\t".join(cells))
    return dict(zip(names, cells))


def _arrow_rows(file):
    """The rows of Parquet and Arrow files, read in batches of at most PARQUET_ROWS rows."""
    import pyarrow
    import pyarrow.parquet

    with told_if_damaged(file.path), pyarrow.OSFile(str(file.path)) as opened:
        if file.ending == ".parquet":
            batches = pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=PARQUET_ROWS)
        else:  # a stream, as `datasets` writes it
            batches = pyarrow.ipc.open_stream(opened)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


_TEXT = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
_READERS = {**_TEXT, ".parquet": _arrow_rows, ".arrow": _arrow_rows, ".xlsx": _xlsx_rows}
