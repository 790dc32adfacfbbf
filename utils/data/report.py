"""What a user is told of a conversion: report.json and the table of it, and what becomes of rows that cannot be used.

Of those the first is shown with the reason, and the command that reads them if it is known.
"""

import itertools
import json
import random
import shlex
from collections import Counter
from pathlib import Path

import numpy

from utils.data.convert import EVAL, TRAIN, Recognised
from utils.data.exams import option_fields
from utils.data.inputs import InputFile
from utils.data.messages import is_empty, plain_names
from utils.data.readers import looks_like_data
from utils.data.schemas import BESIDE_TEXT, GUESSED, OUTPUTS
from utils.files import sha256_of
from utils.model.chat_format import encode_turns
from utils.model.folder import load_tokenizer, quiet_offline
from utils.settings import Settings
from utils.text import say, shorten

POINTS = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
EXAMPLES = 5  # rows shown
NEARLY_ALL = 0.95  # of the conversations: a system text that so many share is the model's own
FEW_EVAL_ROWS = 30  # below that, figures on the held-out rows mean little
SHOWN = 40  # characters of a field's value
UNKNOWN = "fields not recognised"
LOOKED_AT = 200  # rows of a file that tell what it is
NOTES = 3  # on files, in the line that says that there is nothing to convert
TABLES = (".csv", ".tsv", ".xlsx")

# Names of fields that hold questions and answers end with these, those of answers that may be wrong have one of NOT_RIGHT.
ANSWERS = tuple(
    "答案 回答 回复 答复 处方 方剂 用药 输出 治疗 诊断 answer response output completion reply target summary assistant".split()
)
QUESTIONS = tuple(
    "问题 提问 题目 题干 症状 主诉 病情 病例 病历 描述 输入 指令 question query instruction instruct prompt input ask symptom "
    "content document article user human".split()
)
NOT_RIGHT = "model pred generated candidate gpt llm wrong bad distractor".split()
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


def build_report(
    files: list[InputFile],
    skipped: list[tuple[str, str]],
    found: Recognised,
    written: Counter,
    settings: Settings,
) -> dict:
    """report.json. `written`: rows of each output file. Tokens are counted in TOKEN_ROWS conversations, drawn at random."""
    rows = found.rows
    trained = [row for row in rows if row.kind == "sft" and not row.reason]
    drawn = random.Random(settings.SEED).sample(trained, min(settings.TOKEN_ROWS, len(trained)))
    examples = [json.loads(found.line(row)) for row in drawn]
    tokens = count_tokens(settings.TOKENIZER_MODEL, examples)
    reasons = Counter(row.reason for row in rows if row.reason)
    outputs = [name for name in OUTPUTS if written[name]]
    by_file = Counter(row.file for row in rows)
    # Held-out answers, if they are long, that stand word for word in training
    answers = {row.rest for row in trained if row.long_rest and row.split == TRAIN}
    repeated = sum(row.long_rest and row.split == EVAL and row.rest in answers for row in trained)
    # The mode in which a model is trained on these conversations
    thought = sum(row.reasoning for row in trained)
    mode = "on" if 2 * thought > len(trained) else "off" if 2 * thought < len(trained) else "tie"
    thinking = {"mode": mode, "with_reasoning": thought, "conversations": len(trained)}
    kept = sum(count <= settings.MAX_LENGTH for count in tokens)
    firsts = (example["messages"][0] for example in examples)
    systems = Counter(first["content"] for first in firsts if first["role"] == "system")
    [(system, count)] = systems.most_common(1) or [("", 0)]
    unused = {
        schema: {name: count for name, (count, _) in fields.items()}
        for schema, fields in found.unused.items()
    }
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
        "kept_by_max_length": round(kept / len(tokens), 4) if tokens else None,
        "thinking": thinking if trained else {},
        "system": system if count >= NEARLY_ALL * len(examples) else "",
        "fields": {
            schema: {"used": list(used), "unused": unused[schema]} for schema, used in found.used.items()
        },
        "fingerprints": {name: sha256_of(settings.OUTPUT_DIR / f"{name}.jsonl") for name in outputs},
        "examples": examples[:EXAMPLES],
        "settings": settings.as_dict(),
    }


