"""Exports: what they hold, that they answer as the folder does, that they hold no path of this machine, what is refused."""

import shutil

import pytest
import small_runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_download import export_model
from model_finetune import finetune_dpo, finetune_lora, finetune_sft
from utils.errors import run
from utils.files import read_json, write_json, write_jsonl
from utils.model.export import FolderExport
from utils.model.folder import model_sha256

pytestmark = pytest.mark.slow  # three trainings first
OTHER_PROMPT, SAME = "makes another prompt than the folder's", "12 of 12 greedy answers the same"


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


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="optional: pip install gguf")


def change(path, **fields):
    """Set fields of a JSON file; "gone" takes one away."""
    write_json(path, {name: value for name, value in (read_json(path) | fields).items() if value != "gone"})


def change_weights(folder, new, **more):
    """Put `new`(name, weight) in the place of a folder's weights, or nothing, and `more` beside them."""
    path = folder / "model.safetensors"
    weights = {name: new(name, weight) for name, weight in load_file(path).items()} | more
    save_file(
        {name: weight for name, weight in weights.items() if weight is not None}, path, {"format": "pt"}
    )


def one_line(capsys):
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def copy(folder, to):
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("best", "checkpoint*"))


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
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000
    assert config["use_cache"] and AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_a_folder_in_float32_costs_nothing(export, place, capsys):
    output = export("sft", "--precision", "fp32")
    assert "12 of 12 greedy answers the same as the folder's, KL 0.0e+00" in capsys.readouterr().out
    exported, finished = (load_file(folder / "model.safetensors") for folder in (output, place / "sft"))
    assert all(torch.equal(exported[name], finished[name]) for name in finished)
    assert (output / "tokenizer.json").read_bytes() == (place / "base/tokenizer.json").read_bytes()


def test_an_adapter_is_tried_on_the_base_that_it_names(export, place, capsys):
    asked = ("lora", "--format", "adapter")
    config = read_json(export(*asked) / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(place / "base") and SAME in capsys.readouterr().out
    output = export(*asked, "--base", "someone/model")
    assert "not tried: someone/model is not on this machine" in capsys.readouterr().out
    assert read_json(output / "adapter_config.json")["base_model_name_or_path"] == "someone/model"
    assert "base_model: someone/model" in (output / "README.md").read_text(encoding="utf-8")
    exported, trained = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, place / "lora")
    )
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    gives_nothing_away(output, place)
    write_json(place / "base/source.json", {"repo": "someone/model"})
    try:
        export(*asked, "--base", "someone/model")
        assert SAME in capsys.readouterr().out
        export(*asked, "--base", "Qwen/Qwen3-0.6B", code=2)
        assert "was trained on someone/model" in capsys.readouterr().err
    finally:
        (place / "base/source.json").unlink()


def gives_nothing_away(output, place):
    """No path of this machine is in the export."""
    for path in output.iterdir():
        assert str(place.parent).encode() not in path.read_bytes(), path.name
        assert str(output.parent).encode() not in path.read_bytes(), path.name


def test_the_card_tells_how_the_model_was_made(export, place):
    write_jsonl(place / "raw/rows.jsonl", [])
    source = {"repo": "someone/rows", "revision": "f00", "licence": "MIT", "sha256": "5a1e"}
    write_json(place.parent / "raw/rows.source.json", source)
    write_json(place / "report.json", {"files": [{"file": "rows.jsonl", "rows": 68, "sha256": "5a1e"}]})
    output = export("dpo")  # two trainings away from the base
    gives_nothing_away(output, place)
    card = (output / "README.md").read_text(encoding="utf-8")
    for said in ("SFT from base: LEARNING_RATE 0.003, EPOCHS 2", "DPO from sft:", "BETA 0.1"):
        assert said in card
    assert read_json(place / "dpo/run.json")["identity"]["TRAIN_FILE"].removeprefix("sha256 ") in card
    assert "someone/rows at f00, licence: MIT; 68 rows, sha256 `5a1e`" in card
    assert "not medical advice" in card and "greedy answers the same" in card
    assert "have not been compared" in card


