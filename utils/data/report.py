"""What a user is told of a conversion: report.json and the table of it, and what becomes of rows that cannot be used.

Of those the first is shown with the reason, and the command that reads them if it is known.
"""

import heapq
import json
import random
import shlex
from collections import Counter
from pathlib import Path

import numpy

from utils.data.convert import EVAL, TRAIN, Recognised, Row
from utils.data.dedup import mixed
from utils.data.exams import option_fields
from utils.data.inputs import InputFile
from utils.data.messages import is_empty, plain_names
from utils.data.readers import looks_like_data
from utils.data.schemas import GUESSED, OUTPUTS
from utils.files import sha256_of, show_path
from utils.model.chat_format import encode_turns
from utils.model.folder import load_tokenizer, quiet_offline
from utils.settings import Settings
from utils.text import say, shorten

POINTS = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
EXAMPLES = 5  # rows shown
NEARLY_ALL = 0.95  # of the conversations: a system text that so many share is the model's own
FEW_EVAL_ROWS = 30  # below that, figures on the held-out rows mean little
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
NEVER = ("reasoning", "system", "explanation", "history", "options", "id", "source", "url", "title", "split")
NOT_RIGHT = "model pred generated candidate gpt llm wrong bad distractor".split()  # in the names of answers
LEAST_DISTINCT = 0.5  # share of a field's texts; a field with fewer different ones is a category, no question and no answer
TABLE_FIELDS = 5  # fields of text; a row with more is a line of a table


# ---- The report


def count_tokens(model: str, examples: list[dict]) -> list[int]:
    """The tokens of each example as a trainer sees it (the longest turn, with all before it); [] if `model` is no folder."""
    if not model or not Path(model).is_dir() or not examples:
        return []
    quiet_offline()
    tokenizer = load_tokenizer(model)
    turns = (encode_turns(tokenizer, example["messages"]) for example in examples)
    return [max(len(prompt) + len(answer) for prompt, answer in pairs) for pairs in turns]


def conversations(rows: list[Row]) -> list[Row]:
    """The rows that are kept as conversations."""
    return [row for row in rows if row.kind == "sft" and not row.reason]


def sample_examples(found: Recognised, count: int, seed: int) -> list[dict]:
    """`count` of the conversations (all, if fewer), in their order; random, but the same for the same rows."""
    mine = conversations(found.rows)
    drawn = heapq.nsmallest(count, range(len(mine)), key=lambda number: mixed(mine[number].content, seed))
    return [json.loads(found.line(mine[number])) for number in sorted(drawn)]


def build_report(
    files: list[InputFile],
    skipped: list[tuple[str, str]],
    found: Recognised,
    written: Counter,
    examples: list[dict],
    tokens: list[int],
    settings: Settings,
) -> dict:
    """report.json. `written`: rows of each output file; `examples`: conversations, `tokens`: the number that each has."""
    rows = found.rows
    reasons = found.reasons + Counter(row.reason for row in rows if row.kind and row.reason)
    trained = conversations(rows)
    outputs = [name for name in OUTPUTS if written[name]]
    by_file = Counter(row.file for row in rows)
    # Held-out answers, if they are long, that stand word for word in training
    answers = {row.rest for row in trained if row.long_rest and row.split == TRAIN}
    repeated = sum(row.long_rest and row.split == EVAL and row.rest in answers for row in trained)
    # The mode in which a model is trained on these conversations
    thought = sum(row.reasoning for row in trained)
    mode = "on" if 2 * thought > len(trained) else "off" if 2 * thought < len(trained) else "tie"
    thinking = {"mode": mode, "with_reasoning": thought, "conversations": len(trained)}
    system, count = max(found.systems.items(), key=lambda item: item[1], default=("", 0))
    fields = {schema: {"used": [], "unused": Counter()} for schema, _, _ in found.fields}
    for (schema, names, unused), times in found.fields.items():
        mine = fields[schema]
        mine["used"] += [name for name in map(str, names) if name not in (*unused, *mine["used"])]
        mine["unused"].update(dict.fromkeys(unused, times))
    return {
        "rows_in": len(rows),
        "rows_kept": written.total(),
        "rows_set_aside": reasons.total(),
        "set_aside": dict(reasons.most_common()),
        "outputs": {name: written[name] for name in outputs},
        "files": [
            {"file": file.name, "encoding": file.encoding, "split": file.split}
            | {"rows": by_file[number], "sha256": sha256_of(file.path)}
            for number, file in enumerate(files)
        ],
        "skipped": dict(skipped),
        "schemas": dict(found.schemas.most_common()),
        "eval_answers_in_training": repeated,
        "characters": _spread([row.characters for row in trained]),
        "tokens": _spread(tokens),
        "tokens_counted_in": len(tokens),
        "max_length": settings.MAX_LENGTH,
        "kept_by_max_length": _share([count <= settings.MAX_LENGTH for count in tokens]),
        "reasoning_share": _share([row.reasoning for row in trained]),
        "thinking": thinking if trained else {},
        "system": system if count >= NEARLY_ALL * found.systems.total() else "",
        "fields": fields,
        "fingerprints": {name: sha256_of(settings.OUTPUT_DIR / f"{name}.jsonl") for name in outputs},
        "examples": random.Random(settings.SEED).sample(examples, min(EXAMPLES, len(examples))),
        "settings": settings.as_dict(),
    }


