"""Files of every kind and encoding give their rows, and what is damaged in them is told with its line."""

import json
import time

import pytest
from data_rows import BAD, RAW

from utils.data.inputs import InputFile, detect_encoding
from utils.data.messages import Reject
from utils.data.readers import parse_row, read_rows
from utils.errors import UserError


def test_torture_file(tmp_path, convert):
    bad = RAW + [(json.dumps(row).encode(), reason) for row, reason in BAD]
    good = json.dumps({"query": "麻黄的功效是什么？", "response": "发汗解表。"}, ensure_ascii=False).encode()
    lines = [line for line, _ in bad]
    path = tmp_path / "torture.jsonl"
    start = b"\xef\xbb\xbf" + good + b"\r\n\r\n   \n"
    path.write_bytes(start + b"\n".join(lines) + b"\r\n" + good + b"\n" + good[:-9])
    found = convert(path)
    wanted = [(number, reason) for number, (_, reason) in enumerate(bad, 4)]
    wanted += [
        (len(bad) + 4, "exact duplicate"),
        (len(bad) + 5, "undecodable bytes" if good[:-9][-1] > 127 else "not JSON"),
    ]
    ledger = sorted((row["line"], row["reason"]) for row in found["set_aside"])
    assert len(bad) >= 55 and ledger == wanted
    [kept] = found["sft_train"] + found["sft_eval"]
    assert kept["messages"][0]["content"] == "麻黄的功效是什么？"
    assert all(row["row"] is not None or row["line"] == 7 for row in found["set_aside"])
    assert {row["line"]: row for row in found["set_aside"]}[len(bad) + 4]["detail"] == "of torture.jsonl:1"


@pytest.mark.parametrize(
    "text, place",
    [
        ('[\n{"query": "问", "response": "答"},\n{"query": "坏" "response": "x"}]', "line 3, column 15"),
        ('[\n{"query": "问", "response": "答"},\n{"query": "断', "line 3, column 11"),
        ('[{"query": "问", "response": "答"}', "line 1, column 33"),
        ('[{"query": "问", "response": "答"} {"query": "问"}]', "line 1, column 34"),
        ('{"n": 1, "data": [{"query": "问", "response": "答"}, x]}', "line 1, column 52"),
        ('{"n": 1, "data": [{"query": "问", "response": "答"}]', "line 1, column 51"),
    ],
)
def test_a_broken_array_is_told_with_the_place(tmp_path, convert, text, place):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"a.json: broken JSON at {place}"):
        convert(tmp_path / "a.json")


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


def test_encoding_of_a_damaged_utf8_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(["麻黄汤".encode()] * 5 + ["麻黄".encode("gb18030")] * 3 + [b"\xff"]))
    assert detect_encoding(InputFile(path, path.name)) == "utf-8"
    assert len(list(read_rows(InputFile(path, path.name, encoding="utf-8")))) == 9


def test_many_duplicate_keys_take_no_longer_than_their_text():
    text = "{" + ", ".join(f'"k{number % 40_000}": 1' for number in range(80_000)) + "}"
    start = time.monotonic()
    with pytest.raises(Reject, match="duplicate keys"):
        parse_row(text, "utf-8")
    assert time.monotonic() - start < 2  # 51 s when every name was counted through the whole list
