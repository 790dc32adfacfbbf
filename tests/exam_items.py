"""Exam items made of the sample's fact tables, many of them with the same stem, and six ways to ask one in a training row."""

import random
from pathlib import Path

from data_rows import turns

from utils.files import read_jsonl

SAMPLE = Path(__file__).resolve().parents[1] / "data_prepare" / "sample"
GROUPS = {
    "nature": "下列药物中，药性为{}的是（　）",
    "category": "下列各项，属于{}的是",
    "channels": "以下哪一味药归{}经？",
}
FACTS = {
    "{}的主要功效是": lambda herb: "、".join(herb["actions"]),
    "{}的药性是（ ）。": lambda herb: herb["nature"],
    "关于{}的归经，下列叙述正确的是": lambda herb: "、".join(herb["channels"]) + "经",
    "{}的性味是": lambda herb: "、".join(herb["flavours"]) + "，" + herb["nature"],
}


def make_items(seed: int = 0) -> list[dict]:
    """About 1,400 items {"question", "options", "answer"}; of those about groups, many share a stem and differ in options."""
    chance, herbs, items = random.Random(seed), list(read_jsonl(SAMPLE / "herbs.jsonl")), []

    def add(stem, right, wrong):
        options = chance.sample([right, *chance.sample(wrong, 3)], 4)
        answer = "ABCD"[options.index(right)]
        items.append({"question": stem, "options": dict(zip("ABCD", options)), "answer": answer})

    for herb in herbs:
        for field, stem in GROUPS.items():
            value = herb[field][0] if field == "channels" else herb[field]
            others = [other["name"] for other in herbs if value not in (other[field], *other[field])]
            add(stem.format(value), herb["name"], others)
        for stem, fact in FACTS.items():
            add(
                stem.format(herb["name"]), fact(herb), sorted({fact(other) for other in herbs} - {fact(herb)})
            )
    return chance.sample(items, len(items))


def ways_to_ask(item: dict, chance: random.Random) -> list[dict]:
    """Training rows that ask an exam item in six ways: its options listed, framed and explained, in one line, in another order,
    without letters, and in a conversation."""
    stem, options, answer = item["question"], item["options"], item["answer"]
    right, bare = options[answer], stem.replace("（　）", "").replace("（ ）", "").rstrip("。？")
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    in_line = "  ".join(f"({letter}){text}" for letter, text in options.items())
    shuffled = chance.sample(list(options.values()), len(options))
    relettered = "\n".join(f"{letter}、{text}" for letter, text in zip("ABCD", shuffled))
    frame = "以下是中国中医药考试中的一道单项选择题，请不要做任何分析和解释，直接输出答案选项。"
    explained = f"本题考查中药的基本知识。正确答案是{answer}，即{right}。"
    asked = f"第一题：{stem}选项是{lines}", f"这道题选{answer}，{right}。"
    greeting = "你好，我在准备执业医师考试，能帮我看几道题吗？", "当然可以，请说。"
    return [
        {"query": f"{stem}\n{lines}", "response": f"{answer}. {right}"},
        {"instruction": frame, "input": f"题目：{stem}\n{lines}\n答案：", "output": explained},
        {"query": f"{stem} {in_line}", "response": f"选{answer}。"},
        {
            "question": f"请回答下面的选择题：{bare}？\n{relettered}",
            "answer": f"{'ABCD'[shuffled.index(right)]}、{right}",
        },
        {"query": f"{bare}哪一个？可选的有：{'、'.join(shuffled)}。", "response": f"是{right}。"},
        {"messages": turns(*greeting, *asked)},
    ]
