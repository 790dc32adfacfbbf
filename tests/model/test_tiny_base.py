"""The built-in base model: small, a real Qwen3, pre-trained on statements, and able to learn the exam from other entities."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from data_prepare import convert_to_qwen3_format
from model_download import pretrain_tiny_model, tiny_recipe
from model_finetune import finetune_sft
from utils.data.terms import Terms
from utils.device import pick_device
from utils.evaluation.exams import choices_by_text
from utils.files import read_json, read_jsonl
from utils.model.packed_forward import prepare_packed

TINY, SAMPLE = ROOT / "model_download/tiny_qwen3_tcm", ROOT / "data_prepare/sample"


def exam_accuracy(folder, exam):
    model = prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    choices = choices_by_text(model, tokenizer, exam, pick_device("cpu", "fp32"))
    return sum(choice == item["answer"] for (choice, _), item in zip(choices, exam)) / len(exam)


def test_it_is_small_and_a_qwen3():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert isinstance(model, Qwen3ForCausalLM) and model.lm_head.weight is model.model.embed_tokens.weight
    assert not [path for path in TINY.iterdir() if path.suffix in (".bin", ".pt", ".py")]


def test_the_tokenizer_keeps_every_text_and_words_whole():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for text in ("麻黄味辛、微苦，性温。", "Ωμέγα 😀 𠮷", "a\n\n b\t<think>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    alone = tokenizer("微寒")["input_ids"]
    inside = tokenizer("石膏的药性是微寒。")["input_ids"]
    assert any(inside[i : i + len(alone)] == alone for i in range(len(inside)))
    assert tokenizer("<|im_start|>user\n")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert len(tokenizer("user")["input_ids"]) == 1


def test_its_training_log_is_kept():
    log = list(read_jsonl(TINY / "training_log.jsonl"))
    first, last = (sum(entry["loss"] for entry in part) / 10 for part in (log[:10], log[-10:]))
    assert last < 0.3 * first and log[-1]["step"] > 0.98 * log[-1]["steps"]


def test_the_script_makes_such_a_folder(tmp_path, capsys):
    places = ["--output-dir", str(tmp_path / "model"), "--statements-file", str(few_statements(tmp_path))]
    course = "--epochs 3 --copies 20 --names 8 --tokens-per-step 128 --warmup-steps 2".split()
    sizes = "--width 64 --layers 1 --feed-forward 64 --vocabulary 600".split()
    pretrain_tiny_model.main([*places, *course, *sizes])
    log = list(read_jsonl(tmp_path / "model/training_log.jsonl"))
    assert log[-1]["loss"] < log[0]["loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 64


def few_statements(folder):
    path = folder / "statements.jsonl"
    path.write_text(
        "".join(f'{{"text": "{name}的药性是温。"}}\n' for name in "麻黄 桂枝 干姜 附子 肉桂".split() * 40),
        encoding="utf-8",
    )
    return path


def test_exercises_are_invented_and_carry_names_over():
    terms, exercises = Terms(SAMPLE / "terms.jsonl"), read_json(SAMPLE / "exercises.json")
    rng = random.Random(0)
    names = tiny_recipe.invent_names(40, terms, rng)
    assert len(set(names)) == 40 and not set(names) & set(terms.kinds)
    for messages in tiny_recipe.copy_exercises(200, exercises["copy"], names, rng):
        question, answer = (message["content"] for message in messages)
        assert [name for name in names if name in answer and name in question]


def test_tokenizer_pieces_end_where_terms_end():
    terms = Terms(SAMPLE / "terms.jsonl")
    assert list(tiny_recipe.pieces(["石膏的药性是大寒。"], terms))[:5] == [
        "",
        "石膏",
        "的药性是",
        "大寒",
        "。",
    ]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    settings = SimpleNamespace(LEARNING_RATE=1.0, WARMUP_STEPS=10)
    rates = [tiny_recipe.learning_rate(step, 1000, settings) for step in range(1000)]
    assert rates[0] == 0.1 and max(rates) == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


@pytest.fixture
def unstopped(monkeypatch):
    """Handlers of Ctrl-C as they were: the trainer's belong to its script."""
    monkeypatch.setattr("utils.training.callbacks.signal.signal", lambda number, handler: None)


@pytest.mark.slow
def test_fine_tuning_teaches_it_to_answer_about_entities_it_was_never_asked_about(
    tmp_path, capsys, unstopped
):
    """A few dozen steps on the rows of other entities lift the exam on the held-out ones by at least 15 points."""
    files = [str(SAMPLE / "tcm_sample.jsonl"), str(SAMPLE / "tcm_exam.jsonl")]
    places = ["--output-dir", str(tmp_path), "--tokenizer-model", str(TINY)]
    convert_to_qwen3_format.main(["--input-files", *files, *places])
    exam = list(read_jsonl(tmp_path / "exam.jsonl"))[::4]
    rows = [
        "--train-file",
        str(tmp_path / "sft_train.jsonl"),
        "--eval-file",
        str(tmp_path / "sft_eval.jsonl"),
    ]
    course = "--max-length 512 --rows-per-step 2 --learning-rate 1e-3 --max-steps 80".split()
    finetune_sft.main(["--model", str(TINY), *rows, "--output-dir", str(tmp_path / "sft"), *course])
    assert exam_accuracy(tmp_path / "sft", exam) >= exam_accuracy(TINY, exam) + 0.15
