"""The stages of the conversion: recognise every row, and once each row's fate is known, write its line where it belongs.

Texts are compared by their letters and digits; traditional characters count as simplified ones by OpenCC's table.
"""

import functools
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from utils.data.inputs import InputFile
from utils.data.messages import Reject
from utils.data.schemas import convert_rows
from utils.device import memory_for_process
from utils.errors import UserError
from utils.files import atomic_write
from utils.text import bar, format_bytes

TRAIN, EVAL, EXAM = "train", "eval", "exam"  # the splits

LONG = 40  # characters without filler: as long as a case description, too long for a name in a template
LONG_ANSWER = 20  # characters: two rows do not share such an answer by chance
SHORTEST_LATER_TURN = 8  # characters: later turns such as "请继续" are no question of their own
BYTES_A_ROW = 1000  # of memory
FORECAST_ROWS = 50_000  # rows after which the memory is forecast
COURTESY_LEFT = 0.15  # of a turn's characters, beside words of courtesy

_COMMON_MARKS = "，。、？；：（）！“”\n "  # signs of nearly every Chinese text
_NOISE = re.compile(r"(?<!\d)(?:[^\w<>=+%±≤≥]|_)+|(?:[^\w<>=+%±≤≥]|_)+(?!\d)")
_FILLER = re.compile(
    "请问|您好|你好|谢谢|是什么|有哪些|是哪些|有什么|什么是|分别|一下|医生|大夫|怎么办|[请吗呢呀啊的了]"
)
# Greetings, thanks and good wishes; words that go with them; and words that make a question of their own beside them.
_COURTESY = re.compile(
    "你好|您好|大家好|hello|hi(?![a-z])|哈喽|早上好|上午好|中午好|下午好|晚上好|早安|晚安|在吗|在不在|在线吗|有人吗|打扰|麻烦|辛苦(?=[了您你医])"
    "|感谢|谢谢|谢了|多谢|不用谢|不谢|不客气|不用客气|没关系|没事|不用担心|明白|知道了|了解|清楚了|收到|好的|再见|拜拜|请教|咨询"
    "|早日康复|恢复健康|身体健康|健康|平安|顺利|愉快|thankyou|thanks|bye"
)
_BESIDE_COURTESY = re.compile(
    "医生|大夫|医师|老师|专家|主任|先生|女士|朋友|非常|十分|太|真的|真是|祝愿?|希望|如果?有|有|问题|疑问|疑惑|需要|随时|联系|告诉|告知"
    "|找我|问我|欢迎|可以|一定|注意|解答|回答|回复|帮助|建议|耐心|指导|支持|信任|配合|按时|其他|别的|任何|早日|恢复|身体|生活|您|你|我们?"
    "|一下|想问|请问|问|个|些|会|请|祝|再|那|就|也|都|很|的|了|吧|啊|哦|嗯|呀|哈|呢|好|去|来|给|这|为|对|向|是|应该|知道|想|再次|一些|还|其"
)
ASKS = re.compile("什么|怎|如何|哪|多少|为何|是否|能不能|可不可以|几|吗$|呢$")


# ---- Texts as they are compared


def normalize(text: str) -> str:
    """The letters and digits of a text, NFKC and case-folded. A sign between two digits stays (1.5 is not 15)."""
    letters = text
    for mark in _COMMON_MARKS:
        letters = letters.replace(mark, "")
    if letters.isalpha():  # NFKC is quick if nothing has to change; signs count between digits only
        text = letters
    text = unicodedata.normalize("NFKC", text).casefold().translate(_simplified())
    return text if text.isalnum() else _NOISE.sub("", text)


@functools.cache
def _simplified():
    """{code of a traditional character: the simplified one}."""
    package = importlib.util.find_spec("opencc").submodule_search_locations[0]
    lines = (Path(package) / "dictionary" / "TSCharacters.txt").read_text(encoding="utf-8-sig").splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line)
    return {ord(old): simplified.split()[0] for old, simplified in pairs if len(old) == 1}


