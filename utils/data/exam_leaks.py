"""Exam questions that are asked in training: alone, with their options, framed, or inside a longer text.

A training row leaks an exam item in two cases:

- It holds at least LISTED of its options, in any order, and its stem, of which a few characters may have been changed or the end
  cut. A stem that differs in a number, a negation or an opposite (虚 and 实) is another one.
- It asks the stem and lists no options, no other item of the exam has that stem, and the stem says enough to be asked alone: it is
  LONG_STEM characters or longer, or all that is asked, or the row's answer names the right option.

Rows that list other options under the same stem ("下列药物中，性温的是") ask other questions. Of each stem a few short pieces, the
rarest, are looked for in all rows; a row that has one is compared whole.
"""

import functools
import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from utils.data.convert import EXAM, Recognised, Row, normalize, without_filler
from utils.data.dedup import SHINGLE, differ_in_fact, shingles
from utils.data.exams import options_in
from utils.text import progress

PIECES = 4  # looked for of each stem, apart from one another, so that a changed character leaves one whole
LONG_STEM = 10  # characters, without filler: so long a text is not part of another question by chance
LONG_RIGHT = 4  # characters: so long an option is not named by chance
LISTED = 0.75  # of the options: one of four may have been changed
EDIT = 8  # characters of a stem for each that may have been changed
LEFT = 2 / 3  # of a stem that was cut before its end

_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
# What ends a stem if the options follow.
_TRAILING = re.compile("(?:是指|是|为|有|包括|属于|哪项|哪一项|以下|下列)+$")
# Words that may stand around a stem without asking something else.
_FRAME = re.compile(
    "中医药?|考试|选择|单选|多选|单项|题目?|问题?|回答|答案?|解释|什么|哪[一个项些味]*|何谓|[是指为即何叫个项第一二三]"
)
_NEGATION = "[不非未没]"
_OPTIONS = re.compile("$|\n|[a-j]")
_LETTER = re.compile("(?:本题|正确|答案|应|该|选|是|为)*([a-j])(?![a-z])")
# Letters one after the other, or three things in a row.
_LISTS = re.compile(
    r"(?<![A-Za-z])A(?![A-Za-z]).+?(?<![A-Za-z])B(?![A-Za-z]).+?(?<![A-Za-z])C(?![A-Za-z])"
    r"|[^、，。？：\s]+(?:、[^、，。？：\s]+){2}",
    re.DOTALL,
)


class ExamItem:
    """An exam item as it is compared: normalised, without filler words."""

    def __init__(self, row: Row, line: bytes):
        item = json.loads(line)
        asked = untagged(item["question"])
        options = {letter: plain(option) for letter, option in item["options"].items()}
        self.row, self.alone = row, True  # False if another item has this stem
        self.question = re.sub(r"[（(][\s_]*[)）]|[\s_。？?：:]+$", "", asked).rstrip()  # without the gap
        self.core = plain(asked)  # whose pieces are looked for
        self.stem = _TRAILING.sub("", self.core) or self.core
        self.options, self.right = set(options.values()), [options[letter] for letter in item["answer"]]

    def listed_in(self, text: str) -> bool:
        """True if most options of the item stand in a text."""
        return sum(option in text for option in self.options) >= LISTED * len(self.options)


class RowText:
    """What a training row asks and answers, as it is compared."""

    def __init__(self, line: bytes):
        row = json.loads(line)
        turns = row.get("messages") or row["prompt"]
        answers = [turn for turn in turns if turn["role"] == "assistant"] + row.get("chosen", [])
        self.turns = [untagged(turn["content"]) for turn in turns if turn["role"] != "assistant"]
        self.asked = "\n".join(self.turns)
        self.answer = plain("\n".join(turn["content"] for turn in answers + row.get("rejected", [])))
        self.plain = f"{plain(self.asked)}\n{self.answer}"

    @functools.cached_property
    def options(self) -> dict[str, str]:
        """{letter: option} of the options that the question lists by letters."""
        return {letter: plain(option) for letter, option in options_in(self.asked)[1].items()}

    def answer_of(self, item: ExamItem) -> str:
        """ "right" or "wrong": which options of the item the row's answer names; "" if none."""
        letter = _LETTER.match(self.answer)
        answer = self.options.get(letter[1].upper(), self.answer) if letter else self.answer
        if all(option in answer for option in item.right):
            return "right"
        return "wrong" if any(option in answer for option in item.options) else ""


