"""Worse answers for preference pairs: swapped facts, or what a model itself says wrongly.

Each maker takes SFT rows and yields for each of them (a worse answer, "") or (None, the reason why there is none).

Facts are swapped so that only the question tells: a substitute that is rare, cuts a longer word in two or changes the length gives
the wrong answer away, and that is what a model then learns. So terms are swapped whole, between borders, for terms that really
stand between the same borders in other answers: as common as what they replace.
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.data.convert import ASKS, is_courtesy, normalize
from utils.files import read_jsonl
from utils.kept import digest, read_kept, write_kept
from utils.settings import Settings

LENGTH_TOLERANCE = 0.2  # a sampled answer is at most this much longer or shorter, or by one character: DPO shall not learn length
SAME = 0.8  # agreement from which on answers without known facts say the same
DRAWS, NAME_DRAWS = 12, 30  # substitutes looked at; of names more, to find one that looks alike
COMMON = (5, 0.1)  # questions, and share of them: signs in more than both do not tell one case from another
CHUNK = 64  # rows whose answers are sampled, and kept, at a time

# A single character (a channel such as 肺, a nature such as 温) is a term only if one of these, or nothing, is beside it.
ALONE_LEFT, ALONE_RIGHT = "性味归入属为是、，：。", "经、，。；"
# What may stand beside a whole term, other than a sign, a digit, a letter or the end of the text.
LEFT, RIGHT = "是为归入属于由能和与及或味性", "经和与及或一"
NAME_LEFT, NAME_RIGHT = LEFT + "用", RIGHT + "的是归入属有能由主可为在味性要穴"
# Such as 肝胃不和证, whether it is a known term or not.
_SYNDROME = re.compile(r"[\u4e00-\u9fff]{2,4}证(?![\u4e00-\u9fff])")

Worse = tuple[str | None, str]


class Terms:
    """The terms of a file of {"kind", "term"[, "near": terms that mean nearly the same]}: data_prepare/sample/terms.jsonl.

    `kinds`: {term: its kinds}, `by_kind`: {kind: terms}, `near`: {(kind, term): terms that mean nearly the same}.
    """

    def __init__(self, path: Path):
        self.kinds, self.by_kind, self.near = defaultdict(list), defaultdict(list), defaultdict(set)
        for row in read_jsonl(path, wanted=["kind", "term"]):
            self.kinds[row["term"]].append(row["kind"])
            self.by_kind[row["kind"]].append(row["term"])
            self.near[row["kind"], row["term"]].update(row.get("near", ()))
        self.by_first = defaultdict(list)  # {first character: terms, longest first}
        for term in sorted(self.kinds, key=len, reverse=True):
            self.by_first[term[0]].append(term)

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """[(start, end, term), ...] in order, longest terms first, without overlaps."""
        found, at, by_first = [], 0, self.by_first
        while at < len(text):
            for term in by_first.get(text[at], ()):
                if text.startswith(term, at) and (len(term) > 1 or _stands_alone(text, at)):
                    found.append((at, at + len(term), term))
                    at += len(term)
                    break
            else:
                at += 1
        return found

    def stated(self, answer: str, question: str) -> set[str]:
        """The set of terms that `answer` states and `question` does not already name."""
        return {term for _, _, term in self.find(answer) if term not in question}


def _stands_alone(text, at):
    after = text[at + 1 : at + 2]
    left = not at or text[at - 1] in ALONE_LEFT
    return left and (not after or after in ALONE_RIGHT or text[at + 1 :] == "\n")


class Slot(NamedTuple):
    """A whole term in an answer, which begins at `start`."""

    start: int
    term: str
    kind: str
    is_name: bool  # of what the question asks about
    after: str  # the character after it, and that before it
    before: str

    def places(self) -> list[tuple]:
        """Where a substitute may come from, the nearest first. It is always as long: many small differences would tell, too."""
        place = (self.is_name, self.kind, len(self.term), self.after, self.before)
        return [place, place[:4], place[:3]]


def split_row(row: dict) -> tuple[list[dict], dict]:
    """(prompt messages, answer message) of an SFT row: the last assistant turn and what comes before it."""
    last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last], row["messages"][last]


def question_of(row: dict) -> tuple[str, str]:
    """The last question of an SFT row and its answer."""
    prompt, answer = split_row(row)
    return prompt[-1]["content"], answer["content"]


def ends_in_courtesy(row: dict) -> bool:
    """True if the last turns are nothing but thanks, a greeting or good wishes."""
    question, answer = question_of(row)
    return is_courtesy(question) or is_courtesy(answer) and not ASKS.search(question)


# ---- When another answer is right, too


def agreement(one: str, other: str) -> float:
    """F1 of the two texts' character pairs (Dice 1945): 1 for the same text, 0 for nothing in common."""
    pairs = [Counter(zip(f" {text}", f"{text} ")) for text in (one, other)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())


