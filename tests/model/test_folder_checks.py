"""A model folder from a stranger: each damaged or hostile file is told in one line that names it, before anything is built."""

import json
import shutil
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.model.folder import check_model, find_models, load_model, load_tokenizer, model_sha256
from utils.model.folder_checks import INDEX


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a good model folder."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture(scope="session")
def adapter_folder(tiny_folder, tmp_path_factory):
    """A LoRA adapter on the tiny model, as PEFT saves it, with the tokenizer."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("adapter") / "lora"
    base = load_model(str(tiny_folder), torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_folder / name, place)
    change(place / "adapter_config.json", base_model_name_or_path=str(tiny_folder))
    return place


@pytest.fixture
def adapter(adapter_folder, tmp_path):
    return shutil.copytree(adapter_folder, tmp_path / "lora")


def change(path, **fields):
    path.write_text(json.dumps(read_json(path) | fields), encoding="utf-8")


def load(folder):
    check_model(str(folder))
    return load_tokenizer(str(folder)), load_model(str(folder), torch.float32)


def refused(folder, *words):
    """The folder is refused in one line that holds `words`, within seconds."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load(folder)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700 and all(word in line for word in words), line
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "content",
    [
        '{"base_model_name_or_path": "SELF"}',
        "[]",
        "3",
        '{"base_model_name_or_path": 3}',
        '{"base_model_name_or_path": ["a"]}',
        json.dumps({"base_model_name_or_path": "x" * 300}),
        '{"base_model_name_or_path": "a\\u0000b"}',
        '{"base_model_name_or_path": "\\\\\\\\server\\\\share"}',
        '{"base_model_name_or_path": "OTHER"}',
        "[" * 100_000,
        '{"r": ' + "9" * 5000 + "}",
        "not JSON",
    ],
    ids=str,
)
def test_a_damaged_adapter_never_stops_the_search_for_models(adapter, tiny_folder, monkeypatch, content):
    monkeypatch.setattr("utils.model.folder.ROOT", adapter.parent)
    runs = adapter.parent / "trainer_output"
    for name in ("lora", "other"):
        shutil.copytree(adapter, runs / name)
    shutil.copytree(tiny_folder, runs / "good")
    for name, other in (("lora", "other"), ("other", "lora")):
        text = content.replace("SELF", str(runs / name)).replace("OTHER", str(runs / other))
        (runs / name / "adapter_config.json").write_text(text, encoding="utf-8")
    assert find_models() == [runs / "good"]
    refused(runs / "lora", "lora")


