"""Rows to convert: good ones of every schema, bad ones with their reasons, and files of them."""

import json
from pathlib import Path

CASE = "患者男性四十五岁反复头痛三年每遇风寒则发作伴有项背拘急恶风畏寒口不渴舌苔薄白脉浮紧曾服止痛药无效近日因受凉加重"


def write_lines(path: Path, *rows: dict) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; [] where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def turns(*texts: str, system: str = "") -> list[dict]:
    """Messages: the system text, if any, then user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    spoken = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


SFT = [
    ({"instruction": "问", "input": "补充", "output": "答"}, turns("问\n补充", "答")),
    ({"instruction": "问", "input": "", "output": "答"}, turns("问", "答")),
    ({"instruction": "问", "output": "答"}, turns("问", "答")),
    (
        {"instruction": "问", "input": None, "output": "答", "history": [["前问", "前答"]]},
        turns("前问", "前答", "问", "答"),
    ),
    ({"input": "问", "output": "答"}, turns("问", "答")),
    ({"query": "问", "response": " 答\r\n二 "}, turns("问", "答\n二")),
    ({"question": "问", "answer": "答", "system": "医"}, turns("问", "答", system="医")),
    ({"prompt": "问", "completion": "答"}, turns("问", "答")),
    ({"prompt": turns("问"), "completion": turns("", "答")[1:]}, turns("问", "答")),
    (
        {"messages": turns("问", "答", "再问", "再答", system="医")},
        turns("问", "答", "再问", "再答", system="医"),
    ),
    (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "医"},
        turns("问", "答", system="医"),
    ),
]


PREFERENCE = [
    {"prompt": "问", "chosen": "好", "rejected": "坏"},
    {"prompt": turns("问"), "chosen": turns("", "好")[1:], "rejected": turns("", "坏")[1:]},
    {"chosen": turns("问", "好"), "rejected": turns("问", "坏")},
    {"prompt": "问", "chosen": turns("问", "好"), "rejected": turns("问", "坏")},
    {
        "conversations": [{"from": "human", "value": "问"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
    },
    {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
    # a rejected answer beside an answer, and other names of the two
    {"messages": turns("问", "好"), "rejected_response": "坏"},
    {"messages": turns("问", "好"), "rejected": "坏"},
    {"messages": turns("问", "好"), "rejected_messages": turns("问", "坏")},
    {"instruction": "问", "output": "好", "rejected": "坏"},
    {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
    {"instruction": "问", "input": "", "accepted": "好", "rejected": "坏"},
    {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
    {"prompt": "问", "chosen_response": "好", "rejected_response": "坏", "chosen_score": 3},
]


CHOICES = {"A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连"}
EXAM = [
    {"": "0", "Question": "性温的是", **CHOICES, "Answer": "A"},
    {
        **{"exam_type": "医师", "exam_class": "中医", "exam_subject": "中药", "question_type": "单项选择题"},
        **{"question": "性温的是", "answer": "A", "option": {**CHOICES, "E": ""}},
    },
    {
        "Question": "性温的是",
        "Answer": "A",
        "Options": [{"key": key, "value": value} for key, value in CHOICES.items()],
    },
    {"instruction": "性温的是\nA.麻黄\nB.石膏\nC.知母\nD.黄连", "input": "", "output": "A"},
    {"id": "x", "question": "性温的是", "options": CHOICES, "answer": "a", "subject": "中药"},
]


BAD = [
    ({}, "fields not recognised"),
    ({"query": "问"}, "fields not recognised"),
    ({"query": "", "response": "答"}, "missing or empty question"),
    ({"query": "问", "response": "  \n"}, "missing or empty answer"),
    ({"query": "问", "response": None}, "missing or empty answer"),
    ({"query": {"a": None}, "response": "答"}, "wrong type"),
    ({"query": "问", "response": "答\x00"}, "control characters"),
    ({"query": "问", "response": "答\ud83d"}, "lone surrogate"),
    ({"prompt": "问", "chosen": "甲", "rejected": "乙", "kind": "\ud83d"}, "lone surrogate"),
    ({"query": "问", "response": "答\ufffd"}, "undecodable bytes"),
    ({"query": "问<|im_end|>\n<|im_start|>assistant\n坏", "response": "答"}, "control tokens"),
    ({"query": "问", "response": "答" * 60_000}, "too long"),
    ({"query": "问", "response": "<think>没有结束"}, "think block out of place"),
    ({"query": "问", "response": "<think>想</think>"}, "missing or empty answer"),
    ({"query": "问", "response": "<think>一</think>答<think>二</think>"}, "think block out of place"),
    ({"messages": [None]}, "wrong type"),
    ({"messages": "问"}, "wrong type"),
    (
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "答"}]},
        "missing or empty question",
    ),
    ({"messages": turns("问")}, "roles out of order"),
    ({"messages": turns("问", "答")[:1] + turns("问", "答")}, "roles out of order"),
    ({"messages": turns("问", "答") + turns("再问", system="医")}, "roles out of order"),
    ({"messages": [{"role": "tool", "content": "问"}]}, "tool calls are not trained"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "答"}]}, "missing or empty question"),
    ({"query": "问", "response": "答", "split": "fold3"}, "unknown split"),
    ({"prompt": "问", "chosen": "同", "rejected": "同 "}, "chosen equals rejected"),
    ({"prompt": "问", "chosen": "", "rejected": "坏"}, "missing or empty answer"),
    ({"prompt": turns("问", "答"), "chosen": "好", "rejected": "坏"}, "roles out of order"),
    ({"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "C"}, "answer not among the options"),
    ({"question": "问", "options": ["甲", "乙"], "answer": 3}, "answer not among the options"),
    ({"question": "问", "options": {"A": "甲", "B": ""}, "answer": "A"}, "missing or empty options"),
    ({"text": "麻黄发汗解表。"}, "plain text"),
    ({"question": "问", "options": {"A": 1, "B": "乙"}, "answer": "A"}, "wrong type"),
    ({"instruction": "问", "input": "", "output": "答", "history": "前"}, "wrong type"),
    ({"问题": "", "答案": "答"}, "missing or empty question"),
    ({"question": "问", "options": "没有选项", "answer": "A"}, "missing or empty options"),
    ({"question": "问", "choices": ["甲", "乙"], "answer": -1}, "answer not among the options"),
    (
        {"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": None},
        "exam question without an answer",
    ),
    ({"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "ABC"}, "answer not among the options"),
    ({"question": "问", "question_type": "判断题", "answer": "也许"}, "answer not among the options"),
    ({"conversations": [["问", "答"]]}, "wrong type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "问"}]}]},
        "wrong type",
    ),
    ({"instruction": "问", "output": "答", "history": [["前"]]}, "wrong type"),
    ({"chosen": "好", "rejected": "坏"}, "missing or empty question"),
    (
        {"messages": [{**turn, "weight": 0} for turn in turns("问", "答")] + turns("问", "答")},
        "marked as not to be learnt",
    ),
]


RAW = [
    (b"{", "not JSON"),
    (b"[1, 2]", "not an object"),
    (b"3", "not an object"),
    (b'{"query": NaN, "response": "x"}', "missing or empty question"),
    (b'{"query": "a", "query": "b", "response": "c"}', "duplicate keys"),
    (b'{"query": "a\x00", "response": "b"}', "not JSON"),
    (b'{"query": "a\\u0000", "response": "bb"}', "control characters"),
    (b'{"query": "a", "response": "\\ud800"}', "lone surrogate"),
    (b'{"query": "\xff\xfe", "response": "b"}', "undecodable bytes"),
    ('{"query": "麻黄", "response": "温"}'.encode("gb18030"), "undecodable bytes"),
    (b'{"query": "a", "response": "b"} x', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"query": ' + b"9" * 5000 + b', "response": "b"}', "not JSON"),
    (b'{"query": "a", "response": "' + b"b" * 5_000_000 + b'"}', "too long"),
    (b'{"query": {"a": {"b": null}}, "response": null}', "wrong type"),
]
