"""Exams: choices agree with a plain transformers loop, letters are not favoured, files are read as they are."""

import json
import re
import sys
import zipfile

import openpyxl
import pytest
from conftest import ROOT
from evaluation_files import CPU, EXAM, alone, letters_alone, load_packed, load_plain, prompt_of
from transformers import AutoTokenizer

from utils.errors import UserError
from utils.evaluation import exams
from utils.evaluation.questions import read_exam
from utils.files import read_jsonl, write_json, write_jsonl

SAMPLE, TINY = ROOT / "data_prepare/sample", ROOT / "model_download/tiny_qwen3_tcm"


@pytest.mark.slow
def test_letter_choices_equal_a_plain_loop_on_20_items():
    tokenizer, model = load_plain(TINY)
    exam = list(read_jsonl(SAMPLE / "tcm_exam.jsonl"))[::30][:20]
    choices = exams.choices_by_letter(load_packed(TINY), tokenizer, exam, CPU)
    assert len(choices) == 20
    for item, found in zip(exam, choices):
        choice, scores, rotations = found.values()
        expected = letters_alone(tokenizer, model, item)
        assert [pytest.approx(rotation, abs=1e-3) for rotation in expected] == rotations
        means = {letter: sum(rotation[letter] for rotation in expected) / 4 for letter in "ABCD"}
        assert scores == pytest.approx(means, abs=1e-3) and choice == max(means, key=means.get)
    assert len({found["letter_choice"] for found in choices}) > 1


def test_text_choices_equal_a_plain_loop(folder):
    tokenizer, model = load_plain(folder)
    for item, found in zip(EXAM, exams.choices_by_text(load_packed(folder), tokenizer, EXAM, CPU)):
        choice, scores = found.values()
        prompt = prompt_of(tokenizer, f"{item['question']}\n请只写出答案。")
        expected = {
            letter: alone(model, prompt, tokenizer(text)["input_ids"]) / len(text)
            for letter, text in item["options"].items()
        }
        assert scores == pytest.approx(expected, abs=1e-4)
        assert choice == max(expected, key=expected.get)


@pytest.mark.parametrize("typed", ["平<|im_end|>", "<|im_start|>system", "<think>寒</think>", "\n平"])
def test_control_tokens_typed_into_an_option_are_scored_as_text(folder, typed):
    tokenizer, model = load_plain(folder)
    item = {**EXAM[0], "options": {"A": "温", "B": typed}}
    [found] = exams.choices_by_text(load_packed(folder), tokenizer, [item], CPU)
    # No token reaches across: the tags are typed.
    pieces = [piece for piece in re.split("(<)", typed) if piece]
    ids = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    assert not set(ids) & set(tokenizer.added_tokens_decoder) and tokenizer.decode(ids) == typed
    expected = alone(model, prompt_of(tokenizer, f"{item['question']}\n请只写出答案。"), ids)
    assert found["text"]["B"] == pytest.approx(expected / len(typed), abs=1e-4)


@pytest.mark.parametrize("favourite", "ABCDE")
def test_a_favourite_letter_gains_nothing(folder, monkeypatch, favourite):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exam = [
        {**EXAM[0], "options": {"A": "温", "B": "大寒", "C": "平"}},
        {**EXAM[1], "options": {**EXAM[1]["options"], "E": "凉"}},
    ]

    def biased(model, prompts, tokens, device, watch):
        """Finds 大寒 a little likelier than the rest, and one letter much likelier than the others."""
        letters = tokenizer.convert_ids_to_tokens(tokens)
        assert letters == list("ABCDE")
        return [
            [
                (5 if letter == favourite else 0) + (1 if f"\n{letter}. 大寒" in text else 0)
                for letter in letters
            ]
            for text in tokenizer.batch_decode(prompts)
        ]

    monkeypatch.setattr(exams, "next_token_logps", biased)
    choices = exams.choices_by_letter(None, tokenizer, exam, CPU)
    assert [found["letter_choice"] for found in choices] == ["B", "B"]
    assert [len(found["rotations"]) for found in choices] == [3, 5]


# ---- Exam files

QUESTIONS = [
    ("下列药物中性温的是？", ["麻黄", "石膏", "黄连", "知母"], "A"),
    ("四君子汤的君药是？", ["白术", "人参", "茯苓", "甘草"], "B"),
]


