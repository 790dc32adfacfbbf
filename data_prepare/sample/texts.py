"""What is said of an entity: rows of question and answer, and plain statements."""

import random
import re
from collections.abc import Iterator

from data_prepare.sample.entities import Entity, Wordings

BARE = "请只写出答案。"  # asks for the bare fact: what the exam scores, and what a short answer looks like


def rows_of(entity: Entity, wordings: Wordings, rows_per_fact: int, turn: int) -> Iterator[dict]:
    """Question-and-answer rows of one entity: for each fact one bare answer and `rows_per_fact` - 1 full sentences.

    `turn` (an int that differs from entity to entity) moves through the wordings, so that all of them are used.
    """
    for position, (name, value) in enumerate(entity.facts.items()):
        words = wordings[entity.kind][name]
        for number in range(rows_per_fact):
            question = words["questions"][(turn + position + number) % len(words["questions"])]
            answer = (
                words["answers"][(turn + position + number) % len(words["answers"])] if number else "{v}。"
            )
            yield {
                "instruction": question.format(n=entity.name),
                "input": "" if number else BARE,
                "output": answer.format(n=entity.name, v=value),
                "split": "eval" if entity.held_out else "train",
                "entity": entity.name,
                "kind": f"{entity.kind}.{name}",
            }


def statements_of(entity: Entity, wordings: Wordings, cards: int, rng: random.Random) -> Iterator[str]:
    """Plain sentences: every wording of every fact by itself, and `cards`, each with all facts of the entity in a new order.

    A card names the entity once, at its start. So a fact is met at every distance from its name, which is what lets a model
    find it again from a question; told next to the name only, it stays bound to that wording.
    """
    clauses = []  # for each fact, its statements without the name at their start, for the cards
    for name, value in entity.facts.items():
        words = wordings[entity.kind][name]["statements"]
        yield from (text.format(n=entity.name, v=value) for text in words)
        headless = [
            re.sub("^{n}(穴|的|：)*", "", text)
            for text in words
            if text.startswith("{n}") and not text.startswith("{n}（")
        ]
        clauses.append([text.rstrip("。").format(v=value) for text in headless])
    for _ in range(cards if len(clauses) > 1 else 0):
        card = [rng.choice(own) for own in clauses]
        rng.shuffle(card)
        yield f"{entity.name}：{'；'.join(card)}。"
