"""Reads any data file row by row, and names the place of every row that cannot be read.

A row leaves the reader as `(place, raw)`. `place` is the line where it starts (in Parquet, Arrow and columns of lists its
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
import zipfile
from collections.abc import Iterator

from utils.data.inputs import BOM, DAMAGED, SURROGATES, InputFile, says_evaluation
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

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")
_LENIENT = json.JSONDecoder(strict=False, parse_int=str)  # finds where an element ends; parse_row judges it


def read_rows(file: InputFile) -> Iterator[tuple[Place, Raw]]:
    """Yield `(place, raw)` for every row of a file, blank lines left out; UserError where the file is broken."""
    try:
        yield from _READERS[file.ending](file)
    except DAMAGED as error:
        raise UserError(f"{show_path(file.path)} cannot be unpacked ({error})") from None


def parse_row(raw: Raw, encoding: str) -> dict:
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
    elif not raw.isascii() and SURROGATES.search(raw):
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
        twice = collections.Counter(name for name, _ in pairs) - collections.Counter(fields.keys())
        raise Reject("duplicate keys", ", ".join(sorted(twice)))
    return fields


# NaN and Infinity, which are no JSON, are what pandas writes for an empty field.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=lambda name: None)


def _open_text(file, newline):
    return io.TextIOWrapper(file.open_bytes(), file.encoding, "surrogateescape", newline)


def _json_rows(file):
    """JSON lines, an array, or an object of arrays, whatever the file's name says."""
    with file.open_bytes() as opened:
        lines = (line.removeprefix(BOM).strip() for line in opened)
        first, second = itertools.islice(itertools.chain(filter(None, lines), [b"", b""]), 2)
    if re.match(rb"\[\s*([\[{\"\]]|$)", first):
        whole = not second or not first.endswith(b"]")
    else:  # an object in one line that has another below it is a row, however damaged
        whole = first.startswith(b"{") and (first.endswith((b"{", b"[", b",", b":")) or not second)
    return _whole_json(file) if whole else _json_lines(file)


def _json_lines(file):
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
    with _open_text(file, "\n") as opened:
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
    except RecursionError:
        raise UserError(f"{show_path(file.path)}: JSON nested too deep") from None


