"""Which rows ask the same question, and what becomes of each row: its split, and whether it is a duplicate or a leak.

Questions are the same if their normalised texts without filler words are equal. Two long ones are also the same if their
3-character shingles overlap by `threshold` (Jaccard) and they have the same long answer: questions of a template ("麻黄的性味是什么？",
"桂枝的性味是什么？") overlap as much, but ask something else. Other numbers, negations or opposites (左 and 右) make another question:
two patients' records are alike in all else. Questions that are not the same may still have to go to one split: a few that differ in
a word (a family), and those about one text (a passage). Long questions that may overlap are found by MinHash signatures, compared
in bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3), then exactly.
"""

import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable

import numpy

from utils.data.convert import EVAL, EXAM, LONG, TRAIN, Recognised, Row, text_key
from utils.text import progress

SHINGLE = 3  # characters
HASHES = 32  # in 8 bands of 4: of pairs that overlap by 0.85, 0.3 % share no band
NEIGHBOURS = 4  # rows of one bucket compared with each row, so that a large bucket costs linear time
TEXTS = 1000  # whose signatures are made together, or whose pieces are kept

FAMILY = 5  # questions: more than this that differ in a word are a template, and may go to two splits
PASSAGE = 0.6  # of the shingles of the shorter question: two that share so many are about one passage
PASSAGE_TRIES = 4  # failed comparisons, after which a question is compared no more
# Pieces in more than both a number and a share of the long questions are of an instruction and no passage.
INSTRUCTION = ((4, 0.25), (100, 0.1))
COUNTED = 2000  # long questions, whose pieces are counted for that
# More dialogues than both open with the same question: they are told apart by what they ask next.
OPENER = (5, 0.1)

LEAST_HELD_OUT, SMALL_SHARE = 20, 0.2  # rows, or that share of a small set, are held out at least
LARGEST_GROUP = 1 / 3  # of the rows, which a group may have that is held out because all are too large

_NUMBERS = re.compile(r"\d+(?:[.,:/%-]\d+)*|[零〇一二三四五六七八九十百千万两半]+")
_DECIDING = re.compile("[无不未非否没伴有男女左右上下升降增减高低轻重阴阳寒热虚实浮沉迟数滑涩弦细]")

_FACTORS = numpy.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35], dtype=numpy.uint32)
_random = random.Random(0)
_XOR = numpy.array([_random.getrandbits(32) for _ in range(HASHES)], dtype=numpy.uint32)
_ODD = numpy.array([_random.getrandbits(32) | 1 for _ in range(HASHES)], dtype=numpy.uint32)


# ---- The fate of each row


def decide(
    found: Recognised, exam_leaks: Iterable[tuple[Row, Row]], threshold: float, **shares: float
) -> None:
    """Give every row its split, and set duplicates and leaks aside, whatever the order of the rows (of equal ones the first is kept).

    `exam_leaks`: (row, exam row) for every row that asks an exam question. `shares`: as in assign_splits.
    """
    rows, (least, share) = found.rows, OPENER
    opened = Counter(row.questions[0] for row in rows if len(row.questions) > 1)
    for row in rows:  # a dialogue that many others open alike ("我想请您看看") counts by its next question
        if len(row.questions) > 1 and opened[row.questions[0]] > max(least, share * len(rows)):
            row.questions = row.questions[1:] + row.questions[:1]
    same, family = group_questions(found, threshold)
    assign_splits(rows, join_passages(found, family), **shares)
    _set_leaks_aside(rows, family, EVAL, "evaluation leak")
    for row, exam_row in exam_leaks:
        if row.split == TRAIN or row.split == EVAL and not row.told:
            row.set_aside("exam leak", exam_row)
    _set_leaks_aside(rows, family, EXAM, "exam leak")

    usable = [row for row in rows if row.kind and not row.reason]
    usable.sort(key=lambda row: row.content)
    usable.sort(key=lambda row: -row.characters)  # the longest is kept: it has the punctuation
    kept: dict[tuple, Row] = {}
    for row in usable:
        question = same.get(row.questions[0], row.questions[0])
        if (other := kept.setdefault((row.kind, row.split, question, row.rest), row)) is not row:
            row.set_aside("exact duplicate" if row.content == other.content else "near-duplicate", other)


def _set_leaks_aside(rows, family, held_out, reason):
    """Set aside the training rows that ask, in any turn, what a row of the split `held_out` asks first."""
    asked: dict[int, Row] = {}
    for row in rows:
        if row.split == held_out:
            asked.setdefault(family.get(row.questions[0], row.questions[0]), row)
    for row in rows if asked else ():
        for question in row.questions if row.split == TRAIN else ():
            if leaked := asked.get(family.get(question, question)):
                row.set_aside(reason, leaked)


