"""Recognises a row by its field names, and turns it into one of the things this project hands on.

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

from utils.data.conversations import read_conversation, read_preference, read_question_answer
from utils.data.exams import ANSWERS, LETTERS, QUESTIONS, as_conversation, exam_item, option_fields
from utils.data.inputs import InputFile
from utils.data.messages import Fields, Reject, marked_turns, plain_names, text_of
from utils.data.readers import Place, parse_row, read_rows

# Question / further context / answer: the first of which a row has all fields. Reasoning and system text may be beside them.
QUESTION_ANSWER = (
    "instruction/input/output instruction//output input//output input//target query//response "
    "question/context/answer question//answer question//response prompt//completion prompt//response "
    "instruction/input/response instruction/context/response instruction//response "
    "title/ask/answer ask//answer query//answer 症状//处方 问//答 q//a"
).split()
# The same for rows that have reasoning: an answer of a reasoning model is often called content.
REASONED = ["input//content", "question//content", "prompt//content"]
ROLES = ("question", "input", "reasoning", "answer", "system", "options", "chosen", "rejected")  # fmt: skip

WANTED_ROLES = ({"question", "answer"}, {"question", "chosen", "rejected"})  # one of the two

BESIDE_TEXT = {"id", "source", "url", "title", "meta", "metadata", "date", "timestamp", "lang", "language"}

SPLITS = {"": "", "train": "train", **dict.fromkeys(("eval", "validation", "valid", "dev", "test"), "eval")}

# Text that no tokenizer or file can carry, and control tokens of models, which would forge a turn; a group's name is the reason.
_UNFIT = re.compile(
    "(?P<control_characters>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f])|(?P<lone_surrogate>[\ud800-\udfff])"
    r"|(?P<undecodable_bytes>\ufffd)|(?P<control_tokens><[|｜][\w▁ ]{2,30}[|｜]>|</s>|^\s*<s>|\[/?INST\]|<</?SYS>>"
    r"|</?tool_(?:call|response)s?>|<(?:start|end)_of_turn>|<(?:[be]os|eo[adhm]|pad|unk|reserved_\d+)>"
    r"|\[(?:gMASK|SEP|CLS|EOS|BOS|PAD|UNUSED_TOKEN_\d+)\])"
    r"|(?P<marks_of_a_dialogue_inside_a_text><(?:user|bot|human|assistant)>\s*[:：]"
    r"|^\s*#{2,}\s*(?:Human|Assistant|Response|Instruction|回答|指令)\s*[:：]"
    r"|^\s*\[Round \d+\]|^\s*(?:Human|Assistant)\s*[:：])",
    re.MULTILINE,
)
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
OUTPUTS = list(dict.fromkeys(name for files in OUTPUT_FILES.values() for name in files[:2]))


class ConvertedRow(NamedTuple):
    """A usable row. `body`: the fields of the output line; `questions`: the user turns; `rest`: all text after the first."""

    kind: str  # of OUTPUT_FILES
    schema: str
    body: dict  # of a bad answer: {"prompt", "rejected"}
    questions: list
    rest: str
    split: str  # "train", "eval", or "" where the row does not say
    characters: int
    trimmed: bool  # whether turns were left out at an end
    unused: dict  # {field that holds something and was not used: its value}; of turns "messages[].name"


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
    for part in filter(None, map(str.strip, text.split(","))):
        role, _, field = map(str.strip, part.partition("="))
        if not field:
            raise ValueError(f"{part!r} is not role=field; wanted e.g. question=Content,answer=Summary")
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
        columns[role] = field
    if columns and not any(wanted <= set(columns) for wanted in WANTED_ROLES):
        raise ValueError("it has to name a question and an answer (or a question, chosen and rejected)")
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
                if "options" in fields.names or "option A" in fields.names:
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
    told = fields.get("split") or ""
    split = SPLITS.get(told.strip().lower()) if isinstance(told, str) else None
    if split is None:
        raise Reject("unknown split", f"{told!r}; wanted one of {', '.join(filter(None, SPLITS))}")
    if fields.peek("tools") is not None:
        raise Reject("tool calls are not trained", f"field {fields.field('tools')}")
    kind, schema, body = read(fields, schema, options)
    was_trimmed = body.pop("trimmed", False)
    if kind == "exam" and options.explained and fields.peek("explanation") is not None:
        kind, schema = "sft", "exam with explanation"
        body = {"messages": as_conversation(body, text_of(fields, "explanation", "explanation"))}
    if kind == "exam":
        questions, others = [body["question"]], [*body["options"].values(), body["answer"]]
    else:
        prompt = body["messages" if kind == "sft" else "prompt"]
        if options.system and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": options.system})
        turns = prompt + body.get("chosen", []) + body.get("rejected", [])
        questions = [turn["content"] for turn in turns if turn["role"] == "user"]
        first = next(number for number, turn in enumerate(turns) if turn["role"] == "user")
        later = [turn for number, turn in enumerate(turns) if number != first]
        others = [text for turn in later for text in (turn.get("reasoning_content"), turn["content"]) if text]
    rest = "\n".join(others)
    for text in (questions[0], rest, body.get("subject", ""), body.get("kind", "")):
        _check_text(text)
    characters = len(questions[0]) + len(rest)
    if options.max_characters and characters > options.max_characters:
        raise Reject("too long", f"{characters:,} characters")
    made = body, questions, rest, split, characters, was_trimmed, fields.unused()
    return ConvertedRow(kind, schema, *made)


def _check_text(text):
    # Printable text without these holds nothing unfit: the quick answer for nearly every row.
    signs = ("\ufffd", "<", "[", "##", "Human", "Assistant")
    if not text.replace("\n", "").isprintable() or any(sign in text for sign in signs):
        found = _UNFIT.search(text)
        if found:
            around = text[max(0, found.start() - 10) : found.start() + 20]
            raise Reject(found.lastgroup.replace("_", " "), f"{found.group()!r} in {around!r}")


@functools.lru_cache(maxsize=4096)
def _recognise(fields, columns):
    """(schema name, its reader, {plain name: the row's fields}) for a row with these fields; reader None: not by its names."""
    names = dict(plain_names(fields))
    names.update({f"option {letter}": (field,) for letter, field in option_fields(fields).items()})
    given = {role: tuple(field.split("+")) if role == "options" else (field,) for role, field in columns}
    given = {role: own for role, own in given.items() if set(own) <= set(fields)}
    if not any(wanted <= set(given) for wanted in WANTED_ROLES):
        return *_by_names(names), names
    if len(given.get("options", ())) > 1:
        given.update({f"option {letter}": (own,) for letter, own in zip(LETTERS, given.pop("options"))})
        names.pop("options", None)
    # The user says which fields are the question and the answer: no other name counts.
    names = {name: own for name, own in names.items() if name not in (*QUESTIONS, *ANSWERS)} | given
    if "option A" in given or "options" in given:
        return "--columns", _exam, names
    if "chosen" in given:
        return "--columns", read_preference, names
    named = "question", "input" if "input" in given else "", "answer"
    return "--columns", functools.partial(read_question_answer, named=named), names


def _by_names(names):
    """(schema name, its reader) for a row with these plain names; ("", None) where they say nothing."""
    have = set(names)
    if {"chosen", "rejected"} <= have:
        first = "conversations" if "conversations" in have else "prompt"
        return f"{first}/chosen/rejected", read_preference
    listed, asked = {"options", "option A"} & have, set(QUESTIONS) & have and set(ANSWERS) & have
    if listed and (asked or "question" in have) or asked and "question_type" in have:
        return "exam", _exam
    for name in ("messages", "conversations"):
        if name in have:
            return name, functools.partial(read_conversation, name=name)
    named = _question_answer_names(have)
    if not named:
        return "", None
    shown = [names[name][0] for name in (*named[:2], "reasoning", named[2]) if name in have]
    return "/".join(map(str, shown)), functools.partial(read_question_answer, named=named)


def _question_answer_names(have):
    """[question, context or "", answer] of the first line of QUESTION_ANSWER that these names fit, or None."""
    lines = (line.split("/") for line in QUESTION_ANSWER + (REASONED if "reasoning" in have else []))
    return next((line for line in lines if have.issuperset(filter(None, line))), None)


def _by_values(row):
    """The reader of a row that holds one list of turns, or one text that is a dialogue, under whatever name; else None."""
    for name in row.names:
        value = row.peek(name)
        if isinstance(value, list) and all(map(_is_turn, value)):
            return functools.partial(read_conversation, name=name)
    texts = [name for name in row.names if name not in BESIDE_TEXT and isinstance(row.peek(name), str)]
    if len(texts) == 1 and marked_turns(row.peek(texts[0])):
        return functools.partial(read_conversation, name=texts[0])
    return None


def _is_turn(value):
    if isinstance(value, str):
        return bool(marked_turns(value, both=False))
    return isinstance(value, dict) and not {"role", "from", "speaker", "human"}.isdisjoint(value)


def _unknown(row, options):
    """The Reject of a row that no reader knows."""
    for name in row.names:
        if isinstance(row.peek(name), str):
            _check_text(row.peek(name))
    names = {str(name).strip().lower() for name in row.row} - BESIDE_TEXT
    if names in ({"text"}, {"content"}, {"文本"}) and not options.columns:
        return Reject("plain text", "continued pre-training is not done here; wanted questions and answers")
    return Reject("fields not recognised", f"fields: {', '.join(map(str, row.row)) or 'none'}")


def _exam(row, schema, options):
    listed = any(row.peek(name) is not None for name in ("options", "option A", "option B"))
    if listed or "判断" in str(row.peek("question_type") or ""):
        return "exam", schema, exam_item(row, options.first_option)
    named = _question_answer_names(set(row.names))  # a question of an exam that is no choice
    if not named:
        raise Reject("missing or empty options", "0 options")
    return read_question_answer(row, "/".join(filter(None, named)), options, named)
