"""Every schema is recognised by its field names, and every unusable row is refused with its reason."""

import pytest
from data_rows import BAD, EXAM, PREFERENCE, SFT, turns

from utils.data.readers import Reject
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
        {
            "messages": [
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": "答", "reasoning_content": "想"},
            ]
        },
    ],
)
def test_reasoning_becomes_reasoning_content(row):
    item = convert_row(row)
    assert item.body["messages"][-1] == {"role": "assistant", "content": "答", "reasoning_content": "想"}
    assert item.reasoning


def test_an_empty_think_block_is_no_reasoning():
    assert (
        convert_row({"query": "问", "response": "<think>\n\n</think>\n\n答"}).body["messages"][-1]
        == turns("", "答")[1]
    )


@pytest.mark.parametrize("row", PREFERENCE)
def test_preference_rows(row):
    item = convert_row(row)
    assert item.kind == "dpo"
    assert item.body == {
        "prompt": turns("问"),
        "chosen": turns("", "好")[1:],
        "rejected": turns("", "坏")[1:],
        "kind": "given",
    }


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
