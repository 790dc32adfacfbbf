"""Which rows ask the same question, and what becomes of them: one side of the split, a duplicate, an evaluation leak.

Two questions are the same if their normalised texts (NFKC, case, spacing, punctuation), without politeness and filler words,
are equal; or if both are long, their 3-character shingles overlap by `threshold` (Jaccard), and they either hold the same
characters or have the same long answer. The last condition keeps template questions apart ("麻黄的性味是什么？",
"桂枝的性味是什么？"): they overlap as much as true duplicates do, but ask something else. A few long questions that overlap
so far and differ in a word with it are a family: not duplicates, but never on two sides of the split. Candidates are found
with MinHash signatures in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3) and then
compared exactly.
"""

import hashlib
import itertools
import random
from collections import Counter

import numpy

from utils.data.normalize import normalize_all, without_filler
from utils.data.text_store import TextStore

LONG = 40  # characters without filler: as long as a case description, too long for a name in a template


LONG_ANSWER = 20  # characters: two rows do not share such an answer by chance


SHINGLE = 3  # characters


HASHES, BANDS = 32, 8  # 4 hashes a band: a pair that overlaps by 0.85 is missed once in 370 times


NEIGHBOURS = 4  # rows of one bucket compared with each row, so that a large bucket costs linear time


SHORTEST_LATER_TURN = 8  # characters: later turns such as "请继续" are no question of their own


FAMILY = 5  # more questions than this, alike but for a word, are a template, not one question


# What is known of a row after the first pass; `kind` and `split` by the numbers below.
ROW = numpy.dtype(
    [
        ("kind", "u1"),
        ("split", "u1"),
        ("content", "u8"),
        ("rest", "u8"),
        ("long_rest", "?"),
        ("file", "i4"),
        ("line", "i8"),
        ("characters", "i4"),
        ("reasoning", "?"),
    ]
)


QUESTION = numpy.dtype(
    [("row", "i8"), ("first", "?"), ("key", "u8"), ("mark", "i8")]
)  # mark: of its signature, or -1


_KIND = {"": 0, "sft": 1, "dpo": 2, "exam": 3}  # 0: a row that could not be used


_SPLIT = {"": 0, "train": 1, "eval": 2}


TRAIN, EVAL, EXAM = 1, 2, 3  # the sides that rows go to: 1 and 2 as in _SPLIT


KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE, EVALUATION_LEAK, EXAM_LEAK = range(5)


REASONS = ("", "exact duplicate", "near-duplicate", "evaluation leak", "exam leak")


_random = random.Random(0)


_XOR = numpy.array([_random.getrandbits(32) for _ in range(HASHES)], dtype=numpy.uint32)


_ODD = numpy.array([_random.getrandbits(32) | 1 for _ in range(HASHES)], dtype=numpy.uint32)


