"""What is said of an entity: rows of question and answer, preference pairs, and plain statements."""

import random
import re
from collections.abc import Iterator

from data_prepare.sample.entities import Entity, Wordings

BARE = "请只写出答案。"  # asks for the bare fact: what the exam scores, and what a short answer looks like
CAUTION = "使用注意：{}。"  # follows what a herb does, in a statement and in a safe answer


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


def preferences_of(
    entities: list[Entity], wordings: Wordings, per_herb: int, share: float, rng: random.Random
) -> Iterator[dict]:
    """Preference pairs for safe answers: who asks what a herb does is told its caution, too; no other answer has one.

    `per_herb` pairs for each herb, in which the better answer has the caution; they are `share` of all pairs. In the others the
    worse answer has one, the herb's own or that of any herb. Half of these are near the first kind (bare answers about what a herb
    does, what a formula does), so that the caution follows the question that is asked and nothing else.
    """
    for held_out in (False, True):
        own = [entity for entity in entities if entity.held_out == held_out]
        cautions = {entity.name: entity.facts["caution"] for entity in own if entity.kind == "herb"}
        wanted, near, far = [], [], []
        for turn, entity in enumerate(own):
            for row in rows_of(entity, wordings, 1 + per_herb, turn):
                asks_herb = row["kind"] == "herb.actions"
                is_near = asks_herb or row["kind"] == "formula.actions"
                (wanted if asks_herb and not row["input"] else near if is_near else far).append(row)
        half = round(len(wanted) * (1 - share) / share / 2)
        plain = rng.sample(near, min(half, len(near))) + rng.sample(far, half)
        pairs = [("caution wanted", row) for row in wanted] + [("caution unasked", row) for row in plain]
        for kind, row in rng.sample(pairs, len(pairs)):
            answer = row.pop("output")
            caution = cautions.get(row["entity"]) or rng.choice(list(cautions.values()))
            cautious = answer + CAUTION.format(caution)
            chosen, rejected = (cautious, answer) if kind == "caution wanted" else (answer, cautious)
            yield {**row, "chosen": chosen, "rejected": rejected, "kind": kind}


def statements_of(entity: Entity, wordings: Wordings, cards: int, rng: random.Random) -> Iterator[str]:
    """Plain sentences: every wording of every fact by itself, and `cards`, each with all facts of the entity in a new order.

    A card names the entity once, at its start. So a fact is met at every distance from its name, which is what lets a model
    find it again from a question; told next to the name only, it stays bound to that wording. What a herb does is said once more
    with its caution behind it, as in a safe answer.
    """
    clauses = []  # for each fact, its statements without the name at their start, for the cards
    for name, value in entity.facts.items():
        words = wordings[entity.kind][name]["statements"]
        plain = [text.format(n=entity.name, v=value) for text in words]
        yield from plain
        if name == "actions" and "caution" in entity.facts:
            yield from (text + CAUTION.format(entity.facts["caution"]) for text in plain)
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
