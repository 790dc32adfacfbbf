"""The built-in base model: small, a real Qwen3, pre-trained on statements, and able to learn the exam from other entities."""

import random
from types import SimpleNamespace

import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from data_prepare import convert_to_qwen3_format
from data_prepare.sample.entities import TABLES
from data_prepare.sample.invented import Names, copy_exercises, invent_world
from data_prepare.sample.texts import statements_of
from model_download import pretrain_tiny_model, tiny_recipe
from model_finetune import finetune_sft
from utils.data.pairs import Terms
from utils.files import read_json, read_jsonl, write_jsonl

TINY, SAMPLE = ROOT / "model_download/tiny_qwen3_tcm", ROOT / "data_prepare/sample"


def test_it_is_small_and_a_qwen3():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 16_000_000  # in git
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


@pytest.mark.slow
def test_the_script_makes_such_a_folder(tmp_path, capsys):
    names = "麻黄 桂枝 干姜 附子 肉桂".split() * 40
    write_jsonl(tmp_path / "statements.jsonl", [{"text": f"{name}的药性是温。"} for name in names])
    places = f"--output-dir {tmp_path}/model --statements-file {tmp_path}/statements.jsonl"
    course = "--epochs 2 --copies 20 --greetings 1 --refusals 6 --invented 10 --tokens-per-step 512 --warmup-steps 2"
    sizes = "--width 64 --layers 1 --feed-forward 64 --vocabulary 600"
    pretrain_tiny_model.main(f"{places} {course} {sizes}".split())
    log = list(read_jsonl(tmp_path / "model/training_log.jsonl"))
    assert log[-1]["loss"] < log[0]["loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 64


def test_exercises_are_about_fresh_names_and_carry_them_over():
    terms, exercises = Terms(SAMPLE / "terms.jsonl"), read_json(SAMPLE / "exercises.json")
    names = Names(terms, random.Random(0))
    for pattern in exercises["copy"]:
        [(question, answer)] = copy_exercises(1, [pattern], names)
        shared = max(
            len(name)
            for start in range(len(answer["content"]))
            for end in range(start + 1, len(answer["content"]) + 1)
            if (name := answer["content"][start:end]) in question["content"]
        )
        assert shared >= 2, pattern
    fresh = [names.fresh() for _ in range(400)]
    assert len(set(fresh)) > 390 and not set(fresh) & set(terms.kinds)
    real = {name[:1] for kind in TABLES for name in terms.by_kind[kind]}
    assert sum(name[:1] in real for name in fresh) > 200  # look-alikes


def test_the_invented_world_is_stated_in_full_and_asked_about_in_part():
    terms, world = Terms(SAMPLE / "terms.jsonl"), read_json(SAMPLE / "world.json")
    entities = invent_world(world, 50, 0.7, Names(terms, random.Random(0)))
    found = {entity.name for entity in entities}
    assert len(found) == 50 and not found & set(terms.kinds)
    assert {entity.kind for entity in entities} == set(world)
    questions = {
        entity.name: [messages[0]["content"] for messages in pretrain_tiny_model.asked(entity, world, 0)]
        for entity in entities
    }
    assert sum(map(bool, questions.values())) == 35
    for entity in entities:
        stated = "".join(statements_of(entity, world, 2, random.Random(0)))
        assert all(value in stated for value in entity.facts.values())
        assert all(entity.name in question for question in questions[entity.name])


def test_tokenizer_pieces_end_where_terms_end_and_names_are_rows_of_characters():
    terms = Terms(SAMPLE / "terms.jsonl")
    pieces = list(tiny_recipe.pieces(["石膏的药性是大寒。"], terms))[:7]
    assert pieces == ["", "石", "膏", "", "药性", "", "大寒"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    herbs = [name for name in terms.by_kind["herb"] if len(name) > 1]
    whole = [name for name in herbs if len(tokenizer(name)["input_ids"]) == 1]
    assert len(whole) <= len(herbs) // 100  # a few are parts of other terms
    decoded = [tokenizer.decode(token) for token in range(len(tokenizer))]
    assert not [text for text in decoded if len(text) > 1 and set(text) & set("的是")]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    settings = SimpleNamespace(LEARNING_RATE=1.0, WARMUP_STEPS=10)
    rates = [tiny_recipe.learning_rate(step, 1000, settings) for step in range(1000)]
    assert rates[0] == 0.1 and max(rates) == pytest.approx(1, abs=0.01) and 0 < rates[-1] < 0.001


@pytest.mark.slow
def test_fine_tuning_teaches_it_to_answer_about_entities_it_was_never_asked_about(tmp_path, monkeypatch):
    """Fifteen steps on the rows of other entities halve the loss of answers about the held-out ones."""
    # Handlers of Ctrl-C stay as they were: the trainer's belong to its script.
    monkeypatch.setattr("utils.training.run.signal.signal", lambda number, handler: None)
    write_jsonl(tmp_path / "rows.jsonl", list(read_jsonl(SAMPLE / "tcm_sample.jsonl"))[::3])
    places = ["--output-dir", str(tmp_path), "--tokenizer-model", str(TINY)]
    convert_to_qwen3_format.main(["--input-files", str(tmp_path / "rows.jsonl"), *places])
    files = [f"--{name}-file {tmp_path}/sft_{name}.jsonl" for name in ("train", "eval")]
    course = "--max-length 512 --rows-per-step 2 --learning-rate 1e-3 --max-steps 15 --evaluations 1"
    finetune_sft.main(f"{' '.join(files)} --model {TINY} --output-dir {tmp_path}/sft {course}".split())
    log = read_jsonl(tmp_path / "sft/training_log.jsonl")
    before, after = (row["eval_loss"] for row in log if "eval_loss" in row)
    assert after < 0.5 * before