def test_the_card_shows_scores_of_these_very_weights_only(export, place):
    rows = [("exam by option text", "12", True, "50.0% (25.0 to 75.0)"), ("tokens/s", "0", False, "500")]
    names = ("label", "n", "on_card", "cells")
    table = [dict(zip(names, (*row[:3], {"base": "25.0%", "sft": row[3]}))) for row in rows]
    models = {"base": {"weights": "0"}, "sft": {"weights": model_sha256(place / "sft")}}
    write_json(place / "comparison.json", {"models": models, "table": table})
    card = (export("sft") / "README.md").read_text(encoding="utf-8")
    row = "| exam by option text (n = 12) | 25.0% | 50.0% (25.0 to 75.0) |"
    assert f"|  | base | sft |\n|---|---|---|\n{row}\n\nOn" in card and "tokens/s" not in card
    other = {"models": models | {"sft": {"weights": "other"}}, "table": table}
    for another in (other, {"models": {"sft": {}}}):
        write_json(place / "comparison.json", another)
        assert "have not been compared" in (export("sft") / "README.md").read_text(encoding="utf-8")


def test_a_gguf_file_holds_weights_tokens_and_template(export, place, gguf, capsys):
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
    assert '<|im_start|>assistant\n<think>\n\n</think>\n\n"""' in modelfile
    assert "PARAMETER top_p 0.8" in modelfile


@pytest.fixture
def own_head(place, tmp_path):
    """A folder with an LM head of its own, whose config says that it is the embedding."""
    folder = copy(place / "sft", tmp_path / "own_head")
    shuffled = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].roll(1, 0)
    change_weights(folder, lambda name, weight: weight, **{"lm_head.weight": shuffled})
    assert read_json(folder / "config.json")["tie_word_embeddings"] is True
    return folder


@pytest.mark.parametrize(
    "damage, message",
    [
        # transformers 4.57 computes with a base of 10,000 and says nothing
        ({"rope_theta": "gone"}, "rope_parameters is read as"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is read as"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is read as True, wanted False"),
        (lambda name, weight: None if name == "model.norm.weight" else weight, "lacks model.norm.weight"),
        (lambda name, weight: weight * 1.5, "the export is not what the folder is: "),
        ("force_thinking", OTHER_PROMPT),
    ],
    ids=["rope base", "epsilon", "untied", "tied", "tensor", "weights", "template"],
)
def test_a_wrong_folder_is_found(export, own_head, monkeypatch, capsys, damage, message):
    save = FolderExport.save

    def save_and_damage(exporter, folder):
        save(exporter, folder)
        if callable(damage):
            change_weights(folder, damage)
        elif isinstance(damage, dict):
            change(folder / "config.json", **damage)
        else:
            template = folder / "chat_template.jinja"
            template.write_text(
                template.read_text(encoding="utf-8").replace(damage, "enable_thinking"), encoding="utf-8"
            )

    monkeypatch.setattr(FolderExport, "save", save_and_damage)
    export(own_head if "wanted False" in message else "sft", code=1)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("add_rope_freq_base", lambda value: 10_000.0, "rope_parameters is read as"),
        ("add_block_count", lambda value: value - 1, "holds weights that no tool would read: blk."),
        ("add_eos_token_id", lambda value: value + 1, "another end token"),
        ("add_token_merges", lambda merges: merges[5:], OTHER_PROMPT),
        ("add_token_types", lambda kinds: [1] * len(kinds), OTHER_PROMPT),
        ("add_chat_template", lambda text: text.replace("user", "human"), OTHER_PROMPT),
    ],
)
def test_a_wrong_gguf_file_is_found(export, monkeypatch, gguf, capsys, name, wrong, message):
    add = getattr(gguf.GGUFWriter, name)
    monkeypatch.setattr(gguf.GGUFWriter, name, lambda writer, value: add(writer, wrong(value)))
    export("sft", "--format", "gguf", code=1)
    assert message in capsys.readouterr().err


