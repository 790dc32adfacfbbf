"""Recognise what a row is by its field names, and turn it into one of the things this project hands on.

`convert_row` returns an ConvertedRow: a conversation to train on ("sft"), a preference pair ("dpo"), an exam item ("exam") or an
answer that is marked as bad ("bad"); or it raises Reject with the reason. To add a schema of questions and answers, add a line
to QUESTION_ANSWER; to add another language's or data set's name for a field, one to ALIASES; to add a kind of row, a line to
OUTPUT_FILES and a reader that returns it.
"""

import functools
import re
from typing import NamedTuple

from utils.data.exams import LETTERS, as_conversation, exam_item, options_in, subject_of
from utils.data.messages import (
    Reject,
    assistant_message,
    history_of,
    in_order,
    system_message,
    text_of,
    trimmed,
    turns_of,
)

# name, question field, further context, reasoning, answer; the first line whose question and answer fields a row has.
QUESTION_ANSWER = (
    ("Question/Complex_CoT/Response", "question", None, "complex_cot", "response"),
    ("question/think/answer", "question", None, "think", "answer"),
    ("instruction/input/output", "instruction", "input", None, "output"),
    ("instruction/output", "instruction", None, None, "output"),
    ("input/output", "input", None, None, "output"),
    ("query/response", "query", None, None, "response"),
    ("question/answer", "question", None, None, "answer"),
    ("prompt/completion", "prompt", None, None, "completion"),
    ("prompt/response", "prompt", None, None, "response"),
    ("instruction/response", "instruction", None, None, "response"),
    ("title/ask/answer", "title", "ask", None, "answer"),
    ("ask/answer", "ask", None, None, "answer"),
    ("症状/处方", "症状", None, None, "处方"),
)

ALIASES = {
    **dict.fromkeys(("问题", "提问", "题目", "题干"), "question"),
    **dict.fromkeys(("答案", "回答", "回复"), "answer"),
    **{"指令": "instruction", "输入": "input", "输出": "output", "思考": "think", "系统": "system"},
    **{"选项": "options", "choices": "options", "题型": "question_type"},
    **dict.fromkeys(("科目", "学科"), "subject"),
    **dict.fromkeys(("解析", "parse", "analysis", "exp"), "explanation"),
}

BESIDE_TEXT = {"id", "source", "url", "title", "meta", "metadata", "date", "timestamp", "lang", "language"}

SPLITS = {"": "", "train": "train", **dict.fromkeys(("eval", "validation", "valid", "dev", "test"), "eval")}

# Text that no tokenizer or file can carry, and Qwen's own control tokens, which would forge a turn of the conversation.
_UNFIT = re.compile(
    "(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f])|(?P<surrogate>[\ud800-\udfff])|(?P<lost>\ufffd)"
    r"|(?P<token><\|(?:im_start|im_end|endoftext)\|>)"
)

_UNFIT_REASON = {
    "control": "control characters",
    "surrogate": "lone surrogate",
    "lost": "undecodable bytes",
    "token": "control tokens",
}


class OutputFiles(NamedTuple):
    """The output files (less .jsonl) of the rows that are trained on, and of those that are held out.

    `dealt`: whether a share of such rows is held out; others are never trained on, or follow rows of another kind.
    """

    trained: str
    held_out: str
    dealt: bool


OUTPUT_FILES = {
    "sft": OutputFiles("sft_train", "sft_eval", dealt=True),
    "dpo": OutputFiles("dpo_train", "dpo_eval", dealt=True),
    "exam": OutputFiles("exam", "exam", dealt=False),
    # with the good answer to its prompt, whose split it follows, a bad one becomes a preference pair
    "bad": OutputFiles("dpo_train", "dpo_eval", dealt=False),
}
OUTPUTS = list(
    dict.fromkeys(name for kind in OUTPUT_FILES.values() for name in (kind.trained, kind.held_out))
)


class ConvertedRow(NamedTuple):
    """A usable row. `body`: the fields of the output line; `questions`: the user turns; `rest`: all text after the first."""

    kind: str  # of OUTPUT_FILES
    schema: str
    body: dict  # of a bad answer: {"prompt", "rejected"}
    questions: list
    rest: str
    split: str  # "train", "eval", or "" where the row does not say
    characters: int
    reasoning: bool
    trimmed: bool  # whether turns were left out at an end


class RowOptions(NamedTuple):
    """How rows are to be read: `columns`, pairs (role, field) for an unknown schema; `system`, the system text of rows that
    have none; `max_characters` of a row (None: any number); `explained`, whether exam items with an explanation become
    conversations with reasoning."""

    columns: tuple = ()
    system: str = ""
    max_characters: int | None = None
    explained: bool = False


PLAIN = RowOptions()


