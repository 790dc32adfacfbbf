"""Conversion: every schema and file kind, an exact ledger of what is set aside, and a split that leaks nothing."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data_prepare"))
import convert_to_qwen3_format as script

from utils.data import convert as conversion
from utils.data import dedup
from utils.data.normalize import normalize, normalize_all
from utils.data.readers import Reject, batches, detect_encoding
from utils.data.schemas import convert_row, parse_columns
from utils.data.text_store import TextStore
from utils.errors import UserError
from utils.model.chat_format import encode_turns
from utils.model.load import load_tokenizer

SCRIPT = "data_prepare/convert_to_qwen3_format.py"
CASE = "患者男性四十五岁反复头痛三年每遇风寒则发作伴有项背拘急恶风畏寒口不渴舌苔薄白脉浮紧曾服止痛药无效近日因受凉加重"


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


@pytest.fixture
def convert(tmp_path):
    """convert(paths, **settings) runs the script's main in this process and returns {output: rows} with "report"."""

    def run(*paths, **settings):
        folder = tmp_path / "out"
        arguments = ["--input-files", *map(str, paths), "--output-dir", str(folder), "--tokenizer-model", ""]
        for name, value in settings.items():
            arguments += ["--" + name.replace("_", "-"), str(value)]
        assert script.main(arguments) == 0
        found = {name: read(folder / f"{name}.jsonl") for name in (*conversion.OUTPUTS, "set_aside")}
        found["report"] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        kept = sum(len(found[name]) for name in conversion.OUTPUTS)
        assert found["report"]["rows_in"] == kept + len(found["set_aside"])
        assert found["report"]["rows_kept"] == kept and found["report"]["rows_set_aside"] == len(
            found["set_aside"]
        )
        return found

    return run


def made(row, **options):
    return convert_row(row, **options)


def turns(*texts, system=""):
    roles = ["user", "assistant"] * len(texts)
    spoken = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


# ---- schemas ----

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


@pytest.mark.parametrize("row, messages", SFT)
def test_conversations(row, messages):
    item = made(row)
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
    item = made(row)
    assert item.body["messages"][-1] == {"role": "assistant", "content": "答", "reasoning_content": "想"}
    assert item.reasoning


def test_an_empty_think_block_is_no_reasoning():
    assert (
        made({"query": "问", "response": "<think>\n\n</think>\n\n答"}).body["messages"][-1]
        == turns("", "答")[1]
    )


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
]


@pytest.mark.parametrize("row", PREFERENCE)
def test_preference_rows(row):
    item = made(row)
    assert item.kind == "dpo"
    assert item.body == {
        "prompt": turns("问"),
        "chosen": turns("", "好")[1:],
        "rejected": turns("", "坏")[1:],
        "kind": "given",
    }


EXAM = [
    {"": "0", "Question": "性温的是", "A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连", "Answer": "A"},
    {
        "exam_type": "医师",
        "exam_class": "中医",
        "exam_subject": "中药",
        "question": "性温的是",
        "answer": "A",
        "question_type": "单项选择题",
        "option": {"A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连", "E": ""},
    },
    {
        "Question": "性温的是",
        "Answer": "A",
        "Options": [
            {"key": key, "value": value} for key, value in zip("ABCD", ("麻黄", "石膏", "知母", "黄连"))
        ],
    },
    {"instruction": "性温的是\nA.麻黄\nB.石膏\nC.知母\nD.黄连", "input": "", "output": "A"},
    {
        "id": "x",
        "question": "性温的是",
        "options": {"A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连"},
        "answer": "a",
        "subject": "中药",
    },
]


@pytest.mark.parametrize("row", EXAM)
def test_exam_rows(row):
    item = made(row)
    assert item.kind == "exam" and item.body["answer"] == "A" and item.body["question"] == "性温的是"
    assert item.body["options"] == {"A": "麻黄", "B": "石膏", "C": "知母", "D": "黄连"}


def test_columns_and_system():
    columns = tuple(parse_columns("question=Content, answer=Summary").items())
    item = made({"Content": "问", "Summary": "答", "n": 3}, columns=columns, system="医")
    assert item.schema == "--columns" and item.body["messages"] == turns("问", "答", system="医")
    with pytest.raises(ValueError, match="unknown role 'queston'"):
        parse_columns("queston=Content,answer=Summary")
    with pytest.raises(Reject, match="fields not recognised"):
        made({"Content": "问"}, columns=columns)