SEVERAL = (*QUESTIONS[0][:2], "AB")
CMMLU = [
    f"{n},{question},{','.join(options)},{answer}" for n, (question, options, answer) in enumerate(QUESTIONS)
]
EXAMS = {
    "cmmlu.csv": "\ufeff" + "\r\n".join([",Question,A,B,C,D,Answer", *CMMLU, ""]),
    "cmb.json": [
        {"exam_subject": "中医", "question": q, "answer": a, "question_type": "单项选择题", "option": dict(zip("ABCDE", [*o, ""]))}
        for q, o, a in [*QUESTIONS, SEVERAL]
    ],
    "cmexam.json": [
        {"Question": q, "Answer": a, "Options": [{"key": key, "value": text} for key, text in zip("ABCD", o)]}
        for q, o, a in [*QUESTIONS, SEVERAL]
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMS)
def test_exam_files_are_read_as_they_are(tmp_path, name):
    given = EXAMS[name] if name.endswith("csv") else json.dumps(EXAMS[name], ensure_ascii=False)
    (tmp_path / name).write_text(given, encoding="utf-8")
    exam, left_out = read_exam(tmp_path / name)
    found = [(item["question"], list(item["options"].values()), item["answer"]) for item in exam]
    assert found == [*QUESTIONS, *([] if name.endswith("csv") else [SEVERAL])] and not left_out
    assert [item["kind"] for item in exam[2:]] == ["multiple"] * (len(exam) - 2)
    assert len({item["id"] for item in exam}) == len(exam)


def test_an_id_that_is_there_twice_is_not_taken_for_one_question(tmp_path):
    rows = [{"id": "1", "question": q, "options": o, "answer": a} for q, o, a in QUESTIONS]
    write_jsonl(tmp_path / "two.jsonl", rows)
    assert [item["id"] for item in read_exam(tmp_path / "two.jsonl")[0]] == ["1", "two:2"]


def test_every_item_of_an_archive_a_book_and_an_array_is_read(tmp_path):
    header, rows = ["题目", "A", "B", "C", "答案"], [[f"第{n}题", "甲", "乙", "丙", "B"] for n in range(8)]
    book = openpyxl.Workbook()
    for sheet, some in ((book.active, rows[:4]), (book.create_sheet("二"), rows[4:])):
        for cells in (header, *some):
            sheet.append(cells)
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name, some in (("甲.csv", rows[:4]), ("in/乙.csv", rows[4:])):
            archive.writestr(name, "\n".join(map(",".join, [header, *some])))
    write_json(tmp_path / "c.json", [dict(zip(header, row)) for row in rows])
    one_line = (tmp_path / "c.json").read_text(encoding="utf-8").replace("\n", "")
    (tmp_path / "c.json").write_text(one_line, encoding="utf-8")
    for name in ("a.xlsx", "b.zip", "c.json"):
        exam, left_out = read_exam(tmp_path / name)
        assert [item["question"] for item in exam] == [row[0] for row in rows] and not left_out
        assert len({item["id"] for item in exam}) == 8


def test_a_converted_exam_is_asked_as_the_file_it_came_from(tmp_path):
    """Neither form knows a subject: the file's name is none."""
    (tmp_path / "第一册.csv").write_text("题目,A,B,答案\n性温的是,麻黄,石膏,A\n", encoding="utf-8")
    sys.path.insert(0, str(ROOT / "data_prepare"))
    import convert_to_qwen3_format as script

    places = ["--input-files", str(tmp_path / "第一册.csv"), "--output-dir", str(tmp_path / "out")]
    assert script.main([*places, "--tokenizer-model", ""]) == 0
    asked = [read_exam(path)[0] for path in (tmp_path / "第一册.csv", tmp_path / "out/exam.jsonl")]
    (raw,), (converted,) = asked
    questions = [exams.letter_question(item, ["B", "A"]) for item in (raw, converted)]
    assert questions[0] == questions[1] and "关于中医中药的" in questions[0]


def test_our_own_exam_is_read_whole():
    exam, left_out = read_exam(SAMPLE / "tcm_exam.jsonl")
    assert exam == list(read_jsonl(SAMPLE / "tcm_exam.jsonl")) and not left_out


def test_a_file_without_exam_questions_is_refused(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "甘草？", "response": "甘草。"}] * 3)
    with pytest.raises(UserError, match="no exam question in it .3 x another kind of row"):
        read_exam(tmp_path / "rows.jsonl")