def test_a_head_of_its_own_is_exported_and_the_flag_follows_it(export, own_head, gguf, capsys):
    [file] = export(own_head, "--format", "gguf", "--precision", "f16").glob("*.gguf")
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    output = export(own_head)
    assert read_json(output / "config.json")["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(output / "model.safetensors")
    assert capsys.readouterr().out.count("of 12 greedy answers the same") == 2


def test_an_adapter_of_a_trained_model_is_not_said_to_fit_another_base(export, place, tmp_path, capsys):
    """The case of LLaMA-Factory 2588 and TRL 926: two trainings in a row."""
    second = tmp_path / "lora2"
    finetune_lora.main(small_runs.arguments("lora", place, second, "--model", place / "lora"))
    capsys.readouterr()
    export(second, "--format", "adapter", "--base", "Qwen/Qwen3-0.6B", code=2)
    said = one_line(capsys)
    assert "a trained model" in said and "--format folder" in said
    output = export(second, "--format", "adapter")
    assert SAME in capsys.readouterr().out
    assert read_json(output / "adapter_config.json")["base_model_name_or_path"] == str(place / "lora/merged")
    export(second, code=2)  # the folder holds an adapter now
    assert "holds an export of another kind (adapter_config.json)" in capsys.readouterr().err
    shutil.rmtree(output)
    export(second, "--base", "Qwen/Qwen3-0.6B", "--precision", "fp32")  # the card may name where it all began
    assert SAME in capsys.readouterr().out


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
LINEAR = {"type": "linear", "factor": 2.0}
OTHER_SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{L}"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "form, fields, message",
    [
        ("folder", {"quantization_config": {"bits": 8}}, "asks for quantization_config"),
        ("gguf", {"hidden_act": "gelu"}, "has another activation than silu"),
        ("gguf", {"rope_parameters": YARN}, "has RoPE scaling (yarn)"),
        ("gguf", {"rope_scaling": LINEAR, "rope_parameters": "gone"}, "has RoPE scaling (linear)"),
        ("gguf", {"pre_tokenizer": OTHER_SPLIT}, "has a tokenizer that splits words otherwise than Qwen2's"),
    ],
)
def test_what_an_export_does_not_write_is_refused_by_name(
    export, place, tmp_path, gguf, capsys, form, fields, message
):
    other = shutil.copytree(place / "base", tmp_path / "other")
    change(other / ("tokenizer.json" if "pre_tokenizer" in fields else "config.json"), **fields)
    export(other, "--format", form, code=2)
    assert message in one_line(capsys)


def test_rope_scaling_is_in_both_forms_of_a_folder(export, place, tmp_path, capsys):
    other = shutil.copytree(place / "base", tmp_path / "other")
    scaling = {"rope_type": "linear", "factor": 2.0}
    change(other / "config.json", rope_parameters={**scaling, "rope_theta": 1e6}, rope_scaling="gone")
    output = export(other)
    assert read_json(output / "config.json")["rope_scaling"] == scaling
    assert "of 12 greedy answers the same" in capsys.readouterr().out


def test_the_system_text_of_training_is_handed_on(export, place, tmp_path, gguf):
    other = copy(place / "sft", tmp_path / "other")
    change(other / "run.json", system="你是中医。\n请简短回答。")
    output = export(other, "--format", "gguf")
    assert 'SYSTEM """你是中医。\n请简短回答。"""\n' in (output / "Modelfile").read_text(encoding="utf-8")
    assert "> 你是中医。\n> 请简短回答。\n" in (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "{", '{"status": "finished"}', '{"settings": {}}'])
def test_a_record_that_is_missing_or_damaged_is_told(export, place, tmp_path, capsys, text):
    other = shutil.copytree(place / "base", tmp_path / "other")
    if text:
        (other / "run.json").write_text(text, encoding="utf-8")
    card, said = (export(other) / "README.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert "whose training is not recorded" in card and "Trained with thinking on" in card
    assert (f"left out: {other}" in said and "run.json" in said) == bool(text)


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
    assert message in one_line(capsys)


def test_other_files_are_not_overwritten(export, place, tmp_path, capsys):
    before = (place / "lora/run.json").read_bytes()
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    lost, rows = "files that would be lost", tmp_path / "rows"
    for words, held in (
        ([place / "lora"], "a training run"),
        ([tmp_path], lost),
        ([rows, "--data-dir", rows], lost),
    ):
        export("sft", "--output-dir", *words, code=2)
        assert f"holds {held}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (place / "lora/run.json").read_bytes() == before


def test_a_missing_gguf_package_is_named_and_leaves_nothing(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.model.export.gguf_file.gguf", None)
    export("sft", "--format", "gguf", code=2)
    assert "pip install gguf==" in capsys.readouterr().err and not (tmp_path / "exported").exists()
