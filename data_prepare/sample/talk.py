"""Small talk for the tiny base model, and conversations: what it says to a greeting, what it cannot do, questions one after another."""

import random
import re
from collections.abc import Iterator, Sequence

TURNS = (2, 3, 4, 8)  # lengths of conversations, in questions
LINES = (2, 3, 4)  # lengths of texts, in statements


def small_talk(talk: dict, greetings: int, refusals: int, rng: random.Random) -> Iterator[list[dict]]:
    """Conversations of one question and its answer, made of talk.json.

    Every greeting comes `greetings` times. Questions that the model cannot answer come `refusals` times, those that a physician has
    to answer a third as often; their {slots} are filled by chance.
    """
    for group in talk["greetings"] * greetings:
        yield from (one_turn(question, group["answer"]) for question in group["questions"])
    for group in (*[talk["cannot"]] * refusals, *[talk["ill"]] * (refusals // 3)):
        question = rng.choice(group["questions"])
        filled = re.sub(r"{(\w+)}", lambda slot: rng.choice(talk["slots"][slot[1]]), question)
        yield one_turn(filled, group["answer"])


def one_turn(question: str, answer: str) -> list[dict]:
    """The messages of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def join(items: list, share: float, lengths: Sequence[int], rng: random.Random) -> list[list]:
    """All items in groups: a `share` of them, drawn by chance, in groups of one of the `lengths`, the others by themselves."""
    drawn = rng.sample(items, len(items))
    joined = round(share * len(items))
    groups = [[item] for item in drawn[joined:]]
    start = 0
    while start < joined:
        length = rng.choice(lengths)
        groups.append(drawn[start : min(start + length, joined)])
        start += length
    return groups
