"""Tells a user whose rows cannot be used the first of them, the reason, and the command that reads them if it is known."""

import shlex
from collections import Counter

from utils.data.convert import Recognised
from utils.data.exams import option_fields
from utils.data.inputs import InputFile
from utils.data.messages import is_empty, plain_names
from utils.data.readers import looks_like_data
from utils.data.schemas import GUESSED
from utils.files import show_path
from utils.text import shorten

COMMAND = "python data_prepare/convert_to_qwen3_format.py"
SHOWN = 40  # characters of a text

# Names of fields, or ends of them, that hold questions and answers in published data sets.
ANSWERS = (
    *("答案", "回答", "回复", "答复", "处方", "方剂", "用药", "输出", "治疗", "诊断"),
    *("answer", "response", "output", "completion", "reply", "target", "summary", "assistant"),
)
QUESTIONS = (
    *("问题", "提问", "题目", "题干", "症状", "主诉", "病情", "病例", "病历", "描述", "输入", "指令"),
    *("question", "query", "instruction", "instruct", "prompt", "input", "ask", "symptom", "content"),
    *("document", "article", "user", "human"),
)
NEVER = {"reasoning", "system", "explanation", "history", "options", "id", "source", "url", "title", "split"}
NOT_RIGHT = "model pred generated candidate gpt llm wrong bad distractor".split()  # in the names of answers
LEAST_DISTINCT = 0.5  # share of a field's texts; a field with fewer different ones is a category, no question and no answer
TABLE_FIELDS = 5  # fields of text; a row with more is a line of a table


def suggest_columns(rows: list[dict]) -> tuple[str, str] | None:
    """(question field, answer field) of rows that have the same fields, where the names of just two say so; else None."""
    texts = _text_fields(rows)
    questions, answers = _named(texts, QUESTIONS), _named(texts, ANSWERS)
    nested = any(
        isinstance(part, dict)
        for row in rows
        for value in row.values()
        if isinstance(value, list)
        for part in value
    )
    if nested or any(word in name.lower() for name in answers for word in NOT_RIGHT):
        return None
    if len(questions) != 1 or len(answers) != 1 or questions == answers or len(texts) > TABLE_FIELDS:
        return None
    distinct = (len(set(texts[name])) >= LEAST_DISTINCT * len(texts[name]) for name in questions + answers)
    return (questions[0], answers[0]) if all(distinct) else None


def describe(rows: list[dict], table: bool = False) -> str:
    """One phrase that says what rows with the same fields are, if no columns can be suggested. `table`: they are of a table."""
    names = list(map(str, rows[0]))
    if table and any(map(looks_like_data, names)):
        return "the first row reads like data, not like names of columns: put a row of names above it"
    options = option_fields(tuple(rows[0])).values() or plain_names(tuple(rows[0])).get("options", ())
    if options:
        fields = "+".join(map(str, options))
        return f"an exam with the options {fields}: name its other fields, --columns question=...,answer=...,options={fields}"
    for name in names:
        values = [row[name] for row in rows if not is_empty(row.get(name))]
        if values and all(isinstance(value, dict) for value in values):
            return f"{name} holds fields of its own ({', '.join(map(str, values[0]))}): write them as fields of the row"
        if values and all(isinstance(value, list) for value in values):
            parts = [part for value in values for part in value]
            if all(isinstance(part, dict) for part in parts):
                inside = ", ".join(map(str, parts[0]))
                return f"{name} holds rows inside the rows ({inside}): write each as a row of its own"
            unknown = "texts that do not say who speaks" if len(names) == 1 else "values"
            return f"{name} is a list of {unknown}"
    texts = _text_fields(rows)
    questions, answers = _named(texts, QUESTIONS), _named(texts, ANSWERS)
    if len(texts) > TABLE_FIELDS:
        return f"a table of {len(texts)} fields of text, no question and answer a row"
    candidates = [name for name in texts if any(word in name.lower() for word in ANSWERS)]
    if len(candidates) > 1:
        return f"several fields may be the answer: {', '.join(candidates)}"
    if len(questions) > 1:
        return f"several fields may be the question: {', '.join(questions)}"
    if any(word in name.lower() for name in answers for word in NOT_RIGHT):
        return (
            f"{answers[0]} may be an answer of a model, or a wrong one; no field is known as the right answer"
        )
    if questions or answers:
        return f"no field is known as {'an answer' if questions else 'a question'}"
    if table:
        return (
            "no column is known as a question or an answer; if the first row is no header, put one above it"
        )
    return "wanted rows with a question and an answer, one JSON object a row"


