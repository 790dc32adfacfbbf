"""Recognise what a row is by its field names, and turn it into one of the three things this project hands on.

`convert_row` returns an Item: a conversation to train on ("sft"), a preference pair ("dpo") or an exam item ("exam"), or
raises Reject with the reason. To add a schema of questions and answers, add a line to QUESTION_ANSWER.
"""

import functools
import re
import unicodedata
from typing import NamedTuple

from utils.data.readers import Reject

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
)

COLUMN_ROLES = ("question", "input", "reasoning", "answer", "system", "chosen", "rejected")

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

SPLITS = {
    "": "",
    "train": "train",
    "eval": "eval",
    "validation": "eval",
    "valid": "eval",
    "dev": "eval",
    "test": "eval",
}

LETTERS = "ABCDEFGH"

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

_OPTION_LINE = re.compile(r"^\s*([A-H])\s*[.、．:：)）]\s*(.+?)\s*$", re.MULTILINE)


class Item(NamedTuple):
    """A usable row. `body`: the fields of the output line; `questions`: the user turns; `rest`: all text after the first."""

    kind: str
    schema: str
    body: dict
    questions: list
    rest: str
    split: str  # "train", "eval", or "" where the row does not say
    characters: int
    reasoning: bool


class RowOptions(NamedTuple):
    """How rows are to be read: `columns`, pairs (role, field) for an unknown schema; `system`, the system text of rows that
    have none; `max_characters` of a row (None: any number)."""

    columns: tuple = ()
    system: str = ""
    max_characters: int | None = None


PLAIN = RowOptions()


def parse_columns(text: str) -> dict[str, str]:
    """{role: field} of a setting such as "question=Content,answer=Summary"; ValueError says what is wrong with it."""
    columns = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, field = (side.strip() for side in part.partition("="))
        if not equals or not field:
            raise ValueError(f"{part!r} is not role=field; wanted e.g. question=Content,answer=Summary")
        if role not in COLUMN_ROLES:
            raise ValueError(f"unknown role {role!r}; the roles are {', '.join(COLUMN_ROLES)}")
        columns[role] = field
    if columns and "question" not in columns or columns and not {"answer", "chosen"} & set(columns):
        raise ValueError("it has to name a question and an answer (or chosen and rejected)")
    if ("chosen" in columns) != ("rejected" in columns):
        raise ValueError("chosen and rejected go together")
    return columns


def convert_row(row: dict, options: RowOptions = PLAIN) -> Item:
    """The Item that a row makes; raises Reject."""
    schema, read, renamed = _recognise(tuple(row), options.columns)
    if read is None:
        raise Reject("fields not recognised", f"fields: {', '.join(map(str, row)) or 'none'}")
    if renamed:
        row = {name: row[field] for name, field in renamed}
    split = _told_split(row)
    kind, schema, body = read(row, schema)
    if kind == "exam":
        questions, rest, reasoning = [body["question"]], [*body["options"].values(), body["answer"]], False
    else:
        prompt = body["messages" if kind == "sft" else "prompt"]
        if options.system and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": options.system})
        questions, rest, reasoning = _spoken(
            prompt if kind == "sft" else prompt + body["chosen"] + body["rejected"]
        )
    rest = "\n".join(rest)
    for text in (questions[0], rest, body.get("subject", ""), body.get("kind", "")):
        _check_text(text)
    characters = len(questions[0]) + len(rest)
    if options.max_characters and characters > options.max_characters:
        raise Reject("too long", f"{characters:,} characters")
    return Item(kind, schema, body, questions, rest, split, characters, reasoning)


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
    given = {role: field for role, field in columns if field in names}
    if {"question", "answer"} <= set(given):
        context, reasoning = (role if role in given else None for role in ("input", "reasoning"))
        schema, read = "--columns", _question_answer_reader("question", context, reasoning, "answer")
    elif {"question", "chosen", "rejected"} <= set(given):
        fields.pop("prompt", None)
        schema, read = "--columns", _preference
    else:
        schema, read = _recognise_default(set(fields))
        given = {}
    fields.update(given)
    return schema, read, () if all(name == field for name, field in fields.items()) else tuple(fields.items())


