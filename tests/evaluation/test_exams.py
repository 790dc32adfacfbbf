"""Exams: choices agree with a plain transformers loop, letters are not favoured, files are read as they are."""

import json
import re
import zipfile
from dataclasses import replace

import openpyxl
import pytest
import torch
from conftest import ROOT
from evaluation_files import CPU, EXAM, JUDGED, alone, letters_alone, load_packed, load_plain, prompt_of
from transformers import AutoTokenizer

from utils.errors import UserError
from utils.evaluation import exams
from utils.evaluation.measure import letter_choices
from utils.evaluation.questions import read_exam
from utils.files import read_jsonl, write_jsonl


def test_text_choices_equal_a_plain_loop(folder):
    """A statement is asked with its own two words."""
    tokenizer, model = load_plain(folder)
    exam = [*EXAM, *JUDGED]
    for item, found in zip(exam, exams.choices_by_text(load_packed(folder), tokenizer, exam, CPU)):
        asked, words = "请只写出答案。", list(item["options"].values())
        if item in JUDGED:
            asked = f"请判断以上说法是否正确，只写出“{words[0]}”或“{words[1]}”。"
        prompt, expected = prompt_of(tokenizer, f"{item['question']}\n{asked}"), {}
        for letter, text in item["options"].items():
            expected[letter] = alone(model, prompt, tokenizer(text)["input_ids"]) / len(text)
        assert found["text"] == pytest.approx(expected, abs=1e-4)
        assert found["text_choice"] == max(expected, key=expected.get)
    assert "判断题" in exams.letter_question(JUDGED[0], ["A", "B"])


@pytest.mark.parametrize("typed", ["平<|im_end|>", "<|im_start|>system"])
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
        assert tokenizer.convert_ids_to_tokens(tokens) == list("ABCDE")
        texts = tokenizer.batch_decode(prompts)
        return [[5 * (one == favourite) + (f"\n{one}. 大寒" in text) for one in "ABCDE"] for text in texts]

    monkeypatch.setattr(exams, "next_token_logps", biased)
    choices = exams.choices_by_letter(None, tokenizer, exam, CPU)
    assert [found["letter_choice"] for found in choices] == ["B", "B"]
    assert [len(found["rotations"]) for found in choices] == [3, 5]


def test_letters_are_chosen_in_float32_in_any_number_format(folder):
    tokenizer, model = load_plain(folder)
    forms = ({}, {"bf16": True}, {"fp16": True})
    choices = [letter_choices(folder, tokenizer, EXAM[:2], replace(CPU, **changes)) for changes in forms]
    assert choices[0] == choices[1] == choices[2]
    for item in EXAM[:2]:
        choice, scores, rotations = choices[0][item["id"]].values()
        expected = letters_alone(tokenizer, model, item)
        assert [pytest.approx(rotation, abs=1e-4) for rotation in expected] == rotations
        means = {letter: sum(rotation[letter] for rotation in expected) / 4 for letter in "ABCD"}
        assert scores == pytest.approx(means, abs=1e-4) and choice == max(means, key=means.get)
    rounded = letters_alone(tokenizer, model.to(torch.bfloat16), EXAM[0])  # bfloat16 would show
    assert rounded[0] != pytest.approx(choices[0]["0"]["rotations"][0], abs=1e-4)


# ---- Exam files

QUESTIONS = [
    ("下列药物中性温的是？", ["麻黄", "石膏", "黄连", "知母"], "A"),
    ("四君子汤的君药是？", ["白术", "人参", "茯苓", "甘草"], "B"),
]
TWO = (*QUESTIONS[0][:2], "AB")
CMMLU = [
    f"{n},{question},{','.join(options)},{answer}" for n, (question, options, answer) in enumerate(QUESTIONS)
]
FILES = {
    "cmmlu.csv": "\ufeff" + "\r\n".join([",Question,A,B,C,D,Answer", *CMMLU, ""]),
    "cmb.json": [
        {"exam_subject": "中医", "question": q, "answer": a, "question_type": "单项选择题", "option": dict(zip("ABCDE", [*o, ""]))}
        for q, o, a in [*QUESTIONS, TWO]
    ],
    "cmexam.json": [
        {"Question": q, "Answer": a, "Options": [{"key": key, "value": text} for key, text in zip("ABCD", o)]}
        for q, o, a in [*QUESTIONS, TWO]
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_exam_files_are_read_as_they_are(tmp_path, name):
    given = FILES[name] if name.endswith("csv") else json.dumps(FILES[name], ensure_ascii=False)
    (tmp_path / name).write_text(given, encoding="utf-8")
    exam, left_out = read_exam(tmp_path / name)
    found = [(item["question"], list(item["options"].values()), item["answer"]) for item in exam]
    several = {} if name.endswith("csv") else {"questions with several right answers": 1}
    assert found == QUESTIONS and left_out == several
    assert len({item["id"] for item in exam}) == len(exam)
    about = "中医" if name == "cmb.json" else "中医中药"  # the file's name is no subject
    assert f"关于{about}的" in exams.letter_question(exam[0], ["B", "A"])
    write_jsonl(tmp_path / "exam.jsonl", exam)
    assert read_exam(tmp_path / "exam.jsonl") == (exam, {})


def test_every_item_of_an_archive_and_a_book_is_read(tmp_path):
    header, rows = ["题目", "A", "B", "C", "答案"], [[f"第{n}题", "甲", "乙", "丙", "B"] for n in range(8)]
    book = openpyxl.Workbook()
    for sheet, some in ((book.active, rows[:4]), (book.create_sheet("二"), rows[4:])):
        for cells in (header, *some):
            sheet.append(cells)
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name, some in (("甲.csv", rows[:4]), ("in/乙.csv", rows[4:])):
            archive.writestr(name, "\n".join(map(",".join, [header, *some])))
    for name in ("a.xlsx", "b.zip"):
        exam, left_out = read_exam(tmp_path / name)
        assert [item["question"] for item in exam] == [row[0] for row in rows] and not left_out
        assert len({item["id"] for item in exam}) == 8


def test_an_id_that_is_there_twice_is_not_taken_for_one_question(tmp_path):
    rows = [{"id": "1", "question": q, "options": o, "answer": a} for q, o, a in QUESTIONS]
    write_jsonl(tmp_path / "two.jsonl", rows)
    assert [item["id"] for item in read_exam(tmp_path / "two.jsonl")[0]] == ["1", "two:2"]
    ours = ROOT / "data_prepare/sample/tcm_exam.jsonl"
    assert read_exam(ours) == (list(read_jsonl(ours)), {})


def test_a_file_without_exam_questions_is_refused(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "甘草？", "response": "甘草。"}] * 3)
    with pytest.raises(UserError, match="no exam question in it .3 x another kind of row"):
        read_exam(tmp_path / "rows.jsonl")
