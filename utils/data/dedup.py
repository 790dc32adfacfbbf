"""Which rows ask the same question, and what becomes of each row: its split, and whether it is a duplicate or a leak.

Two questions are the same if their normalised texts (NFKC, case, spacing, punctuation), without politeness and filler words,
are equal; or if both are long, their 3-character shingles overlap by `threshold` (Jaccard), and they either hold the same
characters or have the same long answer. The last condition keeps template questions apart ("麻黄的性味是什么？",
"桂枝的性味是什么？"): they overlap as much as true duplicates do, but ask something else. Where numbers, negations or opposites
(左 and 右) differ, so do the questions: two patients' records are alike in all else. A few long questions that overlap so far
and differ in a word with it are a family: not duplicates, but never in two splits. Nor are questions about one passage.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy

from utils.data.exam_leaks import find_exam_leaks
from utils.data.minhash import candidate_pairs, containment, overlap, repeated
from utils.data.row_index import EVAL, EXAM, KIND, TRAIN, RowIndex
from utils.data.split import SplitSettings, assign_splits
from utils.data.text_store import TextStore
from utils.text import progress

FAMILY = 5  # more questions than this, alike but for a word, are a template, not one question

# Two questions that share so much of the shorter one's shingles are about one passage.
PASSAGE = 0.6
# Questions with which one is compared in vain, so that a template of many rows costs linear time.
PASSAGE_TRIES = 4
# Questions, and share of the long ones: what more than both share is an instruction, no passage.
LARGEST_PASSAGE = (100, 0.1)

KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE, EVALUATION_LEAK, EXAM_LEAK, MARKED_BAD, ALSO_GOOD = range(7)
REASONS = (
    *("", "exact duplicate", "near-duplicate", "evaluation leak", "exam leak"),
    *("marked as a bad answer, no good one", "marked as a bad answer, and as a good one"),
)

_NUMBERS = re.compile(r"\d+(?:[.,:/%-]\d+)*|[零〇一二三四五六七八九十百千万两半]+")
_DECIDING = re.compile("[无不未非否没伴有男女左右上下升降增减高低轻重阴阳寒热虚实浮沉迟数滑涩弦细]")


class Decisions(NamedTuple):
    """Arrays (rows,): `split` (TRAIN, EVAL, EXAM; 0: cannot be used), `status` (an index into REASONS), and
    `duplicate_of`, the row that it repeats or leaks, or of a bad answer the row of the good one, or -1."""

    split: numpy.ndarray
    status: numpy.ndarray
    duplicate_of: numpy.ndarray

    def set_aside(self, rows: numpy.ndarray | int, reason: int, duplicate_of: numpy.ndarray | int) -> None:
        """Note for `rows` (their numbers) why they are not kept."""
        self.status[rows] = reason
        self.duplicate_of[rows] = duplicate_of


class QuestionGroups(NamedTuple):
    """The distinct questions and their groups, each named by the index of its first member in `keys`.

    `keys`, `same`, `family` and `together` have an entry a distinct question, `asked` a question, `first` a row.
    """

    keys: numpy.ndarray  # text_keys, ascending
    asked: numpy.ndarray  # index into `keys`
    first: numpy.ndarray  # index into `keys` of the row's first question; 0 where the row cannot be used
    same: numpy.ndarray  # group of those that are one question
    family: numpy.ndarray  # group of those that differ in a word at most
    together: numpy.ndarray  # group of those that go to one split: families that share a passage


def decide(index: RowIndex, lines: TextStore, threshold: float, settings: SplitSettings) -> Decisions:
    """What becomes of every row. `lines`: the rows' output lines, of which those with exam questions are read.

    Depends on the rows and the seed, not on the order of the rows, except that of two equal rows the first is kept.
    """
    rows = index.rows
    groups = group_index(index, threshold)
    split = assign_splits(rows, groups.together[groups.first], groups.keys, settings)
    status = numpy.zeros(len(rows), dtype=numpy.uint8)
    decisions = Decisions(split, status, numpy.full(len(rows), -1, dtype=numpy.int64))

    _set_leaks_aside(decisions, index.questions, groups, EVAL, EVALUATION_LEAK)
    for row, exam_row in find_exam_leaks(lines, rows, split):
        decisions.set_aside(row, EXAM_LEAK, exam_row)
    _set_leaks_aside(decisions, index.questions, groups, EXAM, EXAM_LEAK)

    usable = numpy.flatnonzero((rows["kind"] > 0) & (status == KEPT))
    _set_repeats_aside(decisions, usable, EXACT_DUPLICATE, equal=(rows["kind"], split, rows["content"]))
    usable = usable[status[usable] == KEPT]
    same_question_and_answer = (rows["kind"], split, groups.same[groups.first], rows["rest"])
    longest_first = (-rows["characters"], rows["content"])  # the longest: it has the punctuation
    _set_repeats_aside(decisions, usable, NEAR_DUPLICATE, same_question_and_answer, longest_first)
    _pair_bad_answers(decisions, rows)
    return decisions


def _pair_bad_answers(decisions, rows):
    """Give every bad answer that is left the good one to the same prompt and its split, or set it aside."""
    left = decisions.status == KEPT
    bad = numpy.flatnonzero(left & (rows["kind"] == KIND["bad"]))
    good = numpy.flatnonzero(left & (rows["kind"] == KIND["sft"]))
    if not len(bad):
        return
    prompts, first = numpy.unique(rows["prompt"][good], return_index=True)
    found = numpy.minimum(numpy.searchsorted(prompts, rows["prompt"][bad]), max(len(prompts) - 1, 0))
    has_good = prompts[found] == rows["prompt"][bad] if len(good) else numpy.zeros(len(bad), dtype=bool)
    decisions.set_aside(bad[~has_good], MARKED_BAD, -1)
    bad, partner = bad[has_good], good[first[found[has_good]]]
    decisions.duplicate_of[bad] = partner
    decisions.split[bad] = decisions.split[partner]
    same = rows["rest"][bad] == rows["rest"][partner]
    decisions.set_aside(bad[same], ALSO_GOOD, partner[same])


def group_index(index: RowIndex, threshold: float) -> QuestionGroups:
    """The groups of all questions of all rows."""
    rows, questions = index.rows, index.questions
    keys, asked = numpy.unique(questions["key"], return_inverse=True)
    first = numpy.zeros(len(rows), dtype=numpy.int64)
    first[questions["row"][questions["first"]]] = asked[questions["first"]]

    mark = numpy.full(len(keys), -1, dtype=numpy.int64)
    mark[asked] = questions["mark"]
    long_at = numpy.flatnonzero(mark >= 0)
    by_key = numpy.argsort(asked, kind="stable")
    starts = numpy.searchsorted(asked[by_key], numpy.arange(len(keys) + 1))

    def text_of(long_question):
        return index.long_text(mark[long_at[long_question]])

    def answers_of(key):
        mine = rows[questions["row"][by_key[starts[key] : starts[key + 1]]]]
        return set(mine["rest"][mine["long_rest"]].tolist())

    marks = index.marks[mark[long_at]]
    same, family = group_questions(len(keys), long_at, marks, text_of, answers_of, threshold)
    together = group_passages(family, long_at, marks, text_of)
    return QuestionGroups(keys, asked, first, same, family, together)


def group_questions(
    count: int,
    long_at: numpy.ndarray,
    marks: numpy.ndarray,
    text_of: Callable[[int], str],
    answers_of: Callable[[int], set],
    threshold: float,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(same, family) of `count` distinct questions, as in QuestionGroups.

    `long_at`: which of them are long; `marks`: their signatures, row by row. `text_of(row of marks)` gives a long question's
    text, `answers_of(question)` the keys of its long answers. A family has FAMILY members at most.
    """
    # Of those that have joined a group: the index that leads on to its first member.
    same: dict[int, int] = {}
    family: dict[int, int] = {}
    for one, other in _one_by_one(candidate_pairs(marks, threshold), "comparing long questions"):
        texts, pair = (text_of(one), text_of(other)), (int(long_at[one]), int(long_at[other]))
        if overlap(*texts) >= threshold:
            _join(family, *pair)
            if differ_in_fact(*texts):
                continue
            if Counter(texts[0]) == Counter(texts[1]) or answers_of(pair[0]) & answers_of(pair[1]):
                _join(same, *pair)
    one_question, alike = _roots(same, count), _roots(family, count)
    members = numpy.bincount(alike[numpy.unique(one_question)], minlength=count)  # distinct questions in each
    return one_question, numpy.where(members[alike] > FAMILY, one_question, alike)