def convert_row(row: dict, options: RowOptions = PLAIN) -> ConvertedRow:
    """The ConvertedRow that a row makes; raises Reject."""
    schema, read, renamed = _recognise(tuple(row), options.columns)
    if read is None:
        names = {str(name).strip().lower() for name in row} - BESIDE_TEXT
        if names in ({"text"}, {"content"}, {"文本"}) and not options.columns:
            raise Reject(
                "plain text", "continued pre-training is not done here; wanted questions and answers"
            )
        raise Reject("fields not recognised", f"fields: {', '.join(map(str, row)) or 'none'}")
    if renamed:
        row = {name: row[field] for name, field in renamed}
    split = _told_split(row)
    kind, schema, body = read(row, schema)
    was_trimmed = body.pop("trimmed", False)
    if kind == "exam" and options.explained and text_of(row, "explanation", "explanation", optional=True):
        kind, schema = "sft", "exam with explanation"
        body = {"messages": as_conversation(body, text_of(row, "explanation", "explanation"))}
    if kind == "exam":
        questions, others, reasoning = [body["question"]], [*body["options"].values(), body["answer"]], False
    else:
        prompt = body["messages" if kind == "sft" else "prompt"]
        if options.system and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": options.system})
        turns = prompt + body.get("chosen", []) + body.get("rejected", [])
        questions, others, reasoning = _spoken(turns)
    rest = "\n".join(others)
    for text in (questions[0], rest, body.get("subject", ""), body.get("kind", "")):
        _check_text(text)
    characters = len(questions[0]) + len(rest)
    if options.max_characters and characters > options.max_characters:
        raise Reject("too long", f"{characters:,} characters")
    return ConvertedRow(kind, schema, body, questions, rest, split, characters, reasoning, was_trimmed)


def _told_split(row):
    """The split that a row names for itself, or ""."""
    told = row.get("split")
    if told is None:
        return ""
    split = SPLITS.get(told.strip().lower()) if isinstance(told, str) else None
    if split is None:
        raise Reject("unknown split", f"{told!r}; wanted one of {', '.join(filter(None, SPLITS))}")
    return split


def _spoken(turns):
    """(the user's turns, all other text and the user's later turns, whether there is reasoning) of messages."""
    questions, rest, reasoning = [], [], False
    for turn in turns:
        if turn["role"] == "user":
            questions.append(turn["content"])
            if len(questions) == 1:
                continue
        elif "reasoning_content" in turn:
            rest.append(turn["reasoning_content"])
            reasoning = True
        rest.append(turn["content"])
    return questions, rest, reasoning


def _check_text(text):
    # Printable text without these two holds nothing unfit: the quick answer for nearly every row.
    if not text.replace("\n", "").isprintable() or "\ufffd" in text or "<|" in text:
        found = _UNFIT.search(text)
        if found:
            around = text[max(0, found.start() - 10) : found.start() + 20]
            raise Reject(_UNFIT_REASON[found.lastgroup], f"{found.group()!r} in {around!r}")


@functools.lru_cache(maxsize=4096)
def _recognise(names, columns):
    """(schema name, its reader, the renaming of the row's fields) for a row with these field names; reader None: unknown.

    The renaming, ((name the reader uses, the row's field), ...), is empty where the names are already those.
    """
    fields = {str(name).strip().lower(): name for name in names}
    for name in list(fields):
        if name in ALIASES:
            fields.setdefault(ALIASES[name], fields.pop(name))
    given = {role: field for role, field in columns if field in names}
    if {"question", "answer"} <= set(given):
        context, reasoning = (role if role in given else None for role in ("input", "reasoning"))
        schema, read = "--columns", _question_answer_reader("question", context, reasoning, "answer")
    elif {"question", "chosen", "rejected"} <= set(given):
        fields.pop("prompt", None)
        schema, read = "--columns", _preference
    else:
        schema, read = _recognise_default(fields)
        given = {}
    fields.update(given)
    return schema, read, () if all(name == field for name, field in fields.items()) else tuple(fields.items())


def _recognise_default(fields):
    """(schema name, its reader) for a row with these fields, {name as in QUESTION_ANSWER: name in the row}."""
    have = set(fields)
    if {"chosen", "rejected"} <= have:
        return ("conversations" if "conversations" in have else "prompt") + "/chosen/rejected", _preference
    listed = {"option", "options", "question_type"} & have or {"a", "b"} <= have
    if "question" in have and {"answer", "answer_idx"} & have and listed:
        return "exam", _exam
    for name in ("messages", "conversations"):
        if name in have:
            return name, _conversation
    for name, *used in QUESTION_ANSWER:
        if have.issuperset(filter(None, used)):
            given = [fields[field] for field in used if field]
            if not set(ALIASES).isdisjoint(given):  # such as 问题/答案
                name = "/".join(given)
            return name, _question_answer_reader(*used)
    return "", None