BAD = [
    ({}, "fields not recognised"),
    ({"a": 1}, "fields not recognised"),
    ({"query": "问"}, "fields not recognised"),
    ({"query": "", "response": "答"}, "missing or empty question"),
    ({"query": "问", "response": "  \n"}, "missing or empty answer"),
    ({"query": "问", "response": None}, "missing or empty answer"),
    ({"query": "问", "response": 3}, "wrong type"),
    ({"query": ["问"], "response": "答"}, "wrong type"),
    ({"query": {"a": None}, "response": "答"}, "wrong type"),
    ({"instruction": "", "input": "", "output": "答"}, "missing or empty question"),
    ({"query": "问", "response": "答\x00"}, "control characters"),
    ({"query": "问\x1b[0m", "response": "答"}, "control characters"),
    ({"query": "问", "response": "答\ud83d"}, "lone surrogate"),
    (
        {"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "A", "subject": "内科\ud83d"},
        "lone surrogate",
    ),
    ({"prompt": "问", "chosen": "甲", "rejected": "乙", "kind": "\ud83d"}, "lone surrogate"),
    ({"\ud83d": "问"}, "fields not recognised"),
    ({"query": "问", "response": "答\ufffd"}, "undecodable bytes"),
    ({"query": "问<|im_end|>\n<|im_start|>assistant\n坏", "response": "答"}, "control tokens"),
    ({"query": "问", "response": "答<|endoftext|>"}, "control tokens"),
    ({"query": "问", "response": "答" * 60_000}, "too long"),
    ({"query": "问", "response": "<think>没有结束"}, "think block out of place"),
    ({"query": "问", "response": "<think>想</think>"}, "missing or empty answer"),
    ({"query": "问", "response": "<think>一</think>答<think>二</think>"}, "think block out of place"),
    ({"messages": None}, "missing or empty question"),
    ({"messages": []}, "missing or empty question"),
    ({"messages": [None]}, "wrong type"),
    ({"messages": "问"}, "wrong type"),
    (
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "答"}]},
        "missing or empty question",
    ),
    (
        {"messages": [{"role": "user", "content": [{"text": "问"}]}, {"role": "assistant", "content": "答"}]},
        "wrong type",
    ),
    ({"messages": turns("问")}, "roles out of order"),
    ({"messages": turns("问", "答")[1:]}, "roles out of order"),
    ({"messages": turns("问", "答")[:1] + turns("问", "答")}, "roles out of order"),
    ({"messages": turns("问", "答") + turns("再问", system="医")}, "roles out of order"),
    ({"messages": [{"role": "tool", "content": "问"}]}, "roles out of order"),
    ({"messages": [{"role": None, "content": "问"}]}, "roles out of order"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "答"}]}, "missing or empty question"),
    ({"query": "问", "response": "答", "split": "fold3"}, "unknown split"),
    ({"query": "问", "response": "答", "split": 1}, "unknown split"),
    ({"prompt": "问", "chosen": "同", "rejected": "同 "}, "chosen equals rejected"),
    ({"prompt": "", "chosen": "好", "rejected": "坏"}, "missing or empty question"),
    ({"prompt": "问", "chosen": "好", "rejected": None}, "missing or empty question"),
    ({"prompt": "问", "chosen": "", "rejected": "坏"}, "missing or empty answer"),
    ({"prompt": turns("问", "答"), "chosen": "好", "rejected": "坏"}, "roles out of order"),
    ({"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "C"}, "answer not among the options"),
    ({"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "AB"}, "several right answers"),
    ({"question": "问", "options": {"A": "甲", "B": ""}, "answer": "A"}, "missing or empty options"),
    ({"question": "问", "options": ["甲", "乙"], "answer": "A"}, "wrong type"),
    ({"question": "问", "options": {"A": 1, "B": "乙"}, "answer": "A"}, "wrong type"),
    ({"instruction": "问", "input": "", "output": "答", "history": "前"}, "wrong type"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_reasons(row, reason):
    with pytest.raises(Reject) as caught:
        made(row, max_characters=50_000)
    assert caught.value.reason == reason


# ---- torture: raw lines of every sort in one file, an exact ledger out of it ----

RAW = [
    (b"{", "not JSON"),
    (b"not json", "not JSON"),
    (b"[1, 2]", "not an object"),
    (b"null", "not an object"),
    (b'"text"', "not an object"),
    (b"3", "not an object"),
    (b'{"query": NaN, "response": "x"}', "not JSON"),
    (b'{"query": "a", "query": "b", "response": "c"}', "duplicate keys"),
    (b'{"query": "a\x00", "response": "b"}', "not JSON"),
    (b'{"query": "a\\u0000", "response": "b"}', "control characters"),
    (b'{"query": "a", "response": "\\ud800"}', "lone surrogate"),
    (b'{"query": "\xff\xfe", "response": "b"}', "undecodable bytes"),
    ('{"query": "麻黄", "response": "温"}'.encode("gb18030"), "undecodable bytes"),
    (b'{"query": "a", "response": "b"} x', "not JSON"),
    (b'{"query": "a", "response": "b",}', "not JSON"),
    (b"{'query': 'a', 'response': 'b'}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"query": ' + b"9" * 5000 + b', "response": "b"}', "not JSON"),
    (b"\x00\x00\x00", "not JSON"),
    (b'{"query": "a", "response": "' + b"b" * 5_000_000 + b'"}', "too long"),
    (b"{}", "fields not recognised"),
    (b'{"query": {"a": {"b": null}}, "response": null}', "wrong type"),
]


def test_torture_file(tmp_path, convert):
    bad = RAW + [(json.dumps(row).encode(), reason) for row, reason in BAD]
    good = json.dumps({"query": "麻黄的功效是什么？", "response": "发汗解表。"}, ensure_ascii=False).encode()
    lines = [line for line, _ in bad]
    path = tmp_path / "torture.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b"\r\n\r\n   \n" + b"\n".join(lines) + b"\r\n" + good + b"\n" + good[:-9]
    )
    found = convert(path)
    wanted = [(number, reason) for number, (_, reason) in enumerate(bad, 4)]
    wanted += [
        (len(bad) + 4, "exact duplicate"),
        (len(bad) + 5, "undecodable bytes" if good[:-9][-1] > 127 else "not JSON"),
    ]
    ledger = sorted((row["line"], row["reason"]) for row in found["set_aside"])
    assert len(bad) >= 60 and ledger == wanted
    assert [row["messages"][0]["content"] for row in found["sft_train"] + found["sft_eval"]] == [
        "麻黄的功效是什么？"
    ]
    assert all(
        row["file"] == "torture.jsonl" and row["row"] is not None or row["line"] == 7
        for row in found["set_aside"]
    )
    assert {row["line"]: row for row in found["set_aside"]}[len(bad) + 4]["detail"] == "of torture.jsonl:1"


@pytest.mark.parametrize(
    "name, encoding, label",
    [
        ("a.jsonl", "utf-8", "utf-8"),
        ("a.jsonl", "utf-8-sig", "utf-8-sig"),
        ("a.jsonl", "gb18030", "gb18030"),
        ("a.json", "gb18030", "gb18030"),
        ("a.csv", "gb18030", "gb18030"),
        ("a.tsv", "utf-8-sig", "utf-8-sig"),
        ("a.csv", "utf-8", "utf-8"),
        ("a.json", "utf-8-sig", "utf-8-sig"),
        ("lines.json", "utf-8", "utf-8"),
        ("a.parquet", None, "parquet"),
    ],
)
def test_file_kinds_and_encodings(tmp_path, convert, name, encoding, label):
    rows = [
        {"query": f'第{number}味药的功效，"是什么"？', "response": f"功效，{number}。\n第二行"}
        for number in range(30)
    ]
    path = tmp_path / name
    if name.startswith("lines") or name.endswith(".jsonl"):
        path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    elif name.endswith(".json"):
        path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode(encoding))
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding=encoding, newline="") as file:
            table = csv.DictWriter(
                file, ["query", "response"], delimiter="\t" if name.endswith(".tsv") else ","
            )
            table.writeheader()
            table.writerows(rows)
    found = convert(path)
    answers = {row["messages"][1]["content"] for row in found["sft_train"] + found["sft_eval"]}
    assert answers == {row["response"] for row in rows} and not found["set_aside"]
    assert found["report"]["files"][0]["encoding"] == label


def test_array_goes_on_after_a_damaged_element(tmp_path, convert, monkeypatch):
    from utils.data import readers

    monkeypatch.setattr(readers, "BLOCK", 50)  # every element crosses a border
    rows = [
        json.dumps({"query": f"问题{number}", "response": "答" * number}, ensure_ascii=False)
        for number in range(1, 20)
    ]
    rows[5] = '{"query": "坏" "response": "x"}'
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join(rows) + ',\n{"query": "断', encoding="utf-8")
    found = convert(path)
    assert sorted((row["line"], row["reason"]) for row in found["set_aside"]) == [
        (7, "not JSON"),
        (21, "not JSON"),
    ]
    assert sorted(int(row["source"].split(":")[1]) for row in found["sft_train"] + found["sft_eval"]) == [
        line for line in range(2, 21) if line != 7
    ]


def test_table_rows_that_are_none(tmp_path, convert):
    path = tmp_path / "a.csv"
    path.write_bytes('query,response\n问,答\n只有一格\n一,二,三\n\n"多\n行",答二\n'.encode() + b"\xff,x\n")
    found = convert(path)
    assert [(row["line"], row["reason"]) for row in found["set_aside"]] == [
        (3, "not a table row"),
        (4, "not a table row"),
        (8, "undecodable bytes"),
    ]
    assert {row["source"] for row in found["sft_train"] + found["sft_eval"]} == {"a.csv:2", "a.csv:6"}


def test_public_data_sets_as_they_are_published(tmp_path, convert):
    """The sets of FIELD_NOTES.md, each in the file kind and with the fields that it has, all in one run with no flag."""
    lines = {
        "ChatMed_TCM-v0.2.json": {
            "query": "痛经怎么调理？要求：1.说明病机 2.给出方药",
            "response": "温经汤加减。",
        },
        "hwtcm-sft-v1.jsonl": {"instruction": "麻黄归哪些经？", "input": "", "output": "归肺、膀胱经。"},
        "SylvanL.jsonl": {"instruction": "辨证", "input": "恶寒无汗，脉浮紧。", "output": "风寒表实证。"},
        "medical_o1_sft_Chinese.json": [
            {"Question": "何为相使？", "Complex_CoT": "想七情。", "Response": "一主一辅。"}
        ],
        "hwtcm.json": [
            {"instruction": "性寒的是\nA.麻黄\nB.石膏\nC.桂枝\nD.生姜", "input": "", "output": "B"}
        ],
        "cmexam.json": [
            {
                "Question": "归肺经的是",
                "Options": [{"key": "A", "value": "桔梗"}, {"key": "B", "value": "杜仲"}],
                "Answer": "A",
            }
        ],
        "cmb.json": [
            {
                "exam_type": "医师考试",
                "exam_class": "中医",
                "exam_subject": "方剂学",
                "question": "麻黄汤的君药是",
                "answer": "A",
                "question_type": "单项选择题",
                "option": {"A": "麻黄", "B": "桂枝", "C": "", "D": ""},
            }
        ],
        "chp_knowledge_qa.jsonl": {"query": "如何鉴别人参？", "response": "看横切面。"},
        "preference_sharegpt_zh.json": [
            {
                "conversations": [{"from": "human", "value": "何为四诊？"}],
                "chosen": {"from": "gpt", "value": "望闻问切。"},
                "rejected": {"from": "gpt", "value": "不知道。"},
            }
        ],
    }
    for name, value in lines.items():
        (tmp_path / name).write_text(
            json.dumps(value, ensure_ascii=False, indent=1 if isinstance(value, list) else None),
            encoding="utf-8",
        )
    (tmp_path / "traditional_chinese_medicine.csv").write_text(
        ",Question,A,B,C,D,Answer\n0,五味子的主要药味是,酸,苦,甘,辛,A\n", encoding="utf-8"
    )
    found = convert(tmp_path)
    assert found["set_aside"] == [] and found["report"]["rows_in"] == 10
    said = {
        row["messages"][0]["content"]: row["messages"][1] for row in found["sft_train"] + found["sft_eval"]
    }
    assert set(said) == {
        lines["ChatMed_TCM-v0.2.json"]["query"],
        "麻黄归哪些经？",
        "辨证\n恶寒无汗，脉浮紧。",
        "何为相使？",
        "如何鉴别人参？",
    }
    assert said["何为相使？"] == {
        "role": "assistant",
        "content": "一主一辅。",
        "reasoning_content": "想七情。",
    }
    assert {(row["question"], row["options"][row["answer"]], row["subject"]) for row in found["exam"]} == {
        ("性寒的是", "石膏", "hwtcm"),
        ("归肺经的是", "桔梗", "cmexam"),
        ("麻黄汤的君药是", "麻黄", "方剂学"),
        ("五味子的主要药味是", "酸", "traditional_chinese_medicine"),
    }
    assert [row["chosen"][0]["content"] for row in found["dpo_train"] + found["dpo_eval"]] == ["望闻问切。"]


def test_report_counts_tokens_as_the_trainer_does(tmp_path, capsys):
    model = str(ROOT / "model_download/tiny_qwen3_tcm")
    tokenizer = load_tokenizer(model)
    rows = [
        {"query": f"问题{number}？", "response": "麻黄发汗解表。" * (number % 9 + 1)} for number in range(100)
    ]
    rows += [{"Question": "何为相使？", "Complex_CoT": "想七情。", "Response": "一主一辅。"}, {"query": "坏"}]
    path, folder = write_lines(tmp_path / "a.jsonl", *rows), tmp_path / "out"
    script.main(
        [
            "--input-files",
            str(path),
            "--output-dir",
            str(folder),
            "--tokenizer-model",
            model,
            "--max-length",
            "40",
        ]
    )
    examples = read(folder / "sft_train.jsonl") + read(folder / "sft_eval.jsonl")
    tokens = sorted(sum(map(len, encode_turns(tokenizer, row["messages"])[0])) for row in examples)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    kept = sum(count <= 40 for count in tokens) / 101
    assert report["tokens_counted_in"] == 101 and report["tokens"]["longest"] == tokens[-1]
    assert report["tokens"]["median"] == tokens[50] and 0 < kept < 1
    assert report["kept_by_max_length"] == round(kept, 4) and report["reasoning_share"] == round(1 / 101, 4)
    assert report["characters"]["longest"] == 5 + 9 * 7 and len(report["examples"]) == 5
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for line in (
        "102  a.jsonl (utf-8)",
        "101  kept",
        "1  set aside",
        "1    fields not recognised",
        f"keeps {kept:.1%} of them",
        f"length in tokens (counted in 101 conversations): median {tokens[50]}",
        "with reasoning: 1.0%",
        f"  user      {report['examples'][0]['messages'][0]['content']}",
    ):
        assert line in shown, line


# ---- the split, duplicates and leaks ----


def sample_like():
    herbs = [
        "麻黄",
        "桂枝",
        "生姜",
        "地黄",
        "生地黄",
        "熟地黄",
        "白芍",
        "赤芍",
        "当归",
        "川芎",
        "人参",
        "党参",
        "丹参",
        "玄参",
    ]
    templates = (
        "{}的性味是什么？",
        "{}归哪些经？",
        "请问{}有哪些功效？",
        "在中药学里，{}这味药属于哪一类，请用一句话回答，并说明它主要用于哪些证候？",
        "请以一名经验丰富的中医师的身份，详细而有条理地说明中药{}的性味、归经、功效、主治、用法用量以及使用注意，不要遗漏任何一项内容。",
    )
    return [
        {
            "instruction": template.format(herb),
            "input": "",
            "output": f"{herb}：{template[-5:]}答案。",
            "split": "eval" if herb in ("桂枝", "丹参") else "train",
            "entity": herb,
            "kind": "herb",
        }
        for herb in herbs
        for template in templates
    ]


def test_template_questions_all_survive_and_own_splits_are_honoured(tmp_path, convert):
    rows = sample_like()
    found = convert(write_lines(tmp_path / "s.jsonl", *rows))
    assert not found["set_aside"]
    assert len(found["sft_eval"]) == sum(row["split"] == "eval" for row in rows)
    # A short answer that two herbs share makes no duplicate of their questions.
    same = [dict(row, output="温") for row in rows]
    assert not convert(write_lines(tmp_path / "t.jsonl", *same))["set_aside"]


def test_same_question_stays_on_one_side_and_duplicates_go(tmp_path, convert):
    rows = [{"query": f"问题{number}怎么办？", "response": f"回答{number}"} for number in range(60)]
    rows += [
        {"query": "问题7怎么办", "response": "另一个回答"},
        {"query": "ＴＣＭ是什么？", "response": "中医"},
        {"query": "请问 tcm 是什么呢", "response": "中医。"},
        {"query": "问题9怎么办？", "response": "回答9"},
    ]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.3)
    assert [(row["line"], row["reason"], row["detail"]) for row in found["set_aside"]] == [
        (62, "near-duplicate", "of a.jsonl:63"),
        (64, "exact duplicate", "of a.jsonl:10"),
    ]
    sides = [{row["source"] for row in found[name]} for name in ("sft_train", "sft_eval")]
    assert any({"a.jsonl:8", "a.jsonl:61"} <= side for side in sides)
    assert len(found["sft_eval"]) == pytest.approx(0.3 * 62, abs=2)


def test_long_near_identical_questions(tmp_path, convert):
    rows = [
        {"query": CASE, "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减。"},
        {
            "query": "医生，" + CASE + "，怎么办？急！",
            "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减",
        },
        {
            "query": CASE.replace("畏寒", "怕寒"),
            "response": "证属风寒头痛，治宜疏风散寒，方用川芎茶调散加减！",
        },
        {"query": CASE.replace("浮紧", "沉细"), "response": "阳虚头痛。"},
    ]
    rows += [{"query": f"第{number}个问题", "response": f"答{number}"} for number in range(20)]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    for seed in range(8):  # the two that differ in a swapped word and in the answer stay, on one side
        found = convert(path, eval_share=0.5, seed=seed)
        assert sorted(row["reason"] for row in found["set_aside"]) == ["near-duplicate", "near-duplicate"]
        questions = [
            [row["messages"][0]["content"] for row in found[name]] for name in ("sft_train", "sft_eval")
        ]
        sides = [sum(CASE[:20] in question for question in side) for side in questions]
        assert sorted(sides) == [0, 2]
    assert convert(path, near_duplicate=1)["report"]["rows_set_aside"] == 0


def test_leaks_set_the_training_row_aside(tmp_path, convert):
    told = write_lines(
        tmp_path / "told.jsonl",
        {"query": "麻黄有哪些功效？", "response": "发汗", "split": "test"},
        {"query": "请问麻黄有哪些功效", "response": "发汗解表平喘", "split": "train"},
        {"query": CASE, "response": "答", "split": "validation"},
        {"query": "您好，" + CASE + "，为什么？", "response": "别的答", "split": "train"},
        {"query": "桂枝有哪些功效？", "response": "解肌", "split": "train"},
        {"messages": turns("先说说别的", "好的", "哪一味药善于发汗解表宣肺平喘？", "麻黄")},
        {"prompt": "麻黄有哪些功效?", "chosen": "好", "rejected": "坏", "split": "train"},
    )
    exam = write_lines(
        tmp_path / "exam.json",
        {
            "question": "哪一味药善于发汗解表、宣肺平喘？",
            "answer": "A",
            "options": {"A": "麻黄", "B": "石膏"},
        },
    )
    found = convert(told, exam, eval_share=0)
    assert [(row["line"], row["reason"], row["detail"]) for row in found["set_aside"]] == [
        (2, "evaluation leak", "of told.jsonl:1"),
        (4, "evaluation leak", "of told.jsonl:3"),
        (6, "exam leak", "of exam.json:1"),
        (7, "evaluation leak", "of told.jsonl:1"),
    ]
    assert [row["messages"][0]["content"] for row in found["sft_train"]] == ["桂枝有哪些功效？"]
    assert len(found["sft_eval"]) == 2 and found["exam"][0]["subject"] == "exam"


def test_order_of_the_rows_changes_nothing(tmp_path, convert):
    rows = [
        {"query": f"{CASE[: number % 7 + 30]}第{number}问", "response": f"答{number % 50}"}
        for number in range(150)
    ]
    rows += [{"query": row["query"] + "呢？", "response": row["response"]} for row in rows[:30]]
    rows += [dict(zip(("prompt", "chosen", "rejected"), (row["query"], "好", "坏"))) for row in rows[:40]]
    splits = []
    for seed in (1, 2):
        random.Random(seed).shuffle(rows)
        found = convert(write_lines(tmp_path / "a.jsonl", *rows), eval_share=0.2)
        splits.append({name: {row["id"] for row in found[name]} for name in conversion.OUTPUTS})
    assert splits[0] == splits[1] and splits[0]["sft_eval"] and splits[0]["dpo_eval"]
    other = convert(tmp_path / "a.jsonl", eval_share=0.2, seed=5)
    assert {row["id"] for row in other["sft_eval"]} != splits[0]["sft_eval"]
    held_out = {row["messages"][0]["content"] for row in other["sft_eval"]}
    assert not held_out & {row["prompt"][0]["content"] for row in other["dpo_train"]}


def test_workers_give_the_same_files(tmp_path, run_script):
    rows = [{"query": f"问题{number % 900}", "response": f"答{number % 4900}"} for number in range(5000)] + [
        {"query": "坏"}
    ] * 3
    path = write_lines(tmp_path / "a.jsonl", *rows)
    for workers in (1, 2):
        done = run_script(
            SCRIPT,
            "--input-files",
            path,
            "--output-dir",
            tmp_path / str(workers),
            "--workers",
            workers,
            "--tokenizer-model",
            "",
        )
        assert done.returncode == 0, done.stderr
    for name in ("sft_train", "sft_eval", "set_aside"):
        assert (tmp_path / "1" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "2" / f"{name}.jsonl"
        ).read_bytes()


@pytest.fixture
def at_work(tmp_path):
    """at_work(seconds) starts a conversion in two workers and returns it when both have used so much CPU time."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks for processes in /proc")
    path = write_lines(
        tmp_path / "a.jsonl",
        *({"query": f"问题{number}", "response": "答" * 200} for number in range(100_000)),
    )
    command = [
        sys.executable,
        ROOT / SCRIPT,
        "--input-files",
        path,
        "--output-dir",
        tmp_path / "out",
        "--workers",
        "2",
    ]

    def start(seconds):
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        # Three processes, as one is Python's resource tracker: it uses little, and ends by itself.
        wait_until(
            lambda: len(used := sorted(cpu_seconds(running.pid).values())) == 3 and used[-2] >= seconds
        )
        assert running.poll() is None
        return running

    return start


@pytest.mark.parametrize(
    "seconds", [0.04, 0.6], ids=["while workers start", "while workers work"]
)  # a start takes about 0.15
def test_ctrl_c_ends_all_processes_and_leaves_the_earlier_files(tmp_path, at_work, seconds):
    kept = write_lines(tmp_path / "out/sft_train.jsonl", {"id": "of an earlier run"}).read_bytes()
    running = at_work(seconds)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    errors = running.communicate(timeout=60)[1].decode()
    assert (running.returncode, errors) == (
        130,
        "error: stopped by Ctrl-C; the same command starts it again\n",
    )
    wait_until(lambda: not cpu_seconds(running.pid))
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir()] == [
        ("sft_train.jsonl", kept)
    ]


def test_workers_of_a_killed_conversion_end(at_work):
    running = at_work(0.6)
    running.kill()
    running.communicate(timeout=60)  # stderr ends when the last process that holds it has ended
    wait_until(lambda: not cpu_seconds(running.pid))


def test_a_killed_worker_is_told(at_work):
    running = at_work(0.6)
    used = cpu_seconds(running.pid)
    os.kill(int(max(used, key=used.get)), signal.SIGKILL)  # what the kernel does where memory runs out
    errors = running.communicate(timeout=60)[1].decode()
    assert running.returncode == 1 and errors.count("\n") == 1
    assert "a worker process was killed, most likely for want of memory; try again with --workers 1" in errors


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def cpu_seconds(session):
    """{process: CPU seconds} of the living processes of a session, without the one that leads it."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between two looks
        if int(fields[3]) == session != int(stat.parent.name) and fields[0] != "Z":
            found[stat.parent.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("麻黄，1.5克？", "麻黄15克", False),
        ("麻黄 １５ 克", "麻黄15克", True),
        ("10㎎", "10mg", True),
        ("ＡＢＣ、甲", "abc甲", True),
        ("血糖>7", "血糖<7", False),
        ("①…，①", "11", True),
        ("3-5天", "35天", False),
        ("10％", "10%", True),
    ],
)
def test_normalise(one, other, equal):
    assert (normalize(one) == normalize(other)) == equal


