"""The stages of the conversion: recognise every row, and once each row's fate is known, write its line where it belongs."""

import json
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from utils.data.dedup import EVAL, LONG, Row
from utils.data.inputs import InputFile
from utils.data.messages import Reject
from utils.data.readers import Place, Raw
from utils.data.schemas import OUTPUT_FILES, ConvertedRow, RowOptions, convert_rows
from utils.data.texts import is_courtesy, normalize, text_key, without_filler
from utils.device import memory_for_process
from utils.errors import UserError
from utils.files import atomic_write
from utils.text import bar, format_bytes

LONG_ANSWER = 20  # characters: two rows do not share such an answer by chance
SHORTEST_LATER_TURN = 8  # characters: later turns such as "请继续" are no question of their own
BYTES_A_ROW = 1000  # of memory
FORECAST_ROWS = 50_000  # rows after which the memory is forecast for the first time
SYSTEMS = 1000  # system texts counted: one that nearly all rows share is among the first
UNKNOWN_ROWS, UNKNOWN_CHARACTERS = 200, 300  # kept of a file to suggest columns by: rows, and of each text


class UnknownRow(NamedTuple):
    """A row whose fields are not recognised, its texts shortened."""

    line: Place
    row: dict


class FirstReject(NamedTuple):
    """The first row of a file that cannot be used."""

    line: Place
    reason: str
    detail: str


class Recognised:
    """All rows after the first pass: numbers in memory, their texts in a temporary file in `folder`."""

    def __init__(self, folder: Path):
        self.rows: list[Row] = []
        self.texts = tempfile.TemporaryFile(dir=folder)
        self.end = 0  # of the texts written so far, in bytes
        self.given = 0  # bytes of the rows so far, as they were given
        self.long_questions: dict[int, tuple[int, int]] = {}  # {text_key: where its text begins, its bytes}
        self.schemas: Counter[str] = Counter()  # names of schemas
        self.reasons: Counter[str] = Counter()  # why rows cannot be used
        self.trimmed = 0  # conversations of which turns at an end were left out
        self.fields: Counter[tuple] = Counter()  # {(schema, a row's fields, those not used): rows}
        self.unused: dict[tuple[str, str], object] = {}  # {(schema, field not used): the first value of it}
        self.systems: Counter[str] = Counter()  # {system text: conversations}, SYSTEMS of them at most
        self.rejects: dict[int, FirstReject] = {}  # {file: its first row that cannot be used}
        self.unknown: dict[int, list[UnknownRow]] = {}  # {file: its first rows with fields not recognised}

    def write(self, text: bytes) -> int:
        """Write a text to the temporary file; where it begins there."""
        self.texts.write(text)
        self.end += len(text)
        return self.end - len(text)

    def read(self, at: int, size: int) -> bytes:
        """The text that begins at a place in the temporary file."""
        self.texts.seek(at)
        return self.texts.read(size)

    def line(self, row: Row) -> bytes:
        """The line of output that a row makes; of a row that cannot be used, the detail of its reason."""
        return self.read(row.at, row.size)

    def original(self, row: Row) -> bytes:
        """The row as it was given, as JSON in one line."""
        return self.read(row.at + row.size, row.original)

    def long_question(self, key: int) -> str:
        """The text of a long question, as it is compared."""
        return self.read(*self.long_questions[key]).decode("utf-8", "surrogatepass")


def recognise(sources: list[InputFile], options: RowOptions, folder: Path) -> Recognised:
    """Read and recognise every row."""
    size, forecast_at = sum(source.size for source in sources), FORECAST_ROWS
    found = Recognised(folder)
    with bar(desc="rows recognised", total=size, unit="B", unit_scale=True) as meter:
        for file, source in enumerate(sources):
            for place, raw, row, item in convert_rows(source, options):
                _add_row(found, file, source, place, raw, row, item)
                if isinstance(item, Reject):
                    strange = item.reason == "fields not recognised"
                else:
                    strange = options.columns and item.schema != "--columns"
                if strange and len(unknown := found.unknown.setdefault(file, [])) < UNKNOWN_ROWS:
                    texts = {name: value for name, value in row.items() if isinstance(value, str)}
                    shown = {name: text[:UNKNOWN_CHARACTERS] for name, text in texts.items()}
                    unknown.append(UnknownRow(place, row | shown))
                # About: the same rows take more or less as tables and arrays than as JSON lines.
                done = min(found.given, size - 1)
                if len(found.rows) >= forecast_at:
                    _refuse_too_many(len(found.rows), done / size)
                    forecast_at *= 2
                if len(found.rows) % 1000 == 0:
                    meter.update(done - meter.n)
        meter.update(size - meter.n)
    return found


def _refuse_too_many(rows, share):
    """UserError with the forecast if all rows, of which `rows` are this share, would not fit into the memory."""
    needed, free = BYTES_A_ROW * rows / share, memory_for_process()
    if needed > free:
        raise UserError(
            f"about {rows / share:,.0f} rows are to be compared with one another, which takes {format_bytes(needed)} of memory "
            f"({BYTES_A_ROW} bytes a row); {format_bytes(free)} are free, enough for {free / BYTES_A_ROW:,.0f} rows: "
            "convert the files in parts, each to its own --output-dir"
        )


def _add_row(
    found: Recognised,
    file: int,
    source: InputFile,
    place: Place,
    raw: Raw,
    row: dict,
    item: ConvertedRow | Reject,
) -> None:
    """Take in one row; of a row that cannot be used, the detail of its reason stands in place of an output line."""
    if isinstance(item, Reject):
        text, original = _encoded(item.detail), _encoded(item.row)
        mine = Row(file, place, found.write(text + original), len(text), len(original))
        mine.reason = sys.intern(item.reason)
        found.reasons[item.reason] += 1
        found.rejects.setdefault(file, FirstReject(place, item.reason, item.detail))
    else:
        mine = _usable_row(found, file, source, place, raw, row, item)
    found.given += mine.original
    found.rows.append(mine)


