"""Every schema is recognised by its field names, and every unusable row is refused with its reason."""

import pytest
from data_rows import BAD, EXAM, PREFERENCE, SFT, turns

from utils.data.messages import Reject
from utils.data.schemas import RowOptions, convert_row, parse_columns

REASONED = [
    {"role": "user", "content": "问"},
    {"role": "assistant", "content": "答", "reasoning_content": "想"},
]
PARTS = [{"type": "text", "text": "麻黄"}, {"type": "text", "text": "的药性？"}]
TRIMMED = [  # a conversation, and the whole exchanges of it that are kept
    (turns("", "欢迎", "问", "答")[1:], turns("问", "答")),
    (turns("问", "答", "再问"), turns("问", "答")),
    ([*turns(system="医"), *turns("", "欢迎", "问", "答", "再问")[1:]], turns("问", "答", system="医")),
]
CONVERSATIONS = [
    *SFT,
    *(({"messages": given}, kept) for given, kept in TRIMMED),
    ({"Question": "问", "Complex_CoT": "想", "Response": "答"}, REASONED),
    ({"question": "问", "think": "想", "answer": "答"}, REASONED),
    ({"query": "问", "response": "<think>\n想\n</think>\n\n答"}, REASONED),
    ({"query": "问", "response": "想</think>答"}, REASONED),
    ({"messages": REASONED}, REASONED),
    ({"query": "问", "response": "<think>\n\n</think>\n\n答"}, turns("问", "答")),
    ({"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[:1]}]}, turns("麻黄\n的药性？", "麻黄")),
    ({"question": "问", "answer": "答", "question_type": "简答题"}, turns("问", "答")),
    ({"问题": "问", "答案": "答"}, turns("问", "答")),
    ({"提问": "问", "回答": "答", "科室": "内科"}, turns("问", "答")),
    ({"症状": "问", "处方": "答"}, turns("问", "答")),
    ({"指令": "问", "输入": "补充", "输出": "答"}, turns("问\n补充", "答")),
    ({"department": "内科", "title": "标题", "ask": "问", "answer": "答"}, turns("标题\n问", "答")),
    ({"department": "内科", "title": "头痛", "ask": "头痛三天", "answer": "答"}, turns("头痛三天", "答")),
    ({"prompt": "问", "response": "答"}, turns("问", "答")),
    ({"ask": "问", "answer": "答"}, turns("问", "答")),
]  # fmt: skip


@pytest.mark.parametrize("row, messages", CONVERSATIONS)
def test_conversations(row, messages):
    item = convert_row(row)
    assert (item.kind, item.body["messages"]) == ("sft", messages)
    assert item.trimmed == (row.get("messages") in [given for given, _ in TRIMMED])


@pytest.mark.parametrize("row", PREFERENCE)
def test_preference_rows(row):
    item = convert_row(row)
    assert item.kind == "dpo"
    sides = {"chosen": turns("", "好")[1:], "rejected": turns("", "坏")[1:]}
    assert item.body == {"prompt": turns("问"), **sides, "kind": "given"}
    assert set(item.unused) <= {"chosen_score"}


@pytest.mark.parametrize("row", EXAM)
def test_exam_rows(row):
    item = convert_row(row)
    assert item.kind == "exam" and item.body["answer"] == "A" and item.body["question"] == "性温的是"
    assert item.body["options"] == {"A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连"}


def test_columns_and_system():
    columns = tuple(parse_columns("question=Content, answer=Summary").items())
    item = convert_row({"Content": "问", "Summary": "答", "n": 3}, RowOptions(columns, "医"))
    assert item.schema == "--columns" and item.body["messages"] == turns("问", "答", system="医")
    with pytest.raises(ValueError, match="unknown role 'queston'"):
        parse_columns("queston=Content,answer=Summary")
    with pytest.raises(Reject, match="fields not recognised"):
        convert_row({"Content": "问"}, RowOptions(columns))


@pytest.mark.parametrize("row, reason", BAD)
def test_reasons(row, reason):
    with pytest.raises(Reject) as caught:
        convert_row(row, RowOptions(max_characters=50_000))
    assert caught.value.reason == reason


OPTIONS = {"A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连"}
VITAMINS = {
    "A": "维生素A、维生素B、维生素C",
    "B": "维生素 D",
    "C": "B族",
}  # letters inside options begin no option
LISTED = "\n".join(f"{letter} {text}" for letter, text in VITAMINS.items())
TEN = dict(zip("ABCDEFGHIJ", "甲乙丙丁戊己庚辛壬癸"))
ASKED, JUDGED = {"question": "问", "options": OPTIONS}, {"question": "问", "question_type": "判断题"}
ITEMS = [  # a row, and what its item has
    *((ASKED | {"answer": given}, {"answer": "ABD", "kind": "multiple"})
      for given in ("ABD", "A,B,D", "A、B、D", "DBA", "a b d", ["A", "B", "D"])),
    ({"Question": "问", "Options": LISTED, "Answer": "B"}, {"options": VITAMINS, "answer": "B"}),
    ({"instruction": f"问\n{LISTED}", "output": "B"}, {"options": VITAMINS, "answer": "B"}),
    ({"question": "问", "options": list(TEN.values()), "answer": 9}, {"options": TEN, "answer": "J"}),
    ({"question": "问", **dict(list(TEN.items())[:5]), "answer": "E"}, {"options": dict(list(TEN.items())[:5])}),
    (ASKED | {"answer": "A", "question_type": "多项选择题"}, {"answer": "A", "kind": "multiple"}),
    (ASKED | {"answer": "A", "question_type": "单项选择题"}, {"kind": None}),
    (ASKED | {"answer": "A", "question_type": "", "type": "多发病"}, {"kind": None}),
    (JUDGED | {"answer": "对"}, {"answer": "A", "kind": "true_false", "options": {"A": "正确", "B": "错误"}}),
    (JUDGED | {"answer": "×"}, {"answer": "B", "kind": "true_false"}),
    (JUDGED | {"answer": False}, {"answer": "B", "kind": "true_false"}),
    ({"question": "问", "options": {"A": "对", "B": "错"}, "answer": "B"}, {"answer": "B", "kind": "true_false"}),
    ({"question": "问", "options": ["True", "False"], "answer": "正确"}, {"answer": "A", "kind": "true_false"}),
]  # fmt: skip


@pytest.mark.parametrize("row, wanted", ITEMS)
def test_exam_items(row, wanted):
    body = convert_row(row).body
    assert {name: body.get(name) for name in wanted} == wanted
    assert (
        convert_row({"id": "x", **body, "source": "某处:1"}).body == body
    )  # a converted exam is read as it was


def test_explanations_become_reasoning_on_request():
    row = {"question": "性温的是", "options": OPTIONS, "answer": "A", "解析": "麻黄辛温，石膏大寒。"}
    item = convert_row(row, RowOptions(explained=True))
    assert item.kind == "sft" and item.schema == "exam with explanation"
    assert item.body["messages"][0]["content"] == "性温的是\nA. 麻黄\nB. 石膏\nC. 知母\nD. 黄连"
    assert item.body["messages"][1] == {
        "role": "assistant",
        "content": "A. 麻黄",
        "reasoning_content": "麻黄辛温，石膏大寒。",
    }
    assert convert_row(row).kind == "exam"
    for empty in ("", "nan", float("nan"), None):
        assert convert_row({**row, "解析": empty}, RowOptions(explained=True)).kind == "exam"