def _recognise_default(have):
    if {"chosen", "rejected"} <= have:
        return ("conversations" if "conversations" in have else "prompt") + "/chosen/rejected", _preference
    if {"question", "answer"} <= have and ({"option", "options"} & have or {"a", "b"} <= have):
        return "exam", _exam
    for name in ("messages", "conversations"):
        if name in have:
            return name, _conversation
    for name, *fields in QUESTION_ANSWER:
        if have.issuperset(filter(None, fields)):
            return name, _question_answer_reader(*fields)
    return "", None


def _question_answer_reader(question, context, reasoning, answer):
    return functools.partial(_question_answer, fields=(question, context, reasoning, answer))


def _question_answer(row, schema, fields):
    question, context, reasoning, answer = fields
    if isinstance(row[question], list):  # TRL's prompt/completion in message form
        turns = _turns(row[question], "prompt") + _turns(row[answer], "completion")
        return "sft", schema, {"messages": _in_order(_system(row, turns) + turns, "assistant")}
    asked = _text(row, question, "question", optional=bool(context))
    if context:
        asked = "\n".join(filter(None, [asked, _text(row, context, "question", optional=True)]))
        if not asked:
            raise Reject("missing or empty question", f"{question} and {context} are empty")
    answered = _text(row, answer, "answer")
    options = (
        dict(_OPTION_LINE.findall(asked)) if len(answered) <= 8 and set(answered) <= set(LETTERS) else {}
    )
    if len(options) > 1:  # Monor/hwtcm: the options stand in the question
        stem = asked[: _OPTION_LINE.search(asked).start()]
        return _exam(
            {"question": stem, "options": options, "answer": answered, **_subject(row)},
            "exam in the question",
        )
    messages = [*_system(row), *_history(row), {"role": "user", "content": asked}]
    messages.append(_assistant(answered, reasoning and _text(row, reasoning, "reasoning", optional=True)))
    return "sft", schema, {"messages": messages}


def _conversation(row, schema):
    turns = _turns(row[schema], schema)
    return "sft", schema, {"messages": _in_order(_system(row, turns) + turns, "assistant")}


def _preference(row, schema):
    """TRL: prompt/chosen/rejected as text or messages, the prompt explicit or shared; LLaMA-Factory: both its forms."""
    chosen, rejected = _answer_turns(row, "chosen"), _answer_turns(row, "rejected")
    if "conversations" in row:
        prompt = _turns(row["conversations"], "conversations")
    elif isinstance(row.get("prompt"), list):
        prompt = _turns(row["prompt"], "prompt")
    else:
        field = next(
            (name for name in ("prompt", "question", "instruction", "query", "input") if row.get(name)),
            "prompt",
        )
        context = _text(row, "input", "question", optional=True) if field == "instruction" else ""
        asked = "\n".join(filter(None, [_text(row, field, "question", optional=True), context]))
        prompt = [{"role": "user", "content": asked}] if asked else []
    if len(chosen) > 1 or len(rejected) > 1:  # whole conversations: what they share is the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Reject("roles out of order", "chosen and rejected differ before their last turn")
        prompt = (
            chosen[:-1]
            if chosen[0]["role"] == "system" or len(chosen) > len(prompt)
            else prompt + chosen[:-1]
        )
    if not prompt:
        raise Reject("missing or empty question", "prompt")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Reject("roles out of order", "chosen and rejected have to end with an assistant turn")
    if chosen[-1] == rejected[-1]:
        raise Reject("chosen equals rejected", "")
    prompt = _in_order(_system(row, prompt) + _history(row) + prompt, "user")
    kind = row["kind"] if isinstance(row.get("kind"), str) else "given"
    return "dpo", schema, {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:], "kind": kind}