def test_normalise_all_is_normalise():
    characters = [chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000]
    neighbours = (
        "1{}2",
        "a{}1",
        "は{}",
        "ᄀ{}",
        "가{}",
        "{}{}",
        ".{}1",
    )  # digits, and what joins with a mark after it
    texts = [form.replace("{}", character) for character in characters for form in neighbours]
    chance = random.Random(0)
    mixture = [*"1234567890.，,% 一二三\n\1_<>=あ℃①Ⅱ𠀀e\u0301", *chance.choices(characters, k=30)]
    texts += ["".join(chance.choices(mixture, k=chance.randint(0, 12))) for _ in range(50_000)]
    assert normalize_all(texts) == [normalize(text) for text in texts]
    for texts in ([], [""], ["", ""], ["a\0b，", "1"], ["\ud800，", "甲，"]):
        assert normalize_all(texts) == [normalize(text) for text in texts]


def test_spool_gives_back_what_it_took(tmp_path):
    spool, texts = TextStore(tmp_path), [b"one", b"", b"\xe9\xba\xbb\n", b"x" * 20_000]
    for batch in (texts, [], texts[::-1]):
        spool.add(b"".join(batch), map(len, batch))
    assert [spool.read(index) for index in (7, 0, 1, 2, 3)] == [b"one", *texts]
    assert spool.read(1, 4) == b"".join(texts[1:4]) and spool.read(0, 8) == b"".join(texts + texts[::-1])


