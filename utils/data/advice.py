"""What to tell a user whose rows cannot be used: where it begins, why, and the command that reads them."""

import shlex
from collections import Counter

from utils.data.columns import look_reversed, suggest_columns
from utils.data.convert import Recognised
from utils.data.inputs import InputFile
from utils.files import show_path
from utils.text import shorten

COMMAND = "python data_prepare/convert_to_qwen3_format.py"
SHOWN = 40  # characters of a text


def refusal(sources: list[InputFile], found: Recognised, columns: str) -> str:
    """Why there is nothing to convert, in one line; "" where there is. `columns`: the setting."""
    if found.schemas and (not columns or found.schemas["--columns"]):
        return ""
    first = next(iter(sorted(found.rejects)), None)
    strange = next(iter(sorted(found.unknown)), None)
    if found.schemas:
        return f"no row has the fields of --columns {columns}{_read_as(sources, found, strange)}"
    counted = ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.most_common())
    text = f"no row could be used ({counted or 'the input is empty'})"
    if first is not None:
        text += f"; the first is {sources[first].name}, line {_why(found.rejects[first])}"
    if strange is not None:
        return text + _read_as(sources, found, strange)
    if found.reasons["not JSON"]:  # pretty-printed
        text += "; wanted one JSON object for each row: one a line, or all in one array"
    return text


def _why(reject):
    """The line, reason and detail of a row; of unknown fields not the detail, because advice names them."""
    known = reject.detail and reject.reason != "fields not recognised"
    return f"{reject.line}: {reject.reason}" + (f" ({shorten(reject.detail, 100)})" if known else "")


def _read_as(sources, found, file):
    """The fields of a file's unknown rows, and the columns to read them by with one row as it would be read."""
    if file is None:
        return ""
    rows = found.unknown[file]
    names = Counter(tuple(unknown.row) for unknown in rows).most_common(1)[0][0]
    rows = [unknown for unknown in rows if tuple(unknown.row) == names]
    text = f"; fields found: {', '.join(map(str, names)) or 'none'}"
    columns = suggest_columns([unknown.row for unknown in rows])
    if not columns:
        return text + "; wanted rows with a question and an answer, one JSON object a row"
    line, row = next(known for known in rows if all(known.row[name] for name in columns))
    question, answer = (shorten(row[name], SHOWN) for name in columns)
    path = shlex.quote(show_path(sources[file].path))
    flag = shlex.quote(f"question={columns[0]},answer={columns[1]}")
    return (
        f"{text}; name them, for example: {COMMAND} --input-files {path} --columns {flag}"
        f" (line {line} is then read as question: {question} answer: {answer})"
    )


def notes(sources: list[InputFile], found: Recognised, columns: dict[str, str]) -> list[str]:
    """A line for each file of which no row could be used, and for columns that look the wrong way round."""
    rows, used, said = Counter(), Counter(), []
    for row in found.rows:
        rows[row.file] += 1
        used[row.file] += bool(row.kind)
    for file, source in enumerate(sources):
        if rows[file] and not used[file]:
            advice = _read_as(sources, found, file if file in found.unknown else None)
            why = f"none of its {rows[file]:,} rows could be used; line {_why(found.rejects[file])}"
            said.append(f"{source.name}: {why}{advice}")
        elif not rows[file]:
            said.append(f"{source.name}: no row in it")
    if columns and look_reversed(columns.get("question", ""), columns.get("answer", "")):
        said.append(
            f"--columns reads {columns['question']} as the question and {columns['answer']} as the answer; "
            "their names say the opposite: look at the rows above"
        )
    return said
