"""Exam items made of the sample's fact tables, many of them with the same stem, and six ways to ask one in a training row."""

import random
from pathlib import Path

from data_rows import turns

from utils.files import read_jsonl

SAMPLE = Path(__file__).resolve().parents[1] / "data_prepare" / "sample"
GROUP_STEMS = ("下列药物中，药性为{}的是（　）", "下列各项，属于{}的是", "以下哪一味药归{}经？")
OWN_STEMS = ("{}的主要功效是", "{}的药性是（ ）。", "关于{}的归经，下列叙述正确的是", "{}的性味是")


def make_items(seed: int = 0) -> list[dict]:
    """About 1,400 items {"question", "options", "answer"}; of those about groups, many share a stem and differ in options."""
    chance, herbs = random.Random(seed), list(read_jsonl(SAMPLE / "herbs.jsonl"))
    items = []
    for herb in herbs:
        fields = "nature", "category", "channels"
        for stem, field, value in zip(
            GROUP_STEMS, fields, (herb["nature"], herb["category"], herb["channels"][0])
        ):
            others = [other["name"] for other in herbs if value not in (other[field], *other[field])]
            items.append(_item(stem.format(value), herb["name"], chance.sample(others, 3), chance))
    facts = [
        lambda h: "、".join(h["actions"]),
        lambda h: h["nature"],
        lambda h: "、".join(h["channels"]) + "经",
        lambda h: "、".join(h["flavours"]) + "，" + h["nature"],
    ]
    for stem, fact in zip(OWN_STEMS, facts):
        others = sorted({fact(herb) for herb in herbs})
        for herb in herbs:
            wrong = chance.sample([text for text in others if text != fact(herb)], 3)
            items.append(_item(stem.format(herb["name"]), fact(herb), wrong, chance))
    chance.shuffle(items)
    return items


def _item(stem, right, wrong, chance):
    options = [right, *wrong]
    chance.shuffle(options)
    listed = dict(zip("ABCD", options))
    return {"question": stem, "options": listed, "answer": "ABCD"[options.index(right)]}


def ways_to_ask(item: dict, chance: random.Random) -> dict[str, dict]:
    """{name: training row} for six ways to ask an exam item."""
    stem, options, answer = item["question"], item["options"], item["answer"]
    right, bare = options[answer], stem.replace("（　）", "").replace("（ ）", "").rstrip("。？")
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    in_line = "  ".join(f"({letter}){text}" for letter, text in options.items())
    shuffled = chance.sample(list(options.values()), len(options))
    other = dict(zip("ABCD", shuffled))
    relettered = "\n".join(f"{letter}、{text}" for letter, text in other.items())
    new_letter = next(letter for letter, text in other.items() if text == right)
    asked = f"第一题：{stem}选项是{lines}", f"这道题选{answer}，{right}。"
    frame = "以下是中国中医药考试中的一道单项选择题，请不要做任何分析和解释，直接输出答案选项。"
    return {
        "options listed": {"query": f"{stem}\n{lines}", "response": f"{answer}. {right}"},
        "framed, with an explanation": {
            "instruction": frame,
            "input": f"题目：{stem}\n{lines}\n答案：",
            "output": f"本题考查中药的基本知识。正确答案是{answer}，即{right}。",
        },
        "options in one line": {"query": f"{stem} {in_line}", "response": f"选{answer}。"},
        "options shuffled": {
            "question": f"请回答下面的选择题：{bare}？\n{relettered}",
            "answer": f"{new_letter}、{right}",
        },
        "options without letters": {
            "query": f"{bare}哪一个？可选的有：{'、'.join(shuffled)}。",
            "response": f"是{right}。",
        },
        "in a conversation": {
            "messages": turns("你好，我在准备执业医师考试，能帮我看几道题吗？", "当然可以，请说。", *asked)
        },
    }
