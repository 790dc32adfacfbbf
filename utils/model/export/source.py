"""The finished folder that is exported, what is known of how it was made, and the model that another tool builds of an export."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.errors import RunError, UserError
from utils.files import read_json, show_path, write_json
from utils.model.chat_format import with_default_mode
from utils.model.folder import (
    adapter_base,
    load_model,
    load_tokenizer,
    usable_record,
    write_config_for_other_tools,
)
from utils.model.generate import thinks_by_default
from utils.settings import ROOT

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


class Source(NamedTuple):
    """`model` is whole (an adapter is merged), float32, on the CPU; `runs`: run.json of the folder and of those it was trained from,
    the last training first; `base`: the model before all of them; `system`: the system text of training ("": unknown, none)."""

    folder: Path
    model: Any
    tokenizer: Any
    thinking: bool
    runs: list[dict]
    base: str
    system: str


class Export(NamedTuple):
    """The model's name, the number format, the base to name ("": see the format), and the folder that it goes to."""

    name: str
    precision: str
    base: str
    place: Path


def load_source(folder: Path, form: str) -> Source:
    """The Source in a finished folder, to be exported as `form`. UserError if it has what that form does not carry."""
    refuse_what_is_lost(folder, form)
    runs, base = training_history(folder)
    tokenizer = load_tokenizer(str(folder))
    thinking = thinks_by_default(tokenizer)
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    model = load_model(str(folder), torch.float32).eval()
    model.config.use_cache = True  # training turned it off, and the exported model is for answers
    # the flag follows the weights: transformers 4 would drop a head of its own if this said that it is the embedding
    model.config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    system = runs[0].get("system") if runs else ""
    return Source(folder, model, tokenizer, thinking, runs, base, system if isinstance(system, str) else "")


def refuse_what_is_lost(folder: Path, form: str) -> None:
    """UserError that names what the format, or the exporter, does not write: without it the model would answer otherwise."""
    above = folder
    while (above / "adapter_config.json").is_file():
        above = Path(adapter_base(above))
    config, tokenizer = read_json(above / "config.json"), read_json(folder / "tokenizer.json")
    lost = {
        "quantised weights (quantization_config)": config.get("quantization_config"),
        "a sliding window (use_sliding_window)": config.get("use_sliding_window"),
    }
    if form == "gguf":
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        lost[f"RoPE scaling ({scaling})"] = scaling != "default"
        lost["biases in its attention (attention_bias)"] = config.get("attention_bias")
        lost["another activation than silu (hidden_act)"] = config.get("hidden_act", "silu") != "silu"
        for token in tokenizer.get("added_tokens", []):  # llama.cpp matches tokens as they are
            flags = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
            lost[f"an added token {token['content']!r} with {', '.join(flags)}"] = flags
    for words, there in lost.items():
        if there:
            raise UserError(f"{show_path(folder)} has {words}, which --format {form} does not write")


def run_folder(folder: Path) -> Path:
    """The training folder that a model folder belongs to: itself, or the one above merged/ or a checkpoint."""
    inside = folder.name == "merged" or folder.name.startswith("checkpoint-")
    return folder.parent if inside and not (folder / "run.json").is_file() else folder


def training_history(folder: Path) -> tuple[list[dict], str]:
    """(run.json of the folder and of those it was trained from, the last training first; the base of the first of them)."""
    runs: list[dict] = []
    base = adapter_base(folder) if (folder / "adapter_config.json").is_file() else ""
    above = run_folder(folder)
    while (record := usable_record(above)) and record not in runs:
        runs.append(record)
        base = record["settings"]["MODEL"]  # inside the repository: relative to it
        above = run_folder(ROOT / base)
    return runs, base


def save_tokenizer(source: Source, place: Path) -> None:
    """The tokenizer in `place`: file by file as its base has it if training left it unchanged, with the trained mode."""
    source.tokenizer.save_pretrained(place)
    published = ROOT / source.base
    if source.base and (published / "tokenizer.json").is_file():
        if read_json(published / "tokenizer.json") == read_json(place / "tokenizer.json"):
            for name in TOKENIZER_FILES:
                if (published / name).is_file():
                    shutil.copyfile(published / name, place / name)
    config = read_json(place / "tokenizer_config.json")
    if "chat_template" in config:  # some tools look here, some in chat_template.jinja
        config["chat_template"] = source.tokenizer.chat_template
        write_json(place / "tokenizer_config.json", config)
    write_config_for_other_tools(place)


def build_model(
    config: dict[str, Any], tensors: dict[str, Any], load: Callable, rename: Callable[[str], str] = str
) -> Any:
    """A Qwen3 in float32 of the fields and tensors that another tool reads. `load`: makes a float32 tensor of an entry of `tensors`,
    which is called `rename`(name of the parameter). RunError if one is missing, or nothing would read it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    for name, weight in model.named_parameters():  # names a tied weight once
        if rename(name) not in tensors:
            raise RunError(f"the export lacks {name}: a tool would go on with random numbers in its place")
        weight.data = load(tensors.pop(rename(name)))
    if tensors:
        raise RunError(f"the export holds weights that no tool would read: {', '.join(list(tensors)[:3])}")
    return model