def assign_splits(
    rows: list[Row], together: dict[int, int], eval_share: float, max_eval_rows: int, seed: int
) -> None:
    """Give every usable row its split: TRAIN, EVAL or EXAM. A group of questions (`together`) goes to one split whole.

    Rows that say their split keep it; the others of their group follow, to EVAL if it has both. Of the groups that are left
    `eval_share` of the rows of each kind is held out, `max_eval_rows` at most.
    """

    def group_of(row):
        return together.get(row.questions[0], row.questions[0])

    dealt = [row for row in rows if row.kind and row.kind != EXAM]
    told = {group_of(row): row.told for split in (TRAIN, EVAL) for row in dealt if row.told == split}
    for row in rows:
        if row.kind:
            row.split = EXAM if row.kind == EXAM else row.told or told.get(group_of(row), "")
    for kind in ("sft", "dpo"):
        mine = [row for row in dealt if row.kind == kind]
        free = {row.content: row for row in mine if not row.told}.values()  # each distinct row once
        held_out = sum(row.told == EVAL for row in mine)
        count = len(free) + held_out
        # A small set holds out more, unless some of its rows say that they are held out.
        least = 1 if held_out else max(min(LEAST_HELD_OUT, round(SMALL_SHARE * count)), 1)
        wanted = min(max_eval_rows, max(round(eval_share * count), least)) if eval_share else 0
        wanted -= held_out + sum(row.split == EVAL for row in free)
        chosen = _drawn(Counter(group_of(row) for row in free if not row.split), wanted, seed)
        groups = {group_of(row) for row in free}
        for row in dealt:
            if not row.split and group_of(row) in groups:
                row.split = EVAL if group_of(row) in chosen else TRAIN


def _drawn(sizes, wanted, seed):
    """Groups drawn at random to hold `wanted` rows; if all are larger, the smallest, unless it is most of the rows."""
    chosen = set()
    for group in sorted(sizes, key=lambda group: text_key(f"{seed} {group}")):
        if wanted > 0 and sizes[group] <= max(wanted, 3) and len(sizes) > 1:
            chosen.add(group)
            wanted -= sizes[group]
    smallest = min(sizes, key=lambda group: (sizes[group], group), default=None)
    if wanted > 0 and not chosen and sizes[smallest] <= LARGEST_GROUP * sizes.total():
        chosen.add(smallest)
    return chosen


# ---- Long questions that are alike


def group_questions(found: Recognised, threshold: float) -> tuple[dict[int, int], dict[int, int]]:
    """(same, family): groups of the long questions, {key: key that names its group} for those that are not alone in theirs.

    `same`: one question; `family`: they differ in a word at most.
    """
    keys, text_of = sorted(found.long_questions), found.long_question
    pieces = functools.lru_cache(maxsize=TEXTS)(lambda key: shingles(text_of(key)))
    pairs = candidate_pairs(signatures(map(text_of, keys)), threshold)
    close = {keys[number] for number in numpy.unique(numpy.divmod(pairs, max(len(keys), 1))).tolist()}
    answers: dict[int, set[int]] = {}  # {question: keys of its long answers}
    for row in found.rows:
        for question in close.intersection(row.questions) if row.long_rest else ():
            answers.setdefault(question, set()).add(row.rest)

    same, family = Joined(), Joined()
    for one, other in _each(pairs, keys, "comparing long questions"):
        answered_alike = answers.get(one, set()) & answers.get(other, set())
        if family.group(one) == family.group(other) and not answered_alike:
            continue  # nothing would change: a template of many rows is done soon
        if overlap(pieces(one), pieces(other)) >= threshold:
            family.join(one, other)
            if answered_alike and not differ_in_fact(text_of(one), text_of(other)):
                same.join(one, other)
    same_of, family_of = same.groups(), family.groups()
    members = Counter(group for key, group in family_of.items() if same_of.get(key, key) == key)
    small = {key: group for key, group in family_of.items() if members[group] <= FAMILY}
    return same_of, same_of | small


