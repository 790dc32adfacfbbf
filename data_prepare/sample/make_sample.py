"""Make the built-in TCM sample from its fact tables: question-and-answer rows, an exam, plain statements, a term list.

    python data_prepare/sample/make_sample.py

Reads herbs.jsonl, formulas.jsonl, acupoints.jsonl, syndromes.jsonl, incompatibilities.jsonl and pregnancy.jsonl beside this
script and writes, always the same for the same tables:

    tcm_sample.jsonl    {"instruction", "input", "output", "split", "entity", "kind"}; split is by entity
    tcm_exam.jsonl      {"id", "question", "options", "answer", "subject"}; only about entities of the eval split
    statements.jsonl    {"text"}; every fact of every entity in several wordings, none of them a question
    terms.jsonl         {"kind", "term"}; words that may stand for one another (to make wrong answers of)

Whole entities are held out: no question about a held-out herb, formula, acupoint or syndrome is ever in the train split, so
that the exam asks what the statements taught and the questions of *other* entities taught to ask for.
"""

import hashlib
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `utils` is found from any folder

from utils.errors import run
from utils.files import read_json, read_jsonl, require_file, show_path, write_jsonl
from utils.settings import parse_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--seed 1) ----
TABLES_DIR = "data_prepare/sample"      # the fact tables, and wordings.json: how each fact is asked for and stated
OUTPUT_DIR = "data_prepare/sample"      # where the four files go
HELD_OUT_SHARE = 0.2                    # share of the entities of each kind that only the eval split and the exam ask about
ROWS_PER_FACT = 2                       # question-and-answer rows a fact, one of them with a bare answer
CARDS = 10                              # statements that put all facts of an entity in one line, each in a new order
SEED = 0                                # changes which wordings and which distractors are drawn
# ----
# fmt: on

BARE = "请只写出答案。"  # asks for the bare fact: what the exam scores, and what a short answer looks like

# What the exam asks. Left out: attributes whose value another entity's value could also truthfully answer
# (cautions and indications overlap), and codes, which are letters of the alphabet more than medicine.
EXAM = {
    "herb": ["category", "nature", "flavours", "channels", "actions"],
    "formula": ["category", "source", "composition", "actions", "indication"],
    "acupoint": ["meridian", "location", "special"],
    "syndrome": ["signs", "tongue", "pulse", "principle", "formula"],
}
SUBJECTS = {"herb": "中药", "formula": "方剂", "acupoint": "腧穴", "syndrome": "证候"}

# Values that mean nearly the same thing: no distractor comes from the group of the right answer.
GROUPS = {
    "nature": [{"大寒", "寒", "微寒", "凉"}, {"平"}, {"微温", "温"}, {"热", "大热"}],
    "category": [
        {"止血药", "活血化瘀药"},
        {"化湿药", "利水渗湿药"},
        {"清热药", "泻下药"},
        {"解表剂", "表里双解剂"},
        {"补气药", "补阳药"},
        {"补血药", "补阴药"},
        {"平肝息风药", "安神药"},
        {"理血剂", "补益剂"},
        {"祛湿剂", "祛痰剂"},
        {"清热剂", "祛暑剂", "表里双解剂"},
        {"攻毒杀虫药", "驱虫药", "涌吐药"},
    ],
}
# Concepts of treatment that different words express: two values that share one are too close to be options together.
CONCEPTS = [
    "补益养滋生扶健强壮",
    "清泻凉降火热",
    "温散寒阳回",
    "利水湿渗通淋尿肿",
    "行理疏气郁中",
    "活化瘀血经",
    "止血",
    "化痰咳喘肺",
    "安神惊心",
    "息风平肝痉",
    "解表汗风",
    "祛风湿痹",
    "消食积滞",
    "杀虫",
    "涩收固止泻敛",
    "通便肠下",
    "解毒疮脓",
    "明目",
    "开窍",
]


def value_text(kind, name, value):
    """How an attribute's value is written in an answer."""
    text = "、".join(value) if isinstance(value, list) else value
    if (kind, name) == ("herb", "channels"):
        return text + "经"
    return f"《{text}》" if (kind, name) == ("formula", "source") else text