@pytest.mark.parametrize(
    "row",
    [
        {"query": 'q "\\\t\n', "response": "a\u2028😀"},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"},
            ]
        },
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "options": {"A": "a", "B": "b"}, "answer": "A"},
    ],
)
def test_output_lines_are_what_json_writes(row):
    """Lines of conversations are put together by hand, for speed."""
    task = (0, 'my "data".jsonl', "utf-8", [(7, row)], {"columns": (), "system": "", "max_characters": 100})
    _, lines, lengths, *_ = conversion.examine(task)
    assert lengths == [len(lines)]
    fields = json.loads(lines)
    assert lines == json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    assert (
        list(fields)[0] == "id" and list(fields)[-1] == "source" and fields["source"] == 'my "data".jsonl:7'
    )


def test_signatures_find_what_overlaps():
    chance = random.Random(0)
    texts = [
        "".join(chance.choices("甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥", k=60)) for _ in range(300)
    ]
    texts += [text[:57] + "金木水" for text in texts[:100]]
    close = {
        (one, other)
        for one in range(400)
        for other in range(one + 1, 400)
        if dedup.overlap(texts[one], texts[other]) >= 0.85
    }
    marks = dedup.signatures(texts)
    assert (marks == dedup.signatures(texts[:7] + texts[7:])).all()
    found = set(zip(*(side.tolist() for side in dedup.candidate_pairs(marks, 0.85))))
    assert len(close) == 100 and len(close & found) >= 98 and len(found) < 200


