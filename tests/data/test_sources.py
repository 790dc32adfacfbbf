"""Files of every kind, form and encoding are found and give their rows; what is damaged in them is told with its line."""

import gzip
import io
import json
import zipfile

import datasets
import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from data_rows import write_lines

from utils.data.inputs import InputFile, detect_encoding, find_input_files, says_evaluation
from utils.data.readers import read_rows
from utils.errors import UserError


def rows_of(*names, count=12):
    return [{"query": f"{name}的第{n}个问题？", "response": f"答{n}"} for name in names for n in range(count)]


NAMES = {  # whether they say that a file is for evaluation
    True: "test.jsonl valid_0.json validation.jsonl dev.csv CMExam-test.jsonl eval 测试集.json val 测试.json 验证.json 测试数据.csv "
    "题库测试集.json 某赛-test-B.json testset.jsonl data.test.jsonl data.test.jsonl.gz testA.json test_set.parquet "
    "tcm_test_2.json 中医验证集 评测集.xlsx 验证_甲.json",
    False: "train.jsonl latest.json testing.json medical_test_questions.jsonl tcm.jsonl evaluate.json 某集_train_dev.json "
    "训练.json 训练_测试.json 考试.json 测试工程师.json contest.json data.json 中医开发.json",
}


def test_names_of_evaluation():
    named = list(filter(says_evaluation, " ".join(NAMES.values()).split()))
    assert named == NAMES[True].split()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OTHER = [
    *((f"a.{ending}", LFS, "a Git LFS pointer") for ending in ("json", "parquet", "jsonl.gz", "zip")),
    ("a.jsonl", b"\n<!DOCTYPE html>\n<html>", "a web page, not the file"),
    ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "save it as .xlsx"),
    ("a.csv", b"PK\x03\x04", "a .zip or .xlsx file under another name"),
    ("a.json", b"PAR1", "a .parquet or .gz file under another name"),
    ("a.csv", b"\xff\xfea\x00", "UTF-16: save it as UTF-8"),
    ("a.xls", b"x", "an old Excel file: save it as .xlsx"),
    ("a.json", b"%PDF-1.7", "a PDF"),
]


@pytest.mark.parametrize("name, start, words", OTHER)
def test_files_that_are_something_else_are_told_by_their_first_bytes(tmp_path, name, start, words):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(UserError, match=words):
        find_input_files([tmp_path / name], "x")


def test_files_and_folders_say_their_split(tmp_path, convert, capsys):
    data = tmp_path / "data"
    write_lines(data / "train.jsonl", *rows_of("训练"))
    own = {"query": "自己说的？", "response": "答", "split": "train"}
    write_lines(data / "test.jsonl", *rows_of("测试"), own)
    write_lines(data / "dev" / "part.jsonl", *rows_of("开发"))
    found = convert(data, eval_share=0)
    assert {row["source"].rpartition(":")[0] for row in found["sft_eval"]} == {"test.jsonl", "dev/part.jsonl"}
    assert len(found["sft_eval"]) == 24 and len(found["sft_train"]) == 13
    splits = {file["file"]: file["split"] for file in found["report"]["files"]}
    assert splits == {"dev/part.jsonl": "eval", "test.jsonl": "eval", "train.jsonl": ""}
    assert "test.jsonl (utf-8, evaluation by its name)" in capsys.readouterr().out
    given = convert(data / "test.jsonl", eval_share=0)  # named by the user, who says so
    assert len(given["sft_train"]) == 13