def load_entities(tables, wordings):
    """[{"kind", "name", "facts": {attribute: value text}, "also": {attribute: [values]}}] of all fact tables, in file order.

    "also" lists what some textbooks say instead: never taught, and never offered as a wrong answer.
    """
    entities = []
    for kind, table in (
        ("herb", "herbs"),
        ("formula", "formulas"),
        ("acupoint", "acupoints"),
        ("syndrome", "syndromes"),
    ):
        for row in read_jsonl(tables / f"{table}.jsonl", wanted=["name"]):
            facts = {name: value_text(kind, name, row[name]) for name in wordings[kind] if row[name]}
            entities.append({"kind": kind, "name": row["name"], "facts": facts, "also": row.get("also", {})})
    against = {}
    for row in read_jsonl(tables / "incompatibilities.jsonl", wanted=["kind", "a", "b"]):
        for one, other in ((row["a"], row["b"]), (row["b"], row["a"])):
            against.setdefault(one, []).append(other)
    for name, others in against.items():
        entities.append({"kind": "incompatibility", "name": name, "facts": {"against": "、".join(others)}})
    for row in read_jsonl(tables / "pregnancy.jsonl", wanted=["name", "level"]):
        entities.append({"kind": "pregnancy", "name": row["name"], "facts": {"level": row["level"]}})
    return entities


def hold_out(entities, share):
    """Mark the entities with the lowest hash of their name, `share` of each of the four main kinds, as held out.

    A name is held out in every kind it appears in: a held-out herb is not asked about as a pregnancy caution either.
    """
    names = set()
    for kind in EXAM:
        own = sorted(
            (e["name"] for e in entities if e["kind"] == kind),
            key=lambda n: hashlib.sha256(n.encode()).hexdigest(),
        )
        names.update(own[: round(share * len(own))])
    for entity in entities:
        entity["held_out"] = entity["name"] in names


def rows_of(entity, wordings, rows_per_fact, turn):
    """Question-and-answer rows of one entity: for each fact one bare answer and `rows_per_fact` - 1 full sentences.

    `turn` (an int that differs from entity to entity) moves through the wordings, so that all of them are used.
    """
    for place, (name, value) in enumerate(entity["facts"].items()):
        words = wordings[entity["kind"]][name]
        for number in range(rows_per_fact):
            question = words["questions"][(turn + place + number) % len(words["questions"])]
            answer = words["answers"][(turn + place + number) % len(words["answers"])] if number else "{v}。"
            yield {
                "instruction": question.format(n=entity["name"]),
                "input": "" if number else BARE,
                "output": answer.format(n=entity["name"], v=value),
                "split": "eval" if entity["held_out"] else "train",
                "entity": entity["name"],
                "kind": f"{entity['kind']}.{name}",
            }


def statements_of(entity, wordings, cards, rng):
    """Plain sentences: every wording of every fact by itself, and `cards`, each with all facts of the entity in a new order.

    A card names the entity once, at its start. So a fact is met at every distance from its name, which is what lets a model
    find it again from a question; told next to the name only, it stays bound to that wording.
    """
    clauses = []
    for name, value in entity["facts"].items():
        words = wordings[entity["kind"]][name]["statements"]
        yield from (text.format(n=entity["name"], v=value) for text in words)
        headless = [
            re.sub("^{n}(穴|的|：)*", "", text)
            for text in words
            if text.startswith("{n}") and not text.startswith("{n}（")
        ]
        clauses.append([text.rstrip("。").format(v=value) for text in headless])
    for _ in range(cards if len(clauses) > 1 else 0):
        card = [rng.choice(own) for own in clauses]
        rng.shuffle(card)
        yield f"{entity['name']}：{'；'.join(card)}。"


