"""Worse answers for preference pairs: swapped facts, another question's answer, or what a model itself says wrongly.

Each maker takes SFT rows and yields for each of them a Worse: a rejected answer, or the reason why there is none. An answer that
says the same as the good one is no worse answer.
"""

import bisect
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.data.normalize import normalize
from utils.data.swap import Question, swap_facts
from utils.data.terms import Terms

LENGTH_TOLERANCE = 0.2  # a rejected answer is at most this much longer or shorter: DPO shall not learn length
SAME = 0.8  # of the characters' pairs: answers that agree by this much say the same, where no facts tell them apart
CHUNK = 64  # rows whose answers are sampled, and kept, at a time
FOLDS = 5  # of the pairs, to measure how well they are told apart
MEASURED = 20_000  # pairs looked at for that

# Such as 肝胃不和证, whether it is a known term or not.
_SYNDROME = re.compile(r"[\u4e00-\u9fff]{2,4}证(?![\u4e00-\u9fff])")


class Worse(NamedTuple):
    """A worse answer, or None and why there is none."""

    answer: str | None
    reason: str = ""


class Sampling(NamedTuple):
    """How answers are sampled from a model: `samples` of each question, of at most `max_new_tokens`, `batch_size` at a time.

    `temperature`: 1 draws as likely as the model thinks a token, less draws likelier ones.
    """

    model: str | Path
    samples: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int


def split_row(row: dict) -> tuple[list[dict], dict]:
    """(prompt messages, answer message) of an SFT row: the last assistant turn and what comes before it."""
    last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last], row["messages"][last]


def question_of(row: dict) -> Question:
    """The last question of an SFT row and its answer."""
    prompt, answer = split_row(row)
    return Question(prompt[-1]["content"], answer["content"])


def similar_length(good: str, bad: str) -> bool:
    """Whether `bad` is within LENGTH_TOLERANCE of the length of `good` (always one character of leeway)."""
    return abs(len(good) - len(bad)) <= max(1, LENGTH_TOLERANCE * len(good))


def agreement(one: str, other: str) -> float:
    """F1 of the two texts' character pairs (Dice 1945): 1 for the same text, 0 for nothing in common."""
    pairs = [Counter(zip(f" {text}", f"{text} ")) for text in (one, other)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())


def facts_of(answer: str, question: str, terms: Terms) -> set[str]:
    """The terms and syndromes that an answer states and the question does not."""
    return terms.stated(answer, question) | {
        name for name in _SYNDROME.findall(answer) if name not in question
    }


def says_the_same(good: str, other: str, question: str, terms: Terms) -> bool:
    """Whether another answer is right, too: it is part of the good one or holds it, or states all its facts of the same thing.

    Where the good one states no known fact, an answer that hardly differs is right.
    """
    one, two = normalize(good), normalize(other)
    if one in two or two in one:
        return True
    facts = facts_of(good, question, terms)
    if facts:
        names = {term for _, _, term in terms.find(good) if len(term) > 1 and term in question}
        return facts <= facts_of(other, question, terms) and names <= {
            term for _, _, term in terms.find(other)
        }
    return agreement(good, other) >= SAME


def swapped_facts(rows: list[dict], terms: Terms, rng: random.Random) -> Iterator[Worse]:
    """The good answer with terms swapped for wrong ones of the same kind."""
    for wrong, reason in swap_facts([question_of(row) for row in rows], terms, rng):
        yield Worse(wrong, reason)


def mismatched(rows: list[dict], terms: Terms, rng: random.Random) -> Iterator[Worse]:
    """Another row's answer, of similar length, that shares no more than a few facts with the good one, and no syndrome."""
    by_length = sorted({split_row(row)[1]["content"] for row in rows}, key=lambda text: (len(text), text))
    lengths = [len(text) for text in by_length]
    for row in rows:
        question, good = question_of(row)
        leeway = max(1, LENGTH_TOLERANCE * len(good))
        near = range(
            bisect.bisect_left(lengths, len(good) - leeway), bisect.bisect_right(lengths, len(good) + leeway)
        )
        facts = facts_of(good, question, terms)
        others = (by_length[index] for index in rng.sample(near, min(len(near), 8)))
        fits = (other for other in others if not _could_answer(good, other, question, facts, terms))
        other = next(fits, None)
        yield (
            Worse(other)
            if other
            else Worse(None, "no other answer of similar length that says something else")
        )


def _could_answer(good, other, question, facts, terms):
    shared = facts & facts_of(other, question, terms)
    return (
        2 * len(shared) > len(facts)
        or any(_SYNDROME.search(fact) for fact in shared)
        or says_the_same(good, other, question, terms)
    )