def test_skipped_files_are_named(tmp_path, convert, capsys):
    data = tmp_path / "data"
    write_lines(data / "a.jsonl", *rows_of("甲"))
    for name in ("book.txt", "a.rar", ".hidden", "README.md", "a.source.json"):
        (data / name).write_text("文", encoding="utf-8")
    write_lines(data / "more" / "b.jsonl", *rows_of("乙"))
    skipped = convert(data)["report"]["skipped"]
    assert skipped == {
        "README.md": "a text for people",
        "a.rar": "cannot read .rar",
        "book.txt": "plain text: continued pre-training is not done here",
        "more/": "a folder in the folder: name it after --input-files too",
    }
    assert "book.txt: plain text: continued pre-training" in capsys.readouterr().out
    with pytest.raises(UserError, match="plain text: continued pre-training is not done here"):
        convert(data / "book.txt")
    (data / "a.jsonl").unlink()
    with pytest.raises(UserError, match="no data file .*README.md, a text for people; a.rar"):
        convert(data)


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    return "".join(",".join(cells) + "\r\n" for cells in (rows[0], *map(dict.values, rows))).encode()


def as_parquet(rows):
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    return data.getvalue()


def zipped(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def dumped(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent).encode()


ROWS = rows_of("甲", count=30)
TURNS = [[{"from": "human", "value": r["query"]}, {"from": "gpt", "value": r["response"]}] for r in ROWS]
FORMS = {
    "a.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "gb.jsonl": as_lines(ROWS).decode().encode("gb18030"),
    "bom.jsonl": b"\xef\xbb\xbf" + as_lines(ROWS).replace(b"\n", b"\r\n"),
    "bom.json": b"\xef\xbb\xbf" + dumped(ROWS, indent=1),
    "bom.tsv": b"\xef\xbb\xbf" + as_csv(ROWS).replace(b",", b"\t"),
    "lines.json": as_lines(ROWS),
    "a.parquet": as_parquet(ROWS),
    "a.zip": zipped({"in/a.jsonl": as_lines(ROWS[:10]), "b.csv": as_csv(ROWS[10:]), "__MACOSX/b.csv": b"x"}),
    "wrapped.json": dumped({"version": "1.0", "data": ROWS}),
    "one_line.jsonl": dumped({"data": ROWS}),
    "two_keys.json": dumped({"part1": ROWS[:10], "part2": ROWS[10:]}, indent=2),
    "nested.json": dumped([ROWS[:10], ROWS[10:]], indent=1),
    "mixed.json": dumped({"rows": [*ROWS[:10]], "more": [ROWS[10:]], "note": "x"}),
    "no_brackets.json": b",\n".join(dumped(row) for row in ROWS) + b",\n",
    "pretty.json": b"\n".join(dumped(row, indent=1) for row in ROWS),
    "columns.json": dumped({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1),
    "pandas.json": dumped({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}),
    "by_name.json": dumped({f"病例{n}": row for n, row in enumerate(ROWS)}, indent=1),
    "lists_of_one.jsonl": as_lines([{name: [text] for name, text in row.items()} for row in ROWS]),
    "turns.jsonl": as_lines(TURNS),
    "turns.json": dumped(TURNS),
    "wrapped_turns.json": dumped({"data": TURNS}),
    "marked.jsonl": as_lines([{"data": [f"问：{row['query']}", f"答：{row['response']}"]} for row in ROWS]),
    "marked_text.jsonl": as_lines([{"text": f"<user>: {r['query']} <bot>: {r['response']}"} for r in ROWS]),
    "tabs.csv": as_csv(ROWS).replace(b",", b"\t"),
    "semicolons.csv": as_csv(ROWS).replace(b",", b";"),
    "titles.csv": "某年的问答\n填表说明：略\n\n".encode() + as_csv(ROWS).replace(b",", b"\t"),
    "title.csv": "某年的问答,\n".encode() + as_csv(ROWS),
    "no_wrapper.jsonl": as_lines([{"turns_before": [{"x": 1}], **row} for row in ROWS]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_in_which_rows_come(tmp_path, convert, name):
    (tmp_path / name).write_bytes(FORMS[name])
    found = convert(tmp_path / name)
    kept = found["sft_train"] + found["sft_eval"]
    assert {row["messages"][0]["content"] for row in kept} == {row["query"] for row in ROWS}
    assert len(kept) == 30 and not found["set_aside"]
    encoding = {"gb": "gb18030", "bom": "utf-8-sig"}.get(name.partition(".")[0], "utf-8")
    assert found["report"]["files"][0]["encoding"] == ("parquet" if "parquet" in name else encoding)


@pytest.mark.parametrize("said", [None, b"A1", b"A1:B4"])
def test_excel_tables(tmp_path, convert, said):
    """Two sheets, a title over the names of the columns, and a wrong size that the first states, as WPS may write it."""
    book = openpyxl.Workbook()
    sheets = {book.active: ROWS[:10], book.create_sheet("二"): [*ROWS[10:], {"question": "空"}]}
    for sheet, rows in sheets.items():
        for cells in (["某年的问答"], [], ["问题", "答案", None], *map(list, map(dict.values, rows))):
            sheet.append(cells)
    book.save(tmp_path / "right.xlsx")
    with zipfile.ZipFile(tmp_path / "right.xlsx") as right:
        parts = {name: right.read(name) for name in right.namelist()}
    if said:
        parts = {name: part.replace(b'ref="A1:C13"', b'ref="%s"' % said) for name, part in parts.items()}
        assert any(b'ref="%s"' % said in part for part in parts.values())
    (tmp_path / "a.xlsx").write_bytes(zipped(parts))
    found = convert(tmp_path / "a.xlsx")
    assert found["report"]["rows_kept"] == 30 and found["report"]["schemas"] == {"问题/答案": 30}
    [aside] = found["set_aside"]
    assert (aside["line"], aside["reason"]) == ("二!24", "missing or empty answer")


def test_splits_in_one_file_or_in_a_folder_that_save_to_disk_wrote(tmp_path, convert):
    parts = {"train": ROWS[:20], "test": ROWS[20:]}
    (tmp_path / "a.json").write_bytes(dumped(parts))
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    for given in ("a.json", "both"):
        found = convert(tmp_path / given, eval_share=0)
        assert len(found["sft_train"]) == 20 and len(found["sft_eval"]) == 10
    parts["train"].save_to_disk(tmp_path / "one")
    assert len(convert(tmp_path / "one", eval_share=0)["sft_train"]) == 20


def test_each_file_is_read_once_and_its_size_is_that_of_the_unpacked_one(tmp_path):
    content = b'{"query": "q", "response": "r"}\n' * 1000
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.zip").write_bytes(zipped({"in.jsonl": content}))
    sources, _ = find_input_files([tmp_path, tmp_path / "a.jsonl"], "x")
    wanted = {name: len(content) for name in ("a.jsonl", "a.jsonl.gz", "a.zip/in.jsonl")}
    assert len(sources) == 3 and {source.name: source.size for source in sources} == wanted


LINES = [  # that are no rows to train on, and why
    (b"{", "not JSON"),
    (b"[1, 2]", "not an object"),
    (b"3", "not an object"),
    (b"{}", "fields not recognised"),
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


def test_torture_file(tmp_path, convert):
    """Every damaged line stands in the ledger with its number and reason; the good one among them is kept."""
    good = '{"query": "麻黄的功效是什么？", "response": "发汗解表。"}'.encode()
    start, lines = b"\xef\xbb\xbf" + good + b"\r\n\r\n   \n", b"\n".join(line for line, _ in LINES)
    path = tmp_path / "torture.jsonl"
    path.write_bytes(start + lines + b"\r\n" + good + b"\n" + good[:-9])
    found = convert(path)
    wanted = [reason for _, reason in LINES] + ["exact duplicate", "undecodable bytes"]
    asides = sorted(found["set_aside"], key=lambda aside: aside["line"])
    assert [(aside["line"], aside["reason"]) for aside in asides] == list(enumerate(wanted, 4))
    [kept] = found["sft_train"] + found["sft_eval"]
    assert kept["messages"][0]["content"] == "麻黄的功效是什么？"
    assert all(aside["row"] is not None for aside in asides) and asides[-2]["detail"] == "of torture.jsonl:1"


BROKEN = [
    ("a.jsonl.gz", FORMS["a.jsonl.gz"][:200], "not a whole .gz file"),
    ("a.zip", FORMS["a.zip"][:200], "not a whole .zip file"),
    ("a.xlsx", b"x", "not a whole .xlsx file"),
    ("a.json", b'[\n{"query": "q", "response": "r"},\n{"query": "q" "response": "r"}]', "a.json: broken JSON: .* line 3 column 15"),
    ("a.json", b'[{"query": "q", "response": "r"}', "a.json: broken JSON: .* line 1 column 33"),
    ("a.json", b'{"n": 1, "data": [{"query": "q", "response": "r"}]', "a.json: broken JSON: .* line 1 column 51"),
]  # fmt: skip


@pytest.mark.parametrize("name, data, words", BROKEN)
def test_a_damaged_file_is_one_line_with_the_place(tmp_path, convert, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        convert(tmp_path / name)


def test_encoding_of_a_damaged_utf8_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(["麻黄汤".encode()] * 5 + ["麻黄".encode("gb18030")] * 3 + [b"\xff"]))
    assert detect_encoding(InputFile(path, path.name)) == "utf-8"
    assert len(list(read_rows(InputFile(path, path.name, encoding="utf-8")))) == 9


QUOTE = "a quote out of place"
TABLES = [  # a table, its rows (line, answer), and its lines that are set aside
    ("a.csv", b"\xe4,x\n\xe9\x97\xae,y\n\xe4\xb8\x80\n1,2,3\n\n", [(3, "y")], {2: "undecodable bytes", 4: "not a table row", 5: "not a table row"}),
    ("a.csv", '\n"多\n行",答二\n一,"一，\n二,三\n四"\n二,"说""好""。"\n', [(3, "答二"), (5, "一，\n二,三\n四"), (8, '说"好"。')], {}),
    ("a.csv", '一,答一\n"二,答二\n三,答三\n四,"答四\n五,答五\n', [(2, "答一"), (4, "答三"), (6, "答五")], {3: QUOTE, 5: QUOTE}),
    ("a.csv", '一,答一\n二,"答二\n三,答三\n五,答五\n', [(2, "答一"), (4, "答三"), (5, "答五")], {3: QUOTE}),
    ("a.tsv", '一\t答一\n二\t"答二\n三\t答三\n四\t答四"\n五\t答五\n', [(2, "答一"), (4, "答三"), (6, "答五")], {3: QUOTE, 5: QUOTE}),
    ("a.tsv", '"四诊"是什么\t望闻问切\n"问"\t"答"\n', [(2, "望闻问切"), (3, "答")], {}),
]  # fmt: skip


@pytest.mark.parametrize("name, text, kept, aside", TABLES)
def test_lines_of_tables(tmp_path, convert, name, text, kept, aside):
    """Each line is read or set aside; a quote that would swallow lines is told."""
    head = "query\tresponse\n" if name.endswith("tsv") else "query,response\n"
    (tmp_path / name).write_bytes(head.encode() + (text if isinstance(text, bytes) else text.encode()))
    found = convert(tmp_path / name)
    rows = found["sft_train"] + found["sft_eval"]
    assert sorted((int(row["source"].split(":")[1]), row["messages"][1]["content"]) for row in rows) == kept
    assert {row["line"]: row["reason"] for row in found["set_aside"]} == aside


def test_places_in_arrays(tmp_path, convert):
    (tmp_path / "a.json").write_bytes(dumped([{"query": "问", "response": ""}] * 3))
    (tmp_path / "b.jsonl").write_bytes(dumped(ROWS[0]) + b'\n[{"a": 1}, {"a": 2}]\n')
    places = [(aside["file"], aside["line"]) for aside in convert(tmp_path)["set_aside"]]
    assert places == [("a.json", 1), ("a.json", "1#2"), ("a.json", "1#3"), ("b.jsonl", 2), ("b.jsonl", "2#2")]
