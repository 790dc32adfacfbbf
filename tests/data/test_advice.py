"""Rows that cannot be used: which columns are suggested, what is said where none are, and in how many lines."""

import pytest
from data_rows import write_lines

from utils.data.report import columns_or_form
from utils.data.schemas import convert_row

CASE = "患者恶寒发热{}日，无汗，头身疼痛，舌苔薄白，脉浮紧。"
CASES = [{"Content": CASE.format(n), "Summary": "麻黄、桂枝、杏仁" + "、甘草" * n} for n in range(1, 40)]


def many(**fields):
    """Thirty rows; the sign * in a text is another number in each row."""
    return [{name: value.replace("*", str(n)) if isinstance(value, str) else value for name, value in fields.items()}
            for n in range(30)]  # fmt: skip


@pytest.mark.parametrize(
    "rows, words",
    [
        (CASES, "name them, if they are right: --columns question=Content,answer=Summary"),
        ([dict(reversed(row.items())) for row in CASES], "--columns question=Content,answer=Summary"),
        (many(患者症状="问*", 用药="答*"), "--columns question=患者症状,answer=用药"),
        (many(病例="问*", 中药处方="答*", 标签=["内科"], 来=["甲"]), "--columns question=病例,answer=中药处方"),
        (many(instruct="问*", output="答*"), "--columns question=instruct,answer=output"),
        (many(content="问*", reasoning_content="想*", reply="答*"), "--columns question=content,answer=reply"),
        (many(科室="内科", 提问内容描述="问*", 医生回复="答*"), "--columns question=提问内容描述,answer=医生回复"),
        # Two texts without known names, however much one of them asks, are no question and answer.
        (many(q1="为什么*冷？", a1="因为*"), "no field is known as a question or an answer"),
        (many(症候="恶寒*", 方="麻黄汤*"), "no field is known as a question or an answer"),
        (many(描述="恶寒*", 科="内*"), "no field is known as an answer"),
        (many(描述="甲*", model_output="乙*"), "model_output may be an answer of a model"),
        (many(Number="*", Question="下列性温的是*"), "no field is known as an answer"),
        (many(名="甲*", 处方="乙*"), "no field is known as a question"),
        (many(query_text="甲*", 描述="乙*", output_gpt="丙*"), "no field is known as an answer"),
        (many(描述="甲*", answer_of_a="x*", gpt_answer="乙*", qwen_answer="丙*"), "several fields may be the answer"),
        (many(主诉="甲*", 病情="乙*", 处方="丙*"), "several fields may be the question: 主诉, 病情"),
        (many(名称="甲*", 处方="乙*", 步骤="丙*", 功效="丁*", 用法="戊*", 出处="己*"), "a table of 6 fields of text"),
        # A category is no answer, whatever its name.
        (many(描述="甲*", 诊断="感冒"), "no field is known as an answer"),
        (many(title="例*", qa=[{"q": "诊断？", "a": "湿热"}]), "qa holds rows inside the rows (q, a)"),
        (many(描述="甲*", 诊断="乙*", 轮=[{"问": "丙"}]), "轮 holds rows inside the rows (问)"),
        (many(描述="甲*", 回答=["乙", "丙"]), "回答 is a list: wanted a text"),
        (many(项="甲*", options={"A": "x", "B": "y"}), "--columns question=...,answer=...,options=options"),
        (many(lines=["甲", "乙"]), "or turns that say who speaks"),
    ],
)  # fmt: skip
def test_columns_are_suggested_by_known_names_or_it_is_said_what_the_rows_are(rows, words):
    said = quoted(columns_or_form(rows))
    assert words in said and ("question=" in said) == ("question=" in words)


def quoted(line):
    """A line without the quotes that names in Chinese get in a shell."""
    return line.replace("'", "")


def test_a_table_without_names_of_columns():
    rows = [{"甘草的药性是什么？": f"药{n}的药性是什么？", "性平。": f"性{n}。"} for n in range(4)]
    assert "the first row reads like data" in columns_or_form(rows, table=True)
    assert "if the first row is no header" in columns_or_form([{"甘草": "麻黄", "性平": "性温"}], table=True)


def test_a_schema_is_told_by_the_names_that_the_row_has():
    assert convert_row({"问题": "问", "答案": "答"}).schema == "问题/答案"
    assert convert_row({"question": "问", "answer": "答"}).schema == "question/answer"
    assert convert_row({"问题": "问", "答案": "答", "思考": "想"}).schema == "问题/思考/答案"


def test_files_that_were_not_used_are_named_once(tmp_path, convert, capsys):
    data = tmp_path / "data"
    write_lines(data / "a.jsonl", *({"query": f"第{n}问？", "response": f"答{n}"} for n in range(12)))
    write_lines(data / "b.jsonl", *({"病例": f"恶寒{n}", "方剂": f"麻黄汤{n}"} for n in range(5)))
    write_lines(data / "c.jsonl", {"text": "麻黄发汗。"})
    (data / "d.jsonl").write_bytes(b"")
    for number in range(30):
        write_lines(data / f"e{number:02}.jsonl", {"症候": f"恶寒{number}", "方": "麻黄汤"})
    mixed = [{"query": f"某{n}？", "response": f"答{n}"} for n in range(3)]
    write_lines(data / "f.jsonl", *mixed, {"instruct": "问", "output": "答"})
    convert(data)
    notes = [quoted(line) for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "b.jsonl: none of its 5 rows could be used; line 1: fields not recognised" in notes[0]
    assert notes[0].endswith("; name them, if they are right: --columns question=病例,answer=方剂")
    assert "c.jsonl: none of its 1 rows could be used; line 1: plain text" in notes[1]
    assert "d.jsonl: no row in it" in notes[2]
    assert "e00.jsonl: none of its 1 rows" in notes[3] and "the same in 29 more: e01.jsonl, e02" in notes[3]
    assert "f.jsonl: 1 of its 4 rows could not be used; fields not recognised from line 4 on" in notes[4]
    assert "question=instruct,answer=output" in notes[4] and len(notes) <= 6
