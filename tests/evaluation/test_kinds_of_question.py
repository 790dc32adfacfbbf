"""Questions with several right answers and statements to judge: how they are asked, read, scored and reported."""

from dataclasses import replace

import pytest
import torch
from evaluation_files import CPU, EXAM, alone, compare, load_packed, load_plain, make_arguments, prompt_of
from tiny_model import make_tiny_model

from utils.evaluation import exams, report
from utils.evaluation.exams import letters_in
from utils.evaluation.measure import letter_choices
from utils.files import read_json, write_jsonl
from utils.model.generate import stop_tokens

OPTIONS = {"A": "麻黄", "B": "桂枝", "C": "石膏", "D": "细辛", "E": "黄连"}
SEVERAL = [
    {"id": f"several {n}", "question": f"下列药物中{asked}的有？", "options": OPTIONS, "answer": answer, "subject": "", "kind": "multiple"}
    for n, (asked, answer) in enumerate([("性温", "ABD"), ("性寒", "CE"), ("归肺经", "ABCD")])
]  # fmt: skip
JUDGED = [
    {"id": f"judged {n}", "question": f"{herb}性温。", "options": dict(zip("AB", words)), "answer": answer, "subject": "中药",
     "kind": "true_false"}
    for n, (herb, words, answer) in enumerate([("麻黄", "对错", "A"), ("石膏", ("正确", "错误"), "B")])
]  # fmt: skip


NAMED = [("D、B、A", "ABD"), ("ＡＢＤ。", "ABD"), ("A. 麻黄\nB. 桂枝\nD. 细辛", "ABD"), ("题目问A还是C。答案是：A, B和D。", "ABD"),
         ("AABD", "ABD"), ("ABF", "ABF"), ("麻黄、桂枝、细辛", ""), ("DNA, B12, Abd", ""), ("", "")]  # fmt: skip


@pytest.mark.parametrize("answer, letters", NAMED)
def test_letters_are_read_from_an_answer(answer, letters):
    assert letters_in(answer, OPTIONS.values()) == letters


def test_letters_in_the_text_of_an_option_name_nothing():
    assert letters_in("A. 维生素 C\nB. 维生素 D", ["维生素 C", "维生素 D", "维生素 E"]) == "AB"
    assert letters_in("AB", ["AB", "CD"]) == "AB"


def test_sets_are_what_transformers_generates(folder):
    tokenizer, model = load_plain(folder)
    stop = stop_tokens(model, tokenizer)
    found = exams.choices_of_several(model, tokenizer, SEVERAL, stop, 2)
    for item, choice in zip(SEVERAL, found):
        options = "\n".join(f"{letter}. {text}" for letter, text in OPTIONS.items())
        prompt = prompt_of(
            tokenizer,
            f"以下是关于中医中药的多项选择题，请直接给出正确答案的选项。\n\n题目：{item['question']}\n{options}\n答案是：",
        )
        limits = {"do_sample": False, "max_new_tokens": exams.LONGEST_SET, "eos_token_id": sorted(stop)}
        ids = model.generate(torch.tensor([prompt]), **limits)[0, len(prompt) :].tolist()
        ids = ids[:-1] if ids[-1] in stop else ids
        assert choice["said"] == tokenizer.decode(ids, skip_special_tokens=True).lstrip("\n")
        assert choice["letter_choice"] == letters_in(choice["said"], OPTIONS.values())


@pytest.mark.parametrize(
    "said, letters", [("D、B、A", "ABE"), ("ABC", "ABD"), ("ABE", "AB?"), ("不知道", "")]
)
def test_letters_are_those_of_the_question_as_it_was_asked(folder, monkeypatch, said, letters):
    """The item has no option C: its D and E are asked as C and D, and an E was never there."""
    tokenizer = load_plain(folder)[0]
    item = {**SEVERAL[0], "options": {letter: OPTIONS[letter] for letter in "ABDE"}}
    monkeypatch.setattr(exams, "generate_tokens", lambda *_, **__: [tokenizer(said)["input_ids"]])
    [choice] = exams.choices_of_several(None, tokenizer, [item], set(), 1)
    assert choice == {"letter_choice": letters, "said": said}


def test_a_statement_is_asked_with_its_own_two_words(folder):
    tokenizer, model = load_plain(folder)
    for item, choice in zip(JUDGED, exams.choices_by_text(load_packed(folder), tokenizer, JUDGED, CPU)):
        first, second = item["options"].values()
        prompt = prompt_of(
            tokenizer, f"{item['question']}\n请判断以上说法是否正确，只写出“{first}”或“{second}”。"
        )
        expected = [
            alone(model, prompt, tokenizer(text)["input_ids"]) / len(text) for text in (first, second)
        ]
        assert list(choice["text"].values()) == pytest.approx(expected, abs=1e-4)
    assert "判断题" in exams.letter_question(JUDGED[0], ["A", "B"])


def test_sets_are_the_same_in_both_number_formats(folder):
    tokenizer = load_plain(folder)[0]
    items = [*SEVERAL, *JUDGED, *EXAM[:2]]
    found = [
        letter_choices(folder, tokenizer, items, 1, 2, replace(CPU, bf16=bf16)) for bf16 in (False, True)
    ]
    assert found[0] == found[1] and len(found[0]) == len(SEVERAL) + 1  # LETTER_ROWS limits the others alone
    assert all(found[0][item["id"]].keys() == {"letter_choice", "said"} for item in SEVERAL)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kind_is_in_results_report_and_picture(folder, tmp_path, monkeypatch, capsys, precision):
    drawn = []
    monkeypatch.setattr(report, "plot_comparison", lambda panels, models, path: drawn.extend(panels))
    arguments = [*make_arguments(tmp_path), "--general-file", "", "--generate", 0, "--precision", precision]
    write_jsonl(tmp_path / "exam.jsonl", [*EXAM, *SEVERAL, *JUDGED])
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert compare("--models", folder, other, *arguments) == 0
    written = read_json(tmp_path / "out/comparison.json")
    found = written["models"]["base"]
    assert [found[f"{name}_n"] for name in ("exam", "exam_true_false", "exam_multiple")] == [10, 2, 3]
    assert found["exam_chance"] == 0.25 and found["exam_multiple_chance"] == pytest.approx(1 / 31)
    assert {"exam_multiple", "exam_true_false", "exam_true_false_letter"} <= written["differences"][0].keys()
    titles = {panel.title for panel in drawn}
    assert {
        "exam by option text, n = 10",
        "exam, several answers, n = 3",
        "true or false, by text, n = 2",
    } <= titles
    [kept] = (tmp_path / "out/comparison").glob("tiny-*.json")
    several = [item for item in read_json(kept)["value"]["items"] if item.get("kind") == "multiple"]
    assert [(item["id"], item["answer"]) for item in several] == [
        (item["id"], item["answer"]) for item in SEVERAL
    ]
    assert all("said" in item and "text_choice" not in item for item in several)
    for text in (capsys.readouterr().out, (tmp_path / "out/comparison.md").read_text(encoding="utf-8")):
        assert "| exam, several answers" in text and "| true or false, by text" in text


def test_an_exam_of_several_answers_alone_is_enough(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot_comparison", lambda panels, models, path: None)
    arguments = [*make_arguments(tmp_path), "--pairs-file", "", "--general-file", "", "--generate", 0]
    write_jsonl(tmp_path / "exam.jsonl", SEVERAL)
    assert compare("--models", folder, *arguments) == 0
    found = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    assert found["exam_multiple_n"] == 3 and "exam_n" not in found