def text_key(text):
    """A 64-bit key of a text, the same in every run. A million texts share one by chance with probability 3e-8."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def signatures(texts):
    """MinHash signatures of texts of at least SHINGLE characters: uint16 array (len(texts), HASHES)."""
    lengths = numpy.array([len(text) for text in texts])
    codes = numpy.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    factors = numpy.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35], dtype=numpy.uint32)
    shingles = codes[:-2] * factors[0] ^ codes[1:-1] * factors[1] ^ codes[2:] * factors[2]
    inside = numpy.ones(len(shingles), dtype=bool)
    ends = numpy.cumsum(lengths)[:-1]
    inside[ends - 1] = inside[ends - 2] = False  # no shingle reaches from one text into the next
    shingles = shingles[inside]
    shingles = (shingles ^ shingles >> numpy.uint32(15)) * numpy.uint32(0x2C1B3C6D)
    shingles ^= shingles >> numpy.uint32(13)
    starts = numpy.concatenate(([0], numpy.cumsum(lengths - SHINGLE + 1)[:-1]))
    result = numpy.empty((len(texts), HASHES), dtype=numpy.uint16)
    for index in range(HASHES):
        least = numpy.minimum.reduceat((shingles ^ _XOR[index]) * _ODD[index], starts)
        result[:, index] = (least * numpy.uint32(0x9E3779B1)) >> numpy.uint32(16)
    return result


def candidate_pairs(marks, threshold):
    """Two arrays, the pairs of rows of `marks` (signatures, in an order set by content) that may overlap by `threshold`."""
    bands = numpy.ascontiguousarray(marks).view(numpy.uint64)
    pairs = [numpy.empty(0, dtype=numpy.int64)]
    for band in range(BANDS):
        order = _repeated(bands[:, band])
        order = order[
            numpy.lexsort((bands[order, (band + 1) % BANDS], bands[order, band]))
        ]  # like rows of a bucket side by side
        keys = bands[order, band]
        for step in range(1, NEIGHBOURS + 1):
            same = numpy.flatnonzero(keys[step:] == keys[:-step])
            for part in numpy.array_split(same, len(same) // 100_000 + 1):
                one, other = order[part], order[part + step]
                close = (marks[one] == marks[other]).mean(
                    axis=1
                ) >= threshold - 0.2  # 3 standard errors of the estimate
                low, high = numpy.minimum(one, other)[close], numpy.maximum(one, other)[close]
                pairs.append(low.astype(numpy.int64) * len(marks) + high)
    return divmod(numpy.unique(numpy.concatenate(pairs)), max(1, len(marks)))


def _repeated(values):
    """Indices, ascending, of the values that are there more than once: usually few, and only they need a closer look."""
    order = numpy.argsort(values)
    same = values[order[1:]] == values[order[:-1]]
    found = numpy.zeros(len(values), dtype=bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return numpy.flatnonzero(found)


def overlap(one, other):
    """The Jaccard similarity of the shingles of two texts, 0 to 1."""
    shingles, others = (
        {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)} for text in (one, other)
    )
    return len(shingles & others) / len(shingles | others)


def group_questions(keys, long_at, marks, text_of, answers_of, threshold):
    """Group distinct questions: two int arrays (len(keys),), `same` and `family`: the index of its group's first member.

    `keys`: the distinct text_keys, ascending. `long_at`: which of them are LONG; `marks`: their signatures, row by row.
    `text_of(mark)` gives a long question's text, `answers_of(key index)` the keys of its long answers. Groups in `same` are
    one question each; `family` joins those that differ in a word, as long as they are few.
    """
    same, family = {}, {}  # of those that have joined a group: the index that leads on to its first member
    for one, other in zip(*(side.tolist() for side in candidate_pairs(marks, threshold))):
        texts, pair = (text_of(one), text_of(other)), (int(long_at[one]), int(long_at[other]))
        if overlap(*texts) >= threshold:
            _join(family, *pair)
            if Counter(texts[0]) == Counter(texts[1]) or answers_of(pair[0]) & answers_of(pair[1]):
                _join(same, *pair)
    same, family = _roots(same, len(keys)), _roots(family, len(keys))
    members = numpy.bincount(
        family[numpy.unique(same)], minlength=len(keys)
    )  # distinct questions in each family
    return same, numpy.where(members[family] > FAMILY, same, family)


def sketch_rows(items):
    """(ROW array, QUESTION array, signatures, long texts) of a batch: [(line, content_key, Item, or None if unfit), ...]."""
    rows, questions, long_texts = [], [], []
    usable = [item for _, _, item in items if item]
    rests = iter(normalize_all([item.rest for item in usable]))
    asked = iter(normalize_all([question for item in usable for question in item.questions]))
    for index, (line, key, item) in enumerate(items):
        if item is None:
            rows.append((0, 0, 0, 0, False, 0, line, 0, False))
            continue
        rest = next(rests)
        rows.append(
            (
                _KIND[item.kind],
                _SPLIT[item.split],
                key,
                text_key(rest),
                len(rest) >= LONG_ANSWER,
                0,
                line,
                item.characters,
                item.reasoning,
            )
        )
        for turn, question in enumerate(itertools.islice(asked, len(item.questions))):
            text = without_filler(question)
            if turn and len(text) < SHORTEST_LATER_TURN:
                continue
            questions.append((index, turn == 0, text_key(text), len(long_texts) if len(text) >= LONG else -1))
            if len(text) >= LONG:
                long_texts.append(text)
    marks = signatures(long_texts) if long_texts else numpy.empty((0, HASHES), dtype=numpy.uint16)
    return numpy.array(rows, dtype=ROW), numpy.array(questions, dtype=QUESTION), marks, long_texts


def content_key(item):
    """The 64-bit key that a row's id is written from: the same wherever, and in whatever schema, the row comes from."""
    return text_key("\x1f".join([item.kind, *item.questions, "\x1e", item.rest]))


