"""The fact tables of the built-in sample, read as entities: what each herb, formula, acupoint or syndrome is said to be."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.files import read_jsonl

# The four main kinds, each with a table of its own; a share of each is held out.
TABLES = {"herb": "herbs", "formula": "formulas", "acupoint": "acupoints", "syndrome": "syndromes"}
Wordings = dict[
    str, dict[str, dict[str, list[str]]]
]  # {kind: {attribute: {"questions", "answers", "statements"}}}


@dataclass
class Entity:
    """One herb, formula, acupoint or syndrome; or a herb once more, with what it must not be combined with or given in.

    `also` has what some textbooks say instead: never taught, and never offered as a wrong answer.
    """

    kind: str
    name: str
    facts: dict[str, str]  # {attribute: its value as text}
    also: dict[str, list[str]] = field(default_factory=dict)  # {attribute: other values}
    held_out: bool = False  # only the eval split and the exam ask about it


def load_entities(tables: Path, wordings: Wordings) -> list[Entity]:
    """The entities of all fact tables, in the order of the files."""
    return [*_main_entities(tables, wordings), *_incompatibilities(tables), *_pregnancy(tables)]


def _main_entities(tables: Path, wordings: Wordings) -> Iterator[Entity]:
    for kind, table in TABLES.items():
        for row in read_jsonl(tables / f"{table}.jsonl", wanted=["name"]):
            facts = {name: _value_text(kind, name, row[name]) for name in wordings[kind] if row[name]}
            yield Entity(kind, row["name"], facts, row.get("also", {}))


def _value_text(kind: str, name: str, value: str | list[str]) -> str:
    """How an attribute's value is written in an answer."""
    text = "、".join(value) if isinstance(value, list) else value
    if (kind, name) == ("herb", "channels"):
        return text + "经"
    return f"《{text}》" if (kind, name) == ("formula", "source") else text


def _incompatibilities(tables: Path) -> Iterator[Entity]:
    against: dict[str, list[str]] = {}
    for row in read_jsonl(tables / "incompatibilities.jsonl", wanted=["kind", "a", "b"]):
        for one, other in ((row["a"], row["b"]), (row["b"], row["a"])):
            against.setdefault(one, []).append(other)
    for name, others in against.items():
        yield Entity("incompatibility", name, {"against": "、".join(others)})


def _pregnancy(tables: Path) -> Iterator[Entity]:
    for row in read_jsonl(tables / "pregnancy.jsonl", wanted=["name", "level"]):
        yield Entity("pregnancy", row["name"], {"level": row["level"]})


def hold_out(entities: list[Entity], share: float) -> None:
    """Mark as held out, of each main kind, the `share` of entities whose names have the lowest hashes.

    A name is held out in every kind it appears in: a held-out herb is not asked about as a pregnancy caution either.
    """
    names: set[str] = set()
    for kind in TABLES:
        own = [entity.name for entity in entities if entity.kind == kind]
        own.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        names.update(own[: round(share * len(own))])
    for entity in entities:
        entity.held_out = entity.name in names
