"""What SFT, LoRA and DPO leave behind, in both number formats: files as documented, a model that loads, and loss that fell."""

import importlib.util
import sys
import types

import accelerate.tracking
import accelerate.utils
import pytest
import torch
from safetensors.torch import load_file
from small_runs import train, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.files import read_json, read_jsonl

pytestmark = pytest.mark.slow  # six whole runs


def test_the_finished_folder_is_as_documented(runs, method, precision):
    folder = runs(method, precision)
    record, log = read_json(folder / "run.json"), list(read_jsonl(folder / "training_log.jsonl"))
    assert record["status"] == "finished" and record["settings"]["EPOCHS"] == 2
    assert record["results"]["eval_loss"] < record["results"]["eval_loss_before"]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["step"] for entry in log if "loss" in entry] == list(
        range(1, record["results"]["steps"] + 1)
    )
    assert [entry["step"] for entry in log if "eval_loss" in entry][0] == 0
    assert len([entry for entry in log if "eval_loss" in entry]) == 5
    assert len(list(folder.glob("checkpoint-*"))) == 2 and not (folder / "best").exists()
    assert not [path for path in folder.iterdir() if "partial" in path.name]
    model = AutoModelForCausalLM.from_pretrained(folder / ("merged" if method == "lora" else ""))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<think>\n\n</think>\n\n")  # trained without thinking: that is the default now
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ]


def test_the_merged_model_is_base_plus_adapter(runs, place, precision):
    """In float32, also where the base was held in bfloat16 during training."""
    from peft import PeftModel

    folder = runs("lora", precision)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not [name for name in weights(folder) if "embed" in name or "lm_head" in name]
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)


def test_dpo_raises_the_chosen_over_the_rejected(runs, precision):
    log = [
        entry for entry in read_jsonl(runs("dpo", precision) / "training_log.jsonl") if "eval_loss" in entry
    ]
    assert (
        log[0]["eval_reward_margin"] == 0.0 == log[0]["eval_reward_accuracy"]
    )  # the policy starts as the reference
    assert log[-1]["eval_reward_accuracy"] == 1 and log[-1]["eval_reward_margin"] > 0.5
    assert (
        log[-1]["eval_chosen_logps"] > log[0]["eval_chosen_logps"]
    )  # the SFT term holds the chosen answers up


def test_lora_inside_dpo(place, tmp_path):
    assert train("dpo", place, tmp_path / "out", "--lora", "--max-steps", 2, precision="bf16") == 0
    log = list(read_jsonl(tmp_path / "out/training_log.jsonl"))
    assert log[0]["eval_reward_margin"] == 0.0
    assert (tmp_path / "out/adapter_model.safetensors").is_file() and (
        tmp_path / "out/merged/model.safetensors"
    ).is_file()


def test_embeddings_that_are_not_trained_stay_as_they_are(place, tmp_path):
    """Everything else is trained, and the loss falls."""
    folder = tmp_path / "frozen"
    assert train("sft", place, folder, "--train-embeddings", "false", precision="bf16") == 0
    before, after = load_file(place / "base/model.safetensors"), weights(folder)
    same = [name for name in after if torch.equal(before[name].float(), after[name].float())]
    assert same == ["model.embed_tokens.weight"]
    record = read_json(folder / "run.json")
    assert record["results"]["eval_loss"] < record["results"]["eval_loss_before"]


def test_float16_ends_where_float32_does(runs):
    """As on NVIDIA GPUs without bfloat16."""
    halves, floats = (read_jsonl(runs("sft", name) / "training_log.jsonl") for name in ("fp16", "fp32"))
    for one, other in zip(halves, floats, strict=True):
        for name in {"loss", "eval_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=0.01), one["step"]


def test_a_tracker_gets_the_log(place, tmp_path, monkeypatch):
    """Through accelerate's own trackers, here with a writer in tensorboard's place."""
    got = []

    class Writer:
        def __init__(self, folder, **options):
            assert str(tmp_path / "out") in str(folder)

        add_hparams = flush = close = lambda self, *given, **named: None

        def add_scalar(self, name, value, global_step=None, **more):
            got.append((global_step, name, value))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: name == "tensorboard" or found(name, *more)
    )
    known = [accelerate.utils.LoggerType.TENSORBOARD]
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: known)
    assert train("sft", place, tmp_path / "out", "--tracker", "tensorboard", "--max-steps", 2) == 0
    log = [entry for entry in read_jsonl(tmp_path / "out/training_log.jsonl") if "loss" in entry]
    assert [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in log] == [
        (step, value) for step, name, value in got if name == "loss"
    ]
