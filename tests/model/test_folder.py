"""Model folders: each damaged or hostile one is told in one line, sound ones load, and saved ones are read by other tools too."""

import json
import shutil
import types

import pytest
import torch
from chat_helpers import prompts_of, reference
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.model.folder import (
    INDEX,
    check_model,
    find_models,
    load_model,
    load_tokenizer,
    model_sha256,
    read_record,
    remember_mode,
    save_model,
)
from utils.model.generate import Decoding, TokenStream, decoding_for, stop_tokens
from utils.model.lora import add_lora

TINY = ROOT / "model_download/tiny_qwen3_tcm"
TEXT = "麻黄味辛、微苦，性温。<|im_end|>\n<think>\n\n</think>\n\n  What's this? 🌿"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a good model folder."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """A LoRA adapter on the tiny model, as PEFT saves it, with the tokenizer."""
    from peft import LoraConfig, get_peft_model

    place, base = tmp_path / "lora", load_model(str(tiny_folder), torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, place)
    change(place / "adapter_config.json", base_model_name_or_path=str(tiny_folder))
    return place


def change(path, **fields):
    path.write_text(json.dumps(read_json(path) | fields), encoding="utf-8")


def load(folder):
    check_model(str(folder))
    return load_tokenizer(str(folder)), load_model(str(folder), torch.float32)


def refused(folder, words):
    """The folder is refused in one line that holds `words`."""
    with pytest.raises(UserError) as error:
        load(folder)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700 and words in line, line


def write(path, text):
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


NO_OBJECTS = ["", "[]", "\udcff", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"]
CONFIGS = [  # one for each kind of wrong config
    ({"model_type": "llama", "auto_map": {"AutoModel": "own.Own"}}, "is a model of type llama; wanted Qwen3"),
    ({"num_hidden_layers": 1, "layer_types": None}, "does not expect model.layers.1."),
    ({"num_hidden_layers": 3, "layer_types": None}, "lacks model.layers.2."),
    ({"vocab_size": "3000"}, "tokenizer.json"),
    *(({name: 3.5}, "config.json") for name in ("hidden_size", "head_dim", "layer_types", "rope_parameters")),
    ({"rope_parameters": {"rope_type": "own", "rope_theta": 1}}, "config.json"),
    ({"transformers_weights": "../outside.safetensors"}, "asks for transformers_weights"),
    ({"quantization_config": {"quant_method": "own"}}, "asks for quantization_config"),
    ({"use_sliding_window": True, "sliding_window": 8}, "asks for use_sliding_window"),
]
ADAPTERS = [
    ({"peft_type": "IA3"}, "is of no LoRA adapter"),
    ({"r": "4"}, "adapter_config.json"),
    ({"target_modules": 3}, "adapter_config.json"),
    ({"base_model_name_or_path": 3}, "names no base model"),
    ({"base_model_name_or_path": "a\0b"}, "which is not there"),
    ({"base_model_name_or_path": "\\\\server\\share"}, "names no base model on this machine"),
]


@pytest.mark.parametrize("fields, words", CONFIGS, ids=str)
def test_a_wrong_config_is_told(folder, fields, words):
    change(folder / "config.json", **fields)
    refused(folder, words)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(folder, name):
    for text in NO_OBJECTS:
        write(folder / name, text)
        refused(folder, name)


def test_a_wrong_adapter_is_told_and_never_stops_the_search_for_models(adapter, tiny_folder, monkeypatch):
    runs = adapter.parent / "trainer_output"
    monkeypatch.setattr("utils.model.folder.ROOT", adapter.parent)
    good, config = shutil.copytree(tiny_folder, runs / "good"), read_json(adapter / "adapter_config.json")
    for number, (fields, words) in enumerate(ADAPTERS):
        other = shutil.copytree(adapter, runs / str(number))
        write_json(other / "adapter_config.json", config | fields)
        refused(other, words)
        assert (other in find_models()) == (words == "adapter_config.json")
    assert good in find_models()


def test_an_adapter_trains_as_its_merged_model_and_carries_no_other(adapter, tiny_folder):
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    refused(adapter, "is an adapter for another adapter")
    with pytest.raises(UserError, match="is an adapter without merged/; train the run's finished folder"):
        check_model(str(adapter), whole=True)
    shutil.copytree(tiny_folder, adapter / "merged")
    assert check_model(str(adapter), whole=True) == str(adapter / "merged")


def test_weights_in_several_files_are_read_identified_and_never_from_elsewhere(folder):
    """Two files under an index, with a copy of the tied head, as Qwen's own models come."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for place in set(places.values()):
        part = {name: weights[name] for name in names if places[name] == place}
        save_file(part, folder / place, {"format": "pt"})
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    loaded, before = load(folder)[1].state_dict(), model_sha256(folder)
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": places})
    assert model_sha256(folder) != before
    for outside in (folder.parent / "outside.safetensors", folder / "pytorch_model.bin"):
        shutil.copy(folder / "model-00001-of-00002.safetensors", outside)
    for place in ("pytorch_model.bin", "../outside.safetensors", None, "a\\b.safetensors"):
        write_json(folder / INDEX, {"weight_map": places | {min(places): place}})
        refused(folder, "wanted *.safetensors of the folder")


def test_weights_that_are_not_whole_are_told(folder):
    path, content = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    path.write_bytes(content[:9000])
    refused(folder, "*.safetensors is damaged or foreign")
    path.write_bytes(content)
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    refused(folder, "lacks model.layers.1.mlp.up_proj.weight")