class Collection:
    """What the first pass leaves in memory: keys and signatures, no text. Long questions wait in a temporary file."""

    def __init__(self, folder):
        self.long_texts = TextStore(folder)
        self.parts, self.count, self.marked = [], 0, 0

    def add(self, file_index, rows, questions, marks, long_texts):
        """Take in the sketch_rows of one batch."""
        rows["file"] = file_index
        questions["row"] += self.count
        questions["mark"][questions["mark"] >= 0] += self.marked
        texts = [text.encode("utf-8", "surrogatepass") for text in long_texts]
        self.long_texts.add(b"".join(texts), map(len, texts))
        self.parts.append((rows, questions, marks))
        self.count += len(rows)
        self.marked += len(marks)

    def finish(self):
        """Turn the batches into the arrays `rows`, `questions` and `marks`."""
        self.add(0, *sketch_rows([]))  # so that no input at all is no special case
        self.rows, self.questions, self.marks = (numpy.concatenate(parts) for parts in zip(*self.parts))
        self.parts = None

    def long_text(self, mark):
        """The text whose signature is `marks[mark]`."""
        return self.long_texts.read(mark).decode("utf-8", "surrogatepass")


def decide(collection, threshold, eval_share, max_eval_rows, seed):
    """What becomes of every row: arrays (rows,) `side`, `fate` (an index into REASONS) and `twin`, the row it repeats or -1.

    Depends on the rows and `seed`, not on the order of the rows, except that of two equal rows the first is kept.
    """
    rows, questions = collection.rows, collection.questions
    keys, inverse = numpy.unique(questions["key"], return_inverse=True)
    same, family = _group(collection, keys, inverse, threshold)
    first = numpy.zeros(len(rows), dtype=numpy.int64)  # of rows not usable: 0, never looked at
    first[questions["row"][questions["first"]]] = inverse[questions["first"]]
    side = _sides(rows, family[first], keys, eval_share, max_eval_rows, seed)

    fate, twin = numpy.zeros(len(rows), dtype=numpy.uint8), numpy.full(len(rows), -1, dtype=numpy.int64)
    asked = family[inverse]  # the group of every question, later turns too
    for kind, held_out in ((EVALUATION_LEAK, side == EVAL), (EXAM_LEAK, side == EXAM)):
        example = numpy.full(len(keys), -1, dtype=numpy.int64)
        example[family[first[held_out]][::-1]] = numpy.flatnonzero(held_out)[
            ::-1
        ]  # the first one is written last
        leaks = (example[asked] >= 0) & (side[questions["row"]] == TRAIN)
        fate[questions["row"][leaks]] = kind
        twin[questions["row"][leaks]] = example[asked[leaks]]

    usable = numpy.flatnonzero((rows["kind"] > 0) & (fate == KEPT))
    _keep_first(EXACT_DUPLICATE, usable, fate, twin, (), (rows["kind"], side, rows["content"]))
    usable = usable[fate[usable] == KEPT]
    best = (-rows["characters"], rows["content"])  # the longest: it has the punctuation
    _keep_first(NEAR_DUPLICATE, usable, fate, twin, best, (rows["kind"], side, same[first], rows["rest"]))
    return side, fate, twin


def mixed(keys, seed):
    """Keys (uint64) in a random order that depends on `seed` only (the finaliser of splitmix64)."""
    keys = keys + numpy.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    keys = (keys ^ keys >> numpy.uint64(30)) * numpy.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ keys >> numpy.uint64(27)) * numpy.uint64(0x94D049BB133111EB)
    return keys ^ keys >> numpy.uint64(31)


