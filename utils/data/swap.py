"""Wrong facts out of right ones: terms of an answer give way to terms that stand in the same place in other answers.

A substitute that is rare, that cuts a longer word in two, or that changes the length gives the wrong answer away without the
question, and that is what a model then learns. So terms are swapped whole, between borders, and the substitute is drawn from
the terms that really stand between the same borders in other answers: it is as common as what it replaces.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from utils.data.terms import Terms

# What may stand beside a whole term, other than a sign, a digit, a letter or the end of the text.
LEFT, RIGHT = "是为归入属于由能和与及或味性", "经和与及或一"
NAME_LEFT, NAME_RIGHT = LEFT + "用", RIGHT + "的是归入属有能由主可为在味性要穴"
DRAWS, NAME_DRAWS = 12, 30  # substitutes looked at; of names more, for one that looks alike

# Where a substitute may come from, the nearest first. It is always as long: a sum of small differences would tell, too.
PLACES: tuple[Callable, ...] = (
    lambda slot: (slot.kind, len(slot.term), slot.beside),
    lambda slot: (slot.kind, len(slot.term), slot.beside[1]),
    lambda slot: (slot.kind, len(slot.term)),
)


class Question(NamedTuple):
    """A question and its good answer."""

    text: str
    answer: str


class Slot(NamedTuple):
    """A whole term in the answer of a row."""

    row: int
    start: int
    stop: int
    term: str
    kind: str
    is_name: bool  # of what the question asks about
    beside: tuple  # the characters before and after it


def swap_facts(rows: list[Question], terms: Terms, rng: random.Random) -> list[tuple[str | None, str]]:
    """For each row (its answer with other terms, "") or (None, why there is none).

    Where the answer names what the question asks about, that name is swapped, for one of those drawn that looks most like it:
    mixing up 血海 and 照海 is what small models do. Elsewhere about half of the terms, at least one. A substitute is of the
    same kind and as long, means nothing near the original, shares no character with it but what most of their kind
    share, and is in neither the question, the answer, nor any other answer about the same thing.
    """
    asked = [terms.find(row.text) for row in rows]
    answered = [terms.find(row.answer) for row in rows]
    offers = [_slots(number, row, found, terms) for number, (row, found) in enumerate(zip(rows, answered))]
    right = _right_about(asked, answered)
    chosen = [_chosen(slots, rng) for slots in offers]
    # Not from all slots: of answers that hold one fact only, more are chosen than of others.
    places = _places(chosen)
    common = _common_characters(terms)

    results = []
    for row, slots, mine, known in zip(rows, offers, chosen, right):
        swapped: dict[Slot, str] = {}
        for slot in mine:
            # A name is wrong whatever is right of it; a fact is not, if it is right of what is asked about.
            not_these = {*swapped.values(), *(() if slot.is_name else known)}
            other = _substitute(slot, row, not_these, places, terms, common, rng)
            if other:
                swapped[slot] = other
        results.append(_rewritten(row, slots, swapped))
    return results


def _slots(number, row, found, terms):
    """The slots of an answer: its names, if it has any, else its facts."""
    names, facts = [], []
    for start, stop, term in found:
        beside = row.answer[start - 1 : start] if start else "", row.answer[stop : stop + 1]
        is_name = len(term) > 1 and term in row.text
        words = (NAME_LEFT, NAME_RIGHT) if is_name else (LEFT, RIGHT)
        if all(map(_is_border, beside, words)) and (is_name or term not in row.text):
            slot = Slot(number, start, stop, term, terms.kinds[term][0], is_name, beside)
            (names if is_name else facts).append(slot)
    return names or facts


def _is_border(character, words):
    return not "\u4e00" <= character <= "\u9fff" or character in words


def _right_about(asked, answered):
    """For each row, all terms in answers to questions about the same thing: what is right to say of it elsewhere."""
    stated = defaultdict(set)
    for names, facts in zip(asked, answered):
        for _, _, name in names:
            stated[name].update(term for _, _, term in facts)
    return [set().union(*(stated[name] for _, _, name in names)) for names in asked]


def _common_characters(terms):
    """{kind: the characters that at least half of its terms have}, such as 经."""
    common = {}
    for kind, kin in terms.by_kind.items():
        counts = Counter(character for term in kin for character in set(term))
        common[kind] = {character for character, count in counts.items() if 2 * count >= len(kin)}
    return common


def _chosen(slots, rng):
    if not slots:
        return []
    if slots[0].is_name:
        return [rng.choice(slots)]
    return [slot for slot in slots if rng.random() < 0.5] or [rng.choice(slots)]


def _places(slots_of_rows):
    """[(key function, {key: slots}), ...] for each of PLACES."""
    places = [(key, defaultdict(list)) for key in PLACES]
    for slot in (slot for slots in slots_of_rows for slot in slots):
        for key, by_key in places:
            by_key[slot.is_name, key(slot)].append(slot)
    return places


def _substitute(slot, row, not_these, places, terms, common, rng):
    """A term from another answer for the place of the slot's own, or None."""
    for key, by_key in places:
        pool = by_key.get((slot.is_name, key(slot)), [slot])
        drawn = [rng.choice(pool).term for _ in range(NAME_DRAWS if slot.is_name else DRAWS)]
        fits = [term for term in drawn if term not in not_these and _is_wrong(slot, term, row, terms, common)]
        if fits:
            return max(fits, key=lambda term: _alike(slot.term, term)) if slot.is_name else fits[0]
    return None


def _is_wrong(slot, term, row, terms, common):
    """Whether `term` in the place of the slot's own makes a wrong answer that looks like a right one."""
    if term in row.text or term in row.answer:
        return False
    if not slot.is_name and (set(slot.term) & set(term)) - common[slot.kind]:
        return False
    near, near_term = terms.near[slot.kind, slot.term], terms.near.get((slot.kind, term), ())
    return term not in near and slot.term not in near_term


def _alike(one, other):
    return len(set(one) & set(other)) + (one[0] == other[0])


def _rewritten(row, slots, swapped):
    if not slots:
        return None, "no known term between borders in the answer"
    if not swapped:
        return None, "no other answer has a term to swap with"
    text, end = "", len(row.answer)
    for slot in sorted(swapped, key=lambda slot: -slot.start):
        text, end = swapped[slot] + row.answer[slot.stop : end] + text, slot.start
    return row.answer[:end] + text, ""
