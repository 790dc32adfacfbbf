"""Exports: what they hold, that they answer as the folder does, that they hold no path of this machine, what is refused."""

import shutil
import sys

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_download import export_model
from model_finetune import finetune_dpo, finetune_lora, finetune_sft
from utils.errors import run
from utils.files import read_json, write_json, write_jsonl
from utils.model.folder import model_sha256

pytestmark = pytest.mark.slow  # three trainings first


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with finished runs (sft, lora, dpo), the data that they were trained on, and where that came from."""
    place = small_runs.make_place(tmp_path_factory.mktemp("export"))
    for method, script in (("sft", finetune_sft), ("lora", finetune_lora), ("dpo", finetune_dpo)):
        more = ["--model", place / "sft"] if method == "dpo" else []
        script.main(small_runs.arguments(method, place, place / method, *more))
    return place


@pytest.fixture
def export(place, tmp_path):
    """export("sft", "--format", "gguf") -> the folder that it was exported to"""

    def export(model, *arguments, code=0):
        output = tmp_path / "exported"
        words = [place / model, "--output-dir", output, "--eval-file", place / "sft_eval.jsonl", *arguments]
        assert run(lambda: export_model.main([*map(str, words)])) == code
        return output

    return export


@pytest.mark.parametrize("model", ["sft", "lora", "dpo"])
def test_a_folder_in_bfloat16_answers_as_the_run_does(export, place, model, capsys):
    output = export(model)
    assert "of 12 greedy answers the same" in capsys.readouterr().out
    weights = load_file(output / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    finished = load_file(place / model / ("merged" if model == "lora" else ".") / "model.safetensors")
    assert finished.keys() == weights.keys()
    assert all(torch.equal(finished[name].bfloat16(), weights[name]) for name in weights)
    config = read_json(output / "config.json")
    assert (
        config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000 and config["use_cache"]
    )
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_a_folder_in_float32_costs_nothing(export, place, capsys):
    output = export("sft", "--precision", "fp32")
    assert "12 of 12 greedy answers the same as the folder's, KL 0.0e+00" in capsys.readouterr().out
    exported, finished = (load_file(folder / "model.safetensors") for folder in (output, place / "sft"))
    assert all(torch.equal(exported[name], finished[name]) for name in finished)


def test_the_tokenizer_is_the_published_one_where_it_is_unchanged(export, place):
    output = export("dpo")  # two trainings away from the base
    assert (output / "tokenizer.json").read_bytes() == (place / "base/tokenizer.json").read_bytes()
    published = read_json(place / "base/tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == published["model_max_length"]
    chat = [{"role": "user", "content": "甘草？"}]
    for asked in ({}, {"enable_thinking": True}):  # llama.cpp and mlx-lm always pass the latter
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **asked)
        assert prompt.endswith("<think>\n\n</think>\n\n")


def test_the_adapter_names_its_base_as_asked(export, place, capsys):
    assert "12 of 12" in (export("lora", "--format", "adapter"), capsys.readouterr().out)[1]
    config = read_json(export("lora", "--format", "adapter") / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(place / "base")
    output = export("lora", "--format", "adapter", "--base", "Qwen/Qwen3-0.6B")
    assert read_json(output / "adapter_config.json")["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert "base_model: Qwen/Qwen3-0.6B" in (output / "README.md").read_text(encoding="utf-8")
    exported, trained = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, place / "lora")
    )
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    "model, arguments",
    [("dpo", []), ("lora", ["--format", "adapter", "--base", "Qwen/Qwen3-0.6B"])],
    ids=["folder", "adapter"],
)
def test_no_path_of_this_machine_is_given_away(export, place, model, arguments):
    output = export(model, *arguments)
    for path in output.iterdir():
        assert str(place.parent).encode() not in path.read_bytes(), path.name
        assert str(output.parent).encode() not in path.read_bytes(), path.name


def test_the_card_tells_how_the_model_was_made(export, place):
    write_jsonl(place / "raw/rows.jsonl", [])
    source = {"repo": "someone/rows", "revision": "f00", "licence": "MIT", "sha256": "5a1e"}
    write_json(place.parent / "raw/rows.source.json", source)
    write_json(place / "report.json", {"files": [{"file": "rows.jsonl", "rows": 68, "sha256": "5a1e"}]})
    card = (export("dpo") / "README.md").read_text(encoding="utf-8")
    assert (
        "SFT from base: LEARNING_RATE 0.003, EPOCHS 2" in card
        and "DPO from sft:" in card
        and "BETA 0.1" in card
    )
    assert read_json(place / "dpo/run.json")["identity"]["TRAIN_FILE"].removeprefix("sha256 ") in card
    assert "someone/rows at f00, licence: MIT; 68 rows, sha256 `5a1e`" in card
    assert "not medical advice" in card and "greedy answers the same" in card
    assert "have not been compared" in card


def test_a_model_without_a_run_can_be_exported(export, place):
    card = (export("base") / "README.md").read_text(encoding="utf-8")
    assert "whose training is not recorded" in card and "Trained with thinking on" in card


def test_the_card_shows_scores_of_these_very_weights_only(export, place):
    rows = [("exam by option text", "12", True, "50.0% (25.0 to 75.0)"), ("tokens/s", "0", False, "500")]
    names = ("label", "n", "on_card", "cells")
    table = [dict(zip(names, (*row[:3], {"base": "25.0%", "sft": row[3]}))) for row in rows]
    models = {"base": {"weights": "0"}, "sft": {"weights": model_sha256(place / "sft")}}
    write_json(place / "comparison.json", {"models": models, "table": table})
    card = (export("sft") / "README.md").read_text(encoding="utf-8")
    assert (
        "|  | base | sft |\n|---|---|---|\n| exam by option text (n = 12) | 25.0% | 50.0% (25.0 to 75.0) |\n\nOn"
        in card
    )
    assert "tokens/s" not in card
    for damaged in (
        {"models": models | {"sft": {"weights": "other"}}, "table": table},
        {"models": {"sft": {}}},
        [],
    ):
        write_json(place / "comparison.json", damaged)
        assert "have not been compared" in (export("sft") / "README.md").read_text(encoding="utf-8")


def test_a_gguf_file_holds_weights_tokens_and_template(export, place, capsys):
    gguf = pytest.importorskip("gguf", reason="optional: pip install gguf")
    for precision, most in (("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)):
        output = export("sft", "--format", "gguf", "--precision", precision)
        reader = gguf.GGUFReader(output / f"sft-{precision}.gguf")
        tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        weight = load_file(place / "sft/model.safetensors")["model.layers.1.mlp.down_proj.weight"]
        error = (torch.from_numpy(tensors["blk.1.ffn_down.weight"]) - weight).abs().max() / weight.abs().max()
        assert 0 < error < most
        assert reader.fields["qwen3.rope.freq_base"].contents() == 1_000_000
        assert reader.fields["tokenizer.ggml.pre"].contents() == "qwen2"
        tokenizer = AutoTokenizer.from_pretrained(place / "sft")
        assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
        assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert capsys.readouterr().out.count("of 12 greedy answers the same") == 3
    modelfile = (output / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith("FROM ./sft-q8_0.gguf\n") and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert (
        '<|im_start|>assistant\n<think>\n\n</think>\n\n"""' in modelfile
        and "PARAMETER top_p 0.8" in modelfile
    )


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(export, place, tmp_path, capsys):
    pytest.importorskip("gguf", reason="optional: pip install gguf")
    other = shutil.copytree(place / "sft", tmp_path / "other")
    tokenizer = read_json(other / "tokenizer.json")
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}"
    write_json(other / "tokenizer.json", tokenizer)
    export(other, "--format", "gguf", code=2)
    assert "llama.cpp cannot split words as this tokenizer does" in capsys.readouterr().err