def draw(rows, among, count, seed):
    """A mask of `count` rows (all, if fewer) out of those where `among` is true; random, but the same for the same rows."""
    places = numpy.flatnonzero(among)
    drawn = numpy.zeros(len(rows), dtype=bool)
    drawn[places[numpy.argsort(mixed(rows["content"][places], seed), kind="stable")[:count]]] = True
    return drawn


def count_by_file(rows, files):
    """Rows of each file, an int array (files,)."""
    return numpy.bincount(rows["file"], minlength=files)


def _group(collection, keys, inverse, threshold):
    rows, questions = collection.rows, collection.questions
    mark = numpy.full(len(keys), -1, dtype=numpy.int64)
    mark[inverse] = questions["mark"]
    long_at = numpy.flatnonzero(mark >= 0)
    by_question = numpy.argsort(inverse, kind="stable")
    starts = numpy.searchsorted(inverse[by_question], numpy.arange(len(keys) + 1))

    def answers_of(index):
        mine = rows[questions["row"][by_question[starts[index] : starts[index + 1]]]]
        return set(mine["rest"][mine["long_rest"]].tolist())

    return group_questions(
        keys,
        long_at,
        collection.marks[mark[long_at]],
        lambda index: collection.long_text(mark[long_at[index]]),
        answers_of,
        threshold,
    )


def _sides(rows, group, keys, eval_share, max_eval_rows, seed):
    """TRAIN, EVAL or EXAM for every row (0: not usable). A group goes to one side whole, unless its rows say otherwise."""
    side = numpy.where(rows["kind"] == _KIND["exam"], EXAM, rows["split"])
    side[rows["kind"] == 0] = 0
    trained = (rows["kind"] > 0) & (side != EXAM)
    for told in (TRAIN, EVAL):  # EVAL last: it wins where a group has both
        members = numpy.zeros(len(keys), dtype=bool)
        members[group[trained & (rows["split"] == told)]] = True
        side[trained & (rows["split"] == 0) & members[group]] = told
    for kind in (_KIND["sft"], _KIND["dpo"]):
        free = numpy.flatnonzero((rows["kind"] == kind) & (rows["split"] == 0))
        free = free[numpy.unique(rows["content"][free], return_index=True)[1]]  # each distinct row once
        wanted = min(max_eval_rows, max(round(eval_share * len(free)), 1 if eval_share else 0))
        wanted -= numpy.count_nonzero(side[free] == EVAL)
        sizes = numpy.bincount(group[free[side[free] == 0]], minlength=len(keys))
        open_groups = numpy.flatnonzero(sizes)
        chosen = numpy.zeros(len(keys), dtype=bool)
        for index in open_groups[numpy.argsort(mixed(keys[open_groups], seed))].tolist():
            if wanted <= 0:
                break
            if (
                sizes[index] <= max(wanted, 3) and len(open_groups) > 1
            ):  # a group too large for evaluation is trained on
                chosen[index] = True
                wanted -= sizes[index]
        undecided = trained & (side == 0) & (numpy.bincount(group[free], minlength=len(keys)) > 0)[group]
        side[undecided] = numpy.where(chosen[group[undecided]], EVAL, TRAIN)
    return side


def _keep_first(reason, usable, fate, twin, preference, equal):
    """Among the rows `usable` that agree in all the arrays `equal`, keep the first by `preference`, then by position."""
    usable = usable[_repeated(equal[-1][usable])]
    order = usable[
        numpy.lexsort(
            [usable, *(key[usable] for key in reversed(preference)), *(key[usable] for key in equal)]
        )
    ]
    repeats = numpy.ones(len(order), dtype=bool)
    repeats[:1] = False
    for key in equal:
        repeats[1:] &= key[order[1:]] == key[order[:-1]]
    kept = order[numpy.maximum.accumulate(numpy.where(repeats, 0, numpy.arange(len(order))))]
    fate[order[repeats]] = reason
    twin[order[repeats]] = kept[repeats]


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