def _share(values):
    """The share of true values, or None of no values."""
    return round(float(numpy.mean(values)), 4) if len(values) else None


def _spread(values):
    if not len(values):
        return {}
    return {name: int(numpy.percentile(values, point)) for name, point in POINTS.items()}


def show(report: dict, found: Recognised) -> None:
    """Print the report as a compact table."""

    def line(count, text, before=""):
        say(f"{before}{count if isinstance(count, str) else format(count, ','):>12}  {text}")

    line("rows", "input", "\n")
    for file in report["files"]:
        by_name = ", evaluation by its name" if file["split"] else ""
        line(file["rows"], f"{file['file']} ({file['encoding']}{by_name})")
    for name, reason in report["skipped"].items():
        line("skipped", f"{name}: {reason}")
    schemas = ", ".join(f"{name} {count:,}" for name, count in report["schemas"].items())
    line(report["rows_in"], f"in all; recognised as {schemas or 'nothing'}")
    for title, total, counts in (
        ("kept", "rows_kept", "outputs"),
        ("set aside", "rows_set_aside", "set_aside"),
    ):
        line(report[total], title, "\n")
        for name, count in report[counts].items():
            line(count, f"  {name}")
    if count := report["eval_answers_in_training"]:
        stand = "held-out answers stand" if count > 1 else "held-out answer stands"
        line(count, f"{stand} word for word in training: the loss on them says little", "\n")
    counted = {"characters": "", "tokens": f" (counted in {report['tokens_counted_in']:,} conversations)"}
    for unit, where in counted.items():
        if values := ", ".join(f"{name} {value:,}" for name, value in report[unit].items()):
            say(f"\nlength in {unit}{where}: {values}")
    if report["tokens"]:
        say(f"MAX_LENGTH {report['max_length']:,} keeps {report['kept_by_max_length']:.1%} of them")
    elif report["characters"]:
        say("no tokens counted: TOKENIZER_MODEL is not there yet")
    for note in _before_training(report, found):
        say(note)
    for example in report["examples"]:
        say("\n" + example["source"])
        for message in example["messages"]:
            say(f"  {message['role']:<10}{shorten(message['content'])}")


def _before_training(report, found):
    """Lines on what a user should know before training."""
    if thinking := report["thinking"]:
        tie = "; keep the rows of one mode" if thinking["mode"] == "tie" else ""
        counts = f"{thinking['with_reasoning']:,} of {thinking['conversations']:,}"
        yield f"thinking {thinking['mode']}: {counts} conversations end with reasoning{tie}"
    if report["system"]:
        yield f"system text of nearly all conversations: {shorten(report['system'])}"
    for schema, fields in report["fields"].items():
        unused = []
        for name, rows in fields["unused"].items():
            example = json.dumps(found.unused[schema, name], ensure_ascii=False, default=str)
            unused.append(f"{name} ({rows:,} row{'s' * (rows > 1)}, such as {shorten(example, SHOWN)})")
        if unused:
            yield f"not used, of {schema}: {'; '.join(unused)}"
    held_out = report["outputs"].get("sft_eval", report["outputs"].get("dpo_eval", 0))
    if 0 < held_out < FEW_EVAL_ROWS:
        yield f"few rows are held out ({held_out}): figures on them mean little"