def test_a_template_that_asks_otherwise_is_found(export, monkeypatch, capsys):
    from utils.model.export import folder

    read = folder.read

    def read_another(source, exported):
        tokenizer, model = read(source, exported)
        tokenizer.chat_template = tokenizer.chat_template.replace("force_thinking", "enable_thinking")
        return tokenizer, model

    monkeypatch.setattr(folder, "read", read_another)
    export("sft", code=1)
    assert "makes another prompt than the folder's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        ("sft", ["--format", "onnx"], "--format is 'onnx', wanted folder | gguf | adapter | training-data"),
        ("sft", ["--precision", "q8_0"], "--precision: wanted bf16 or fp32, got 'q8_0'"),
        ("sft", ["--format", "adapter"], "is no LoRA adapter"),
        ("nowhere", [], "does not exist"),
        ("sft", ["--eval-file", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ("sft", ["--name", "../../x"], "--name: wanted letters, digits"),
    ],
)
def test_wrong_input_is_one_line(export, capsys, model, arguments, message):
    export(model, *arguments, code=2)
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1


def test_a_training_run_is_not_overwritten(export, place, capsys):
    before = (place / "lora/run.json").read_bytes()
    export("sft", "--output-dir", place / "lora", code=2)
    assert "holds a training run" in capsys.readouterr().err
    assert (place / "lora/run.json").read_bytes() == before


def test_a_missing_gguf_package_is_named_and_leaves_nothing(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    export("sft", "--format", "gguf", code=2)
    assert "pip install gguf==" in capsys.readouterr().err and not (tmp_path / "exported").exists()
