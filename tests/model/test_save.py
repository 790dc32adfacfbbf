"""Saved folders: what transformers 4 and other tools look for is there, and transformers 5 reads the same as before."""

import json
import types

import pytest
import torch
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from utils.files import read_json
from utils.model.folder import remember_mode, save_model
from utils.model.lora import add_lora

TEXT = "麻黄味辛、微苦，性温。<|im_end|>\n<think>\n\n</think>\n\n  What's this? 🌿"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("save") / "base")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("save") / "saved"
    save_model(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), folder)
    return folder


def test_the_rope_base_stands_where_transformers_4_looks(base, saved):
    config = read_json(saved / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000
    assert config["rope_scaling"] is None
    ids = torch.tensor([list(range(60))])
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in (base, saved)
    )
    assert after.config.rope_parameters == before.config.rope_parameters
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_the_tokenizer_has_a_class_that_transformers_4_knows(base, saved):
    config = read_json(saved / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in config
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, saved))
    assert before(TEXT).data.keys() == after(TEXT).data.keys() == {"input_ids", "attention_mask"}
    assert before(TEXT)["input_ids"] == after(TEXT)["input_ids"]
    assert after.eos_token == "<|im_end|>" and after.pad_token == "<|endoftext|>"


def test_a_list_of_special_tokens_gets_the_name_that_both_take(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base, extra_special_tokens=["<|im_start|>"])
    assert tokenizer.extra_special_tokens == ["<|im_start|>"]
    save_model(AutoModelForCausalLM.from_pretrained(base), tokenizer, tmp_path)
    assert read_json(tmp_path / "tokenizer_config.json")["additional_special_tokens"] == ["<|im_start|>"]
    assert AutoTokenizer.from_pretrained(tmp_path).extra_special_tokens == ["<|im_start|>"]


def test_an_adapter_folder_holds_no_path_of_this_machine(base, tmp_path):
    settings = types.SimpleNamespace(RANK=4, ALPHA=8, as_dict=lambda: {"MODEL": "model_download/base"})
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), settings)
    save_model(model, AutoTokenizer.from_pretrained(base), tmp_path)
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.[jm][sd]*")}
    assert "adapter_config.json" in texts and "README.md" not in texts
    assert not [name for name, text in texts.items() if str(base.parent) in text]
    assert json.loads(texts["adapter_config.json"])["base_model_name_or_path"] == "model_download/base"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_adapter_config_is_the_same_in_every_process(base, tmp_path, seed):
    """PEFT keeps the names of layers in a set, whose order differs from process to process."""
    settings = types.SimpleNamespace(RANK=4, ALPHA=8, as_dict=lambda: {"MODEL": "model_download/base"})
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), settings)
    names = list(model.peft_config["default"].target_modules)
    model.peft_config["default"].target_modules = names[seed:] + names[:seed]
    save_model(model, AutoTokenizer.from_pretrained(base), tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["target_modules"] == sorted(names)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_base_that_answers_greedily_stays_greedy(base, tmp_path, sampled):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if not sampled:
        model.generation_config = GenerationConfig(do_sample=False)
    remember_mode(model, tokenizer, thinking=False)
    save_model(model, tokenizer, tmp_path)
    written = read_json(tmp_path / "generation_config.json")
    assert (written["do_sample"], written.get("temperature")) == ((True, 0.7) if sampled else (False, None))
    assert written["eos_token_id"] == [
        tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")
    ]