def _spread(values):
    return {name: int(numpy.percentile(values, point)) for name, point in POINTS.items()} if values else {}


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
    for title, counts in (("kept", "outputs"), ("set aside", "set_aside")):
        line(sum(report[counts].values()), title, "\n")
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
        say(
            f"MAX_LENGTH {report['settings']['MAX_LENGTH']:,} keeps {report['kept_by_max_length']:.1%} of them"
        )
    elif (model := report["settings"]["TOKENIZER_MODEL"]) and report["characters"]:
        say(f"no tokens counted: {model} is not there yet")
    if thinking := report["thinking"]:
        tie = "; keep the rows of one mode" if thinking["mode"] == "tie" else ""
        counts = f"{thinking['with_reasoning']:,} of {thinking['conversations']:,}"
        say(f"thinking {thinking['mode']}: {counts} conversations end with reasoning{tie}")
    if report["system"]:
        say(f"system text of nearly all conversations: {shorten(report['system'])}")
    for schema, fields in found.unused.items():
        unused = []
        for name, (rows, value) in fields.items():
            example = shorten(json.dumps(value, ensure_ascii=False, default=str), SHOWN)
            unused.append(f"{name} ({rows:,} row{'s' * (rows > 1)}, such as {example})")
        if unused:
            say(f"not used, of {schema}: {'; '.join(unused)}")
    held_out = report["outputs"].get("sft_eval", report["outputs"].get("dpo_eval", 0))
    if 0 < held_out < FEW_EVAL_ROWS:
        say(f"few rows are held out ({held_out}): figures on them mean little")
    for example in report["examples"]:
        say("\n" + example["source"])
        for message in example["messages"]:
            say(f"  {message['role']:<10}{shorten(message['content'])}")


# ---- Rows that cannot be used


def refusal(files: list[InputFile], found: Recognised, columns: str) -> str:
    """The reason why there is nothing to convert, in one line; "" if there is. `columns`: the setting."""
    if found.schemas and (not columns or found.schemas["--columns"]):
        return ""
    if found.schemas:
        fields = ", ".join(found.given(next(row for row in found.rows if row.kind)))
        return f"no row has the fields of --columns {columns}; fields found: {fields}"
    counted = Counter(row.reason for row in found.rows).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counted)
    said = [f"no row could be used ({reasons or 'the input is empty'})", *notes(files, found)[:NOTES]]
    if reasons.endswith(" not JSON"):
        said.append("wanted one JSON object for each row: one a line, or all in one array")
    return "; ".join(said)


def notes(files: list[InputFile], found: Recognised) -> list[str]:
    """A line for each file of which no row, or not every row, could be recognised; files that are alike share one."""
    said: dict[tuple, list[str]] = {}  # {what is alike: [the line, file, file, ...]}
    rows_of = {number: list(rows) for number, rows in itertools.groupby(found.rows, lambda row: row.file)}
    for number, file in enumerate(files):
        rows = rows_of.get(number, [])
        lost = [row for row in rows if not row.kind]
        strange = [row for row in lost if row.reason == UNKNOWN]
        reason, advice = lost[0].reason if lost else "", _advice(found, strange, file.ending in TABLES)
        if not rows:
            line = "no row in it"
        elif len(lost) == len(rows):
            detail = "" if reason == UNKNOWN else shorten(json.loads(found.line(lost[0])), 200)
            why = f"line {lost[0].line}: {reason}" + (f" ({detail})" if detail else "")
            line = f"none of its {len(rows):,} rows could be used; {why}{advice}"
        elif strange:
            where = f"{UNKNOWN} from line {strange[0].line} on"
            line = f"{len(lost):,} of its {len(rows):,} rows could not be used; {where}{advice}"
        else:
            continue
        said.setdefault((len(lost) == len(rows), reason, advice), [f"{file.name}: {line}"]).append(file.name)
    lines = []
    for line, _, *more in said.values():
        others = f" (and the same in {len(more):,} more: {shorten(', '.join(more), 100)})" if more else ""
        lines.append(line + others)
    if guessed := found.schemas[GUESSED]:
        why = "nothing in the file shows where the count begins; if it begins at 1, write the answers as letters"
        lines.append(f"exam answers that are numbers were counted from 0 in {guessed:,} rows: {why}")
    return lines


