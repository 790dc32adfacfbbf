"""A world without medicine, in which the tiny base model learns what a question is: invented people, tools, places, weather.

Its wordings (world.json) are built like those of the TCM sample, so that what is learned here carries over; its names and its
facts are drawn by chance and mean nothing. `copy_exercises` asks about names that are met once only: the answer can come from
nowhere but the question.
"""

import random
from collections.abc import Iterator

from data_prepare.sample.entities import TABLES, Entity, Wordings
from data_prepare.sample.talk import one_turn
from utils.data.pairs import Terms

LOOK_ALIKES = 0.5  # share of the fresh names that differ little from a real one: each syllable has to be read


class Names:
    """Invented names of 2 to 4 characters, put together from the characters of real terms, none of them a term."""

    def __init__(self, terms: Terms, rng: random.Random):
        self.terms, self.rng = terms, rng
        self.characters = sorted(
            {character for term in terms.kinds for character in term if character.isalpha()}
        )
        self.real = [name for kind in TABLES for name in terms.by_kind[kind]]

    def different(self, count: int) -> list[str]:
        """`count` different names drawn character by character."""
        names: dict[str, None] = {}
        while len(names) < count:
            names[self._new(self._any)] = None
        return list(names)

    def fresh(self) -> str:
        """One name, half the time a look-alike of a real one."""
        return self._new(self._look_alike if self.rng.random() < LOOK_ALIKES else self._any)

    def _new(self, draw):
        name = draw()
        while name in self.terms.kinds:
            name = draw()
        return name

    def _any(self):
        return "".join(self.rng.choices(self.characters, k=self.rng.choice([2, 3, 3, 4])))

    def _look_alike(self):
        """A real name with one character exchanged, or the halves of two of them joined."""
        one, other = self.rng.sample(self.real, 2)
        if self.rng.random() < 0.5:
            return one[: (len(one) + 1) // 2] + other[len(other) // 2 :]
        at = self.rng.randrange(len(one))
        return one[:at] + self.rng.choice(self.characters) + one[at + 1 :]


def invent_world(world: Wordings, count: int, asked_share: float, names: Names) -> list[Entity]:
    """`count` entities with facts drawn from `world`, in equal parts of its kinds; `asked_share` of them are not held out."""
    entities = []
    for number, name in enumerate(names.different(count)):
        kind = list(world)[number % len(world)]
        facts = {attribute: _value(words, names.rng) for attribute, words in world[kind].items()}
        entities.append(Entity(kind, name, facts, held_out=number >= asked_share * count))
    return entities


def _value(words, rng):
    """One of the values, or as many as the attribute may have."""
    return "、".join(rng.sample(words["values"], rng.randint(1, words.get("most", 1))))


def copy_exercises(count: int, patterns: list[list[str]], names: Names) -> Iterator[list[dict]]:
    """`count` one-turn conversations about fresh names; the answer carries the right one over from the question."""
    for _ in range(count):
        n, m = names.fresh(), names.fresh()
        question, answer = (text.format(n=n, m=m) for text in names.rng.choice(patterns))
        yield one_turn(question, answer)