def _one_by_one(pairs, label):
    """The pairs of two arrays as ints, with a progress bar."""
    one, other = pairs
    for number in progress(label, "pairs")(range(len(one))):
        yield int(one[number]), int(other[number])


def differ_in_fact(one: str, other: str) -> bool:
    """Whether two questions that are alike have other numbers, or more or fewer of the words that decide."""
    if _NUMBERS.findall(one) != _NUMBERS.findall(other):
        return True
    return Counter(_DECIDING.findall(one)) != Counter(_DECIDING.findall(other))


def group_passages(
    family: numpy.ndarray, long_at: numpy.ndarray, marks: numpy.ndarray, text_of: Callable[[int], str]
) -> numpy.ndarray:
    """The families, those joined that share a passage; the other arguments as in `group_questions`."""
    joined: dict[int, int] = {}
    failed: Counter[int] = Counter()
    pairs = candidate_pairs(marks, PASSAGE, band=2, neighbours=1)
    for one, other in _one_by_one(pairs, "looking for shared passages"):
        pair = int(family[long_at[one]]), int(family[long_at[other]])
        if failed[one] >= PASSAGE_TRIES or _root(joined, pair[0]) == _root(joined, pair[1]):
            continue
        if containment(text_of(one), text_of(other)) >= PASSAGE:
            _join(joined, *pair)
        else:
            failed[one] += 1
    together = _roots(joined, len(family))[family]
    members = numpy.bincount(together[long_at], minlength=len(family))
    least, share = LARGEST_PASSAGE
    return numpy.where(members[together] > max(least, share * len(long_at)), family, together)


