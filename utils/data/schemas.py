"""Recognise what a row is by its field names, and turn it into one of the things this project hands on.

`convert_row` returns a ConvertedRow: a conversation to train on ("sft"), a preference pair ("dpo"), an exam item ("exam") or
an answer that is marked as bad ("bad"); or it raises Reject with the reason. To add a schema of questions and answers, add a
line to QUESTION_ANSWER; to add another language's or data set's name for a field, one to ALIASES in messages.py; to add a kind
of row, a line to OUTPUT_FILES and a reader that returns it.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from utils.data.exams import (
    ANSWERS,
    LETTERS,
    QUESTIONS,
    as_conversation,
    exam_item,
    letters_alone,
    option_fields,
    options_in,
    subject_of,
)
from utils.data.inputs import InputFile
from utils.data.messages import (
    Fields,
    Reject,
    assistant_message,
    history_of,
    in_order,
    marked_turns,
    not_learnt,
    plain_names,
    system_message,
    text_of,
    trimmed,
    turns_of,
)
from utils.data.readers import Place, parse_row, read_rows

# Question, further context, answer: the first line of which a row has all fields. Reasoning and system text may be beside them.
QUESTION_ANSWER = (
    ("instruction", "input", "output"),
    ("instruction", None, "output"),
    ("input", None, "output"),
    ("query", None, "response"),
    ("question", "context", "answer"),
    ("question", None, "answer"),
    ("question", None, "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
    ("instruction", None, "response"),
    ("title", "ask", "answer"),
    ("ask", None, "answer"),
    ("query", None, "answer"),
    ("症状", None, "处方"),
    ("问", None, "答"),
    ("q", None, "a"),
)
ROLES = (
    "question",
    "input",
    "reasoning",
    "answer",
    "system",
    "options",
    "chosen",
    "rejected",
)  # of --columns

BESIDE_TEXT = {"id", "source", "url", "title", "meta", "metadata", "date", "timestamp", "lang", "language"}

SPLITS = {"": "", "train": "train", **dict.fromkeys(("eval", "validation", "valid", "dev", "test"), "eval")}

# Text that no tokenizer or file can carry, and the control tokens of models, which would forge a turn of the conversation.
_UNFIT = re.compile(
    "(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f])|(?P<surrogate>[\ud800-\udfff])|(?P<lost>\ufffd)"
    r"|(?P<token><[|｜][\w▁ ]{2,30}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<[be]os>|\[gMASK\])"
    r"|(?P<dialogue><(?:user|bot|human|assistant)>\s*[:：]|^\s*#{2,}\s*(?:Response|Instruction|回答|指令)\s*[:：])",
    re.MULTILINE,
)
_UNFIT_REASON = {
    "control": "control characters",
    "surrogate": "lone surrogate",
    "lost": "undecodable bytes",
    "token": "control tokens",
    "dialogue": "marks of a dialogue inside a text",
}
EVIDENCE_ROWS = 200  # of a file, by which is told whether the answers of an exam are counted from 0 or 1


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
    dict.fromkeys(name for files in OUTPUT_FILES.values() for name in (files.trained, files.held_out))
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
    unused: (
        dict  # {name of a field that holds something and was not used: its value}; of turns "messages[].name"
    )


class RowOptions(NamedTuple):
    """How rows are to be read: `columns`, pairs (role, field) for an unknown schema; `system`, the system text of rows that
    have none; `max_characters` of a row (None: any number); `explained`, whether exam items with an explanation become
    conversations with reasoning; `first_option`, the number of the first option where exam answers are numbers (None: unknown)."""

    columns: tuple = ()
    system: str = ""
    max_characters: int | None = None
    explained: bool = False
    first_option: int | None = None


PLAIN = RowOptions()


def parse_columns(text: str) -> dict[str, str]:
    """{role: field} of a setting such as "question=Content,answer=Summary"; ValueError says what is wrong with it."""
    columns = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, field = (side.strip() for side in part.partition("="))
        if not equals or not field:
            raise ValueError(f"{part!r} is not role=field; wanted e.g. question=Content,answer=Summary")
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
        columns[role] = field
    if columns and "question" not in columns or columns and not {"answer", "chosen"} & set(columns):
        raise ValueError("it has to name a question and an answer (or chosen and rejected)")
    if ("chosen" in columns) != ("rejected" in columns):
        raise ValueError("chosen and rejected go together")
    return columns


def convert_rows(
    file: InputFile, options: RowOptions = PLAIN
) -> Iterator[tuple[Place, object, dict | None, ConvertedRow | Reject]]:
    """(place, raw, row, what it makes or why it is set aside) of every row of a file; `row` is None where it is no object.

    The first EVIDENCE_ROWS are read ahead: they tell whether the answers of an exam are counted from 0 or from 1.
    """
    raws = read_rows(file)
    ahead = list(itertools.islice(raws, EVIDENCE_ROWS))
    if options.first_option is None:
        options = options._replace(first_option=_first_option([raw for _, raw in ahead], file.encoding))
    for place, raw in itertools.chain(ahead, raws):
        row = None
        try:
            row = parse_row(raw, file.encoding)
            yield place, raw, row, convert_row(row, options)
        except Reject as problem:
            problem.row = problem.row if row is None else row
            yield place, raw, row, problem


def _first_option(raws, encoding):
    """0 or 1 where an answer of these rows fits only one of the two, else None."""
    for raw in raws:
        fits = []
        for first in (0, 1):
            try:
                row = parse_row(raw, encoding)
                fields = Fields(row, _recognise(tuple(row), ())[2])
                if "options" in fields or "option A" in fields:
                    exam_item(fields, first)
                    fits.append(first)
            except Reject:
                continue
        if len(fits) == 1:
            return fits[0]
    return None


def convert_row(row: dict, options: RowOptions = PLAIN) -> ConvertedRow:
    """The ConvertedRow that a row makes; raises Reject."""
    schema, read, names = _recognise(tuple(row), options.columns)
    fields = Fields(row, names)
    read = read or _by_values(fields)
    if read is None:
        raise _unknown(fields, options)
    split = _told_split(fields)
    if fields.peek("tools") is not None:
        raise Reject("tool calls are not trained", f"field {fields.field('tools')}")
    kind, schema, body = read(fields, schema, options)
    was_trimmed = body.pop("trimmed", False)
    if kind == "exam" and options.explained and fields.peek("explanation") is not None:
        kind, schema = "sft", "exam with explanation"
        body = {"messages": as_conversation(body, text_of(fields, "explanation", "explanation"))}
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
    unused = fields.unused()
    return ConvertedRow(
        kind, schema, body, questions, rest, split, characters, reasoning, was_trimmed, unused
    )


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
    # Printable text without these holds nothing unfit: the quick answer for nearly every row.
    if (
        not text.replace("\n", "").isprintable()
        or "\ufffd" in text
        or "<" in text
        or "[" in text
        or "##" in text
    ):
        found = _UNFIT.search(text)
        if found:
            around = text[max(0, found.start() - 10) : found.start() + 20]
            raise Reject(_UNFIT_REASON[found.lastgroup], f"{found.group()!r} in {around!r}")


@functools.lru_cache(maxsize=4096)
def _recognise(fields, columns):
    """(schema name, its reader, {plain name: the row's fields}) for a row with these fields; reader None: not by its names."""
    names = dict(plain_names(fields))
    names.update({f"option {letter}": (field,) for letter, field in option_fields(fields).items()})
    given = {role: tuple(field.split("+")) for role, field in columns}
    given = {role: own for role, own in given.items() if set(own) <= set(fields)}
    if not columns or not (
        {"question", "answer"} <= set(given) or {"question", "chosen", "rejected"} <= set(given)
    ):
        return *_by_names(names), names
    if len(given.get("options", ())) > 1:
        given.update({f"option {letter}": (own,) for letter, own in zip(LETTERS, given.pop("options"))})
        names.pop("options", None)
    context = "input" if "input" in given else None
    names = {name: own for name, own in names.items() if name not in ("prompt", "label", "score")} | given
    if "option A" in given or "options" in given:
        return "--columns", _exam, names
    if "chosen" in given:
        return "--columns", _preference, names
    return "--columns", functools.partial(_question_answer, named=("question", context, "answer")), names


def _by_names(names):
    """(schema name, its reader) for a row with these plain names; ("", None) where they say nothing."""
    have = set(names)
    if {"chosen", "rejected"} <= have:
        return ("conversations" if "conversations" in have else "prompt") + "/chosen/rejected", _preference
    listed = {"options", "option A"} & have or "question_type" in have and set(ANSWERS) & have
    if listed and set(QUESTIONS) & have:
        return "exam", _exam
    for name in ("messages", "conversations"):
        if name in have:
            return name, functools.partial(_conversation, name=name)
    named = _question_answer_names(have)
    if not named:
        return "", None
    shown = [names[name][0] for name in (*named[:2], "reasoning", named[2]) if name in have]
    return "/".join(map(str, shown)), functools.partial(_question_answer, named=named)


def _question_answer_names(have):
    return next((line for line in QUESTION_ANSWER if have.issuperset(filter(None, line))), None)


def _by_values(row):
    """The reader of a row that holds one list of turns, or one text that is a dialogue, under whatever name; else None."""
    for name in row.names:
        value = row.peek(name)
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            if all({"role", "from", "speaker"} & set(turn) for turn in value):
                return functools.partial(_conversation, name=name)
        elif isinstance(value, list) and all(isinstance(turn, str) for turn in value):
            if all(marked_turns(turn, both=False) for turn in value):
                return functools.partial(_conversation, name=name)
    texts = [name for name in row.names if name not in BESIDE_TEXT and isinstance(row.peek(name), str)]
    if len(texts) == 1 and marked_turns(row.peek(texts[0])):
        return functools.partial(_conversation, name=texts[0])
    return None


def _unknown(row, options):
    """The Reject of a row that no reader knows."""
    names = {str(name).strip().lower() for name in row.row} - BESIDE_TEXT
    if names in ({"text"}, {"content"}, {"文本"}) and not options.columns:
        return Reject("plain text", "continued pre-training is not done here; wanted questions and answers")
    return Reject("fields not recognised", f"fields: {', '.join(map(str, row.row)) or 'none'}")


def _question_answer(row, schema, options, named):
    question, context, answer = named
    value = row.peek(question)
    if isinstance(value, list) and all(isinstance(turn, dict) and "type" not in turn for turn in value):
        turns = turns_of(row.get(question), question, row)  # TRL's prompt/completion in message form
        turns += turns_of(row.get(answer), answer, row)
        return _trained_or_bad(row, schema, in_order(system_message(row, turns) + turns, "assistant"))
    asked = text_of(row, question, "question", optional=bool(context))
    if context:
        more = text_of(row, context, "question", optional=True)
        asked = "\n".join(filter(None, [asked if asked not in more else "", more]))
        if not asked:
            raise Reject("missing or empty question", f"{question} and {context} are empty")
    answered = text_of(row, answer, "answer")
    letters = letters_alone(answered)
    if letters:
        stem, listed = options_in(asked if "\n" in asked else asked.replace("\\n", "\n"))
        if listed:  # Monor/hwtcm: the options stand in the question
            item = Fields({"question": stem, "options": listed, "answer": letters})
            return "exam", "exam in the question", exam_item(item) | subject_of(row)
        if list(letters) == sorted(letters):
            raise Reject("an option letter without its options", f"the answer is {answered}")
    asking = marked_turns(asked) or [{"role": "user", "content": asked}]
    messages = [*system_message(row), *history_of(row), *asking]
    messages.append(assistant_message(answered, text_of(row, "reasoning", "reasoning", optional=True)))
    return _trained_or_bad(row, schema, in_order(messages, "assistant") if len(asking) > 1 else messages)


def _conversation(row, schema, options, name):
    value = row.get(name)
    turns = turns_of([value] if isinstance(value, str) else value, name, row)
    mask = row.peek("loss_mask")
    if isinstance(mask, list):
        row.get("loss_mask")
        if len(mask) != len(value) or not all(
            learnt for learnt, turn in zip(mask[-len(turns) :], turns) if turn["role"] == "assistant"
        ):
            raise Reject("marked as not to be learnt", f"loss_mask is {mask}")
    messages = system_message(row, turns) + turns
    kept = in_order(trimmed(messages), "assistant")
    reasoning = text_of(row, "reasoning", "reasoning", optional=True)
    if reasoning and "reasoning_content" not in kept[-1]:
        kept[-1]["reasoning_content"] = reasoning
    kind, schema, body = _trained_or_bad(row, schema or name, kept)
    return kind, schema, body | {"trimmed": len(kept) < len(messages)}


def _trained_or_bad(row, schema, messages):
    """The conversation to train on; a pair where the row has a rejected answer too; or a bad answer where the row (KTO) or
    its last turn (weight 0) is marked as one."""
    answers = [message for message in messages if message["role"] == "assistant"]
    weights = [answer.pop("weight", 1) for answer in answers]
    if 0 in weights[:-1] or not_learnt(row, "the row"):
        raise Reject("marked as not to be learnt", "an answer that is not the last has weight 0")
    if row.peek("rejected") is not None:
        return _pair(row, schema, messages[:-1], messages[-1:], _answer_turns(row, "rejected"))
    if any(name.startswith("rejected") and row.peek(name) is not None for name in row.names):
        raise Reject("a rejected answer of an unknown form", "beside the answer")
    judged = [row.get(mark) for mark in ("label", "kto_tag") if _truth(row.peek(mark)) is not None]
    if weights[-1] == 0 or any(_truth(mark) is False for mark in judged):
        return "bad", f"{schema}, marked as bad", {"prompt": messages[:-1], "rejected": messages[-1:]}
    for mark in ("label", "score"):
        by_model = mark == "label" or not {"answer", "处方", "答"} & set(row.names)
        if schema != "--columns" and by_model and _is_number(row.peek(mark)):
            raise Reject(
                "a label or score beside the answer",
                f"{mark} {row.peek(mark)!r} may say that the answer is bad",
            )
    return "sft", schema, {"messages": messages}


def _truth(value):
    """True or False as JSON has it, or as a table writes it; else None: 0 is a number of something else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _is_number(value):
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*-?\d+(?:\.\d+)?\s*", value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _preference(row, schema, options):
    """TRL: prompt/chosen/rejected as text or messages, the prompt explicit or shared; LLaMA-Factory: both its forms."""
    chosen, rejected = _answer_turns(row, "chosen"), _answer_turns(row, "rejected")
    prompt = _preference_prompt(row)
    if len(chosen) > 1:  # whole conversations: what they share is the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Reject("roles out of order", "chosen and rejected differ before their last turn")
        whole = chosen[0]["role"] == "system" or len(chosen) > len(prompt)
        prompt = chosen[:-1] if whole else prompt + chosen[:-1]
        chosen, rejected = chosen[-1:], rejected[-1:]
    if not prompt:
        raise Reject("missing or empty question", "prompt")
    return _pair(row, schema, system_message(row, prompt) + history_of(row) + prompt, chosen, rejected)


def _pair(row, schema, prompt, chosen, rejected):
    if len(rejected) > 1 and rejected[:-1] != prompt:
        raise Reject("roles out of order", "chosen and rejected differ before their last turn")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Reject("roles out of order", "chosen and rejected have to end with an assistant turn")
    if chosen[-1] == rejected[-1]:
        raise Reject("chosen equals rejected", "")
    if ("reasoning_content" in chosen[-1]) != ("reasoning_content" in rejected[-1]):
        raise Reject("reasoning on one side of a pair", "")
    kind = row.get("kind") if isinstance(row.peek("kind"), str) else "given"
    sides = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
    return "dpo", schema, {"prompt": in_order(prompt, "user"), **sides, "kind": kind}


def _preference_prompt(row):
    """The turns before the two answers, as far as they have a field of their own."""
    for name in ("conversations", "messages", "prompt"):
        if name == "conversations" and name in row or isinstance(row.peek(name), list):
            return turns_of(row.get(name), name, row)
    names = ("prompt", "question", "instruction", "query", "input")
    name = next((name for name in names if row.peek(name) is not None), "prompt")
    more = text_of(row, "input", "question", optional=True) if name == "instruction" else ""
    asked = "\n".join(filter(None, [text_of(row, name, "question", optional=True), more]))
    return [{"role": "user", "content": asked}] if asked else []


def _answer_turns(row, name):
    value = row.peek(name)
    if value is None or isinstance(value, str):
        return [assistant_message(text_of(row, name, "answer"))]
    return turns_of([row.get(name)] if isinstance(value, dict) else row.get(name), name, row)


def _exam(row, schema, options):
    listed = [
        name
        for name in ("options", *(f"option {letter}" for letter in LETTERS))
        if row.peek(name) is not None
    ]
    if not listed and "判断" not in str(row.peek("question_type") or ""):
        named = _question_answer_names(set(row.names))  # a question of an exam that is no choice
        if not named:
            raise Reject("missing or empty options", "0 options")
        return _question_answer(row, "/".join(filter(None, named)), options, named)
    return "exam", schema, exam_item(row, options.first_option)