def facts_of(answer: str, question: str, terms: Terms) -> set[str]:
    """The terms and syndromes that an answer states and the question does not."""
    syndromes = {name for name in _SYNDROME.findall(answer) if name not in question}
    return terms.stated(answer, question) | syndromes


def says_the_same(good: str, other: str, question: str, terms: Terms) -> bool:
    """True if another answer is right, too: it is part of the good one or holds it, or states all its facts of the same thing.

    If the good one states no known fact, an answer that hardly differs is right.
    """
    one, two = normalize(good), normalize(other)
    if one in two or two in one:
        return True
    facts = facts_of(good, question, terms)
    if not facts:
        return agreement(good, other) >= SAME
    names = {term for _, _, term in terms.find(good) if len(term) > 1 and term in question}
    stated = {term for _, _, term in terms.find(other)}
    return facts <= facts_of(other, question, terms) and names <= stated


# ---- Swapped facts


def swapped_facts(rows: list[dict], terms: Terms, rng: random.Random) -> Iterator[Worse]:
    """The good answer with terms swapped for wrong ones of the same kind.

    If the answer names what the question asks about, that name is swapped, for one of those drawn that looks most like it:
    mixing up 血海 and 照海 is what small models do. Else about half of the terms are swapped, at least one.
    """
    questions = [question_of(row) for row in rows]
    slots_of = [_slots(question, terms) for question in questions]
    chosen = [
        [slot for slot in slots if not slot.is_name and rng.random() < 0.5] or slots and [rng.choice(slots)]
        for slots in slots_of
    ]
    # Substitutes come from the chosen slots: they are as common among the wrong terms as the right terms that they replace.
    pools: dict[tuple, list[str]] = defaultdict(list)
    for slot in (slot for slots in chosen for slot in slots):
        for place in slot.places():
            pools[place].append(slot.term)
    common = {}  # {kind: the characters that at least half of its terms have}, such as 经
    for kind, kin in terms.by_kind.items():
        counts = Counter(character for term in kin for character in set(term))
        common[kind] = {character for character, count in counts.items() if 2 * count >= len(kin)}
    for question, slots, mine, right in zip(questions, slots_of, chosen, _right_about(questions, terms)):
        _, text = question
        swapped: dict[Slot, str] = {}
        for slot in mine:
            # A wrong name is wrong even if the term is right of what is asked about; a wrong fact has to be none of those.
            not_these = {*swapped.values(), *(() if slot.is_name else right)}
            if other := _substitute(slot, question, not_these, pools, terms, common, rng):
                swapped[slot] = other
        for slot, other in swapped.items():  # as long as the term that it replaces
            text = text[: slot.start] + other + text[slot.start + len(other) :]
        if swapped:
            yield text, ""
        elif slots:
            yield None, "no other answer has a term to swap with"
        else:
            yield None, "no known term between borders in the answer"


def _slots(question, terms):
    """The slots of an answer: its names, if it has any, else its facts. On both sides of a slot is a border."""
    (asked, answer), names, facts = question, [], []
    for start, stop, term in terms.find(answer):
        before, after = answer[start - 1 : start] if start else "", answer[stop : stop + 1]
        is_name = len(term) > 1 and term in asked
        words = (NAME_LEFT, NAME_RIGHT) if is_name else (LEFT, RIGHT)
        signs = zip((before, after), words)
        between = all(not "\u4e00" <= sign <= "\u9fff" or sign in word for sign, word in signs)
        if between and (is_name or term not in asked):
            slot = Slot(start, term, terms.kinds[term][0], is_name, after, before)
            (names if is_name else facts).append(slot)
    return names or facts


def _right_about(questions, terms):
    """For each question, all terms in answers to questions about the same thing: they are right to say of it.

    A question that names a thing (a herb, a formula) is about that. One that names signs only is a case: what is right for it
    stands in the answers to questions with all of its signs, or, if those are common to many cases, to the same question.
    """
    asked, stated = ([{term for _, _, term in terms.find(one[side])} for one in questions] for side in (0, 1))
    rows_of = defaultdict(set)  # {name or text of a question: numbers of the questions}
    for number, (names, (question, _)) in enumerate(zip(asked, questions)):
        for name in (*names, normalize(question)):
            rows_of[name].add(number)
    least, share = COMMON
    for names, (question, _) in zip(asked, questions):
        if any("." not in kind for name in names for kind in terms.kinds[name]):
            same = set().union(*(rows_of[name] for name in names))
        else:
            same = set.intersection(*(rows_of[name] for name in names)) if names else set()
            if len(same) > max(least, share * len(questions)):
                same = rows_of[normalize(question)]
        yield set().union(*(stated[number] for number in same))


