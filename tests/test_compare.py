"""Comparison: scores agree with a plain transformers loop, intervals with known values, files as documented."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_finetune import compare_models
from utils.device import pick_device
from utils.errors import run
from utils.files import read_json, write_jsonl
from utils.packed_model import prepare_packed
from utils.plots import plot_comparison
from utils.scoring import exam_choices, mean_loss, preference_choices, wilson

INSTRUCTION = "请只写出答案。"
EXAM = [{"id": f"{n}", "question": f"{name}的药性是什么？", "answer": "ABCD"[n % 4],
         "options": {"A": "温", "B": "大寒", "C": "平", "D": "微温而辛"}, "subject": "中药"}
        for n, name in enumerate("麻黄 桂枝 甘草 人参 黄芪 当归 川芎 白芍 茯苓 白术".split())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(folder):
    """(tokenizer, untouched model): the independent path."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def alone(model, prompt, answer):
    """Log-probability of `answer` after `prompt` (lists of ids): one sequence, full logits, no packing."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    return -F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def prompt_of(tokenizer, question):
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text)["input_ids"]


def test_exam_scores_equal_a_plain_loop(folder, plain):
    tokenizer, model = plain
    packed = prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for item, (choice, scores) in zip(EXAM, exam_choices(packed, tokenizer, EXAM, INSTRUCTION, pick_device("cpu", "fp32"))):
        prompt = prompt_of(tokenizer, f"{item['question']}\n{INSTRUCTION}")
        expected = {letter: alone(model, prompt, tokenizer(text)["input_ids"]) / len(text) for letter, text in item["options"].items()}
        assert scores == pytest.approx(expected, abs=1e-4)
        assert choice == max(expected, key=expected.get)


def test_loss_and_preference_equal_a_plain_loop(folder, plain):
    tokenizer, model = plain
    packed = prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    device = pick_device("cpu", "fp32")
    documents = [(prompt_of(tokenizer, item["question"]), tokenizer(text)["input_ids"])
                 for item in EXAM for text in list(item["options"].values())[:2]]
    logps = [alone(model, *document) for document in documents]
    tokens = sum(len(answer) for _, answer in documents)
    assert mean_loss(packed, [{"documents": [d]} for d in documents], device) == pytest.approx(-sum(logps) / tokens, rel=1e-5)
    pairs = [{"documents": documents[index:index + 2]} for index in range(0, len(documents), 2)]
    assert preference_choices(packed, pairs, device) == [logps[i] > logps[i + 1] for i in range(0, len(logps), 2)]


def test_wilson_interval():
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)        # statsmodels proportion_confint(method="wilson")
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("right", [0, 401])
def test_shares_of_none_and_all_can_be_drawn(tmp_path, right):
    models = {"base": {"heldout_loss": 1.0, "preference_accuracy": right / 401, "preference_interval": wilson(right, 401)}}
    plot_comparison(models, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tests_on_disk(tmp_path):
    rows = [{"id": f"{n}", "messages": [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": "温。"}]}
            for n, item in enumerate(EXAM)]
    write_jsonl(tmp_path / "sft_eval.jsonl", rows)
    write_jsonl(tmp_path / "exam.jsonl", EXAM)
    write_jsonl(tmp_path / "dpo_eval.jsonl", [
        {"id": row["id"], "prompt": row["messages"][:1], "chosen": row["messages"][1:],
         "rejected": [{"role": "assistant", "content": "寒。"}], "kind": "facts"} for row in rows])
    return ["--eval-file", tmp_path / "sft_eval.jsonl", "--exam-file", tmp_path / "exam.jsonl", "--pairs-file",
            tmp_path / "dpo_eval.jsonl", "--output-dir", tmp_path, "--max-new-tokens", 6, "--device", "cpu", "--precision", "fp32"]


def test_the_comparison_is_written_and_printed(folder, tests_on_disk, tmp_path, capsys):
    other = make_tiny_model(tmp_path / "sft_finetuned", seed=1)
    assert run(lambda: compare_models.main([*map(str, ["--models", folder, other, *tests_on_disk])])) == 0
    models = read_json(tmp_path / "comparison.json")["models"]
    assert list(models) == ["base", "sft"]
    for figures in models.values():
        assert {"heldout_loss", "exam_accuracy", "exam_n", "preference_accuracy"} <= figures.keys()
        assert figures["exam_n"] == 10 and figures["exam_interval"][0] <= figures["exam_accuracy"] <= figures["exam_interval"][1]
    said = capsys.readouterr().out
    assert "| base" in said and "麻黄" in said
    assert "| model" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_without_exam_and_pairs_only_the_loss_is_compared(folder, tests_on_disk, tmp_path, capsys):
    arguments = [*map(str, ["--models", folder, *tests_on_disk, "--exam-file", tmp_path / "no", "--pairs-file", tmp_path / "no"])]
    assert run(lambda: compare_models.main(arguments)) == 0
    assert "exam_accuracy" not in read_json(tmp_path / "comparison.json")["models"]["base"]


@pytest.mark.parametrize("arguments, message", [
    (["--models", "nowhere/at/all"], "does not exist"),
    (["--eval-file", "nowhere.jsonl"], "make it with: python data_prepare/convert_to_qwen3_format.py"),
])
def test_wrong_input_is_one_line(folder, tests_on_disk, capsys, arguments, message):
    assert run(lambda: compare_models.main([*map(str, ["--models", folder, *tests_on_disk, *arguments])])) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