def _advice(found, strange, table):
    """The fields of rows that are not recognised, and what to do about them; "" if there are no such rows."""
    if not strange:
        return ""
    rows = [found.given(row) for row in strange[:LOOKED_AT]]
    names = Counter(map(tuple, rows)).most_common(1)[0][0]
    advice = columns_or_form([row for row in rows if tuple(row) == names], table)
    return f"; fields found: {', '.join(names) or 'none'}; {advice}"


def columns_or_form(rows: list[dict], table: bool = False) -> str:
    """The setting that reads rows with the same fields, if the names of just two say so; else one phrase about what they are.

    `table`: they are of a table, whose first line may be no names of columns.
    """
    names, plain = tuple(rows[0]), plain_names(tuple(rows[0]))
    held = {name: next((row[name] for row in rows if not is_empty(row[name])), None) for name in names}
    texts = {}  # {field of text: True if its texts differ}
    beside = BESIDE_TEXT.union(plain.get("reasoning", ()), plain.get("system", ()))
    for name in names:
        told = [row[name] for row in rows if isinstance(row[name], str) and not is_empty(row[name])]
        if name not in beside and 2 * len(told) >= len(rows):
            texts[name] = len(set(told)) >= LEAST_DISTINCT * len(told)
    named = [name for name, differ in texts.items() if differ]
    questions = [name for name in named if name.strip().lower().endswith(QUESTIONS)]
    answers = [name for name in named if name.strip().lower().endswith(ANSWERS)]
    wrong = [name for name in answers if any(word in name.lower() for word in NOT_RIGHT)]
    if options := [*option_fields(names).values()] or plain.get("options"):
        listed = "+".join(options)
        return f"an exam with the options {listed}: name its other fields, --columns question=...,answer=...,options={listed}"
    for name, value in held.items():
        if isinstance(value, list) and isinstance(value[0], dict):
            return f"{name} holds rows inside the rows ({', '.join(value[0])}): write each as its own row"
    if len(questions) == len(answers) == 1 and not wrong and len(texts) <= TABLE_FIELDS:
        flag = shlex.quote(f"question={questions[0]},answer={answers[0]}")
        return f"name them, if they are right: --columns {flag}"
    if table and any(map(looks_like_data, names)):
        return "the first row reads like data, not like names of columns: put a row of names above it"
    for name, value in held.items():
        if isinstance(value, dict):
            return f"{name} holds fields of its own ({', '.join(value)}): write them as fields of the row"
        if isinstance(value, list):
            return f"{name} is a list: wanted a text, or turns that say who speaks"
    candidates = [name for name in texts if any(word in name.lower() for word in ANSWERS)]
    if len(texts) > TABLE_FIELDS:
        return f"a table of {len(texts)} fields of text, no question and answer a row"
    for what, several in (("answer", candidates), ("question", questions)):
        if len(several) > 1:
            return f"several fields may be the {what}: {', '.join(several)}"
    if wrong:
        return f"{wrong[0]} may be an answer of a model, or a wrong one: no field is known as a right one"
    missing = [what for what, known in (("a question", questions), ("an answer", answers)) if not known]
    header = "; if the first row is no header, put one above it" if table else ""
    return f"no field is known as {' or '.join(missing)}{header}"