def _usable_row(found, file, source, place, raw, row, item):
    key = text_key("\x1f".join([item.kind, *item.questions, "\x1e", item.rest]))
    fields = {"id": f"{key:016x}", **item.body, "source": f"{source.name}:{place}"}
    text, original = _encoded(fields) + b"\n", _as_json(raw, source.encoding)
    rest = normalize(item.rest)
    mine = Row(file, place, found.write(text + original), len(text), len(original))
    mine.kind, mine.told, mine.content = sys.intern(item.kind), item.split or source.split, key
    mine.rest, mine.long_rest, mine.characters = text_key(rest), len(rest) >= LONG_ANSWER, item.characters
    mine.questions = tuple(_question_keys(found, item.questions))
    found.schemas[item.schema] += 1
    found.trimmed += item.trimmed
    found.fields[item.schema, tuple(row), tuple(item.unused)] += 1
    for name, value in item.unused.items():
        found.unused.setdefault((item.schema, name), value)
    if item.kind == "sft":
        first, last = item.body["messages"][0], item.body["messages"][-1]
        mine.reasoning = "reasoning_content" in last  # the last turn decides what the row teaches
        system = first["content"] if first["role"] == "system" else ""
        if system in found.systems or len(found.systems) < SYSTEMS:
            found.systems[system] += 1
    return mine


def _question_keys(found, questions):
    """The keys of a row's questions as they are compared, without greetings and thanks; the long ones are kept as texts."""
    if len(questions) > 1:
        questions = [question for question in questions if not is_courtesy(question)] or questions[:1]
    for turn, question in enumerate(questions):
        text = without_filler(normalize(question))
        if turn and len(text) < SHORTEST_LATER_TURN:
            continue
        key = text_key(text)
        if len(text) >= LONG and key not in found.long_questions:
            written = text.encode("utf-8", "surrogatepass")
            found.long_questions[key] = found.write(written), len(written)
        yield key


def _as_json(raw, encoding):
    """A row as it was given, in UTF-8 and in one line; a table row is written as an object."""
    if isinstance(raw, dict):
        return json.dumps(raw, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    if isinstance(raw, str):
        return raw.replace("\n", " ").encode("utf-8", "backslashreplace")
    return raw.decode(encoding, "backslashreplace").encode() if encoding == "gb18030" else raw


def _encoded(value):
    """JSON in one line, as UTF-8; what UTF-8 cannot hold (lone surrogates) makes it all \\u escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str).encode()


def pair_bad_answers(found: Recognised) -> None:
    """Give every bad answer that is left the good one to the same prompt and its split, or set it aside."""
    bad = [row for row in found.rows if row.kind == "bad" and not row.reason]
    good: dict[int, Row] = {}  # {prompt: the first row that answers it well}
    for row in found.rows if bad else ():
        if row.kind == "sft" and not row.reason:
            good.setdefault(_prompt_key(json.loads(found.line(row))["messages"][:-1]), row)
    for row in bad:
        partner = good.get(_prompt_key(json.loads(found.line(row))["prompt"]))
        if partner is None:
            row.set_aside("marked as a bad answer, no good one", None)
        elif partner.rest == row.rest:
            row.set_aside("marked as a bad answer, and as a good one", partner)
        else:
            row.of, row.split = partner, partner.split


def _prompt_key(messages):
    return text_key("\x1f".join(message["content"] for message in messages))


def write_outputs(found: Recognised, sources: list[InputFile], folder: Path) -> Counter:
    """Write every line to its file, and what is set aside to the ledger. {output file: its rows}."""
    outputs: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {"set_aside": stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))}
        for row in found.rows:
            name, line = "set_aside", b""
            if row.reason:
                line = _ledger_line(row, found, sources)
            else:
                kind = OUTPUT_FILES[row.kind]
                name = kind.held_out if row.split == EVAL else kind.trained
                line = _pair_line(row, found) if row.kind == "bad" else found.line(row)
                outputs[name] += 1
            if name not in files:
                files[name] = stack.enter_context(atomic_write(folder / f"{name}.jsonl", "wb"))
            files[name].write(line)
    return outputs


def _pair_line(row, found):
    """The preference pair of a bad answer and the conversation that answers the same prompt well."""
    pair, chosen = json.loads(found.line(row)), json.loads(found.line(row.of))["messages"][-1:]
    turns = {"prompt": pair["prompt"], "chosen": chosen, "rejected": pair["rejected"]}
    return _encoded({"id": pair["id"], **turns, "kind": "given", "source": pair["source"]}) + b"\n"


def _ledger_line(row, found, sources):
    """The ledger's line of a row that cannot be used, that repeats or leaks another, or that is a bad answer alone."""
    detail = f"of {sources[row.of.file].name}:{row.of.line}" if row.of else ""
    detail = detail if row.kind else json.loads(found.line(row))
    entry = {"file": sources[row.file].name, "line": row.line, "reason": row.reason, "detail": detail}
    return _encoded(entry)[:-1] + b', "row": ' + found.original(row) + b"}\n"


def remove_stale(folder: Path, outputs: Counter) -> None:
    """Remove the evaluation file of an earlier run that the new training file does not belong to."""
    for kind in OUTPUT_FILES.values():
        if outputs[kind.trained] and not outputs[kind.held_out]:
            (folder / f"{kind.held_out}.jsonl").unlink(missing_ok=True)