def _question_answer_reader(question, context, reasoning, answer):
    return functools.partial(_question_answer, fields=(question, context, reasoning, answer))


def _question_answer(row, schema, fields):
    question, context, reasoning, answer = fields
    if isinstance(row[question], list):  # TRL's prompt/completion in message form
        turns = turns_of(row[question], "prompt") + turns_of(row[answer], "completion")
        return _trained_or_bad(row, schema, in_order(system_message(row, turns) + turns, "assistant"))
    asked = text_of(row, question, "question", optional=bool(context))
    if context:
        more = text_of(row, context, "question", optional=True)
        asked = "\n".join(filter(None, [asked if asked not in more else "", more]))
        if not asked:
            raise Reject("missing or empty question", f"{question} and {context} are empty")
    answered = text_of(row, answer, "answer")
    if len(answered) <= len(LETTERS) and set(answered) <= set(LETTERS):
        stem, options = options_in(asked)
        if options:  # Monor/hwtcm: the options stand in the question
            listed = {"question": stem, "options": options, "answer": answered, **subject_of(row)}
            return "exam", "exam in the question", exam_item(listed)
    messages = [*system_message(row), *history_of(row), {"role": "user", "content": asked}]
    thought = reasoning and text_of(row, reasoning, "reasoning", optional=True)
    messages.append(assistant_message(answered, thought))
    return _trained_or_bad(row, schema, messages)


def _conversation(row, schema):
    turns = turns_of(row[schema], schema)
    messages = system_message(row, turns) + turns
    kept = in_order(trimmed(messages), "assistant")
    kind, schema, body = _trained_or_bad(row, schema, kept)
    return kind, schema, body | {"trimmed": len(kept) < len(messages)}


def _trained_or_bad(row, schema, messages):
    """The conversation to train on, or a bad answer where the row (KTO) or its last turn (weight 0) is marked as one."""
    answers = [message for message in messages if message["role"] == "assistant"]
    weights = [answer.pop("weight", 1) for answer in answers]
    if 0 in weights[:-1]:
        raise Reject("an earlier answer has weight 0", "answers that are not to be learnt can only come last")
    if weights[-1] != 0 and not any(_is_false(row.get(mark)) for mark in ("label", "kto_tag")):
        return "sft", schema, {"messages": messages}
    return "bad", f"{schema}, marked as bad", {"prompt": messages[:-1], "rejected": messages[-1:]}


def _is_false(value):
    """False as JSON has it, or as a table writes it; 0 is a number of something else."""
    return value is False or isinstance(value, str) and value.strip().lower() == "false"


def _preference(row, schema):
    """TRL: prompt/chosen/rejected as text or messages, the prompt explicit or shared; LLaMA-Factory: both its forms."""
    chosen, rejected = _answer_turns(row, "chosen"), _answer_turns(row, "rejected")
    prompt = _preference_prompt(row)
    if len(chosen) > 1 or len(rejected) > 1:  # whole conversations: what they share is the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Reject("roles out of order", "chosen and rejected differ before their last turn")
        whole = chosen[0]["role"] == "system" or len(chosen) > len(prompt)
        prompt = chosen[:-1] if whole else prompt + chosen[:-1]
    if not prompt:
        raise Reject("missing or empty question", "prompt")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Reject("roles out of order", "chosen and rejected have to end with an assistant turn")
    if chosen[-1] == rejected[-1]:
        raise Reject("chosen equals rejected", "")
    prompt = in_order(system_message(row, prompt) + history_of(row) + prompt, "user")
    kind = row["kind"] if isinstance(row.get("kind"), str) else "given"
    return "dpo", schema, {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:], "kind": kind}


def _preference_prompt(row):
    """The turns before the two answers, as far as they have a field of their own."""
    for field in ("conversations", "prompt"):
        if field == "conversations" and field in row or isinstance(row.get(field), list):
            return turns_of(row[field], field)
    names = ("prompt", "question", "instruction", "query", "input")
    field = next((name for name in names if row.get(name)), "prompt")
    more = text_of(row, "input", "question", optional=True) if field == "instruction" else ""
    asked = "\n".join(filter(None, [text_of(row, field, "question", optional=True), more]))
    return [{"role": "user", "content": asked}] if asked else []


def _answer_turns(row, field):
    value = row[field]
    if isinstance(value, str):
        return [assistant_message(text_of(row, field, "answer"))]
    return turns_of([value] if isinstance(value, dict) else value, field)


def _exam(row, schema):
    listed = any(name in row for name in ("option", "options", "a"))
    if not listed and "判断" not in str(row["question_type"] or ""):
        return _question_answer(row, "question/answer", ("question", None, None, "answer"))
    return "exam", schema, exam_item(row)
