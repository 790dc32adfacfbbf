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


def columns_or_form(rows: list[dict], table: bool = False) -> tuple[str, str] | str:
    """(question field, answer field) of rows with the same fields, where the names of just two say so; else one phrase that
    says what the rows are. `table`: they are of a table, whose first line may be no names of columns."""
    texts = _text_fields(rows)
    questions, answers = _named(texts, QUESTIONS), _named(texts, ANSWERS)
    wrong = any(word in name.lower() for name in answers for word in NOT_RIGHT)
    lists = [value for row in rows for value in row.values() if isinstance(value, list)]
    nested = any(isinstance(part, dict) for value in lists for part in value)
    known = len(questions) == len(answers) == 1 and questions != answers
    if known and not (nested or wrong or len(texts) > TABLE_FIELDS):
        distinct = (
            len(set(texts[name])) >= LEAST_DISTINCT * len(texts[name]) for name in questions + answers
        )
        if all(distinct):
            return questions[0], answers[0]
    names = tuple(rows[0])
    options = "+".join(map(str, option_fields(names).values() or plain_names(names).get("options", ())))
    candidates = [name for name in texts if any(word in name.lower() for word in ANSWERS)]
    unnamed = "no column is known as a question or an answer; if the first row is no header, put one above it"
    said = (
        (table and any(map(looks_like_data, names)), "the first row reads like data, not like names of columns: put a row of names above it"),
        (options, f"an exam with the options {options}: name its other fields, --columns question=...,answer=...,options={options}"),
        (inside := _inside(rows), inside),
        (len(texts) > TABLE_FIELDS, f"a table of {len(texts)} fields of text, no question and answer a row"),
        (len(candidates) > 1, f"several fields may be the answer: {', '.join(candidates)}"),
        (len(questions) > 1, f"several fields may be the question: {', '.join(questions)}"),
        (wrong, f"{''.join(answers[:1])} may be an answer of a model, or a wrong one; no field is known as the right answer"),
        (questions or answers, f"no field is known as {'an answer' if questions else 'a question'}"),
        (table, unnamed),
        (True, "wanted rows with a question and an answer, one JSON object a row"),
    )  # fmt: skip
    return next(words for true, words in said if true)


def _inside(rows):
    """One phrase about the first field that holds objects or lists; "" where all hold texts and numbers."""
    for name in rows[0]:
        values = [row[name] for row in rows if not is_empty(row.get(name))]
        if values and all(isinstance(value, dict) for value in values):
            return f"{name} holds fields of its own ({', '.join(map(str, values[0]))}): write them as fields of the row"
        if values and all(isinstance(value, list) for value in values):
            if all(isinstance(part, dict) for value in values for part in value):
                inside = ", ".join(map(str, values[0][0]))
                return f"{name} holds rows inside the rows ({inside}): write each as a row of its own"
            return (
                f"{name} is a list of {'values' if len(rows[0]) > 1 else 'texts that do not say who speaks'}"
            )
    return ""


def _text_fields(rows):
    """{field: its texts} of the fields that hold text in at least half of the rows and may be a question or an answer."""
    never = [plain_names(tuple(rows[0])).get(name, ()) for name in NEVER]
    texts = {
        str(name): [
            row[name].strip() for row in rows if isinstance(row[name], str) and not is_empty(row[name])
        ]
        for name in rows[0]
        if not any(name in fields for fields in never)
    }
    return {name: found for name, found in texts.items() if 2 * len(found) >= len(rows)}


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
    columns = columns_or_form(rows, table=file.ending in (".csv", ".tsv", ".xlsx"))
    if isinstance(columns, str):
        return text + columns
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
        fields = tuple(unknown[0].row) if unknown else ()
        alike = not rows[number], not used[number], first and first.reason, fields
        said.setdefault(alike, [f"{file.name}: {line}"]).append(file.name)
    lines = []
    for line, _, *more in said.values():
        others = f" (and the same in {len(more):,} more: {shorten(', '.join(more), 100)})" if more else ""
        lines.append(line + others)
    if guessed := found.schemas[GUESSED]:
        why = "nothing in the file shows where the count begins; if it begins at 1, write the answers as letters"
        lines.append(f"exam answers that are numbers were counted from 0 in {guessed:,} rows: {why}")
    return lines
