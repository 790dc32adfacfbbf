"""Save a model folder: weights, decoding settings, tokenizer, and the thinking mode it was trained in."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.device import release_memory
from utils.files import read_json, write_json
from utils.model.chat_format import DECODING, generation_settings, with_default_mode
from utils.model.load import load_model

TOKENS_OF_CONFIG = ("bos_token_id", "pad_token_id")  # in config.json as well as in generation_config.json


def remember_mode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Make the thinking mode of the training rows the default of all that is saved: checkpoints and finished folder alike.

    Answers are drawn as Qwen advises for the mode; a base that says do_sample false, as the tiny one does, stays greedy.
    """
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    settings = generation_settings(tokenizer, thinking)
    if model.generation_config.do_sample is False:
        settings = {name: value for name, value in settings.items() if name not in DECODING[thinking]}
    model.generation_config.update(**settings)
    model.config.update({name: settings[name] for name in TOKENS_OF_CONFIG})


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a model (or adapter), its decoding settings and its tokenizer.

    Weights keep float32: rounding them to bfloat16 would lose updates as small as DPO's.
    """
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)  # an adapter's save_pretrained leaves it out
    tokenizer.save_pretrained(folder)
    _sort_adapter_config(Path(folder))
    write_config_for_other_tools(Path(folder))


def _sort_adapter_config(folder):
    """PEFT writes its sets in an order that differs from run to run."""
    path = folder / "adapter_config.json"
    if path.is_file():
        config = read_json(path)
        write_json(path, {name: sorted(value) if _is_set(value) else value for name, value in config.items()})


def _is_set(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def write_config_for_other_tools(folder: Path) -> None:
    """Make a folder that transformers 5 saved readable for transformers 4 too, and for what is built on either.

    config.json gets the RoPE base where 4.x looks for it: without it, 4.57 computes with 10,000 and says nothing. The
    tokenizer gets a class that both know. It is not Qwen2Tokenizer, with which 5.x would ignore how tokenizer.json splits words.
    PEFT's README.md, a form to fill in with a path of this machine, is removed.
    """
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        rope = dict(config["rope_parameters"])
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        write_json(folder / "config.json", config)
    config = read_json(folder / "tokenizer_config.json")
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):
        # the name that 4.x has for such a list, and 5.x takes
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", config)
    (folder / "README.md").unlink(missing_ok=True)


def save_adapter_and_merged(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the adapter of a PeftModel at the root of `folder`, the merged model in merged/. `model` is of no use afterwards.

    The base is read from its folder once more, in float32: in training it may have been held in bfloat16, and the merged
    weights are to be rounded no further than those of a base that was not.
    """
    save_model(model, tokenizer, folder)
    for weight in model.parameters():  # two models at once would be the peak of the whole run
        if not weight.requires_grad:
            weight.data = weight.data.new_empty(0)
    release_memory()
    merged = load_model(str(folder), torch.float32)
    merged.config.update({name: getattr(model.config, name) for name in TOKENS_OF_CONFIG})
    save_model(merged, tokenizer, folder / "merged")