# ---- Rows that cannot be used


def refusal(files: list[InputFile], found: Recognised, columns: str) -> str:
    """The reason why there is nothing to convert, in one line; "" if there is. `columns`: the setting."""
    if found.schemas and (not columns or found.schemas["--columns"]):
        return ""
    strange = min(found.unknown, default=None)
    advice = "" if strange is None else f"; {_read_as(files[strange], found.unknown[strange])}"
    if found.schemas:
        return f"no row has the fields of --columns {columns}{advice}"
    counted = ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.most_common())
    text = f"no row could be used ({counted or 'the input is empty'})"
    if found.rejects:
        first = min(found.rejects)
        text += f"; the first is {files[first].name}, line {_why(*found.rejects[first])}"
    if not advice and found.reasons["not JSON"]:
        advice = "; wanted one JSON object for each row: one a line, or all in one array"
    return text + advice


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
            line = f"none of its {lost:,} rows could be used; line {_why(*first)}{advice}"
        elif unknown:
            where = f"fields not recognised from line {unknown[0][0]} on"
            line = f"{lost:,} of its {rows[number]:,} rows could not be used; {where}{advice}"
        else:
            continue
        alike = (
            not rows[number],
            not used[number],
            first and first[1],
            tuple(unknown[0][1] if unknown else ()),
        )
        said.setdefault(alike, [f"{file.name}: {line}"]).append(file.name)
    lines = []
    for line, _, *more in said.values():
        others = f" (and the same in {len(more):,} more: {shorten(', '.join(more), 100)})" if more else ""
        lines.append(line + others)
    if guessed := found.schemas[GUESSED]:
        why = "nothing in the file shows where the count begins; if it begins at 1, write the answers as letters"
        lines.append(f"exam answers that are numbers were counted from 0 in {guessed:,} rows: {why}")
    return lines


def _why(place, reason, detail):
    """The line, reason and detail of a row; of unknown fields not the detail, because advice names them."""
    known = detail and reason != "fields not recognised"
    return f"{place}: {reason}" + (f" ({shorten(detail, 200)})" if known else "")


def _read_as(file, unknown):
    """The fields of a file's unknown rows, and the columns to read them by with one row as it would be read, or what they are."""
    names = Counter(tuple(row) for _, row in unknown).most_common(1)[0][0]
    alike = [(place, row) for place, row in unknown if tuple(row) == names]
    text = f"fields found: {', '.join(map(str, names)) or 'none'}; "
    columns = columns_or_form([row for _, row in alike], table=file.ending in (".csv", ".tsv", ".xlsx"))
    if isinstance(columns, str):
        return text + columns
    place, row = next(one for one in alike if not any(is_empty(one[1][name]) for name in columns))
    question, answer = (shorten(row[name], SHOWN) for name in columns)
    flag = shlex.quote(f"question={columns[0]},answer={columns[1]}")
    return (
        f"{text}name them, for example: {COMMAND} --input-files {shlex.quote(show_path(file.path))} --columns {flag}"
        f" (line {place} is then read as question: {question} answer: {answer})"
    )


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
        both = [texts[name] for name in questions + answers]
        if all(len(set(told)) >= LEAST_DISTINCT * len(told) for told in both):
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
            listed = "values" if len(rows[0]) > 1 else "texts that do not say who speaks"
            return f"{name} is a list of {listed}"
    return ""


def _text_fields(rows):
    """{field: its texts} of the fields that hold text in at least half of the rows and may be a question or an answer."""
    plain = plain_names(tuple(rows[0]))
    never = {name for role in NEVER for name in plain.get(role, ())}
    texts = {}
    for name in rows[0]:
        found = [row[name].strip() for row in rows if isinstance(row[name], str) and not is_empty(row[name])]
        if name not in never and 2 * len(found) >= len(rows):
            texts[str(name)] = found
    return texts


def _named(names, known):
    """The names that are known ones, else those that end with one."""
    exact = [name for name in names if name.strip().lower() in known]
    return exact or [name for name in names if name.strip().lower().endswith(known)]