def sampled(rows: list[dict], terms: Terms, sampling: Sampling, kept: Path) -> Iterator[Worse]:
    """The worst of several answers sampled from a model: fewest of the good one's facts, then least agreement with it.

    Sampled answers are kept in the file `kept` as they come: the same command goes on where it was stopped.
    """
    for row, answers in zip(rows, sample_answers(rows, sampling, kept)):
        question, good = question_of(row)
        texts = [text.strip() for text in answers]
        fits = [text for text in texts if text and similar_length(good, text)]
        wrong = [text for text in fits if not says_the_same(good, text, question, terms)]
        facts = facts_of(good, question, terms)
        if wrong:
            yield Worse(
                min(
                    wrong,
                    key=lambda text: (len(facts & facts_of(text, question, terms)), agreement(text, good)),
                )
            )
        else:
            yield Worse(
                None, "every sampled answer is right" if fits else "no sampled answer of similar length"
            )


def sample_answers(rows: list[dict], sampling: Sampling, kept: Path) -> list[list[str]]:
    """For each row, `samples` answers of the model. What `kept` holds of the same model, rows and settings is not done again."""
    from utils.model.folder import check_model, model_sha256, quiet_offline
    from utils.text import progress

    check_model(sampling.model)
    quiet_offline(sampling.model)
    identity = sampling._asdict() | {
        "model": model_sha256(sampling.model),
        "ids": [row["id"] for row in rows],
    }
    done = _kept_parts(kept, identity)
    missing = [start for start in range(0, len(rows), CHUNK) if start not in done]
    if missing:
        generate = _generator(sampling)
        kept.write_bytes(b"".join(map(_as_line, [identity, *done.items()])))
        with open(kept, "ab") as file:
            for start in progress("sampling answers", f"parts of {CHUNK} questions")(missing):
                done[start] = generate([split_row(row)[0] for row in rows[start : start + CHUNK]], start)
                file.write(_as_line([start, done[start]]))
                file.flush()
    return [answers for start in sorted(done) for answers in done[start]]


def _kept_parts(kept, identity):
    """{number of a part's first row: its answers} that an earlier run with this identity kept, each under its checksum."""
    if not kept.is_file():
        return {}
    found = []
    for line in kept.read_bytes().splitlines():
        try:
            value = json.loads(line)
            if value["sha256"] == _digest(value["kept"]):
                found.append(value["kept"])
        except (ValueError, TypeError, KeyError, RecursionError):
            pass  # damaged, or the piece of a line that a stopped run left: made again
    return dict(found[1:]) if found and found[0] == identity else {}


def _as_line(value):
    return json.dumps({"sha256": _digest(value), "kept": value}, ensure_ascii=False).encode() + b"\n"


def _digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _generator(sampling):
    """A function (conversations, number of the first row) -> for each of them `samples` answers."""
    from utils.device import pick_device
    from utils.model.folder import load_for_answers, load_tokenizer
    from utils.model.generate import Decoding, generate_answers

    tokenizer, model = load_tokenizer(sampling.model), load_for_answers(sampling.model, pick_device())
    decoding = Decoding(do_sample=True, temperature=sampling.temperature)

    def generate(conversations, start):
        repeated = [messages for messages in conversations for _ in range(sampling.samples)]
        answers = generate_answers(
            model,
            tokenizer,
            repeated,
            sampling.max_new_tokens,
            decoding,
            batch_size=sampling.batch_size,
            seed=sampling.seed + start,
        )
        return [answers[at : at + sampling.samples] for at in range(0, len(answers), sampling.samples)]

    return generate


def make_pair(row: dict, worse: Worse, kind: str) -> dict | None:
    """The preference row of an SFT row and its worse answer; None where there is no answer that differs."""
    prompt, answer = split_row(row)
    if worse.answer is None or worse.answer == answer["content"]:
        return None
    rejected = {**answer, "content": worse.answer}
    return {"id": row["id"], "prompt": prompt, "chosen": [answer], "rejected": [rejected], "kind": kind}


def told_apart(pairs: list[dict]) -> float:
    """The share of pairs, out of preference rows, whose good answer is recognised without the question; 0.5 is chance.

    Judged by the log-odds of an answer's character pairs in the good and the bad answers of the other FOLDS - 1 parts. Where
    the same words are good in one pair and bad in another, it falls below 0.5: the parts that are left lack just the pair's
    own good answer.
    """
    texts = [
        [_character_pairs(pair[side][0]["content"]) for side in ("chosen", "rejected")] for pair in pairs
    ]
    random.Random(0).shuffle(texts)
    texts = texts[:MEASURED]
    right = 0.0
    for fold in range(FOLDS):
        counts = Counter(), Counter()
        for number, answers in enumerate(texts):
            if number % FOLDS != fold:
                for count, answer in zip(counts, answers):
                    count.update(answer)
        for chosen, rejected in texts[fold::FOLDS]:
            margin = _log_odds(chosen, *counts) - _log_odds(rejected, *counts)
            right += 0.5 if margin == 0 else margin > 0
    return right / len(texts)


def _character_pairs(text):
    return [one + other for one, other in zip(f"\n{text}", f"{text}\n")]


def _log_odds(answer, good, bad):
    return sum(math.log((good[pair] + 0.5) / (bad[pair] + 0.5)) for pair in answer)
