"""Recognises a row by its field names, and turns it into one of the things this project hands on.

`convert_row` returns a ConvertedRow: a conversation to train on ("sft"), a preference pair ("dpo") or an exam item ("exam"); or
it raises Reject with the reason. To add a schema of questions and answers, add a line to QUESTION_ANSWER; to add another name
for a field, one to ALIASES in messages.py. A reader takes the row's Fields and its schema's name, and returns (kind, schema, body).
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from utils.data.exams import ANSWERS, LETTERS, QUESTIONS, as_conversation, exam_in, exam_item, option_fields
from utils.data.inputs import InputFile
from utils.data.messages import (
    Fields,
    Reject,
    assistant_message,
    check_text,
    exchanges,
    marked_turns,
    plain_names,
    question_of,
    refuse_unlearnt,
    text_of,
    turns_of,
)
from utils.data.readers import Place, read_rows

# Question/further context/answer: a row is read by the first line of which it has all fields. Reasoning and system text may be
# beside them.
QUESTION_ANSWER = (
    "instruction/input/output instruction//output input//output input//target query//response "
    "question/context/answer question//answer question//response prompt//completion prompt//response "
    "instruction/input/response instruction/context/response instruction//response "
    "title/ask/answer ask//answer query//answer 症状//处方 问//答 q//a"
).split()
# The same for rows that have reasoning: an answer of a reasoning model is often called content.
REASONED = ["input//content", "question//content", "prompt//content"]
ROLES = ("question", "input", "reasoning", "answer", "system", "options", "chosen", "rejected")
WANTED_ROLES = ({"question", "answer"}, {"question", "chosen", "rejected"})  # one of the two
BESIDE_TEXT = {"id", "source", "url", "title", "meta", "metadata", "date", "timestamp", "lang", "language"}
SPLITS = {"": "", "train": "train", **dict.fromkeys(("eval", "validation", "valid", "dev", "test"), "eval")}
# Names of questions, answers and conversations, which do not count in a row that --columns reads.
NAMED_BY_USER = {*QUESTIONS, *ANSWERS, "context", "messages", "conversations", "chosen", "rejected"}
EVIDENCE_ROWS = 200  # of a file, which may tell if the answers of an exam are counted from 0 or from 1
HALVES = "turns before the first question, or after the last answer"  # of a conversation, as a field not used
GUESSED = "exam with answers counted from 0 by default"  # the schema of rows in which nothing proves 0 or 1
# Files, less .jsonl. An exam is never trained on.
OUTPUTS = ("sft_train", "sft_eval", "dpo_train", "dpo_eval", "exam")


class ConvertedRow(NamedTuple):
    """A usable row. `body`: the fields of the output line; `questions`: the user turns; `rest`: all text after the first."""

    kind: str  # "sft", "dpo" or "exam"
    schema: str
    body: dict
    questions: list
    rest: str
    split: str  # "train" or "eval" if the row says so, else ""
    unused: dict  # {field that holds something and was not used: its value}; of turns "messages[].name"


def parse_columns(text: str) -> dict[str, str]:
    """{role: field} of a setting such as "question=Content,answer=Summary"; ValueError says what is wrong with it."""
    columns = {}
    for part in filter(None, map(str.strip, text.split(","))):
        role, _, field = map(str.strip, part.partition("="))
        if not field or role not in ROLES:
            raise ValueError(f"{part!r} is not role=field; the roles are {', '.join(ROLES)}")
        columns[role] = field
    if columns and not any(wanted <= set(columns) for wanted in WANTED_ROLES):
        raise ValueError("it has to name a question and an answer (or a question, chosen and rejected)")
    return columns


def convert_rows(
    file: InputFile, **options: Any
) -> Iterator[tuple[Place, dict | Reject, ConvertedRow | Reject]]:
    """(place, row, what it makes or why it is set aside) of every row of a file. `options`: of convert_row.

    The first EVIDENCE_ROWS are read ahead: an answer that fits only one way tells if exam answers are counted from 0 or from 1.
    """

    def attempt(row, first):
        if isinstance(row, Reject):
            return row
        try:
            return convert_row(row, first=first, **options)
        except Reject as problem:
            return Reject(problem.reason, problem.detail, row)

    rows = read_rows(file)
    ahead, first = list(itertools.islice(rows, EVIDENCE_ROWS)), None
    for _, row in ahead:
        fits = [number for number in (0, 1) if isinstance(attempt(row, number), ConvertedRow)]
        if len(fits) == 1:
            first = fits[0]
            break
    for place, row in itertools.chain(ahead, rows):
        yield place, row, attempt(row, first)


def convert_row(
    row: dict,
    columns: tuple = (),
    system: str = "",
    explained: bool = False,
    max_characters: float = math.inf,
    first: int | None = None,
) -> ConvertedRow:
    """The ConvertedRow that a row makes; raises Reject.

    `columns`: pairs (role, field) for an unknown schema; `system`: the system text of rows that have none; `explained`: exam
    items with an explanation become conversations with reasoning; `first`: the number of an exam's first option, if it is known.
    """
    names, schema = _names(tuple(row), columns)
    fields = Fields(row, names)
    told = fields.get("split")
    split = SPLITS.get(str(told or "").strip().lower())
    if split is None:
        raise Reject("unknown split", f"{told!r}; wanted one of {', '.join(filter(None, SPLITS))}")
    if fields.peek("tools") is not None:
        raise Reject("tool calls are not trained", f"field {fields.field('tools')}")
    kind, schema, body = _read(fields, schema, first)
    if kind == "exam" and explained and fields.peek("explanation") is not None:
        kind, schema = "sft", "exam with explanation"
        body = {"messages": as_conversation(body, text_of(fields, "explanation", "explanation"))}
    if kind == "exam":
        questions, others = [body["question"]], [*body["options"].values(), body["answer"]]
    else:
        prompt = body["messages" if kind == "sft" else "prompt"]
        if system and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": system})
        turns = prompt + body.get("chosen", []) + body.get("rejected", [])
        questions = [turn["content"] for turn in turns if turn["role"] == "user"]
        others = [text for turn in turns for text in (turn.get("reasoning_content"), turn["content"]) if text]
        others.remove(questions[0])
    rest = "\n".join(others)
    for text in (questions[0], rest, body.get("subject", ""), body.get("kind", "")):
        check_text(text)
    size = len(questions[0]) + len(rest)
    if size > max_characters:
        raise Reject("too long", f"{size:,} characters")
    return ConvertedRow(kind, schema, body, questions, rest, split, fields.unused())


@functools.lru_cache(maxsize=4096)
def _names(fields, columns):
    """({name that a field is read under: the row's fields}, "--columns" if these say how such a row is read, else "")."""
    names = plain_names(fields)
    names = names | {f"option {letter}": (own,) for letter, own in option_fields(fields).items()}
    given = {role: tuple(field.split("+")) if role == "options" else (field,) for role, field in columns}
    given = {role: own for role, own in given.items() if set(own) <= set(fields)}
    if not any(wanted <= set(given) for wanted in WANTED_ROLES):
        return names, ""
    if len(given.get("options", ())) > 1:
        given.update({f"option {letter}": (own,) for letter, own in zip(LETTERS, given.pop("options"))})
        names.pop("options", None)
    if "input" in given:
        given["context"] = given.pop("input")
    # The user says which fields are the question and the answer: no other name counts.
    return {name: own for name, own in names.items() if name not in NAMED_BY_USER} | given, "--columns"


@functools.lru_cache(maxsize=4096)
def _question_answer_names(have):
    """[question, context or "", answer] of the first line of QUESTION_ANSWER that these names fit, or None."""
    lines = (line.split("/") for line in QUESTION_ANSWER + (REASONED if "reasoning" in have else []))
    return next((line for line in lines if set(have).issuperset(filter(None, line))), None)


def _read(row, schema, first):
    """(kind, schema, body) that a row makes: by the names of its fields, else by what they hold. `schema`: "--columns" or ""."""
    have = row.names.keys()
    if {"chosen", "rejected"} <= have:
        return _read_preference(row, schema or "prompt/chosen/rejected")
    listed = any(row.peek(name) is not None for name in ("options", "option A", "option B"))
    asked = not have.isdisjoint(QUESTIONS) and not have.isdisjoint(ANSWERS)
    if listed and (asked or "question" in have) or asked and "判断" in str(row.peek("question_type")):
        item, guessed = exam_item(row, first)
        return "exam", schema or (GUESSED if guessed else "exam"), item
    dialogue = next((name for name in ("messages", "conversations") if name in have), "")
    named = _question_answer_names(tuple(have))
    if dialogue or not named:
        return _read_dialogue(row, dialogue or _dialogue_field(row))
    shown = [str(row.names[name][0]) for name in (*named[:2], "reasoning", named[2]) if name in have]
    return _read_question_answer(row, schema or "/".join(shown), *named)


def _dialogue_field(row):
    """The field that holds a list of turns, under whatever name, or a text that is a dialogue; else Reject."""

    def is_turn(value):
        if isinstance(value, str):
            return bool(marked_turns(value, both=False))
        return isinstance(value, dict) and not {"role", "from", "speaker", "human"}.isdisjoint(value)

    values = {name: row.peek(name) for name in row.names}
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    told = [name for name in texts if name not in BESIDE_TEXT]
    for name, value in values.items():
        alone = told == [name] and marked_turns(value)
        if alone or isinstance(value, list) and all(map(is_turn, value)):
            return name
    for text in texts.values():
        check_text(text)
    if set(row.names) - BESIDE_TEXT == {"text"}:
        raise Reject("plain text", "continued pre-training is not done here; wanted questions and answers")
    raise Reject("fields not recognised", f"fields: {', '.join(map(str, row.row)) or 'none'}")


def _read_question_answer(row, schema, question, context, answer):
    value = row.peek(question)
    if isinstance(value, list) and all(isinstance(turn, dict) and "type" not in turn for turn in value):
        turns = turns_of(row.get(question), question, row)  # TRL's prompt/completion in message form
        return _conversation(row, schema, turns + turns_of(row.get(answer), answer, row))
    asked = text_of(row, question, "question", optional=bool(context))
    if context:
        more = text_of(row, context, "question", optional=True)
        asked = "\n".join(filter(None, [asked if asked not in more else "", more]))
    if not asked:
        raise Reject("missing or empty question", f"{question} and {context} are empty")
    answered = text_of(row, answer, "answer")
    said = marked_turns(asked, both=False) + marked_turns(answered, both=False)
    if [turn["role"] for turn in said] == ["user", "assistant"]:  # "问：..." and "答：..."
        asked, answered = (turn["content"] for turn in said)
    turns = _history_of(row) + (marked_turns(asked) or [{"role": "user", "content": asked}])
    turns.append(assistant_message(answered, text_of(row, "reasoning", "reasoning", optional=True)))
    return _conversation(row, schema, turns, f"question={row.field(question)},answer={row.field(answer)}")


def _history_of(row):
    """The turns before the question: LLaMA-Factory's `history`, [[question, answer], ...], or messages."""
    history = row.get("history") or []
    if isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        history = [{"human": pair[0], "assistant": pair[1]} for pair in history]
    return turns_of(history, "history", row) if history else []


def _read_dialogue(row, name):
    value = row.get(name)
    turns = turns_of([value] if isinstance(value, str) else value, name, row)
    return _conversation(row, name, turns)


def _conversation(row, schema, turns, columns=""):
    """The conversation to train on; a pair, if the row has a rejected answer too; or an exam item, if the answer is a letter.
    `columns`: the setting that reads the row in spite of a label."""
    refuse_unlearnt(row, turns=turns)
    if turns[0]["role"] != "system" and row.peek("system") is not None:
        turns = [{"role": "system", "content": text_of(row, "system", "system text")}, *turns]
    messages = exchanges(turns)
    if len(messages) < len(turns):
        row.unused_in_turns[HALVES] = next((turn for turn in turns if turn not in messages), turns[-1])
    paired = {"chosen", "rejected"} <= set(row.names)
    item = None if paired else exam_in(row, messages[-2]["content"], messages[-1]["content"])
    if item and len(messages) > 2 + (messages[0]["role"] == "system"):
        raise Reject("an exam question inside a conversation", f"the answer is {item['answer']}")
    if item:
        row.used -= {row.field("system"), row.field("reasoning")}  # an item holds neither
        return "exam", "exam in the question", item
    if paired or row.peek("rejected") is not None:
        return _pair(row, schema, messages[:-1], messages[-1])
    if "reasoning_content" not in messages[-1] and row.peek("reasoning") is not None:
        messages[-1]["reasoning_content"] = text_of(row, "reasoning", "reasoning")
    if any(name.startswith("rejected") and row.peek(name) is not None for name in row.names):
        raise Reject("a rejected answer of an unknown form", "beside the answer")
    _refuse_judged(row, schema, columns)
    return "sft", schema, {"messages": messages}


def _refuse_judged(row, schema, columns):
    """Reject of a row (KTO) that says that its answer is bad, and of a number that may judge it."""
    by_hand = {"answer", "处方", "答"} & set(row.names)
    for mark in ("label", "kto_tag") if by_hand else ("label", "kto_tag", "score"):
        told = str(row.peek(mark)).strip().lower()
        if told == "false":
            raise Reject("marked as not to be learnt", f"{mark} is {told}: a bad answer")
        if told == "true":
            row.get(mark)
        elif schema != "--columns" and re.fullmatch(r"-?\d+(\.\d+)?", told):
            way = f"; if it is right in every row: --columns {columns}" if columns else ""
            detail = f"it may be a bad one; not used: {', '.join(row.unused())}{way}"
            raise Reject("a label or score beside the answer", detail)


def _read_preference(row, schema):
    """TRL: prompt/chosen/rejected as text or messages, the prompt explicit or shared; LLaMA-Factory: both its forms."""
    chosen = _answer_turns(row, "chosen")
    lists = (name for name in ("conversations", "messages", "prompt") if isinstance(row.peek(name), list))
    if own := next(lists, ""):
        prompt = turns_of(row.get(own), own, row)
    else:
        asked = question_of(row, ("prompt", "question", "instruction", "query", "input"), optional=True)
        prompt = [{"role": "user", "content": asked}] if asked else []
    if len(chosen) > 1 and (chosen[0]["role"] == "system" or len(chosen) > len(prompt)):
        prompt = []  # it stands in the chosen conversation
    elif not prompt:
        raise Reject("missing or empty question", "prompt")
    return _conversation(row, schema, _history_of(row) + prompt + chosen)


def _answer_turns(row, name):
    value = row.get(name)
    if value is None or isinstance(value, str):  # HH-RLHF: the whole dialogue in one text
        return marked_turns(value or "") or [assistant_message(text_of(row, name, "answer"))]
    return turns_of([value] if isinstance(value, dict) else value, name, row)


def _pair(row, schema, prompt, chosen):
    *before, rejected = _answer_turns(row, "rejected")
    if before and prompt[-len(before) :] != before:
        raise Reject("roles out of order", "chosen and rejected differ before their last turn")
    if rejected["role"] != "assistant":
        raise Reject("roles out of order", "chosen and rejected have to end with an assistant turn")
    if chosen == rejected:
        raise Reject("chosen equals rejected", "")
    if ("reasoning_content" in chosen) != ("reasoning_content" in rejected):
        raise Reject("reasoning on one side of a pair", "")
    kind = row.get("kind") if isinstance(row.peek("kind"), str) else "given"
    return "dpo", schema, {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "kind": kind}