def without_filler(normalised: str) -> str:
    """A normalised question without the words that do not change what is asked (itself, if nothing else would be left)."""
    return _FILLER.sub("", normalised) or normalised


def is_courtesy(text: str) -> bool:
    """True if a turn of a dialogue is nothing but a greeting, thanks or good wishes."""
    text = normalize(text)
    left = _COURTESY.sub("", text)
    if len(left) == len(text) or ASKS.search(left):
        return False
    return len(_BESIDE_COURTESY.sub("", left)) <= COURTESY_LEFT * len(text)


def text_key(text: str) -> int:
    """A 64-bit key of a text, the same in every run. A million texts share one by chance with probability 3e-8."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# ---- The first pass


@dataclass(slots=True, eq=False)
class Row:
    """One row of the input as it is compared with the others: numbers only, its text waits in a file."""

    file: int  # number of its source
    line: int | str  # as Place in readers.py
    at: int  # where its output line begins in the file of texts
    size: int  # bytes of that line; of a row that cannot be used, of the detail of its reason
    original: int = 0  # bytes of the row as it was given, which follows
    kind: str = ""  # "sft", "dpo" or "exam"; "" if the row cannot be used
    told: str = ""  # the split that the row says it belongs to, or ""
    content: int = 0  # text_key of the whole row, from which its id is written
    questions: tuple[int, ...] = ()  # text_key of each, normalised; what the row is about comes first
    rest: int = 0  # text_key of all text after the first question, normalised
    long_rest: bool = False  # True if that is too long to be shared by chance
    characters: int = 0
    reasoning: bool = False
    split: str = ""  # TRAIN, EVAL or EXAM, as decided
    reason: str = ""  # why the row is set aside, or ""
    of: "Row | None" = None  # the row that it repeats or leaks

    def set_aside(self, reason: str, of: "Row | None") -> None:
        """Note why the row is not kept."""
        self.reason, self.of = reason, of


class Recognised:
    """All rows after the first pass: numbers in memory, their texts in a temporary file in `folder`."""

    def __init__(self, folder: Path):
        self.rows: list[Row] = []
        self.texts = tempfile.TemporaryFile(dir=folder)
        self.long_questions: dict[int, tuple[int, int]] = {}  # {text_key: where its text begins, its bytes}
        self.schemas: Counter[str] = Counter()  # {schema: rows}
        self.used: dict[str, dict[str, None]] = {}  # {schema: the fields that were used, in order}
        self.unused: dict[str, dict[str, list]] = {}  # {schema: {field not used: [rows, its first value]}}

    def write(self, text: bytes) -> int:
        """Write a text to the end of the temporary file; where it begins there."""
        self.texts.write(text)
        return self.texts.tell() - len(text)

    def read(self, at: int, size: int) -> bytes:
        """The text that begins at a place in the temporary file."""
        self.texts.seek(at)
        return self.texts.read(size)

    def line(self, row: Row) -> bytes:
        """The line of output that a row makes; of a row that cannot be used, the detail of its reason."""
        return self.read(row.at, row.size)

    def given(self, row: Row) -> object:
        """The row as it was read."""
        return json.loads(self.read(row.at + row.size, row.original))

    def long_question(self, key: int) -> str:
        """The text of a long question, as it is compared."""
        return self.read(*self.long_questions[key]).decode("utf-8", "surrogatepass")


def recognise(files: list[InputFile], options: dict, folder: Path) -> Recognised:
    """Read and recognise every row; UserError if they would not fit into the memory. `options`: of convert_row."""
    size, given = sum(file.size for file in files), 0
    found = Recognised(folder)
    with bar(desc="rows recognised", total=size, unit="B", unit_scale=True) as meter:
        for number, file in enumerate(files):
            for place, row, item in convert_rows(file, **options):
                if isinstance(item, Reject):
                    detail, original = _encoded(item.detail), _encoded(item.row)
                    row = Row(number, place, found.write(detail + original), len(detail), len(original))
                    row.reason = sys.intern(item.reason)
                    found.rows.append(row)
                else:
                    _add_row(found, number, file, place, row, item)
                # About: the same rows take more or less as tables and arrays than as JSON lines.
                given = min(given + found.rows[-1].original, size - 1)
                if len(found.rows) == FORECAST_ROWS:
                    _refuse_too_many(FORECAST_ROWS * size / given)
                if len(found.rows) % 1000 == 0:
                    meter.update(given - meter.n)
        meter.update(size - meter.n)
    return found


def _refuse_too_many(rows):
    needed, free = BYTES_A_ROW * rows, memory_for_process()
    if needed > free:
        raise UserError(
            f"about {rows:,.0f} rows are to be compared, which takes {format_bytes(needed)} of memory, and {format_bytes(free)} "
            "are free: convert the files in parts, each to its own --output-dir"
        )


def _add_row(found, number, file, place, row, item):
    key = text_key("\x1f".join([item.kind, *item.questions, "\x1e", item.rest]))
    fields = {"id": f"{key:016x}", **item.body, "source": f"{file.name}:{place}"}
    text, original = _encoded(fields) + b"\n", _encoded(row)
    rest = normalize(item.rest)
    mine = Row(number, place, found.write(text + original), len(text), len(original))
    mine.kind, mine.told, mine.content = sys.intern(item.kind), item.split or file.split, key
    mine.rest, mine.long_rest = text_key(rest), len(rest) >= LONG_ANSWER
    mine.characters = len(item.questions[0]) + len(item.rest)
    mine.questions = tuple(_question_keys(found, item.questions))
    found.rows.append(mine)
    found.schemas[item.schema] += 1
    used = dict.fromkeys(str(name) for name in row if name not in item.unused)
    found.used.setdefault(item.schema, {}).update(used)
    unused = found.unused.setdefault(item.schema, {})
    for name, value in item.unused.items():
        unused.setdefault(name, [0, value])[0] += 1
    if item.kind == "sft":  # the last turn decides what the row teaches
        mine.reasoning = "reasoning_content" in item.body["messages"][-1]


def _question_keys(found, questions):
    """The keys of a row's questions as they are compared, without greetings and thanks; the long ones are kept as texts."""
    if len(questions) > 1:
        questions = [question for question in questions if not is_courtesy(question)] or questions[:1]
    for turn, question in enumerate(questions):
        text = without_filler(normalize(question))
        if turn and len(text) < SHORTEST_LATER_TURN:
            continue
        key = text_key(text)
        if len(text) >= LONG and key not in found.long_questions:
            written = text.encode("utf-8", "surrogatepass")
            found.long_questions[key] = found.write(written), len(written)
        yield key


