"""The finished folder that is exported: its model, its tokenizer as published, and what is known of how it was made."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.errors import UserError
from utils.files import read_json, show_path, write_json
from utils.hub import local_folder
from utils.model.chat_format import with_default_mode
from utils.model.folder import (
    adapter_base,
    load_model,
    load_tokenizer,
    run_folder,
    usable_record,
    write_config_for_other_tools,
)
from utils.model.generate import thinks_by_default
from utils.settings import ROOT

# Fields of config.json that change what a model computes, and that no export writes.
NOT_EXPORTED = {"quantization_config": "quantised weights", "use_sliding_window": "a sliding window"}

# What a tokenizer consists of, besides the chat template.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Source:
    """`model` is whole (an adapter is merged), float32, on the CPU; `runs` holds the folder's run.json and those of the folders
    it was trained from, the last training first; `base` is the model before all of them ("" if nobody knows); `system` is the
    system text that nearly all its training rows had ("" if none)."""

    folder: Path
    model: Any
    tokenizer: Any
    thinking: bool
    runs: list[dict]
    base: str
    system: str


class Export(NamedTuple):
    """What is wished for: the model's name, the number format, the base to name ("": see the format), and where it goes."""

    name: str
    precision: str
    base: str
    place: Path


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder; of an adapter, that of its base."""
    while (folder / "adapter_config.json").is_file():
        folder = Path(local_folder(adapter_base(folder)))
    return read_json(folder / "config.json")


def refuse(folder: Path, config: dict[str, Any], unsupported: dict[str, str], what: str) -> None:
    """UserError if `config` asks for one of {field: how it is called} that `what` does not write."""
    for name, words in unsupported.items():
        if config.get(name):
            raise UserError(f"{show_path(folder)} has {words} ({name} in config.json), and {what}")


def load_source(folder: Path) -> Source:
    """The Source in a finished folder. UserError if it cannot be loaded, or no export would write it as it is."""
    refuse(folder, config_of(folder), NOT_EXPORTED, "the export does not write that")
    runs, base = training_history(folder)
    system = runs[0].get("system") if runs else ""
    tokenizer = load_tokenizer(str(folder))
    thinking = thinks_by_default(tokenizer)
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    model = load_model(str(folder), torch.float32).eval()
    model.config.use_cache = True  # training turned it off, and the exported model is for answers
    # the flag follows the weights: transformers 4 would drop a head of its own if this said that it is the embedding
    model.config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    return Source(folder, model, tokenizer, thinking, runs, base, system if isinstance(system, str) else "")


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
    """The tokenizer in `place`: file by file as its base has it where training left it unchanged, with the trained mode."""
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
