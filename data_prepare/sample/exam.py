"""The exam of the built-in sample: single-choice questions about held-out entities, each with one right answer."""

import random
from collections.abc import Iterator

from data_prepare.sample.entities import Entity, Wordings

# What the exam asks. Left out: attributes whose value another entity's value could also truthfully answer
# (cautions and indications overlap), and codes, which are letters of the alphabet more than medicine.
ASKED = {
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


def exam_items(entities: list[Entity], wordings: Wordings, rng: random.Random) -> Iterator[dict]:
    """{"id", "question", "options", "answer", "subject"} for each attribute that is asked of each held-out entity."""
    for entity in entities:
        if not entity.held_out or entity.kind not in ASKED:
            continue
        for name in ASKED[entity.kind]:
            if name not in entity.facts:
                continue
            wrong = _wrong_options(entity, name, entities, rng)
            if len(wrong) < 3:
                continue
            right = entity.facts[name]
            options = [right, *wrong]
            rng.shuffle(options)
            question = rng.choice(wordings[entity.kind][name]["questions"]).format(n=entity.name)
            yield {
                "id": f"{entity.kind}-{name}-{entity.name}",
                "question": question,
                "options": dict(zip("ABCD", options)),
                "answer": "ABCD"[options.index(right)],
                "subject": SUBJECTS[entity.kind],
            }


def _wrong_options(entity: Entity, name: str, entities: list[Entity], rng: random.Random) -> list[str]:
    """Up to three values of the attribute `name` that other entities of the same kind have.

    They are drawn as often as they occur, so that a common answer is no hint; those of nearly the right one's length come
    first; and none is so close to the right one, or to another, that it would be right as well.
    """
    right = entity.facts[name]
    pool = [other.facts[name] for other in entities if other.kind == entity.kind and name in other.facts]
    rng.shuffle(pool)
    pool.sort(key=lambda value: abs(len(value) - len(right)) > max(2, 0.3 * len(right)))
    wrong: list[str] = []
    for value in pool:
        known = [right, *wrong, *entity.also.get(name, [])]
        if len(wrong) < 3 and not any(too_close(name, one, value) for one in known):
            wrong.append(value)
    return wrong


def too_close(name: str, right: str, other: str) -> bool:
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
