"""Fields without known names: which are suggested as question and answer, and which need no suggestion."""

import pytest
from data_rows import turns, write_lines

from utils.data.columns import look_reversed, suggest_columns
from utils.data.schemas import convert_row
from utils.errors import UserError

PRESCRIPTIONS = [
    {
        "Content": f"患者恶寒发热{number}日，无汗，头身疼痛，舌苔薄白，脉浮紧。",
        "Summary": "麻黄、桂枝、杏仁" + "、甘草" * number,
    }
    for number in range(1, 40)
]


@pytest.mark.parametrize(
    "rows, columns",
    [
        (PRESCRIPTIONS, ("Content", "Summary")),
        (
            [{"Summary": row["Summary"], "Content": row["Content"]} for row in PRESCRIPTIONS],
            ("Content", "Summary"),
        ),
        (
            [{"患者症状": row["Content"], "用药": row["Summary"]} for row in PRESCRIPTIONS],
            ("患者症状", "用药"),
        ),
        (
            [{"病例": row["Content"], "中药处方": row["Summary"]} for row in PRESCRIPTIONS],
            ("病例", "中药处方"),
        ),
        # No known name: not the longer text of the first row, but the field that asks, or else the first.
        ([{"q1": f"为什么{'很' * n}冷？", "a1": f"因为{n}"} for n in range(30)], ("q1", "a1")),
        ([{"a1": f"因为{n}", "q1": f"为什么{'很' * n}冷？"} for n in range(30)], ("q1", "a1")),
        ([{"x": f"恶寒{'甲' * n}", "y": f"麻黄{n}"} for n in range(30)], ("x", "y")),
        # A category is neither, however long its texts are.
        (
            [{"科室": "中医内科门诊第一诊室" * 9, "x": f"恶寒{n}", "y": f"麻黄{n}"} for n in range(30)],
            ("x", "y"),
        ),
        ([{"x": f"甲{n}"} for n in range(30)], None),
        ([{"x": n, "y": n} for n in range(30)], None),
    ],
)
def test_suggested_columns(rows, columns):
    assert suggest_columns(rows) == columns


@pytest.mark.parametrize(
    "row, question",
    [
        ({"问题": "问", "答案": "答"}, "问"),
        ({"提问": "问", "回答": "答", "科室": "内科"}, "问"),
        ({"症状": "问", "处方": "答"}, "问"),
        ({"指令": "问", "输入": "补充", "输出": "答"}, "问\n补充"),
        ({"department": "内科", "title": "标题", "ask": "问", "answer": "答"}, "标题\n问"),
        ({"department": "内科", "title": "头痛", "ask": "头痛三天", "answer": "答"}, "头痛三天"),
        ({"prompt": "问", "response": "答"}, "问"),
        ({"ask": "问", "answer": "答"}, "问"),
    ],
)
def test_names_that_need_no_columns(row, question):
    item = convert_row(row)
    assert (item.kind, item.body["messages"]) == ("sft", turns(question, "答"))


def test_a_chinese_schema_is_told_by_its_own_names():
    assert convert_row({"问题": "问", "答案": "答"}).schema == "问题/答案"
    assert convert_row({"question": "问", "answer": "答"}).schema == "question/answer"


def test_the_advice_shows_a_row_as_it_would_be_read(tmp_path, convert):
    path = write_lines(tmp_path / "a.jsonl", *PRESCRIPTIONS)
    with pytest.raises(UserError) as caught:
        convert(path)
    assert "--columns question=Content,answer=Summary" in str(caught.value)
    assert (
        "question: 患者恶寒发热1日，无汗，头身疼痛，舌苔薄白，脉浮紧。 answer: 麻黄、桂枝、杏仁、甘草"
        in str(caught.value)
    )


def test_columns_the_wrong_way_round_are_warned_of(tmp_path, convert, capsys):
    path = write_lines(tmp_path / "a.jsonl", *PRESCRIPTIONS)
    convert(path, columns="question=Summary,answer=Content")
    assert "their names say the opposite" in capsys.readouterr().out
    convert(path, columns="question=Content,answer=Summary")
    assert "their names say the opposite" not in capsys.readouterr().out
    assert look_reversed("Summary", "Content") and not look_reversed("a", "b")