def _values(text, file):
    """(start, raw row) of every row in the JSON values that stand in a text one after the other."""
    at = _SPACE.match(text).end()
    while at < len(text):
        if text[at] == "[":
            at = _SPACE.match(text, at + 1).end()
            while text[at : at + 1] != "]":
                start, (_, at) = at, _LENIENT.raw_decode(text, at)
                rows = _rows_of(text[start:at], file) if text[start] == "[" else [text[start:at]]
                yield from ((start, raw) for raw in rows)
                end, at = _SPACE.match(text, at).end(), _BETWEEN.match(text, at).end()
                if text[end : end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            at += 1
        else:
            start, (_, at) = at, _LENIENT.raw_decode(text, at)
            yield from ((start, raw) for raw in _rows_of(text[start:at], file))
        at = _BETWEEN.match(text, at).end()


def _rows_of(text, file):
    """The rows in the text of a list or an object; the text, if it is a row itself, or damaged."""
    try:
        decoded = text.decode(file.encoding) if isinstance(text, bytes) else text
        value = None if SURROGATES.search(decoded) else _DECODER.decode(decoded)
    except (ValueError, RecursionError, Reject):
        return [text]
    if isinstance(value, list):
        return _rows_of_list(value) or [text]
    return isinstance(value, dict) and _rows_in(value, file) or [text]


def _rows_of_list(rows):
    """The rows in a list: objects are a row each, turns or texts one conversation; [] where it holds anything else."""
    if rows and all(isinstance(row, str) for row in rows):
        return [{"messages": rows}]
    if not all(isinstance(row, dict) for row in rows):
        return []
    return [{"messages": rows}] if rows and all("role" in row or "from" in row for row in rows) else rows


def _rows_in(value, file):
    """The rows of {"data": [...]} (those under "test" say their split with that), of columns ({"question": [...], ...}, as
    pandas writes them also by row number), of rows by name, and of splits that are such objects; [] of a row."""

    def of_split(key, rows):
        return [({"split": "eval"} if says_evaluation(key) and not file.split else {}) | row for row in rows]

    lists = {key: part for key, part in value.items() if isinstance(part, list) and part}
    lists = {key: part for key, part in lists.items() if all(isinstance(row, dict | list) for row in part)}
    if lists and not set(map(str.lower, lists)) & ROW_LISTS:
        found = []
        for key, part in lists.items():
            for rows in part if all(isinstance(row, list) for row in part) else [part]:
                found.append(of_split(key, _rows_of_list(rows)))
        return [row for rows in found for row in rows] if all(found) else []
    columns = list(value.values())
    if len(columns) < 2:
        return []
    if all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return [dict(zip(value, cells)) for cells in zip(*columns)]
    if not all(isinstance(column, dict) for column in columns):
        return []
    if any(map(says_evaluation, value)):
        return [row for key, part in value.items() for row in of_split(key, _rows_in(part, file) or [part])]
    if len(set(map(tuple, columns))) > 1 or not all(map(str.isdecimal, columns[0])):
        return columns if len(set(map(tuple, columns))) == 1 else []
    return [{name: column[number] for name, column in value.items()} for number in columns[0]]


def _csv_rows(file):
    with _open_text(file, "") as opened:
        signs = "\t,;" if file.ending == ".tsv" else ",\t;"  # the first that the header has
        header = next((line for line in opened if re.search(f"[{signs}]", line)), "")
        delimiter = next((sign for sign in signs if sign in header), signs[0])
        opened.seek(0)
        yield from _under_names(_csv_records(opened, delimiter, header.count(delimiter)), file)


def _csv_records(opened, delimiter, delimiters):
    """(line, cells or Reject) of a table. Where a quote swallows lines or does not close, each line is judged by itself."""
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
    from openpyxl.utils.exceptions import InvalidFileException

    def records(sheet):
        sheet.reset_dimensions()  # WPS writes a size of its sheets that may be wrong
        for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            cells = ["" if cell is None else str(cell) for cell in cells]
            filled = max((at for at, cell in enumerate(cells, 1) if cell), default=0)
            if filled:
                yield f"{sheet.title}!{number}" if len(book.worksheets) > 1 else number, cells[:filled]

    try:
        book = openpyxl.load_workbook(file.path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError, OSError) as error:
        raise UserError(f"{show_path(file.path)} is not a whole .xlsx file ({error})") from None
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
    names = head[0][1]
    if isinstance(names, Reject):
        raise UserError(f"{show_path(file.path)}, line {head[0][0]}: {names.reason} in the names of columns")
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
        cells = [cell.encode(file.encoding, "surrogateescape") for cell in cells]
        cells = [cell.decode(file.encoding, "backslashreplace") for cell in cells]
        return Reject("undecodable bytes", f"not {file.encoding}", dict(zip(names, cells)))
    return dict(zip(names, cells))


def _arrow_rows(file):
    """The rows of Parquet and Arrow files, read in batches of at most PARQUET_ROWS rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.OSFile(str(file.path)) as opened:
            if file.ending == ".parquet":
                batches = pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=PARQUET_ROWS)
            else:  # a stream, as `datasets` writes it
                batches = pyarrow.ipc.open_stream(opened)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowInvalid, OSError, ValueError, ArithmeticError) as error:  # also of a year after 9999
        why = str(error).splitlines()[0]
        raise UserError(f"{show_path(file.path)} is not a whole {file.ending} file ({why})") from None


_READERS = {
    **{".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows},
    **{".parquet": _arrow_rows, ".arrow": _arrow_rows, ".xlsx": _xlsx_rows},
}