def test_no_config_chooses_the_attention(folder):
    change(folder / "config.json", _attn_implementation="own/kernel", attn_implementation="own/kernel")
    assert load(folder)[1].config._attn_implementation == "sdpa"


def test_a_tokenizer_that_does_not_fit_is_told(folder):
    """Tokens of another model's tokenizer would be looked up behind the end of the embedding."""
    (folder / "chat_template.jinja").unlink()
    refused(folder, "no chat template with <|im_end|>")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)
    refused(folder, "tokenizer.json has token 3,")
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_a_folder_of_something_else_is_told(folder, tmp_path):
    refused(folder / "config.json", "is a file, wanted a model folder")
    refused(tmp_path, f"did you mean {folder}?")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "holds no *.safetensors weights")


def test_a_damaged_record_of_a_run_is_told(adapter):
    for text in ("[]", "{}", "\udcff", '{"identity": {}, "status": "finished"}'):
        write(adapter / "run.json", text)
        for read in (read_record, load):
            with pytest.raises(UserError, match="run.json"):
                read(adapter)


def test_adapter_answers_as_its_merged_model(tiny_folder, chat_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    run, merged = tmp_path / "lora", tmp_path / "merged"
    adapter, tokenizer = run / "checkpoint-3", chat_model.tokenizer
    tuned = get_peft_model(load_model(str(tiny_folder), torch.float32), config)
    tuned.save_pretrained(adapter)
    write_json(adapter / "generation_config.json", {"do_sample": True, "temperature": 0.7, "eos_token_id": 5})
    tuned.merge_and_unload().save_pretrained(merged)
    for folder in (adapter, merged):
        tokenizer.save_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        one, other = load_model(str(adapter), dtype), load_model(str(merged), dtype)
        for name, weight in other.state_dict().items():
            assert torch.equal(weight, one.state_dict()[name]), name
    prompt = prompts_of(chat_model)[0]
    answers = [list(TokenStream(model, set()).answer(prompt, Decoding(), 20)) for model in (one, other)]
    assert answers[0] == answers[1] != reference(chat_model, prompt, 20)
    assert decoding_for(one, tokenizer).temperature == 0.7 and 5 in stop_tokens(one, tokenizer)

    record = {"status": "running", "settings": {"MODEL": "x"}}
    write_json(run / "run.json", record | {"identity": {"MODEL": f"sha256 {model_sha256(tiny_folder)}"}})
    load_model(str(adapter), torch.float32)
    write_json(run / "run.json", record | {"identity": {"MODEL": "sha256 of something else"}})
    refused(adapter, "trained on other weights")
    refused(run, f"did you mean {adapter}?")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, "no *.safetensors")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    refused(adapter, "gone, which is not there")


def save(base, folder, change_model=lambda model: model, **words):
    """What save_model writes of the model and tokenizer in `base`."""
    tokenizer = AutoTokenizer.from_pretrained(base, **words)
    save_model(change_model(AutoModelForCausalLM.from_pretrained(base)), tokenizer, folder)
    return folder


def test_a_saved_folder_has_what_transformers_4_looks_for(tiny_folder, tmp_path):
    """The RoPE base where it looks, a class and names of the tokenizer that it knows; for 5 nothing changes."""
    saved = save(tiny_folder, tmp_path / "saved", extra_special_tokens=["<|im_start|>"])
    config = read_json(saved / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000
    assert config["rope_scaling"] is None
    ids, folders = torch.tensor([list(range(60))]), (tiny_folder, saved)
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in folders)
    assert after.config.rope_parameters == before.config.rope_parameters
    assert torch.equal(before(ids).logits, after(ids).logits)
    config = read_json(saved / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in config
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    assert before(TEXT).data.keys() == after(TEXT).data.keys() == {"input_ids", "attention_mask"}
    assert before(TEXT)["input_ids"] == after(TEXT)["input_ids"]
    assert after.eos_token == "<|im_end|>" and after.pad_token == "<|endoftext|>"
    assert after.extra_special_tokens == ["<|im_start|>"]


def test_an_adapter_folder_is_the_same_in_every_process_and_on_every_machine(tiny_folder, tmp_path):
    """PEFT keeps the names of layers in a set, whose order differs from process to process, and writes the base's whole path."""
    settings = types.SimpleNamespace(RANK=4, ALPHA=8, as_dict=lambda: {"MODEL": "model_download/base"})
    save(tiny_folder, tmp_path, lambda model: add_lora(model, settings))
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.[jm][sd]*")}
    assert "README.md" not in texts
    assert not [name for name, text in texts.items() if str(tiny_folder.parent) in text]
    config = json.loads(texts["adapter_config.json"])
    assert config["base_model_name_or_path"] == "model_download/base"
    assert config["target_modules"] == sorted(config["target_modules"]) != []


@pytest.mark.parametrize("sampled, written", [(True, (True, 0.7)), (False, (False, None))])
def test_a_base_that_answers_greedily_stays_greedy(tiny_folder, tmp_path, sampled, written):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    if not sampled:
        model.generation_config = GenerationConfig(do_sample=False)
    remember_mode(model, tokenizer, thinking=False)
    save_model(model, tokenizer, tmp_path)
    found = read_json(tmp_path / "generation_config.json")
    assert (found["do_sample"], found.get("temperature")) == written
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert found["eos_token_id"] == ends
