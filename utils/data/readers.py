"""Reads any data file row by row, and names the place of every row that cannot be read.

A row leaves `read_rows` as `(place, raw)`. `place` is the line where it starts (in Parquet, Arrow and columns of lists its
number); of several rows that start in line 1, the third has "1#3", and row 4 of one of several sheets has "Sheet2!4". `raw` is
the JSON text of one row (bytes or str), the dict of one table row, or a Reject that already knows why the row cannot be used;
`parse_row` makes a dict of it.
"""

import collections
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator

from utils.data.inputs import BOM, SURROGATES, InputFile, says_evaluation, told_if_damaged
from utils.data.messages import Reject
from utils.errors import UserError
from utils.files import show_path

Place = int | str
Raw = bytes | str | dict | Reject

PARQUET_ROWS = 500  # read together
LONGEST_CELL = 64 << 20  # characters; the default of csv, 131,072, stops at long answers
TITLES = 3  # rows above the names of the columns that may be titles
LONGEST_NAME = 20  # characters of a field's name in a table

# Lists that belong to a row: an object with one of these and none of the others is a row, not a wrapper of rows.
ROW_LISTS = set(
    "messages conversations options option choices history chosen rejected prompt completion 选项 content tools qa_pairs".split()
)
_SPACE, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s,]*")


def read_rows(file: InputFile) -> Iterator[tuple[Place, Raw]]:
    """Yield `(place, raw)` for every row of a file, blank lines left out; UserError if the file is broken."""
    with told_if_damaged(file.path):
        yield from _READERS[file.ending](file)


def parse_row(raw: Raw, encoding: str) -> dict:
    """The dict of one raw row; raises Reject if it is none."""
    if isinstance(raw, dict):
        return raw
    row = _decoded(raw, encoding)
    if not isinstance(row, dict):
        raise Reject("not an object", f"the line holds a {type(row).__name__}", row)
    return row


def _decoded(raw, encoding):
    """The value of a JSON text; raises Reject."""
    if isinstance(raw, Reject):
        raise raw
    text = raw.decode(encoding, "surrogateescape") if isinstance(raw, bytes) else raw
    if not text.isascii() and SURROGATES.search(text):
        raise Reject("undecodable bytes", f"not {encoding}", _escaped(text, encoding))
    try:
        return _DECODER.decode(text)
    except Reject as problem:
        problem.row = text
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError, and numbers of more than 4,300 digits
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Reject("not JSON", why, text) from None


def _escaped(text, encoding):
    """A text with the bytes that could not be decoded as \\x escapes."""
    return text.encode(encoding, "surrogateescape").decode(encoding, "backslashreplace")


def _unique_keys(pairs):
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = collections.Counter(name for name, _ in pairs) - collections.Counter(fields.keys())
        raise Reject("duplicate keys", ", ".join(sorted(twice)))
    return fields


# NaN and Infinity, which are no JSON, are what pandas writes for an empty field.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=lambda name: None)
_LENIENT = json.JSONDecoder(strict=False, parse_int=str)  # finds where a value ends; parse_row judges it


def _json_rows(file):
    """The rows of JSON lines, of an array, or of an object of arrays, whatever the file's name says."""
    with file.open_bytes() as opened:
        lines = filter(None, (line.removeprefix(BOM).strip() for line in opened))
        first, second = next(lines, b""), next(lines, b"")
    if first.startswith(b"["):
        whole = not second or not first.endswith(b"]")
    else:  # an object in one line that has another below it is a row, however damaged
        whole = first.startswith(b"{") and (not second or first.endswith((b"{", b"[", b",", b":")))
    if whole:
        yield from _whole_json(file)
        return
    with file.open_bytes() as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM).rstrip()  # any line may carry one: files are joined with `cat`
            if line.startswith(b"["):
                for index, row in enumerate(_rows_of(line, file), 1):
                    yield (number if index == 1 else f"{number}#{index}"), row
            elif line:
                yield number, line


def _whole_json(file):
    """The rows of a JSON text that is not one row a line. An array takes twice its bytes of memory, an object four times."""
    with io.TextIOWrapper(file.open_bytes(), file.encoding, "surrogateescape", "\n") as opened:
        text = opened.read()
    line, counted, shown = 1, 0, 0
    try:
        for index, (start, raw) in enumerate(_values(text, file), 1):
            line, counted = line + text.count("\n", counted, start), start
            yield (line if line > shown else f"{line}#{index}"), raw
            shown = line
    except json.JSONDecodeError as error:
        where = f"{show_path(file.path)}: broken JSON at line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} ({error.msg}); mend that place, or get the file again") from None


