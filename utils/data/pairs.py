"""Worse answers for preference pairs: swapped facts, another question's answer, or what a model itself says wrongly.

Each maker takes SFT rows and yields for each of them a Worse: a rejected answer, or the reason why there is none.
"""

import bisect
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.data.terms import Terms

LENGTH_TOLERANCE = 0.2  # a rejected answer is at most this much longer or shorter: DPO shall not learn length


class Worse(NamedTuple):
    """A worse answer, or None and why there is none."""

    answer: str | None
    reason: str = ""


class Sampling(NamedTuple):
    """How answers are sampled from a model: `samples` of each question; what agrees by `different` or more is not worse."""

    model: str | Path
    samples: int
    max_new_tokens: int
    different: float
    seed: int


def split_row(row: dict) -> tuple[list[dict], dict]:
    """(prompt messages, answer message) of an SFT row: the last assistant turn and what comes before it."""
    last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last], row["messages"][last]


def similar_length(good: str, bad: str) -> bool:
    """Whether `bad` is within LENGTH_TOLERANCE of the length of `good` (always one character of leeway)."""
    return abs(len(good) - len(bad)) <= max(1, LENGTH_TOLERANCE * len(good))


def agreement(one: str, other: str) -> float:
    """F1 of the two texts' character pairs (Dice 1945): 1 for the same text, 0 for nothing in common."""
    pairs = [Counter(zip(f" {text}", f"{text} ")) for text in (one, other)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())


def swapped_facts(rows: list[dict], terms: Terms, rng: random.Random) -> Iterator[Worse]:
    """The good answer with terms swapped for wrong ones of the same kind."""
    for row in rows:
        prompt, answer = split_row(row)
        wrong, reason = terms.swap(answer["content"], prompt[-1]["content"], rng)
        if wrong and not similar_length(answer["content"], wrong):
            wrong, reason = None, "the swapped answer has another length"
        yield Worse(wrong, reason)


def mismatched(rows: list[dict], rng: random.Random) -> Iterator[Worse]:
    """Another row's answer, of similar length."""
    by_length = sorted({split_row(row)[1]["content"] for row in rows}, key=lambda text: (len(text), text))
    lengths = [len(text) for text in by_length]
    for row in rows:
        good = split_row(row)[1]["content"]
        leeway = max(1, LENGTH_TOLERANCE * len(good))
        near = range(
            bisect.bisect_left(lengths, len(good) - leeway), bisect.bisect_right(lengths, len(good) + leeway)
        )
        others = [index for index in rng.sample(near, min(len(near), 8)) if by_length[index] != good]
        yield Worse(by_length[others[0]]) if others else Worse(None, "no other answer of similar length")


def sampled(rows: list[dict], sampling: Sampling) -> Iterator[Worse]:
    """The answer that agrees least with the good one, of several sampled from a model."""
    for row, answers in zip(rows, zip(*_sample(rows, sampling))):
        good = split_row(row)[1]["content"]
        fits = [text.strip() for text in answers if text.strip() and similar_length(good, text.strip())]
        worst = min(fits, key=lambda text: agreement(text, good), default=None)
        if worst is None:
            yield Worse(None, "no sampled answer of similar length")
        elif agreement(worst, good) < sampling.different:
            yield Worse(worst)
        else:
            yield Worse(None, "every sampled answer is good")


def _sample(rows, sampling):
    """For each draw, the model's answers to all rows."""
    from utils.device import pick_device
    from utils.model.folders import check_model
    from utils.model.generate import generate_answers
    from utils.model.load import load_for_answers, load_tokenizer, quiet_offline
    from utils.progress import progress

    check_model(sampling.model)
    quiet_offline(sampling.model)
    tokenizer, model = load_tokenizer(sampling.model), load_for_answers(sampling.model, pick_device())
    prompts = [split_row(row)[0] for row in rows]
    return [
        generate_answers(
            model,
            tokenizer,
            prompts,
            sampling.max_new_tokens,
            greedy=False,
            seed=sampling.seed + draw,
            watch=progress(f"sampling answers, round {draw + 1} of {sampling.samples}"),
        )
        for draw in range(sampling.samples)
    ]


def make_pair(row: dict, worse: Worse, kind: str) -> dict | None:
    """The preference row of an SFT row and its worse answer; None where there is no answer that differs."""
    prompt, answer = split_row(row)
    if worse.answer is None or worse.answer == answer["content"]:
        return None
    rejected = {**answer, "content": worse.answer}
    return {"id": row["id"], "prompt": prompt, "chosen": [answer], "rejected": [rejected], "kind": kind}