def test_an_adapter_on_an_adapter_is_that_of_its_merged_base(adapter, tmp_path):
    from peft import LoraConfig, get_peft_model

    first = get_peft_model(
        load_model(str(adapter), torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    second = shutil.copytree(adapter, tmp_path / "second")
    first.save_pretrained(second)
    change(second / "adapter_config.json", base_model_name_or_path=str(adapter))
    wanted = first.merge_and_unload().state_dict()
    found = load(second)[1].state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def in_two_files(folder):
    """The folder's weights in two files under an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for place in set(places.values()):
        save_file(
            {name: weights[name] for name in names if places[name] == place}, folder / place, {"format": "pt"}
        )
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    return weights, places


def test_weights_in_several_files_are_read_and_identified(folder):
    weights, places = in_two_files(folder)
    loaded = load(folder)[1].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    before = model_sha256(folder)
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": places})
    assert model_sha256(folder) != before


@pytest.mark.parametrize(
    "place",
    [
        "pytorch_model.bin",
        "../outside.safetensors",
        "/outside.safetensors",
        "gone.safetensors",
        3,
        None,
        "",
        "a\\b.safetensors",
    ],
)
def test_an_index_names_only_safetensors_in_its_folder(folder, place):
    _, places = in_two_files(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "pytorch_model.bin")
    write_json(folder / INDEX, {"weight_map": places | {min(places): place}})
    refused(folder, "cannot be loaded", ".safetensors")


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_no_config_chooses_the_attention(folder, name):
    change(folder / "config.json", **{name: "stranger/kernel"})
    assert load(folder)[1].config._attn_implementation == "sdpa"


CONFIGS = [
    {"num_hidden_layers": 100_000_000},
    {"num_hidden_layers": 100_000_000, "layer_types": None},
    {"num_hidden_layers": 1},
    {"hidden_size": 1 << 30},
    {"vocab_size": 1 << 40},
    {"intermediate_size": 1 << 30},
    {"head_dim": 1 << 30},
    {"num_key_value_heads": 0},
    {"num_attention_heads": True},
    {"max_position_embeddings": "many"},
    {"rms_norm_eps": "small"},
    {"rms_norm_eps": None},
    {"hidden_act": "own"},
    {"layer_types": "full_attention"},
    {"layer_types": [3, 4]},
    {"rope_parameters": []},
    {"rope_parameters": {"rope_type": "own", "rope_theta": 1}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"rope_theta": "x", "rope_parameters": None},
    {"dtype": "load"},
    {"dtype": ["float32"]},
    {"tie_word_embeddings": "yes"},
    {"eos_token_id": "x"},
    {"eos_token_id": -1},
    {"transformers_weights": "../outside.safetensors"},
    {"quantization_config": {"quant_method": "own"}},
    {"attention_bias": 3},
    {"id2label": 3},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_config_asks_for_what_the_weights_hold(folder, fields):
    change(folder / "config.json", **fields)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 10_000_000},
        {"r": "4"},
        {"r": 0},
        {"target_modules": "(a+)+$"},
        {"target_modules": ["(a+)+$"]},
        {"target_modules": 3},
        {"exclude_modules": "(a+)+$"},
        {"rank_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"q_proj": 10_000_000}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"layers_pattern": "(a+)+$"},
        {"modules_to_save": ["(a+)+$"]},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"lora_alpha": "x"},
        {"megatron_config": {"a": 1}},
        {"bias": 3},
        {"layers_to_transform": "x"},
    ],
    ids=str,
)
def test_an_adapter_asks_for_what_its_weights_hold(adapter, fields):
    change(adapter / "adapter_config.json", **fields)
    refused(adapter, "adapter_config.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": NaN}',
        '{"temperature": "warm"}',
        '{"temperature": [1]}',
        '{"temperature": Infinity}',
        '{"top_k": 1.5}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [1, null]}',
        '{"do_sample": "yes"}',
        "[]",
        "",
        "3",
        "\udcff",
        "[" * 100_000,
    ],
)
def test_generation_config(folder, text):
    (folder / "generation_config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    refused(folder, "generation_config.json")


TOKENIZERS = [
    "",
    "{",
    "[]",
    "3",
    "{}",
    '{"model": null}',
    '{"version": "1.0", "model": {"type": "BPE"}}',
    "\udcff",
]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", TOKENIZERS)
def test_tokenizer(folder, name, text):
    if name == "tokenizer_config.json" and text.startswith("{") and len(text) > 1:
        text = '{"tokenizer_class": 3, "rest": ' + text + "}"
    (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    refused(folder, name)


def test_a_header_that_tells_of_more_than_the_file_holds(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.embed_tokens.weight"]["shape"] = [1 << 30, 64]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    change(folder / "config.json", vocab_size=1 << 30)
    refused(folder, "model.safetensors", "is not whole")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "\udcff", '{"model_type": 3}', '{"model_type": "qwen3"}', "[" * 100_000]
)
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    refused(folder, "model")


def test_a_tokenizer_of_another_model_is_told(folder):
    """Its tokens would be looked up behind the end of the embedding."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "model_download/tiny_qwen3_tcm" / name, folder)
    refused(folder, "tokenizer.json is of another model: it has token 3,")


def test_a_link_to_nothing_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/qwen").symlink_to("gone")
    with pytest.raises(UserError, match="models/qwen is a link to something that is not there"):
        check_model("models/qwen")