def _set_leaks_aside(decisions, questions, groups, held_out, reason):
    """Set aside the training rows that ask, in any turn, what a row of the split `held_out` asks."""
    group = groups.family[groups.asked]  # (questions,)
    source = numpy.full(len(groups.keys), -1, dtype=numpy.int64)  # of each group: its first held-out row
    rows = numpy.flatnonzero(decisions.split == held_out)[::-1]  # backwards: the first is written last
    source[groups.family[groups.first[rows]]] = rows
    leaks = (source[group] >= 0) & (decisions.split[questions["row"]] == TRAIN)
    decisions.set_aside(questions["row"][leaks], reason, source[group[leaks]])


def _set_repeats_aside(decisions, usable, reason, equal, preference=()):
    """Among the rows `usable` that agree in all the arrays `equal`, keep the first by `preference`, then by position."""
    usable = usable[repeated(equal[-1][usable])]
    by_preference = [key[usable] for key in reversed(preference)]
    order = usable[numpy.lexsort([usable, *by_preference, *(key[usable] for key in equal)])]
    repeats = numpy.ones(len(order), dtype=bool)  # whether it equals the one before it
    repeats[:1] = False
    for key in equal:
        repeats[1:] &= key[order[1:]] == key[order[:-1]]
    kept = order[numpy.maximum.accumulate(numpy.where(repeats, 0, numpy.arange(len(order))))]
    decisions.set_aside(order[repeats], reason, kept[repeats])


def _root(parents, index):
    while index in parents:
        index = parents[index]
    return index


def _join(parents, one, other):
    one, other = _root(parents, one), _root(parents, other)
    if one != other:
        parents[max(one, other)] = min(one, other)


def _roots(parents, count):
    """The root of each index, an int array (count,)."""
    roots = numpy.arange(count)
    for index in sorted(parents):  # a parent comes before its children
        roots[index] = roots[parents[index]]
    return roots
