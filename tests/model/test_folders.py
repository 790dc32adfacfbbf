"""Which model folders load, and what is said about the others."""

import json

import pytest
import torch
from chat_helpers import damaged, prompts_of, reference

from utils.errors import UserError
from utils.files import write_json
from utils.model.folder import check_model, load_model, load_tokenizer, model_sha256
from utils.model.generate import Decoding, TokenStream, decoding_for, stop_tokens


def test_adapter_answers_as_its_merged_model(tiny_folder, chat_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapter = tmp_path / "lora" / "checkpoint-3"
    tuned = get_peft_model(load_model(str(tiny_folder), torch.float32), config)
    tuned.save_pretrained(adapter)
    chat_model.tokenizer.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "eos_token_id": 5}), encoding="utf-8"
    )
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    chat_model.tokenizer.save_pretrained(tmp_path / "merged")
    for dtype in (torch.float32, torch.bfloat16):
        one, other = load_model(str(adapter), dtype), load_model(str(tmp_path / "merged"), dtype)
        for name, weight in other.state_dict().items():
            assert torch.equal(weight, one.state_dict()[name]), name
        prompt = prompts_of(chat_model)[0]
        answers = [list(TokenStream(model, set()).answer(prompt, Decoding(), 20)) for model in (one, other)]
        assert answers[0] == answers[1] != reference(chat_model, prompt, 20)
    assert decoding_for(one, chat_model.tokenizer).temperature == 0.7 and 5 in stop_tokens(
        one, chat_model.tokenizer
    )

    write_json(tmp_path / "lora" / "run.json", {"identity": {"MODEL": f"sha256 {model_sha256(tiny_folder)}"}})
    load_model(str(adapter), torch.float32)
    write_json(tmp_path / "lora" / "run.json", {"identity": {"MODEL": "sha256 of something else"}})
    with pytest.raises(UserError, match="trained on other weights"):
        load_model(str(adapter), torch.float32)

    with pytest.raises(UserError, match="did you mean .*checkpoint-3"):
        check_model(str(tmp_path / "lora"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="no \\*.safetensors"):
        check_model(str(adapter))
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="adapter for .*gone, which is not there"):
        check_model(str(adapter))


def test_folders_that_do_not_load_are_told_in_one_line(tiny_folder, tmp_path):
    cut = damaged(tiny_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes()[:9000])
    deeper = damaged(
        tiny_folder, tmp_path / "deeper", num_hidden_layers=3, layer_types=["full_attention"] * 3
    )
    remote = damaged(
        tiny_folder, tmp_path / "remote", model_type="own", auto_map={"AutoConfig": "code.Config"}
    )
    for path, message in (
        (cut, "cannot be loaded"),
        (deeper, "is not whole"),
        (remote, "Python code of its own"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_model(check_model(str(path)), torch.float32)
        assert "\n" not in str(error.value)
    (cut / "model.safetensors").rename(cut / "pytorch_model.bin")
    (deeper / "tokenizer.json").unlink()
    bare = damaged(tiny_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    for path, message in (
        (cut, "no \\*.safetensors"),
        (deeper, "has no tokenizer"),
        (tiny_folder / "config.json", f"did you mean {tiny_folder}"),
    ):
        with pytest.raises(UserError, match=message):
            check_model(str(path))
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(bare))