def untagged(text: str) -> str:
    """A text without the tags and entities of HTML."""
    return html.unescape(_TAG.sub("", text)) if "<" in text or "&" in text else text


def plain(text: str) -> str:
    """A text as it is compared."""
    return without_filler(normalize(untagged(text)))


def find_exam_leaks(found: Recognised) -> Iterator[tuple[Row, Row]]:
    """(row, exam row) for every row that asks an exam question; of several the first."""
    items = [ExamItem(row, found.line(row)) for row in found.rows if row.kind == EXAM]
    rights = Counter(stem for stem, _ in {(item.stem, "\n".join(item.right)) for item in items})
    for item in items:
        item.alone = rights[item.stem] == 1
    by_piece = _by_piece(items)
    asking = [row for row in found.rows if row.kind not in ("", EXAM)] if items else []
    for row in progress("looking for exam questions", "rows")(asking):
        text = RowText(found.line(row))
        numbers = {number for piece in by_piece.keys() & shingles(text.plain) for number in by_piece[piece]}
        leaked = next((items[number] for number in sorted(numbers) if _leaks(text, items[number])), None)
        if leaked:
            yield row, leaked.row


def _by_piece(items):
    """{piece: numbers of the items that are looked for by it}. Of each stem up to PIECES pieces, the rarest first."""
    counts = Counter(piece for item in items for piece in shingles(item.core))
    by_piece = defaultdict(list)
    for number, item in enumerate(items):
        taken: list[int] = []
        for piece in sorted(shingles(item.core), key=lambda piece: (counts[piece], piece)):
            at = item.core.find(piece)
            if len(taken) < PIECES and all(abs(other - at) >= SHINGLE for other in taken):
                taken.append(at)
                by_piece[piece].append(number)
    return by_piece


def _leaks(row, item):
    """True if a training row asks an exam item."""
    if item.listed_in(row.plain):
        return _is_similar(row, item)
    holds = re.compile(f"{re.escape(item.stem)}(?!{_NEGATION})").search
    asked = next(filter(holds, map(plain, row.turns)), "")
    if not asked or not item.alone or row.options or _LISTS.search(row.asked.replace(item.question, "")):
        return False
    if len(item.stem) >= LONG_STEM or not _FRAME.sub("", asked.replace(item.stem, "", 1)):
        return True
    long = 3 * len(item.stem) >= 2 * len(asked) or all(len(option) >= LONG_RIGHT for option in item.right)
    return long and row.answer_of(item) == "right"


def _is_similar(row, item):
    """True if a row holds the item's stem with a few changed characters, or cut before its end, beside its options."""
    text, stem, answer = row.plain, item.stem, row.answer_of(item)
    same = answer == "right" and all(option in text for option in item.options)
    changed = 0 if answer == "wrong" else max(len(stem) // EDIT, same)
    for length, start, stop, edits in _alignments(stem, text):
        if differ_in_fact(stem[:length], text[start:stop]) or re.match(_NEGATION, text[stop:]):
            continue
        if length == len(stem):
            if edits <= changed:
                return item.listed_in(text[:start] + "\n" + text[stop:])
        # A stem that was cut ends where the options begin.
        elif edits == 0 and (_OPTIONS.match(text, stop) or text.startswith(tuple(item.options), stop)):
            return True
    return False


def _alignments(stem, text):
    """(characters of the stem, start, stop, edits): where in the text the stem, or its beginning, stands most nearly.

    Edit distance of a pattern to any part of a text (Sellers 1980), for the whole stem and all its cuts down to LEFT.
    """
    row = [(0, at) for at in range(len(text) + 1)]  # (edits, start) of the part that ends at each place
    for length, character in enumerate(stem, 1):
        before, row = row, [(length, 0)]
        for at, other in enumerate(text):
            changed = before[at][0] + (other != character), before[at][1]
            missing, added = (before[at + 1][0] + 1, before[at + 1][1]), (row[at][0] + 1, row[at][1])
            row.append(min(changed, missing, added))
        if length >= LEFT * len(stem):
            edits, start, stop = min((edits, start, stop) for stop, (edits, start) in enumerate(row))
            yield length, start, stop, edits