def join_passages(found: Recognised, family: dict[int, int]) -> dict[int, int]:
    """{question: group} of questions that go to one split: families, those joined that share a passage. Instructions do not count."""
    keys, text_of = sorted(found.long_questions), found.long_question
    counted = keys[:: len(keys) // COUNTED + 1]
    counts = Counter(piece for key in counted for piece in shingles(text_of(key)))
    limit = min(max(least, share * len(keys)) for least, share in INSTRUCTION)
    instruction = {piece for piece, count in counts.items() if count * len(keys) > limit * len(counted)}

    @functools.lru_cache(maxsize=COUNTED)
    def own_text(key):
        text, own, end = text_of(key), [], 0
        for at, sign in enumerate(text):
            end = at + SHINGLE if text[at : at + SHINGLE] in instruction else end
            own += [sign] if at >= end else []
        return "".join(own)

    compared = own_text if instruction else text_of
    keys = [key for key in keys if len(compared(key)) >= LONG]
    joined, failed = Joined(), Counter()
    pairs = candidate_pairs(signatures(map(compared, keys)), PASSAGE, band=2, neighbours=1)
    for one, other in _each(pairs, keys, "looking for shared passages"):
        groups = [joined.group(family.get(key, key)) for key in (one, other)]
        if failed[one] >= PASSAGE_TRIES or groups[0] == groups[1]:
            continue
        own, others = shingles(compared(one)), shingles(compared(other))
        if len(own & others) >= PASSAGE * min(len(own), len(others)):
            joined.join(*groups)
        else:
            failed[one] += 1
    together = joined.groups()
    return together | {key: together.get(group, group) for key, group in family.items()}


def _each(pairs, keys, label):
    """The keys of every pair, with a bar of progress; an array of pairs takes a tenth of the memory of a list."""
    for start in progress(label, f"x {TEXTS:,} pairs")(range(0, len(pairs), TEXTS)):
        for pair in pairs[start : start + TEXTS].tolist():
            yield keys[pair // len(keys)], keys[pair % len(keys)]


class Joined(dict[int, int]):
    """{member: another of its group}: groups that grow by joining two members, each named by its smallest (union-find)."""

    def group(self, member: int) -> int:
        """The name of the group that `member` is in."""
        while (parent := self.get(member, member)) != member:
            self[member] = self[parent]  # the way is shorter the next time
            member = parent
        return member

    def join(self, one: int, other: int) -> None:
        """Make one group of those of two members."""
        one, other = sorted((self.group(one), self.group(other)))
        self[one] = self[other] = one

    def groups(self) -> dict[int, int]:
        """{member: its group} of all that were joined."""
        return {member: self.group(member) for member in self}


def shingles(text: str) -> set[str]:
    """All pieces of SHINGLE characters of a text."""
    return {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)}


def overlap(own: set[str], others: set[str]) -> float:
    """The Jaccard similarity of two sets of shingles, 0 to 1."""
    shared = len(own & others)
    return shared / (len(own) + len(others) - shared)


def differ_in_fact(one: str, other: str) -> bool:
    """True if two questions that are alike have other numbers, or more or fewer of the words that decide."""
    decide = (_NUMBERS.findall(text) + sorted(_DECIDING.findall(text)) for text in (one, other))
    return next(decide) != next(decide)


# ---- MinHash


def signatures(texts: Iterable[str]) -> numpy.ndarray:
    """MinHash signatures of texts of at least SHINGLE characters: uint16 array (texts, HASHES), made TEXTS at a time."""
    texts, parts = iter(texts), [numpy.empty((0, HASHES), dtype=numpy.uint16)]
    while some := list(itertools.islice(texts, TEXTS)):
        lengths = numpy.array([len(text) for text in some])
        codes = numpy.frombuffer("".join(some).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
        hashes = codes[:-2] * _FACTORS[0] ^ codes[1:-1] * _FACTORS[1] ^ codes[2:] * _FACTORS[2]
        inside = numpy.ones(len(hashes), dtype=bool)
        ends = numpy.cumsum(lengths)[:-1]
        inside[ends - 1] = inside[ends - 2] = False  # no shingle reaches from one text into the next
        hashes = hashes[inside]
        hashes = (hashes ^ hashes >> numpy.uint32(15)) * numpy.uint32(0x2C1B3C6D)
        hashes ^= hashes >> numpy.uint32(13)
        starts = numpy.concatenate(([0], numpy.cumsum(lengths - SHINGLE + 1)[:-1]))
        least = [numpy.minimum.reduceat((hashes ^ xor) * odd, starts) for xor, odd in zip(_XOR, _ODD)]
        parts.append((numpy.stack(least, axis=1) * _FACTORS[0] >> numpy.uint32(16)).astype(numpy.uint16))
    return numpy.concatenate(parts)


def candidate_pairs(
    marks: numpy.ndarray, threshold: float, band: int = 4, neighbours: int = NEIGHBOURS
) -> numpy.ndarray:
    """The pairs of rows of `marks` (signatures) that may overlap by `threshold`: array of lower * len(marks) + higher, sorted.

    `band`: hashes that have to agree, 4 or 2; the fewer, the more of the pairs that overlap little are found. Rows are sorted by a
    band, then by the next one, and each that agrees is compared with so many `neighbours` after it.
    """
    bands = numpy.ascontiguousarray(marks).view({4: numpy.uint64, 2: numpy.uint32}[band])
    pairs = numpy.empty(0, dtype=numpy.int64)
    for number in range(bands.shape[1]):
        own, following = bands[:, number], bands[:, (number + 1) % bands.shape[1]]
        order, found = numpy.lexsort((following, own)), [pairs]
        for step in range(1, neighbours + 1):
            agree = own[order[:-step]] == own[order[step:]]
            one, other = order[:-step][agree], order[step:][agree]
            # The estimate's standard error is 0.09 at most: two of them are left as leeway.
            likely = (marks[one] == marks[other]).mean(axis=1) >= threshold - 0.2
            low, high = numpy.minimum(one, other)[likely], numpy.maximum(one, other)[likely]
            found.append(low * len(marks) + high)
        pairs = numpy.concatenate(found)
        pairs.sort()
        pairs = pairs[numpy.diff(pairs, prepend=-1) > 0]
    return pairs