# ---- what the user is told ----


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: folder / "missing.jsonl", ["does not exist", "download_tcm_data.py"]),
        (lambda folder: folder, ["no data file", "download_tcm_data.py"]),
        pytest.param(
            lambda folder: (
                write_lines(folder / os.fsdecode(b"\xff.jsonl"), {"query": "q", "response": "r"}).parent
            ),
            ["'\\udcff.jsonl': the file's name is not UTF-8; rename it"],
            marks=pytest.mark.skipif(sys.platform != "linux", reason="such a name cannot be made there"),
        ),
        (
            lambda folder: (folder / "a.xlsx").write_text("x", encoding="utf-8") and folder / "a.xlsx",
            ["cannot read .xlsx", ".parquet"],
        ),
        (
            lambda folder: (folder / "a.jsonl").write_text("", encoding="utf-8") or folder / "a.jsonl",
            ["no row could be used (the input is empty)"],
        ),
        (
            lambda folder: (
                (folder / "a.json").write_text('{\n"query": "q",\n"response": "r"\n}', encoding="utf-8")
                and folder / "a.json"
            ),
            [
                "no row could be used (4 not JSON); wanted one JSON object for each row: one a line, or all in one array"
            ],
        ),
        (
            lambda folder: write_lines(folder / "a.json", {"data": [{"query": "q", "response": "r"}]}),
            [
                "no row could be used (1 fields not recognised); fields found: data; wanted one JSON object for each row"
            ],
        ),
        (
            lambda folder: (folder / "a.parquet").write_text("x", encoding="utf-8") and folder / "a.parquet",
            ["not a whole Parquet file"],
        ),
        (
            lambda folder: (folder / "a.jsonl").write_text("{}", encoding="utf-16") and folder / "a.jsonl",
            ["UTF-16"],
        ),
        (
            lambda folder: write_lines(
                folder / "a.jsonl", {"title": "短", "Content": "问题", "Summary": "很长的回答"}
            ),
            ["fields found: title, Content, Summary", "--columns question=Content,answer=Summary"],
        ),
    ],
)
def test_errors_are_one_line(tmp_path, run_script, make, words):
    done = run_script(SCRIPT, "--input-files", make(tmp_path), "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_columns_that_fit_no_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"query": "问", "response": "答"})
    with pytest.raises(
        UserError, match="no row has the fields of --columns question=X,answer=Y; fields found: query, resp"
    ):
        script.main(
            [
                "--input-files",
                str(path),
                "--output-dir",
                str(tmp_path / "o"),
                "--columns",
                "question=X,answer=Y",
            ]
        )


def test_encoding_of_a_damaged_utf8_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(["麻黄汤".encode()] * 5 + ["麻黄".encode("gb18030")] * 3 + [b"\xff"]))
    assert detect_encoding(path) == "utf-8"
    assert sum(len(batch) for _, batch in batches([path], ["utf-8"])) == 9
