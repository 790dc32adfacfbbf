"""The conversion as a whole: public data sets as they are, an exact account of every row, and what the user is told."""

import json
import os
import sys

import convert_to_qwen3_format as script
import pytest
from conftest import ROOT
from data_rows import read, turns, write_lines

from utils.data import convert as conversion
from utils.errors import UserError, run
from utils.model.chat_format import encode_turns
from utils.model.folder import load_tokenizer

PUBLISHED = {  # the sets of FIELD_NOTES.md, each in the file kind and with the fields that it has
    "ChatMed_TCM-v0.2.json": {"query": "痛经怎么调理？要求：1.说明病机 2.给出方药", "response": "温经汤加减。"},
    "hwtcm-sft-v1.jsonl": {"instruction": "麻黄归哪些经？", "input": "", "output": "归肺、膀胱经。"},
    "SylvanL.jsonl": {"instruction": "辨证", "input": "恶寒无汗，脉浮紧。", "output": "风寒表实证。"},
    "medical_o1_sft_Chinese.json": [{"Question": "何为相使？", "Complex_CoT": "想七情。", "Response": "一主一辅。"}],
    "hwtcm.json": [{"instruction": "性寒的是\nA.麻黄\nB.石膏\nC.桂枝\nD.生姜", "input": "", "output": "B"}],
    "cmexam.json": [
        {"Question": "归肺经的是", "Options": [{"key": "A", "value": "桔梗"}, {"key": "B", "value": "杜仲"}], "Answer": "A"},
    ],
    "cmb.json": [
        {"exam_type": "医师考试", "exam_class": "中医", "exam_subject": "方剂学", "question": "麻黄汤的君药是", "answer": "A",
         "question_type": "单项选择题", "option": {"A": "麻黄", "B": "桂枝", "C": "", "D": ""}},
    ],
    "chp_knowledge_qa.jsonl": {"query": "如何鉴别人参？", "response": "看横切面。"},
    "preference_sharegpt_zh.json": [
        {"conversations": [{"from": "human", "value": "何为四诊？"}],
         "chosen": {"from": "gpt", "value": "望闻问切。"}, "rejected": {"from": "gpt", "value": "不知道。"}},
    ],
    "traditional_chinese_medicine.csv": ",Question,A,B,C,D,Answer\n0,五味子的主要药味是,酸,苦,甘,辛,A\n",
}  # fmt: skip


def test_public_data_sets_as_they_are_published(tmp_path, convert):
    for name, value in PUBLISHED.items():
        indent = 1 if isinstance(value, list) else None
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=indent)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = convert(tmp_path)
    assert found["set_aside"] == [] and found["report"]["rows_in"] == 10
    said = {
        row["messages"][0]["content"]: row["messages"][1] for row in found["sft_train"] + found["sft_eval"]
    }
    asked = {"麻黄归哪些经？", "辨证\n恶寒无汗，脉浮紧。", "何为相使？", "如何鉴别人参？"}
    assert set(said) == asked | {PUBLISHED["ChatMed_TCM-v0.2.json"]["query"]}
    assert said["何为相使？"] == {
        "role": "assistant",
        "content": "一主一辅。",
        "reasoning_content": "想七情。",
    }
    assert {(row["question"], row["options"][row["answer"]], row["subject"]) for row in found["exam"]} == {
        ("性寒的是", "石膏", ""), ("归肺经的是", "桔梗", ""), ("麻黄汤的君药是", "麻黄", "方剂学"), ("五味子的主要药味是", "酸", ""),
    }  # fmt: skip
    assert [row["chosen"][0]["content"] for row in found["dpo_train"] + found["dpo_eval"]] == ["望闻问切。"]


