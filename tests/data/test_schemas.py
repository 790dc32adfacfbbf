"""Every schema is recognised by its field names, and every unusable row is refused with its reason."""

import pytest
from data_rows import BAD, EXAM, PREFERENCE, SFT, turns

from utils.data.messages import Reject
from utils.data.schemas import RowOptions, convert_row, parse_columns


@pytest.mark.parametrize("row, messages", SFT)
def test_conversations(row, messages):
    item = convert_row(row)
    assert (item.kind, item.body["messages"]) == ("sft", messages)


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "问", "Complex_CoT": "想", "Response": "答"},
        {"question": "问", "think": "想", "answer": "答"},
        {"query": "问", "response": "<think>\n想\n</think>\n\n答"},
        {"query": "问", "response": "想</think>答"},
        {"messages": [*turns("问"), {"role": "assistant", "content": "答", "reasoning_content": "想"}]},
    ],
)
def test_reasoning_becomes_reasoning_content(row):
    item = convert_row(row)
    assert item.body["messages"][-1] == {"role": "assistant", "content": "答", "reasoning_content": "想"}


def test_an_empty_think_block_is_no_reasoning():
    item = convert_row({"query": "问", "response": "<think>\n\n</think>\n\n答"})
    assert item.body["messages"] == turns("问", "答")


@pytest.mark.parametrize("row", PREFERENCE)
def test_preference_rows(row):
    item = convert_row(row)
    assert item.kind == "dpo"
    sides = {"chosen": turns("", "好")[1:], "rejected": turns("", "坏")[1:]}
    assert item.body == {"prompt": turns("问"), **sides, "kind": "given"}


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


def test_letters_inside_options_begin_no_option():
    options = {"A": "维生素A、维生素B、维生素C", "B": "维生素 D", "C": "B族"}
    listed = "\n".join(f"{letter} {text}" for letter, text in options.items())
    assert convert_row({"Question": "问", "Options": listed, "Answer": "B"}).body["options"] == options
    assert convert_row({"instruction": f"问\n{listed}", "output": "B"}).body["options"] == options


def test_more_options_than_four():
    options = dict(zip("ABCDEFGHIJ", "甲乙丙丁戊己庚辛壬癸"))
    row = {"question": "问", "options": list(options.values()), "answer": 9}
    assert convert_row(row).body["answer"] == "J"
    row = {
        "question": "问",
        **{letter: text for letter, text in options.items() if letter < "F"},
        "answer": "E",
    }
    assert convert_row(row).body["options"]["E"] == "戊"


@pytest.mark.parametrize("answer", ["ABD", "A,B,D", "A、B、D", "DBA", "a b d", ["A", "B", "D"]])
def test_several_right_answers_are_a_kind_of_their_own(answer):
    body = convert_row({"question": "解表的有", "options": OPTIONS, "answer": answer}).body
    assert (body["answer"], body["kind"]) == ("ABD", "multiple")


def test_the_type_of_a_question_decides_its_kind():
    row = {"question": "解表的有", "options": OPTIONS, "answer": "A", "question_type": "多项选择题"}
    assert convert_row(row).body["kind"] == "multiple"
    for other in ({"question_type": "单项选择题"}, {"question_type": "", "type": "多发病"}):
        assert "kind" not in convert_row({**row, **other}).body
    plain = convert_row({"question": "问", "answer": "答", "question_type": "简答题"})
    assert (plain.kind, plain.body["messages"]) == ("sft", turns("问", "答"))


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"question": "麻黄性温。", "question_type": "判断题", "answer": "对"}, "A"),
        ({"question": "麻黄性温。", "question_type": "判断题", "answer": "×"}, "B"),
        ({"question": "麻黄性温。", "options": {"A": "对", "B": "错"}, "answer": "B"}, "B"),
        ({"question": "麻黄性温。", "options": ["True", "False"], "answer": "正确"}, "A"),
        ({"question": "麻黄性温。", "question_type": "判断题", "answer": False}, "B"),
    ],
)
def test_true_or_false(row, answer):
    body = convert_row(row).body
    assert (body["answer"], body["kind"], len(body["options"])) == (answer, "true_false", 2)


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


@pytest.mark.parametrize(
    "messages, kept",
    [
        (turns("", "欢迎", "问", "答")[1:], turns("问", "答")),
        (turns("问", "答", "再问"), turns("问", "答")),
        (
            turns("", "欢迎", "问", "答", "再问", system="医")[:1]
            + turns("", "欢迎", "问", "答", "再问")[1:],
            turns("问", "答", system="医"),
        ),
        (turns("问", "答"), None),
    ],
)
def test_conversations_are_trimmed_to_whole_exchanges(messages, kept):
    item = convert_row({"messages": messages})
    assert item.body["messages"] == (kept or messages) and item.trimmed == bool(kept)


def test_text_in_parts_is_text():
    parts = [{"type": "text", "text": "麻黄"}, {"type": "text", "text": "的药性？"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "温"}]},
    ]
    assert convert_row({"messages": messages}).body["messages"] == turns("麻黄\n的药性？", "温")
    messages[0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}, *parts]
    with pytest.raises(Reject, match="wrong type"):
        convert_row({"messages": messages})


def test_a_converted_exam_is_read_as_it_was():
    row = {"question": "解表的有", "options": OPTIONS, "answer": "A", "question_type": "多项选择题"}
    body = convert_row(row).body
    assert convert_row({"id": "x", **body, "source": "某处:1"}).body == body and body["kind"] == "multiple"
