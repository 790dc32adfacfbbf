"""Measuring a model: every result agrees with a plain loop; what counts as right in an answer."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from evaluation_files import CPU, EXAM, alone, compare, letters_alone, load_plain, make_arguments, prompt_of

from utils.data.texts import Terms
from utils.evaluation.answers import states_one_of
from utils.evaluation.measure import letter_choices
from utils.files import read_json, read_jsonl

SAMPLE = ROOT / "data_prepare/sample"


@pytest.mark.slow
def test_every_item_is_stored_and_agrees_with_a_plain_loop(folder, tmp_path):
    assert compare("--models", folder, *make_arguments(tmp_path)) == 0
    [path] = (tmp_path / "out/comparison").glob("tiny-*.json")
    items, (tokenizer, model) = read_json(path)["value"]["items"], load_plain(folder)
    of = {
        test: [item for item in items if item["test"] == test]
        for test in ("heldout", "general", "exam", "preference", "answer")
    }
    assert [len(of[test]) for test in of] == [10, 80, 10, 10, 90]
    answers = [tokenizer(text + "<|im_end|>")["input_ids"] for text in ("药性是温。", "寒。")]
    for row, loss, pair, exam in zip(EXAM, of["heldout"], of["preference"], of["exam"]):
        logps = [alone(model, prompt_of(tokenizer, row["question"]), answer) for answer in answers]
        assert loss["loss"] == pytest.approx(-logps[0], rel=1e-4) and loss["tokens"] == len(answers[0])
        assert [pair["chosen"], pair["rejected"]] == pytest.approx(logps, rel=1e-4)
        assert exam["rotations"] == [
            pytest.approx(rotation, abs=1e-3) for rotation in letters_alone(tokenizer, model, row)
        ]
        assert exam["text_choice"] == max(exam["text"], key=exam["text"].get) and set(exam["text"]) == set(
            "ABCD"
        )
    assert of["heldout"][0]["id"] == "0" and {item["tokens"] for item in of["answer"]} <= set(range(1, 7))


def test_letters_are_scored_in_float32_in_any_number_format(folder):
    tokenizer, model = load_plain(folder)
    choices = {
        bf16: letter_choices(folder, tokenizer, EXAM, 0, 4, replace(CPU, bf16=bf16)) for bf16 in (False, True)
    }
    assert choices[True] == choices[False] and choices[True].keys() == {item["id"] for item in EXAM}
    for item in EXAM:
        expected = [pytest.approx(rotation, abs=1e-4) for rotation in letters_alone(tokenizer, model, item)]
        assert expected == choices[True][item["id"]]["rotations"]
    rounded = letters_alone(tokenizer, model.to(torch.bfloat16), EXAM[0])
    assert rounded[0] != pytest.approx(choices[True]["0"]["rotations"][0], abs=1e-4)  # bfloat16 would show


def test_general_questions_are_not_about_chinese_medicine_and_do_not_give_the_answer_away():
    terms = [term for term in Terms(SAMPLE / "terms.jsonl").kinds if len(term) > 1]
    rows = list(read_jsonl(SAMPLE / "general_questions.jsonl", ["id", "question", "answer", "accept"]))
    assert len(rows) >= 60 and len({row["question"] for row in rows}) == len(
        {row["id"] for row in rows}
    ) == len(rows)
    for row in rows:
        assert states_one_of(row["answer"], row["accept"]) and not states_one_of(
            row["question"], row["accept"]
        ), row
        assert not [term for term in terms if term in row["question"] + row["answer"]], row


def test_letters_can_be_left_out(folder):
    tokenizer, _ = load_plain(folder)
    assert letter_choices(folder, tokenizer, EXAM, -1, 4, CPU) == {}