def _text_fields(rows):
    """{field: its texts} of the fields that hold text in at least half of the rows and may be a question or an answer."""
    texts = {}
    never = {
        field for plain, fields in plain_names(tuple(rows[0])).items() if plain in NEVER for field in fields
    }
    for name in rows[0]:
        found = [row[name].strip() for row in rows if isinstance(row[name], str) and not is_empty(row[name])]
        if name not in never and 2 * len(found) >= len(rows):
            texts[str(name)] = found
    return texts


def _named(names, known):
    """The names that are known ones, else those that end with one."""
    exact = [name for name in names if name.strip().lower() in known]
    return exact or [name for name in names if name.strip().lower().endswith(known)]


def refusal(files: list[InputFile], found: Recognised, columns: str) -> str:
    """The reason why there is nothing to convert, in one line; "" if there is. `columns`: the setting."""
    if found.schemas and (not columns or found.schemas["--columns"]):
        return ""
    strange = next(iter(sorted(found.unknown)), None)
    advice = "" if strange is None else f"; {_read_as(files[strange], found.unknown[strange])}"
    if found.schemas:
        return f"no row has the fields of --columns {columns}{advice}"
    counted = ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.most_common())
    text = f"no row could be used ({counted or 'the input is empty'})"
    if found.rejects:
        first = min(found.rejects)
        text += f"; the first is {files[first].name}, line {_why(found.rejects[first])}"
    if not advice and found.reasons["not JSON"]:
        advice = "; wanted one JSON object for each row: one a line, or all in one array"
    return text + advice


def _why(reject):
    """The line, reason and detail of a row; of unknown fields not the detail, because advice names them."""
    known = reject.detail and reject.reason != "fields not recognised"
    return f"{reject.line}: {reject.reason}" + (f" ({shorten(reject.detail, 200)})" if known else "")


def _read_as(file, unknown):
    """The fields of a file's unknown rows, and the columns to read them by with one row as it would be read, or what they are."""
    names = Counter(tuple(row) for _, row in unknown).most_common(1)[0][0]
    alike = [(place, row) for place, row in unknown if tuple(row) == names]
    rows = [row for _, row in alike]
    text = f"fields found: {', '.join(map(str, names)) or 'none'}; "
    columns = suggest_columns(rows)
    if not columns:
        return text + describe(rows, file.ending in (".csv", ".tsv", ".xlsx"))
    place, row = next(one for one in alike if not any(is_empty(one[1][name]) for name in columns))
    question, answer = (shorten(row[name], SHOWN) for name in columns)
    flag = shlex.quote(f"question={columns[0]},answer={columns[1]}")
    return (
        f"{text}name them, for example: {COMMAND} --input-files {shlex.quote(show_path(file.path))} --columns {flag}"
        f" (line {place} is then read as question: {question} answer: {answer})"
    )


def notes(files: list[InputFile], found: Recognised, columns: str) -> list[str]:
    """A line for each file of which no row, or not every row, could be recognised; files that are alike share one."""
    rows, used = Counter(row.file for row in found.rows), Counter(row.file for row in found.rows if row.kind)
    said: dict[tuple, list[str]] = {}  # {what is alike: [the line, file, file, ...]}
    for number, file in enumerate(files):
        unknown = found.unknown.get(number) if not columns or not used[number] else None
        first, lost = found.rejects.get(number), rows[number] - used[number]
        advice = f"; {_read_as(file, unknown)}" if unknown else ""
        if not rows[number]:
            line = "no row in it"
        elif not used[number]:
            line = f"none of its {lost:,} rows could be used; line {_why(first)}{advice}"
        elif unknown:
            lines = f"from line {unknown[0].line} on{advice}"
            line = f"{lost:,} of its {rows[number]:,} rows could not be used; fields not recognised {lines}"
        else:
            continue
        alike = (
            not rows[number],
            not used[number],
            first and first.reason,
            tuple(unknown[0].row) if unknown else (),
        )
        said.setdefault(alike, [f"{file.name}: {line}"]).append(file.name)
    lines = []
    for line, _, *more in said.values():
        others = f" (and the same in {len(more):,} more: {shorten(', '.join(more), 100)})" if more else ""
        lines.append(line + others)
    guessed = found.schemas[GUESSED]
    if guessed:
        why = "no 0 and no number as large as the options are many says from where; if it is 1, write them as letters"
        lines.append(f"exam answers that are numbers were counted from 0 in {guessed:,} rows: {why}")
    return lines