def _encoded(value):
    """JSON in one line, as UTF-8; what UTF-8 cannot hold (lone surrogates) makes it all \\u escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str).encode()


# ---- Once each row's fate is known


def write_outputs(found: Recognised, files: list[InputFile], folder: Path) -> Counter:
    """Write every line to its file, and what is set aside to the ledger. {output file: its rows}.

    An evaluation file of an earlier run that the new training file does not belong to is removed.
    """
    outputs: Counter[str] = Counter()
    with ExitStack() as stack:
        opened = {"set_aside": stack.enter_context(atomic_write(folder / "set_aside.jsonl", "wb"))}
        for row in found.rows:
            if row.reason:
                detail = json.loads(found.line(row)) if not row.kind else ""
                detail = f"of {files[row.of.file].name}:{row.of.line}" if row.of else detail
                entry = {"file": files[row.file].name, "line": row.line, "reason": row.reason}
                entry |= {"detail": detail, "row": found.given(row)}
                opened["set_aside"].write(_encoded(entry) + b"\n")
                continue
            name = EXAM if row.split == EXAM else f"{row.kind}_{row.split}"
            if name not in opened:
                opened[name] = stack.enter_context(atomic_write(folder / f"{name}.jsonl", "wb"))
            opened[name].write(found.line(row))
            outputs[name] += 1
    for kind in ("sft", "dpo"):
        if outputs[f"{kind}_{TRAIN}"] and not outputs[f"{kind}_{EVAL}"]:
            (folder / f"{kind}_{EVAL}.jsonl").unlink(missing_ok=True)
    return outputs