@pytest.mark.slow
def test_report_counts_tokens_as_the_trainer_does(tmp_path, capsys):
    model = str(ROOT / "model_download/tiny_qwen3_tcm")
    tokenizer = load_tokenizer(model)
    rows = [{"query": f"问题{n}？", "response": "麻黄发汗解表。" * (n % 9 + 1)} for n in range(100)]
    rows += [{"Question": "何为相使？", "Complex_CoT": "想七情。", "Response": "一主一辅。"}, {"query": "坏"}]
    path, folder = write_lines(tmp_path / "a.jsonl", *rows), tmp_path / "out"
    places = ["--input-files", str(path), "--output-dir", str(folder), "--tokenizer-model", model]
    script.main([*places, "--max-length", "40"])
    examples = read(folder / "sft_train.jsonl") + read(folder / "sft_eval.jsonl")
    tokens = sorted(sum(map(len, encode_turns(tokenizer, row["messages"])[0])) for row in examples)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    kept = sum(count <= 40 for count in tokens) / 101
    assert report["tokens_counted_in"] == 101 and report["tokens"]["longest"] == tokens[-1]
    assert report["tokens"]["median"] == tokens[50] and 0 < kept < 1
    assert report["kept_by_max_length"] == round(kept, 4)
    assert report["characters"]["longest"] == 5 + 9 * 7 and len(report["examples"]) == 5
    shown = capsys.readouterr().out
    for line in (
        "102  a.jsonl (utf-8)", "101  kept", "1  set aside", "1    fields not recognised", f"keeps {kept:.1%} of them",
        f"length in tokens (counted in 101 conversations): median {tokens[50]}",
        "thinking off: 1 of 101 conversations end with reasoning",
        f"  user      {report['examples'][0]['messages'][0]['content']}",
    ):  # fmt: skip
        assert line in shown, line