def _exam(row, schema):
    """The project's own form, CMMLU (columns A to D), CMB (option: {A: ...}) and CMExam (Options: [{key, value}, ...])."""
    question = _text(row, "question", "question")
    options = row.get("options", row.get("option"))
    if options is None:
        options = {letter: row.get(letter.lower()) for letter in LETTERS}
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options = {option.get("key"): option.get("value") for option in options}
    if not isinstance(options, dict) or not all(
        isinstance(value, (str, type(None))) for value in options.values()
    ):
        raise Reject("wrong type", "the options are not texts by letter")
    options = {
        str(letter).strip().upper(): value.strip()
        for letter, value in options.items()
        if value and value.strip()
    }
    if len(options) < 2:
        raise Reject("missing or empty options", f"{len(options)} options")
    answer = re.sub(r"[\s,、]", "", unicodedata.normalize("NFKC", _text(row, "answer", "answer"))).upper()
    if len(answer) > 1 and set(answer) <= set(options):
        raise Reject("several right answers", answer)
    if answer not in options:
        raise Reject("answer not among the options", f"{answer[:40]} of {', '.join(options)}")
    return "exam", schema, {"question": question, "options": options, "answer": answer, **_subject(row)}


def _subject(row):
    names = ("subject", "exam_subject", "exam_class")
    return {
        "subject": next(
            (row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), ""
        )
    }


def _answer_turns(row, field):
    value = row[field]
    if isinstance(value, str):
        return [_assistant(_text(row, field, "answer"))]
    return _turns([value] if isinstance(value, dict) else value, field)


def _turns(value, field):
    """Messages (role/content) or ShareGPT turns (from/value) as messages."""
    if value is None or value == []:
        raise Reject("missing or empty question", f"{field} is empty")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Reject("wrong type", f"{field} is not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        said = turn.get("role", turn.get("from"))
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise Reject(
                "roles out of order", f"{field}, turn {number}: role {said!r}; wanted {', '.join(ROLES)}"
            )
        name = "content" if "content" in turn else "value"
        text = _text(turn, name, "answer" if role == "assistant" else "question", optional=role == "system")
        if role == "assistant":
            turns.append(_assistant(text, _text(turn, "reasoning_content", "reasoning", optional=True)))
        elif text:
            turns.append({"role": role, "content": text})
    return turns


def _in_order(messages, last):
    """The messages, if they are: an optional system text, then user and assistant in turn, ending with `last`."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        raise Reject("roles out of order", " ".join(roles))
    if spoken[-1] != last:
        raise Reject("roles out of order", f"ends with a turn of the {spoken[-1]}, wanted {last}")
    return messages


def _system(row, turns=()):
    text = _text(row, "system", "system text", optional=True) if "system" in row else ""
    if not text or turns and turns[0]["role"] == "system":
        return []
    return [{"role": "system", "content": text}]


def _history(row):
    """LLaMA-Factory's `history`: [[question, answer], ...]."""
    history = row.get("history")
    if not history:
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise Reject("wrong type", "history is not a list of [question, answer]")
    turns = []
    for question, answer in history:
        turns.append({"role": "user", "content": _text({"history": question}, "history", "question")})
        turns.append(_assistant(_text({"history": answer}, "history", "answer")))
    return turns


def _assistant(text, reasoning=""):
    """An assistant message; a think block at the start of its text becomes its reasoning."""
    if "think>" in text:
        thought, closed, rest = text.partition("</think>")
        thought = thought.strip().removeprefix("<think>").strip()
        if not closed or "think>" in rest or "<think>" in thought:
            raise Reject("think block out of place", "wanted one closed <think> block before the answer")
        text, reasoning = rest.strip(), reasoning or thought
        if not text:
            raise Reject("missing or empty answer", "nothing after the think block")
    message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _text(row, field, what, optional=False):
    """The text of a field, ends trimmed and line ends as \\n; Reject where it is no text, or empty and not `optional`."""
    value = row.get(field)
    if value is None:
        value = ""
    elif not isinstance(value, str):
        raise Reject("wrong type", f"{field} is {type(value).__name__}, wanted text")
    value = value.strip()
    if "\r" in value:
        value = value.replace("\r\n", "\n")
    if not value and not optional:
        raise Reject(f"missing or empty {what}", f"{field} is {'missing' if field not in row else 'empty'}")
    return value
