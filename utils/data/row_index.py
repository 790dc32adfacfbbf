"""What the conversion keeps of every row in memory while the texts wait on disk: keys, signatures, numbers."""

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy

from utils.data.minhash import signatures
from utils.data.normalize import normalize_all, without_filler
from utils.data.schemas import OUTPUT_FILES, ConvertedRow
from utils.data.text_store import TextStore

LONG = 40  # characters without filler: as long as a case description, too long for a name in a template
LONG_ANSWER = 20  # characters: two rows do not share such an answer by chance
SHORTEST_LATER_TURN = 8  # characters: later turns such as "请继续" are no question of their own

KIND = {kind: number for number, kind in enumerate(["", *OUTPUT_FILES])}  # 0: a row that cannot be used
TRAIN, EVAL, EXAM = 1, 2, 3  # the splits
TOLD = {"": 0, "train": TRAIN, "eval": EVAL}  # what a row says of its own split

ROW = numpy.dtype(
    [
        ("kind", "u1"),  # as in KIND
        ("told", "u1"),  # as in TOLD
        ("content", "u8"),  # key of the whole row, as given
        ("prompt", "u8"),  # key of all messages before the last answer, as given
        ("rest", "u8"),  # key of all text after the question, normalised
        ("long_rest", "?"),
        ("file", "i4"),
        ("line", "i8"),
        ("characters", "i4"),
        ("reasoning", "?"),
    ]
)
QUESTION = numpy.dtype(
    [
        ("row", "i8"),
        ("first", "?"),  # of its row
        ("key", "u8"),
        ("mark", "i8"),  # which signature and long text is its; -1: it is short and has none
    ]
)


class IndexedBatch(NamedTuple):
    """`rows`: ROW array; `questions`: QUESTION array, counting from this batch; `marks`: signatures of `long_texts`."""

    rows: numpy.ndarray
    questions: numpy.ndarray
    marks: numpy.ndarray
    long_texts: list


def text_key(text: str) -> int:
    """A 64-bit key of a text, the same in every run. A million texts share one by chance with probability 3e-8."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def content_key(item: ConvertedRow) -> int:
    """The 64-bit key that a row's id is written from: the same wherever, and in whatever schema, the row comes from."""
    return text_key("\x1f".join([item.kind, *item.questions, "\x1e", item.rest]))


def _prompt_key(item):
    """What an answer that is marked as bad, and the good one that it is paired with, answer; 0 of anything else."""
    if item.kind not in ("sft", "bad"):
        return 0
    messages = item.body["messages"][:-1] if item.kind == "sft" else item.body["prompt"]
    return text_key("\x1f".join(message["content"] for message in messages))


def index_rows(rows: list[tuple[int, int, ConvertedRow | None]]) -> IndexedBatch:
    """The index of a batch of (line, content_key, ConvertedRow, or None where the row cannot be used)."""
    items = [item for _, _, item in rows if item]
    rests = iter(normalize_all([item.rest for item in items]))
    asked = iter(normalize_all([question for item in items for question in item.questions]))
    found, questions, long_texts = [], [], []
    for index, (line, key, item) in enumerate(rows):
        if item is None:
            found.append((0, 0, 0, 0, 0, False, 0, line, 0, False))
            continue
        rest = next(rests)
        keys = key, _prompt_key(item), text_key(rest), len(rest) >= LONG_ANSWER
        found.append((KIND[item.kind], TOLD[item.split], *keys, 0, line, item.characters, item.reasoning))
        for turn, question in enumerate(itertools.islice(asked, len(item.questions))):
            text = without_filler(question)
            if turn and len(text) < SHORTEST_LATER_TURN:
                continue
            questions.append((index, turn == 0, text_key(text), len(long_texts) if len(text) >= LONG else -1))
            if len(text) >= LONG:
                long_texts.append(text)
    arrays = numpy.array(found, dtype=ROW), numpy.array(questions, dtype=QUESTION)
    return IndexedBatch(*arrays, signatures(long_texts), long_texts)


class RowIndex:
    """The index of all rows: `rows`, `questions` and `marks` as in IndexedBatch, once `finish` has been called."""

    def __init__(self, folder: Path):
        self.long_texts = TextStore(folder)
        self.parts, self.count, self.marked = [], 0, 0

    def add(self, file: int, batch: IndexedBatch) -> None:
        """Take in a batch of the file number `file`."""
        batch.rows["file"] = file
        batch.questions["row"] += self.count
        batch.questions["mark"][batch.questions["mark"] >= 0] += self.marked
        texts = [text.encode("utf-8", "surrogatepass") for text in batch.long_texts]
        self.long_texts.add(b"".join(texts), map(len, texts))
        self.parts.append(batch[:3])
        self.count += len(batch.rows)
        self.marked += len(batch.marks)

    def finish(self) -> None:
        """Turn the batches into three arrays."""
        self.add(0, index_rows([]))  # so that no input at all is no special case
        self.rows, self.questions, self.marks = (numpy.concatenate(parts) for parts in zip(*self.parts))
        self.parts = None

    def long_text(self, mark: int) -> str:
        """The text whose signature is `marks[mark]`."""
        return self.long_texts.read(mark).decode("utf-8", "surrogatepass")