def too_close(name, right, other):
    """Whether `other` could also pass for a right answer where `right` is asked for as attribute `name`."""
    if other == right or any(right in group and other in group for group in GROUPS.get(name, [])):
        return True
    mine, theirs = (set(value.removesuffix("经").replace("微", "").split("、")) for value in (right, other))
    if name in ("flavours", "channels", "special", "composition", "signs"):
        return mine <= theirs or theirs <= mine or (name in ("special", "signs") and bool(mine & theirs))
    if name in ("actions", "principle", "indication"):
        shared = set(zip(right, right[1:])) & set(zip(other, other[1:]))
        return bool(shared) or any(set(c) & set(right) and set(c) & set(other) for c in CONCEPTS)
    if name in ("tongue", "pulse"):  # any finding in common, such as 弦 in 脉弦滑 and 脉弦有力
        return bool((set(right) & set(other)) - set("舌苔脉而有无力薄"))
    return False


def exam_items(entities, wordings, rng):
    """Single-choice items about the held-out entities. Distractors are the values of other entities of the same kind, drawn
    as often as they occur (so that a common answer is no hint), of nearly the same length, and never close enough to the
    right one, or to one another, to be right as well."""
    for entity in (e for e in entities if e["held_out"] and e["kind"] in EXAM):
        for name in (name for name in EXAM[entity["kind"]] if name in entity["facts"]):
            right = entity["facts"][name]
            pool = [e["facts"][name] for e in entities if e["kind"] == entity["kind"] and name in e["facts"]]
            rng.shuffle(pool)
            pool.sort(key=lambda value: abs(len(value) - len(right)) > max(2, 0.3 * len(right)))
            wrong = []
            for value in pool:
                known = [right, *wrong, *entity["also"].get(name, [])]
                if len(wrong) < 3 and not any(too_close(name, one, value) for one in known):
                    wrong.append(value)
            if len(wrong) < 3:
                continue
            options = [right, *wrong]
            rng.shuffle(options)
            question = rng.choice(wordings[entity["kind"]][name]["questions"]).format(n=entity["name"])
            yield {
                "id": f"{entity['kind']}-{name}-{entity['name']}",
                "question": question,
                "options": dict(zip("ABCD", options)),
                "answer": "ABCD"[options.index(right)],
                "subject": SUBJECTS[entity["kind"]],
            }


def terms_of(entities):
    """Words that may stand for one another, by kind: the single terms of list values, whole values otherwise, and names.

    "near" names the terms of the same kind that mean nearly the same: putting one for the other makes no clear mistake.
    """
    seen = set()
    for entity in entities:
        for name, value in entity["facts"].items():
            parts = (
                value.removesuffix("经").split("、")
                if name == "channels"
                else value.strip("《》").split("、")
            )
            kind = {"composition": "herb", "against": "herb", "formula": "formula"}.get(
                name, f"{entity['kind']}.{name}"
            )
            seen.update((kind, part) for part in parts)
        if entity["kind"] in EXAM:
            seen.add((entity["kind"], entity["name"]))
    near = {
        (kind, term): sorted(
            {t for group in GROUPS.get(kind.partition(".")[2], []) if term in group for t in group} - {term}
        )
        for kind, term in seen
    }
    return [
        {"kind": kind, "term": term} | ({"near": near[kind, term]} if near[kind, term] else {})
        for kind, term in sorted(seen)
    ]


def main(argv=None):
    settings = parse_settings(__file__, argv)
    rng = random.Random(settings.SEED)

    # 1. Read the tables and choose whom the training rows never ask about
    wordings = read_json(
        require_file(settings.TABLES_DIR / "wordings.json", "git checkout data_prepare/sample")
    )
    entities = load_entities(settings.TABLES_DIR, wordings)
    hold_out(entities, settings.HELD_OUT_SHARE)

    # 2. Make the rows, the exam, the statements and the terms
    files = {
        "tcm_sample.jsonl": [
            row
            for turn, e in enumerate(entities)
            for row in rows_of(e, wordings, settings.ROWS_PER_FACT, turn)
        ],
        "tcm_exam.jsonl": list(exam_items(entities, wordings, rng)),
        "statements.jsonl": [
            {"text": text} for e in entities for text in statements_of(e, wordings, settings.CARDS, rng)
        ],
        "terms.jsonl": terms_of(entities),
    }

    # 3. Write them
    for name, rows in files.items():
        print(
            f"{write_jsonl(settings.OUTPUT_DIR / name, rows):>7,} lines -> {show_path(settings.OUTPUT_DIR / name)}"
        )


if __name__ == "__main__":
    sys.exit(run(main))