def _substitute(slot, question, not_these, pools, terms, common, rng):
    """A term from another answer for the place of the slot's own that makes a wrong answer which looks like a right one, or None.

    It is in neither the question nor the answer, means nothing near the original, and shares no character with it but those
    that most of their kind share.
    """

    def is_wrong(term):
        if term in not_these or any(term in text for text in question):
            return False
        if not slot.is_name and (set(slot.term) & set(term)) - common[slot.kind]:
            return False
        return term not in terms.near[slot.kind, slot.term] and slot.term not in terms.near[slot.kind, term]

    for place in slot.places():
        drawn = [rng.choice(pools[place]) for _ in range(NAME_DRAWS if slot.is_name else DRAWS)]
        fits = list(filter(is_wrong, drawn))
        if fits and slot.is_name:  # the one that looks most like the right name
            return max(fits, key=lambda term: len(set(slot.term) & set(term)) + (slot.term[0] == term[0]))
        if fits:
            return fits[0]
    return None


# ---- What a model says


def sampled(rows: list[dict], terms: Terms, settings: Settings, kept: Path) -> Iterator[Worse]:
    """The worst of several answers sampled from a model: fewest of the good one's facts, then least agreement with it."""
    for row, answers in zip(rows, sample_answers(rows, settings, kept)):
        question, good = question_of(row)
        leeway = max(1, LENGTH_TOLERANCE * len(good))
        fits = [text for text in map(str.strip, answers) if text and abs(len(text) - len(good)) <= leeway]
        wrong = [text for text in fits if not says_the_same(good, text, question, terms)]
        facts = facts_of(good, question, terms)
        faults = [(len(facts & facts_of(text, question, terms)), agreement(text, good)) for text in wrong]
        if wrong:
            yield wrong[faults.index(min(faults))], ""
        else:
            yield None, "every sampled answer is right" if fits else "no sampled answer of similar length"


def sample_answers(rows: list[dict], settings: Settings, kept: Path) -> list[list[str]]:
    """For each row, SAMPLES answers of MODEL, drawn at TEMPERATURE.

    The folder `kept` takes them as they come, CHUNK rows a file: the same command goes on where it was stopped.
    """
    from utils.device import pick_device
    from utils.model.folder import check_model, load_for_answers, load_tokenizer, model_sha256, quiet_offline
    from utils.model.generate import Decoding, generate_answers
    from utils.text import progress

    folder, model = check_model(settings.MODEL), None
    quiet_offline()
    kept.mkdir(parents=True, exist_ok=True)
    count, decoding = settings.SAMPLES, Decoding(do_sample=True, temperature=settings.TEMPERATURE)
    limits = {"max_new_tokens": settings.MAX_NEW_TOKENS, "batch_size": settings.BATCH_SIZE}
    identity = limits | {"samples": count, "temperature": settings.TEMPERATURE, "model": model_sha256(folder)}
    sampled, files = [], set()
    for start in progress("sampling answers", f"parts of {CHUNK} questions")(range(0, len(rows), CHUNK)):
        part, seed = rows[start : start + CHUNK], settings.SEED + start
        mine = identity | {"seed": seed, "rows": [row["id"] for row in part]}
        path = kept / f"{digest(mine)[:16]}.json"
        answers = read_kept(path, mine)
        if answers is None:
            if model is None:
                tokenizer, model = load_tokenizer(folder), load_for_answers(folder, pick_device())
            prompts = [split_row(row)[0] for row in part for _ in range(count)]
            answers = generate_answers(model, tokenizer, prompts, decoding=decoding, seed=seed, **limits)
            write_kept(path, mine, answers)
        sampled += [answers[at : at + count] for at in range(0, len(answers), count)]
        files.add(path)
    for old in set(kept.iterdir()) - files:  # of other rows, or of another model
        old.unlink()
    return sampled


def told_apart(pairs: list[dict]) -> float:
    """The share of preference rows whose good answer is recognised without the question; 0.5 is chance.

    Judged by the log-odds of an answer's character pairs in the other rows. It falls below 0.5 if the same words are good in one
    row and bad in another: the others lack the row's own good answer.
    """

    def parts(pair):
        texts = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        return [Counter(zip(f"\n{text}", f"{text}\n")) for text in texts]

    good, bad, right = Counter(), Counter(), 0.0
    for chosen, rejected in map(parts, pairs):
        good.update(chosen)
        bad.update(rejected)
    for both in map(parts, pairs):
        chosen, rejected = both
        odds_of = {
            at: (good[at] - chosen[at] + 0.5) / (bad[at] - rejected[at] + 0.5) for at in chosen | rejected
        }
        odds = [sum(count * math.log(odds_of[at]) for at, count in side.items()) for side in both]
        right += 0.5 if odds[0] == odds[1] else odds[0] > odds[1]
    return right / len(pairs)