PLAIN = {"query": "问{}", "response": "答"}
ROWS = [{"data": "x", "n": 1}, {"data": "y", "n": 2}]
UNKNOWN = {"title": "短", "Content": "问题", "Summary": "很长的回答"}
WRONG = [  # a file's name and what is in it, in bytes or rows, and words of the error; None: no file, only its folder
    ("missing.jsonl", None, ["does not exist"]),
    ("", None, ["no data file", "download_tcm_data.py"]),
    ("a.docx", b"x", ["cannot read .docx", ".parquet"]),
    ("a.jsonl", b"", ["no row could be used (the input is empty)"]),
    ("a.json", b"query: q\nresponse: r", [
        "no row could be used (2 not JSON); a.json: none of its 2 rows could be used; line 1: not JSON (",
        "; wanted one JSON object for each row: one a line, or all in one array"]),
    ("a.jsonl", ROWS, [
        "no row could be used (2 fields not recognised); a.jsonl: none of its 2 rows could be used; line 1: fields not recognised",
        "fields found: data, n; no field is known as a question or an answer"]),
    ("a.jsonl", [{"text": "麻黄发汗解表。"}], ["(1 plain text)", "continued pre-training is not done here"]),
    ("a.parquet", b"x", ["not a whole .parquet file"]),
    ("a.jsonl", "{}".encode("utf-16"), ["UTF-16"]),
    ("a.jsonl", [UNKNOWN], [
        "fields found: title, Content, Summary; name them, if they are right: --columns question=Content,answer=Summary"]),
    ("columns.jsonl", [PLAIN], ["no row has the fields of --columns question=X,answer=Y; fields found: query, response"]),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", WRONG)
def test_errors_are_one_line(tmp_path, capsys, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        write_lines(tmp_path / name, *content)
    places = ["--input-files", str(tmp_path / name), "--output-dir", str(tmp_path / "out")]
    columns = ["--columns", "question=X,answer=Y"] if name == "columns.jsonl" else []
    assert run(lambda: script.main(places + columns)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert ("download" in said) == (name == "")


@pytest.mark.skipif(sys.platform != "linux", reason="such a name cannot be made there")
def test_a_file_whose_name_is_not_utf8(tmp_path, convert):
    write_lines(tmp_path / os.fsdecode(b"\xff.jsonl"), {"query": "q", "response": "r"})
    with pytest.raises(UserError, match=r"'\\udcff.jsonl': the file's name is not UTF-8; rename it"):
        convert(tmp_path)


def test_fields_that_nobody_read_are_named(tmp_path, convert, capsys):
    turn = {"role": "user", "content": "麻黄归哪些经？", "emotion": "平静"}
    rows = [
        {"question": "何为四诊？", "answer": "望闻问切。", "note_zh": "甲" * 50, "url": "", "rank": 0},
        {"question": "何为八纲？", "answer": "阴阳表里寒热虚实。", "note_zh": "nan", "rank": 2},
        {"messages": [turn, {"role": "assistant", "content": "肺、膀胱经。"}], "channel": ["web"]},
    ]
    fields = convert(write_lines(tmp_path / "a.jsonl", *rows))["report"]["fields"]
    assert fields["question/answer"]["unused"] == {"note_zh": 1, "rank": 2}
    assert set(fields["question/answer"]["used"]) & {"question", "answer", "rank"} == {"question", "answer"}
    assert fields["messages"]["unused"] == {"channel": 1, "messages[].emotion": 1}
    said = capsys.readouterr().out
    for words in (
        'not used, of question/answer: note_zh (1 row, such as "甲甲', "rank (2 rows, such as 0)",
        'channel (1 row, such as ["web"])', 'messages[].emotion (1 row, such as "平静")',
    ):  # fmt: skip
        assert words in said


THOUGHT = {"Question": "问{}", "think": "想", "Response": "答"}
LAST = turns("问{}", "答", "再问", "再答")
FIRST = [{**turn, "reasoning_content": "想"} if n == 1 else turn for n, turn in enumerate(LAST)]
TOLD = {"system": "你是中医师。", "instruction": "问{}", "output": "答"}
SHARED = "system text of nearly all conversations: 你是中医师。"
SAID = [  # rows, what is said of them, and their common system text; of several turns the last decides the mode
    ([THOUGHT, THOUGHT, PLAIN], "thinking on: 2 of 3 conversations end with reasoning\n", ""),
    ([THOUGHT, PLAIN, PLAIN], "thinking off: 1 of 3 conversations end with reasoning\n", ""),
    ([{"messages": FIRST}, {"messages": FIRST}, {"messages": LAST}], "thinking off: 0 of 3 conversations", ""),
    ([THOUGHT, PLAIN], "thinking tie: 1 of 2 conversations end with reasoning; keep the rows of one mode\n", ""),
    ([TOLD] * 30 + [PLAIN], SHARED, "你是中医师。"),
    ([TOLD] * 30 + [PLAIN] * 10, "thinking off", ""),
]  # fmt: skip


@pytest.mark.parametrize("rows, said, system", SAID)
def test_the_mode_and_the_system_text_are_said(tmp_path, convert, capsys, rows, said, system):
    rows = [json.loads(json.dumps(row).replace("{}", str(n))) for n, row in enumerate(rows)]
    assert convert(write_lines(tmp_path / "a.jsonl", *rows))["report"]["system"] == system
    shown = capsys.readouterr().out
    assert said in shown and (SHARED in shown) == bool(system)


def test_rows_that_would_not_fit_into_memory_are_refused(tmp_path, convert, monkeypatch):
    rows = [{"query": f"第{n}个问题？", "response": f"答{n}"} for n in range(3000)]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    monkeypatch.setattr(conversion, "FORECAST_ROWS", 1000)
    monkeypatch.setattr(conversion, "memory_for_process", lambda: 2_000_000)
    with pytest.raises(UserError, match="about 3,.* rows .* MiB of memory.*convert the files in parts"):
        convert(path)
    assert [file.name for file in (tmp_path / "out").iterdir()] == []  # neither results nor temporary files
    monkeypatch.setattr(conversion, "memory_for_process", lambda: 20_000_000)
    assert convert(path)["report"]["rows_in"] == 3000


def test_input_is_never_overwritten(tmp_path):
    path = write_lines(tmp_path / "sft_train.jsonl", {"query": "问", "response": "答"})
    with pytest.raises(UserError, match="sft_train.jsonl would be overwritten by its result; choose another"):
        script.main(["--input-files", str(path), "--output-dir", str(tmp_path)])
    assert read(path) == [{"query": "问", "response": "答"}] and len(list(tmp_path.iterdir())) == 1


def test_a_second_conversion_says_that_it_replaces_the_first(tmp_path, convert, capsys):
    one, two = (write_lines(tmp_path / f"{name}.jsonl", {"query": name, "response": "答"}) for name in "ab")
    for files, told in (([one], False), ([one], False), ([two], True), ([two, one], False)):
        convert(*files)
        words = f"note: this replaces the conversion of {one}; to train on both: --input-files {one} {two}"
        assert (words in capsys.readouterr().out) == told
