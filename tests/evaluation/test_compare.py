"""Comparison: scores agree with a plain transformers loop, intervals with known values, files as documented."""

import json
import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_finetune import compare_models
from utils.data.terms import Terms
from utils.device import Device
from utils.errors import UserError, run
from utils.evaluation import exams
from utils.evaluation.compare import differences, figures, repetition, states_one_of
from utils.evaluation.exams import read_exam
from utils.evaluation.statistics import mcnemar, mean_per_token, share_difference, wilson
from utils.files import read_json, read_jsonl, write_json, write_jsonl
from utils.model.packed_forward import prepare_packed
from utils.plots import plot_comparison

CPU = Device("cpu", False, "test")
SAMPLE, TINY = ROOT / "data_prepare/sample", ROOT / "model_download/tiny_qwen3_tcm"
INSTRUCTION = "请只写出答案。"
EXAM = [
    {
        "id": f"{n}",
        "question": f"{name}的药性是什么？",
        "answer": "ABCD"[n % 4],
        "options": {"A": "温", "B": "大寒", "C": "平", "D": "微温而辛"},
        "subject": "中药",
    }
    for n, name in enumerate("麻黄 桂枝 甘草 人参 黄芪 当归 川芎 白芍 茯苓 白术".split())
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


# ---- An independent path: one sequence at a time, full logits, no packing, prompts written out here


def load_plain(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def load_packed(folder):
    return prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def prompt_of(tokenizer, question):
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return tokenizer(text)["input_ids"]


def alone(model, prompt, answer):
    """Log-probability of `answer` after `prompt` (lists of ids)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def letters_alone(tokenizer, model, item):
    """[{own letter: log-probability}, ...] for the four rotations of an exam item."""
    rotations = []
    for start in range(4):
        own = ["ABCD"[(start + place) % 4] for place in range(4)]
        question = (
            f"以下是关于{item['subject']}的单项选择题，请直接给出正确答案的选项。\n\n题目：{item['question']}\n"
            f"A. {item['options'][own[0]]}\nB. {item['options'][own[1]]}\nC. {item['options'][own[2]]}\n"
            f"D. {item['options'][own[3]]}\n答案是："
        )
        with torch.no_grad():
            logps = model(torch.tensor([prompt_of(tokenizer, question)])).logits[0, -1].log_softmax(-1)
        rotations.append(
            {own[place]: logps[tokenizer.convert_tokens_to_ids("ABCD"[place])].item() for place in range(4)}
        )
    return rotations


def test_letter_choices_equal_a_plain_loop_on_100_items():
    tokenizer, model = load_plain(TINY)
    exam = list(read_jsonl(SAMPLE / "tcm_exam.jsonl"))[::6][:100]
    choices = exams.exam_letter_choices(load_packed(TINY), tokenizer, exam, CPU)
    assert len(choices) == 100
    for item, (choice, scores, rotations) in zip(exam, choices):
        expected = letters_alone(tokenizer, model, item)
        assert [pytest.approx(rotation, abs=1e-3) for rotation in expected] == rotations
        means = {letter: sum(rotation[letter] for rotation in expected) / 4 for letter in "ABCD"}
        assert scores == pytest.approx(means, abs=1e-3) and choice == max(means, key=means.get)
    assert len({choice for choice, _, _ in choices}) > 1


def test_text_choices_equal_a_plain_loop(folder):
    tokenizer, model = load_plain(folder)
    for item, (choice, scores) in zip(
        EXAM, exams.exam_choices(load_packed(folder), tokenizer, EXAM, INSTRUCTION, CPU)
    ):
        prompt = prompt_of(tokenizer, f"{item['question']}\n{INSTRUCTION}")
        expected = {
            letter: alone(model, prompt, tokenizer(text)["input_ids"]) / len(text)
            for letter, text in item["options"].items()
        }
        assert scores == pytest.approx(expected, abs=1e-4)
        assert choice == max(expected, key=expected.get)


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
    choices = exams.exam_letter_choices(None, tokenizer, exam, CPU)
    assert [choice for choice, _, _ in choices] == ["B", "B"]
    assert [len(rotations) for _, _, rotations in choices] == [3, 5]


# ---- Intervals


def test_intervals_of_shares_have_known_values():
    assert wilson(5, 10) == pytest.approx(
        [0.2366, 0.7634], abs=1e-4
    )  # statsmodels proportion_confint(method="wilson")
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)


def test_mcnemar_counts_the_items_that_only_one_has_right():
    one, other = [True] * 1 + [False] * 9 + [True] * 50, [False] * 1 + [True] * 9 + [True] * 50
    assert (
        mcnemar(one, other) == mcnemar(other, one) == pytest.approx(2 * (1 + 10) / 2**10)
    )  # scipy.stats.binomtest(1, 10)
    assert mcnemar(one, one) == 1 and mcnemar([True, False], [False, True]) == 1
    assert mcnemar([False] * 3000, [True] * 3000) == pytest.approx(0)


def test_intervals_hold_the_truth_about_95_times_in_100():
    rng = random.Random(0)
    held = {"share": 0, "loss": 0}
    for _ in range(1000):
        one = [rng.random() < 0.7 for _ in range(80)]
        other = [
            right if rng.random() < 0.6 else rng.random() < 0.8 for right in one
        ]  # 0.6 x 0.7 + 0.4 x 0.8 = 0.74
        change, (low, high) = share_difference(one, other)
        assert low <= change <= high
        held["share"] += low <= 0.04 <= high
        tokens = [rng.randint(1, 30) for _ in range(80)]
        sums = [
            rng.gauss(2, 0.5) * count for count in tokens
        ]  # one answer is easy from end to end, another hard
        mean, (low, high) = mean_per_token(sums, tokens)
        held["loss"] += low <= 2 <= high
    assert all(930 <= count <= 970 for count in held.values()), held


def test_losses_count_every_token_once():
    assert mean_per_token([1.0, 9.0], [1, 3])[0] == 2.5
    assert mean_per_token([2.0], [4]) == (0.5, None)


# ---- Exam files

QUESTIONS = [
    ("下列药物中性温的是？", ["麻黄", "石膏", "黄连", "知母"], "A"),
    ("四君子汤的君药是？", ["白术", "人参", "茯苓", "甘草"], "B"),
]


def write_exam(kind, folder):
    """Two questions as the data set of that name has them, and where it has such rows one with several right answers."""
    path = folder / f"{kind}.{'csv' if kind == 'cmmlu' else 'json'}"
    if kind == "cmmlu":
        lines = [",Question,A,B,C,D,Answer"] + [
            f"{n},{question},{','.join(options)},{answer}"
            for n, (question, options, answer) in enumerate(QUESTIONS)
        ]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    elif kind == "cmb":
        write_json(
            path,
            [
                {
                    "exam_type": "医师考试",
                    "exam_class": "执业医师",
                    "exam_subject": "中医",
                    "question": question,
                    "answer": answer,
                    "question_type": "单项选择题",
                    "option": dict(zip("ABCDE", [*options, ""])),
                }
                for question, options, answer in [*QUESTIONS, (QUESTIONS[0][0], QUESTIONS[0][1], "AB")]
            ],
        )
    else:
        write_jsonl(
            path,
            [
                {
                    "Question": question,
                    "Answer": answer,
                    "Options": [{"key": key, "value": value} for key, value in zip("ABCD", options)],
                }
                for question, options, answer in [*QUESTIONS, (QUESTIONS[0][0], QUESTIONS[0][1], "ABC")]
            ],
        )
    return path


@pytest.mark.parametrize("kind, several", [("cmmlu", 0), ("cmb", 1), ("cmexam", 1)])
def test_exam_files_are_read_as_they_are(tmp_path, kind, several):
    exam, left_out = read_exam(write_exam(kind, tmp_path))
    assert [(item["question"], list(item["options"].values()), item["answer"]) for item in exam] == QUESTIONS
    assert len({item["id"] for item in exam}) == 2 and dict(left_out) == (
        {"several right answers": several} if several else {}
    )


def test_our_own_exam_is_read_whole():
    exam, left_out = read_exam(SAMPLE / "tcm_exam.jsonl")
    assert exam == list(read_jsonl(SAMPLE / "tcm_exam.jsonl")) and not left_out


def test_a_file_without_exam_questions_is_refused(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "甘草？", "response": "甘草。"}] * 3)
    with pytest.raises(UserError, match="no single-choice question in it .3 x no exam question"):
        read_exam(tmp_path / "rows.jsonl")


# ---- The control set, and what counts as right


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


def test_a_number_in_an_answer_stands_by_itself():
    assert (
        states_one_of("最小的质数是2。", ["2"])
        and states_one_of("是二", ["2", "二"])
        and states_one_of("THANK you!", ["Thank you"])
    )
    assert (
        not states_one_of("1024", ["2"])
        and not states_one_of("十二个", ["2", "二"])
        and not states_one_of("", ["2"])
    )


def test_repetition_is_the_share_of_runs_said_before():
    assert repetition([1, 2, 3, 4, 5]) == repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([1] * 8) == 1 - 1 / 5


# ---- The script


@pytest.fixture
def arguments(tmp_path):
    rows = [
        {
            "id": f"{n}",
            "messages": [
                {"role": "user", "content": item["question"]},
                {"role": "assistant", "content": "药性是温。"},
            ],
        }
        for n, item in enumerate(EXAM)
    ]
    write_jsonl(tmp_path / "sft_eval.jsonl", rows)
    write_jsonl(tmp_path / "exam.jsonl", EXAM)
    write_jsonl(
        tmp_path / "dpo_eval.jsonl",
        [
            {
                "id": row["id"],
                "prompt": row["messages"][:1],
                "chosen": row["messages"][1:],
                "rejected": [{"role": "assistant", "content": "寒。"}],
                "kind": "facts",
            }
            for row in rows
        ],
    )
    return [
        "--eval-file",
        tmp_path / "sft_eval.jsonl",
        "--exam-file",
        tmp_path / "exam.jsonl",
        "--pairs-file",
        tmp_path / "dpo_eval.jsonl",
        "--output-dir",
        tmp_path / "out",
        "--max-new-tokens",
        6,
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]


def compare(*arguments):
    return run(lambda: compare_models.main([*map(str, arguments)]))


def test_the_comparison_is_written_and_printed(folder, arguments, tmp_path, capsys):
    other = make_tiny_model(tmp_path / "sft_finetuned", seed=1)
    assert compare("--models", folder, other, *arguments) == 0
    written = read_json(tmp_path / "out/comparison.json")
    assert list(written["models"]) == ["base", "sft"]
    for found in written["models"].values():
        assert {
            "heldout_loss",
            "exam_accuracy",
            "exam_n",
            "preference_accuracy",
            "exam_letter_accuracy",
            "general_loss",
            "ended_share",
            "repetition",
            "mean_tokens",
            "tokens_per_second",
        } <= found.keys()
        assert (
            found["exam_n"] == 10
            and found["exam_interval"][0] <= found["exam_accuracy"] <= found["exam_interval"][1]
        )
        assert found["perplexity"] == pytest.approx(math.exp(found["heldout_loss"]))
    [pair] = written["differences"]
    assert (pair["from"], pair["to"]) == ("base", "sft") and 0 <= pair["exam_letter"]["p"] <= 1
    said, told = capsys.readouterr().out, (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    for text in (said, told):
        assert "| exam by option letter" in text and "麻黄" in text and "sft against base" in text
    assert "sft - base" in told and "McNemar" in told and "comparison.png" in told
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_every_item_is_stored_and_agrees_with_a_plain_loop(folder, arguments, tmp_path):
    assert compare("--models", folder, *arguments) == 0
    [path] = (tmp_path / "out/comparison").glob("tiny-*.jsonl")
    items, (tokenizer, model) = list(read_jsonl(path)), load_plain(folder)
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


def test_a_second_call_measures_only_what_is_new(folder, arguments, tmp_path, capsys, monkeypatch):
    from utils.evaluation import compare as comparison

    measured, measure = [], comparison._measure
    monkeypatch.setattr("utils.plots.plot_comparison", lambda models, path: None)  # about a second each
    monkeypatch.setattr(
        comparison,
        "_measure",
        lambda folder, *rest: (measured.append(str(folder)), measure(folder, *rest))[1],
    )
    one, two = shutil.copytree(folder, tmp_path / "one"), make_tiny_model(tmp_path / "two", seed=1)
    arguments += ["--general-file", ""]
    assert compare("--models", one, *arguments) == 0
    before = read_json(tmp_path / "out/comparison.json")["models"]["base"]
    assert compare("--models", one, two, *arguments) == 0
    assert measured == [str(one), str(two)] and "measured before" in capsys.readouterr().out
    assert read_json(tmp_path / "out/comparison.json")["models"]["base"] == before
    assert compare("--models", one, two, *arguments, "--show", "1") == 0 and len(measured) == 2
    for change in (["--exam-instruction", "答："], ["--fresh"], ["--exam-rows", "5"]):
        measured.clear()
        assert compare("--models", one, *arguments, *change) == 0 and measured == [str(one)]
    measured.clear()
    config = json.loads((one / "generation_config.json").read_text(encoding="utf-8"))
    write_json(
        one / "generation_config.json", config | {"eos_token_id": 5}
    )  # other end tokens: other answers
    assert compare("--models", one, two, *arguments) == 0 and measured == [str(one)]
    write_jsonl(tmp_path / "exam.jsonl", EXAM[:4])
    assert compare("--models", one, two, *arguments) == 0 and measured == [str(one), str(one), str(two)]


def test_the_default_is_the_base_and_every_finished_run(folder, tmp_path, monkeypatch):
    from utils.model import folders

    monkeypatch.setattr(folders, "ROOT", tmp_path)
    monkeypatch.setattr(compare_models, "ROOT", tmp_path)
    for name, status in (
        ("sft_finetuned", "finished"),
        ("my_run", "finished"),
        ("dpo_finetuned", "running"),
        ("copied", None),
    ):
        shutil.copytree(folder, tmp_path / "trainer_output" / name)
        if status:
            write_json(tmp_path / "trainer_output" / name / "run.json", {"status": status})
    settings = compare_models.parse_settings(compare_models.__file__, ["--base-model", str(folder)])
    named = compare_models.models_to_compare(settings)
    assert set(named) == {"base", "sft", "my_run"} and list(named)[0] == "base"


def test_only_what_was_asked_for_is_compared(folder, arguments, tmp_path):
    assert (
        compare(
            "--models",
            folder,
            *arguments,
            "--exam-file",
            "",
            "--pairs-file",
            "",
            "--general-file",
            "",
            "--generate",
            0,
        )
        == 0
    )
    assert read_json(tmp_path / "out/comparison.json")["models"]["base"].keys() == {
        "folder",
        "heldout_loss",
        "heldout_loss_interval",
        "heldout_loss_n",
        "perplexity",
        "seconds",
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--models", "nowhere/at/all"], "does not exist"),
        (["--exam-file", "no.csv"], "no.csv does not exist"),
        (["--eval-file", "nowhere.jsonl"], "make it with: python data_prepare/convert_to_qwen3_format.py"),
        (["--thinking", "maybe"], "wanted auto, on or off"),
    ],
)
def test_wrong_input_is_one_line(folder, arguments, capsys, changes, message):
    assert compare("--models", folder, *arguments, *changes) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1


def test_figures_and_differences_follow_from_the_items():
    def made(right, loss):
        first = {"test": "model", "folder": "x", "seconds": 1.0, "generation_seconds": 2.0}
        exam = [
            {
                "test": "exam",
                "id": str(n),
                "answer": "A",
                "text_choice": "A" if n < right else "B",
                "letter_choice": "B",
                "text": {"A": 0, "B": 0},
            }
            for n in range(20)
        ]
        heldout = [
            {"test": "heldout", "id": str(n), "loss": loss * (n + 1), "tokens": n + 1} for n in range(4)
        ]
        answers = [
            {
                "test": "answer",
                "about": "heldout",
                "right": right,
                "tokens": 10,
                "ended": True,
                "repetition": 0.5,
            }
            for right in (True, False, None)
        ]
        return [first, *exam, *heldout, *answers]

    one, other = made(8, 2.0), made(18, 1.5)
    found = figures(one)
    assert (found["exam_accuracy"], found["exam_letter_accuracy"], found["exam_chance"]) == (0.4, 0.0, 0.5)
    assert (found["heldout_loss"], found["facts_accuracy"], found["facts_n"], found["tokens_per_second"]) == (
        2.0,
        0.5,
        2,
        15.0,
    )
    change = differences(one, other)
    assert change["exam"]["difference"] == pytest.approx(0.5) and change["exam"]["p"] == pytest.approx(
        2 / 2**10
    )
    assert change["heldout_loss"]["difference"] == pytest.approx(-0.5)
    other[-4]["tokens"] += 1  # another tokenizer: a loss a token is of something else
    assert "heldout_loss" not in differences(one, other)


@pytest.mark.parametrize("right", [0, 401])
def test_shares_of_none_and_all_can_be_drawn(tmp_path, right):
    models = {
        name: {
            "heldout_loss": 1.0,
            "heldout_loss_interval": None,
            "preference_accuracy": right / 401,
            "preference_interval": wilson(right, 401),
        }
        for name in ("base", "中医")
    }
    plot_comparison(models, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