def _values(text, file):
    """(start, raw row) of every row in the JSON values of a text; the elements of an array are values of their own."""
    inside, at = False, _BETWEEN.match(text).end()  # `inside` an array
    while at < len(text) or inside:
        if text[at : at + 1] == ("]" if inside else "["):
            inside, at = not inside, at + 1
        else:
            start, (_, at) = at, _LENIENT.raw_decode(text, at)
            raw = text[start:at]
            rows = [raw] if inside and raw.startswith("{") else _rows_of(raw, file)
            yield from ((start, row) for row in rows)
            end = _SPACE.match(text, at).end()
            if inside and text[end : end + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        at = _BETWEEN.match(text, at).end()


def _rows_of(text, file):
    """The rows in the text of a list or an object; the text, if it is a row itself, or damaged."""
    try:
        value = _decoded(text, file.encoding)
    except Reject:
        return [text]
    rows = _rows_of_object(value, file) if isinstance(value, dict) else _rows_of_list(value)
    return rows or [text]


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
    """The rows of {"data": [...]} (those under "test" say their split with that), of columns ({"question": [...], ...}, as
    pandas writes them also by row number), of rows by name, and of splits that are such objects; [] of a row."""

    def of_split(key, rows):
        return [({"split": "eval"} if says_evaluation(key) and not file.split else {}) | row for row in rows]

    lists = {key: part for key, part in value.items() if isinstance(part, list) and part}
    lists = {key: part for key, part in lists.items() if all(isinstance(row, dict | list) for row in part)}
    if lists and ROW_LISTS.isdisjoint(map(str.lower, lists)):
        found = [of_split(key, _rows_of_list(part)) for key, part in lists.items()]
        return list(itertools.chain(*found)) if all(found) else []
    parts = list(value.values())
    if len(parts) < 2:
        return []
    if all(isinstance(part, list) for part in parts) and len(set(map(len, parts))) == 1:
        return [dict(zip(value, cells)) for cells in zip(*parts)]
    if not all(isinstance(part, dict) for part in parts):
        return []
    if any(map(says_evaluation, value)):
        found = (of_split(key, _rows_of_object(part, file) or [part]) for key, part in value.items())
        return list(itertools.chain(*found))
    alike = len(set(map(tuple, parts))) == 1
    if alike and all(map(str.isdecimal, parts[0])):
        return [{name: column[number] for name, column in value.items()} for number in parts[0]]
    return parts if alike else []


def _csv_rows(file):
    with io.TextIOWrapper(file.open_bytes(), file.encoding, "surrogateescape", "") as opened:
        signs = "\t,;" if file.ending == ".tsv" else ",\t;"  # the first that the header has
        header = next((line for line in opened if re.search(f"[{signs}]", line)), "")
        delimiter = next((sign for sign in signs if sign in header), signs[0])
        opened.seek(0)
        yield from _under_names(_csv_records(opened, delimiter, header.count(delimiter)), file)


def _csv_records(opened, delimiter, delimiters):
    """(line, cells or Reject) of a table. If a quote swallows lines or does not close, each line is judged by itself."""
    csv.field_size_limit(LONGEST_CELL)
    taken, line = [], 1  # the lines of a record, as far as they are read; its first line's number

    def lines():
        for text in opened:
            taken.append(text)
            yield text

    table = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells, damage = next(table, None), ""
        except csv.Error as error:
            cells, damage = [], str(error)
        if cells is None:
            return
        # A cell of several lines is none, if each of them has the cells of a whole row.
        rows = delimiters and len(taken) > 1 and all(text.count(delimiter) == delimiters for text in taken)
        if damage or rows:
            for number, text in enumerate(taken, line):
                if text.count('"') % 2 or damage and len(taken) == 1 and delimiter != "\t":
                    yield number, Reject("a quote out of place", damage or "it would swallow lines", text)
                elif text.strip():  # between tabs, quotes are seldom more than signs of the text
                    plain = csv.QUOTE_NONE if damage and delimiter == "\t" else csv.QUOTE_MINIMAL
                    yield number, next(csv.reader([text], delimiter=delimiter, quoting=plain))
        elif cells:
            yield line, cells
        line += len(taken)
        taken.clear()


def _xlsx_rows(file):
    """The rows of all sheets, each under the first row of its sheet."""
    import openpyxl

    def records(sheet):
        sheet.reset_dimensions()  # WPS writes a size of its sheets that may be wrong
        for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            cells = ["" if cell is None else str(cell) for cell in cells]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield f"{sheet.title}!{number}" if len(book.worksheets) > 1 else number, cells

    book = openpyxl.load_workbook(file.path, read_only=True, data_only=True)
    for sheet in book.worksheets:
        yield from _under_names(records(sheet), file)


def _under_names(records, file):
    """(place, row) of the records of a table (place, cells or Reject) under the first one, or that below titles."""
    head = list(itertools.islice(records, TITLES + 1))
    filled = [0 if isinstance(cells, Reject) else sum(map(bool, map(str.strip, cells))) for _, cells in head]
    titles = next((at for at, count in enumerate(filled) if count != 1), 0)  # one filled cell above several
    if titles and filled[titles] > 1 and all(cells[0].strip() for _, cells in head[:titles]):
        head = head if any(map(looks_like_data, head[titles][1])) else head[titles:]
    if not head:
        return
    line, names = head[0]
    if isinstance(names, Reject):
        raise UserError(f"{show_path(file.path)}, line {line}: {names.reason} in the names of columns")
    # Columns without a name get one, except the first of them, which pandas writes for its row numbers.
    unnamed = [at for at, name in enumerate(names) if not name.strip()][1:]
    names = [f"column {at + 1}" if at in unnamed else name for at, name in enumerate(names)]
    for place, cells in itertools.chain(head[1:], records):
        yield place, cells if isinstance(cells, Reject) else _table_row(names, cells, file)


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
        shown = dict(zip(names, (_escaped(cell, file.encoding) for cell in cells)))
        return Reject("undecodable bytes", f"not {file.encoding}", shown)
    return dict(zip(names, cells))


def _arrow_rows(file):
    """The rows of Parquet and Arrow files, read in batches of at most PARQUET_ROWS rows."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(str(file.path)) as opened:
        if file.ending == ".parquet":
            batches = pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=PARQUET_ROWS)
        else:  # a stream, as `datasets` writes it
            batches = pyarrow.ipc.open_stream(opened)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


_TEXT = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
_READERS = {**_TEXT, ".parquet": _arrow_rows, ".arrow": _arrow_rows, ".xlsx": _xlsx_rows}
