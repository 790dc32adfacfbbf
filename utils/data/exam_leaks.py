"""Exam questions that are asked in training: alone, with their options, framed, or inside a longer text.

A training row leaks an exam item if what it asks contains the item's stem, normalised, and

- it lists at least LISTED of the item's options, in any order and form; or
- it lists nothing else, the stem says enough to be asked alone (no other item of the exam has it), and it is LONG_STEM
  characters or longer, or half of what is asked, or the row's answer names the right option.

The second condition leaves rows alone that list other options under the same stem ("下列药物中，性温的是"): those are other
questions. Of each stem one short piece, the rarest, is looked for in all rows at once; what has it is compared whole.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy

from utils.data.convert import Recognised
from utils.data.dedup import EXAM, Row
from utils.data.exams import options_in
from utils.data.normalize import normalize, without_filler
from utils.text import progress

PIECES = (6, 3)  # characters looked for: of stems that are long enough the first, of others the second
LONG_STEM = 10  # characters, without filler: so long a text is not part of another question by chance
LISTED = 0.75  # of the options: one of four may have been changed
ROWS = 2000  # read at a time

# What a stem ends with where the options follow.
_TRAILING = re.compile("(?:是指|是|为|有|包括|属于|哪项|哪一项|以下|下列)+$")
# Letters one after the other, or three things in a row.
_LISTS = re.compile(
    r"(?<![A-Za-z])A(?![A-Za-z]).+?(?<![A-Za-z])B(?![A-Za-z]).+?(?<![A-Za-z])C(?![A-Za-z])"
    r"|[^、，。？：\s]+(?:、[^、，。？：\s]+){2}",
    re.DOTALL,
)


class ExamItem(NamedTuple):
    """An exam item as it is compared: normalised, the stem also without filler words."""

    row: Row
    question: str  # as it is given, without the gap at its end
    text: str  # the stem as it stands, normalised
    stem: str  # its core: without filler, and without "是" and the like at its end
    options: list[str]
    right: list[str]
    alone: bool  # whether no other item has this stem


def find_exam_leaks(found: Recognised) -> Iterator[tuple[Row, Row]]:
    """(row, exam row) for every row that asks an exam question."""
    items = [_exam_item(row, found.line(row)) for row in found.rows if row.kind == EXAM]
    rights = defaultdict(set)  # {stem: all right answers to it}
    for item in items:
        rights[item.stem].add("\n".join(item.right))
    items = [item._replace(alone=len(rights[item.stem]) == 1) for item in items]
    for length in PIECES:
        fitting = [item for item in items if _piece_length(item) == length]
        if fitting:
            yield from _leaks_of(_by_piece(fitting, length), length, found)


def _exam_item(row, line):
    item = json.loads(line)
    text = normalize(item["question"])
    stem = without_filler(text)
    right = [normalize(item["options"][letter]) for letter in item["answer"]]
    question = re.sub(r"[（(][\s_]*[)）]|[\s_。？?：:]+$", "", item["question"]).rstrip()
    options = [normalize(option) for option in item["options"].values()]
    return ExamItem(row, question, text, _TRAILING.sub("", stem) or stem, options, right, True)


def _piece_length(item):
    return next((length for length in PIECES if len(_core(item)) >= length), 0)


def _core(item):
    """The stem's text, filler inside and all, without its end; where that leaves too little, the whole text."""
    core = _TRAILING.sub("", item.text)
    return core if len(core) >= PIECES[-1] else item.text


def _by_piece(items, length):
    """{piece of `length` characters: the items that are to be looked for by it}: for each the one that fewest others have."""
    pieces = [{text[at : at + length] for at in range(len(text) - length + 1)} for text in map(_core, items)]
    counts = Counter(piece for found in pieces for piece in found)
    by_piece = defaultdict(list)
    for item, found in zip(items, pieces):
        # Filler may be missing elsewhere: a piece without any is looked for first.
        rarest = min(found, key=lambda piece: (without_filler(piece) != piece, counts[piece], piece))
        by_piece[rarest].append(item)
    return by_piece


def _leaks_of(by_piece, length, found):
    wanted = numpy.sort(_hashes("".join(by_piece), length)[::length])
    asking = [row for row in found.rows if row.kind not in ("", EXAM)]
    for start in progress("looking for exam questions", f"x {ROWS:,} rows")(range(0, len(asking), ROWS)):
        rows = asking[start : start + ROWS]
        texts = [found.line(row).decode("utf-8") for row in rows]
        normalised = [normalize(text.replace("\\n", " ")) for text in texts]
        for number, piece in _where(normalised, wanted, length):
            for item in by_piece.get(piece, ()):
                if _leaks(json.loads(texts[number]), item):
                    yield rows[number], item.row


def _hashes(text, length):
    """A 32-bit hash of every piece of `length` characters of a text, uint32 array."""
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    found = numpy.zeros(max(len(codes) - length + 1, 0), dtype=numpy.uint32)
    for at in range(length):
        found = found * numpy.uint32(0x9E3779B1) + codes[at : len(codes) - length + 1 + at]
    return found


def _where(texts, wanted, length):
    """(number of the text, piece) for every piece of `texts` whose hash is in `wanted` (sorted), each once a text."""
    joined = "\0".join(texts)
    hashes = _hashes(joined, length)
    near = numpy.minimum(numpy.searchsorted(wanted, hashes), len(wanted) - 1)
    found = numpy.flatnonzero(wanted[near] == hashes)
    ends = numpy.cumsum([len(text) + 1 for text in texts])
    numbers = numpy.searchsorted(ends, found, side="right")
    return sorted({(int(number), joined[at : at + length]) for number, at in zip(numbers, found)})


def _leaks(row, item):
    """Whether a training row (a line of output) asks an exam item."""
    turns = row.get("messages") or row["prompt"]
    asked = "\n".join(turn["content"] for turn in turns if turn["role"] != "assistant")
    whole = normalize(asked)
    text = without_filler(whole)
    if item.stem not in text:
        return False
    listed = sum(option in whole.replace(item.text, "", 1) for option in item.options)
    if listed >= LISTED * len(item.options):
        return True
    if not item.alone or options_in(asked)[1] or _LISTS.search(asked.replace(item.question, "")):
        return False
    answers = [turn for turn in turns if turn["role"] == "assistant"] + row.get("chosen", [])
    answered = normalize("\n".join(turn["content"] for turn in answers))
    named = all(option in answered for option in item.right)
    return len(item.stem) >= LONG_STEM or 2 * len(item.stem) >= len(text) or named
