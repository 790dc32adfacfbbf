"""Make the built-in TCM sample from its fact tables: question-and-answer rows, an exam, preference pairs, statements, a term list.

    python data_prepare/sample/make_sample.py

Reads herbs.jsonl, formulas.jsonl, acupoints.jsonl, syndromes.jsonl, incompatibilities.jsonl and pregnancy.jsonl beside this
script and writes, always the same for the same tables:

    tcm_sample.jsonl    {"instruction", "input", "output", "split", "entity", "kind"}; split is by entity; some small talk
    tcm_preferences.jsonl   {"instruction", "input", "chosen", "rejected", "split", "entity", "kind"}: safe answers, the herb's caution
                        where one asks what a herb does, and nowhere else
    tcm_exam.jsonl      {"id", "question", "options", "answer", "subject"}; only about entities of the eval split
    statements.jsonl    {"text"}; every fact of every entity in several wordings, none of them a question
    terms.jsonl         {"kind", "term"}; words that may stand for one another (to make wrong answers of)

Whole entities are held out: no question about a held-out herb, formula, acupoint or syndrome is ever in the train split, so
that the exam asks what the statements taught and the questions of *other* entities taught to ask for.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `utils` is found from any folder

from data_prepare.sample.entities import Entity, hold_out, load_entities
from data_prepare.sample.exam import ASKED, GROUPS, exam_items
from data_prepare.sample.talk import small_talk
from data_prepare.sample.texts import preferences_of, rows_of, statements_of
from utils.errors import run
from utils.files import read_json, require_file, show_path, write_jsonl
from utils.settings import read_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--seed 1) ----
TABLES_DIR = "data_prepare/sample"      # the fact tables, and wordings.json: how each fact is asked for and stated
OUTPUT_DIR = "data_prepare/sample"      # where the five files go
HELD_OUT_SHARE = 0.2                    # [0 to 1] share of the entities of each kind that only the eval split and the exam ask about
ROWS_PER_FACT = 2                       # [1, 2, ...] question-and-answer rows per fact, one of them with a bare answer
REFUSALS = 40                           # [0, 1, ...] rows of small talk that ask what it cannot answer, beside one for each greeting
PAIRS_PER_HERB = 3                      # [1, 2, ...] preference pairs per herb whose better answer has its caution
CAUTION_SHARE = 0.5                     # [0.01 to 1] share of such pairs; in the others the worse answer has a caution
CARDS = 10                              # [1, 2, ...] statements that put all facts of an entity in one line, each in a new order
SEED = 0                                # [0, 1, ...] changes which wordings and which distractors are drawn
# ----
# fmt: on


def terms_of(entities: list[Entity]) -> list[dict]:
    """{"kind", "term"}: words that may stand for one another, by kind: the parts of list values, whole other values, names.

    "near" has the terms of the same kind that mean nearly the same: putting one for the other makes no clear mistake.
    """
    seen = set()
    for entity in entities:
        for name, value in entity.facts.items():
            parts = value.removesuffix("经") if name == "channels" else value.strip("《》")
            kind = {"composition": "herb", "against": "herb", "formula": "formula"}.get(
                name, f"{entity.kind}.{name}"
            )
            seen.update((kind, part) for part in parts.split("、"))
        if entity.kind in ASKED:
            seen.add((entity.kind, entity.name))
    terms = []
    for kind, term in sorted(seen):
        groups = [group for group in GROUPS.get(kind.partition(".")[2], []) if term in group]
        near = sorted(set().union(*groups) - {term})
        terms.append({"kind": kind, "term": term} | ({"near": near} if near else {}))
    return terms


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(globals(), argv)
    rng = random.Random(settings.SEED)

    # 1. Read the tables and choose whom the training rows never ask about
    wordings, talk = (
        read_json(require_file(settings.TABLES_DIR / name, "git checkout data_prepare/sample"))
        for name in ("wordings.json", "talk.json")
    )
    entities = load_entities(settings.TABLES_DIR, wordings)
    hold_out(entities, settings.HELD_OUT_SHARE)

    # 2. Make the rows, the exam, the statements, the terms and the pairs
    rows = [
        row
        for turn, entity in enumerate(entities)
        for row in rows_of(entity, wordings, settings.ROWS_PER_FACT, turn)
    ]
    said = {
        question["content"]: answer["content"]
        for question, answer in small_talk(talk, 1, settings.REFUSALS, random.Random(settings.SEED))
    }
    for question, answer in said.items():
        row = {"instruction": question, "input": "", "output": answer}
        rows.append({**row, "split": "train", "entity": "", "kind": "talk"})
    exam = list(exam_items(entities, wordings, rng))
    statements = [
        {"text": text} for entity in entities for text in statements_of(entity, wordings, settings.CARDS, rng)
    ]
    terms = terms_of(entities)
    pairs = list(preferences_of(entities, wordings, settings.PAIRS_PER_HERB, settings.CAUTION_SHARE, rng))

    # 3. Write them
    files = {
        "tcm_sample": rows,
        "tcm_preferences": pairs,
        "tcm_exam": exam,
        "statements": statements,
        "terms": terms,
    }
    for name, content in files.items():
        path = settings.OUTPUT_DIR / f"{name}.jsonl"
        print(f"{write_jsonl(path, content):>7,} lines -> {show_path(path)}")


if __name__ == "__main__":
    sys.exit(run(main))
