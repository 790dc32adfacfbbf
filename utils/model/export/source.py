"""The finished folder that is exported: its model, its tokenizer as published, and what is known of how it was made."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.files import read_json, write_json
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

# What a tokenizer consists of, besides the chat template.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Source:
    """`model` is whole (an adapter is merged), float32, on the CPU; `runs` holds the folder's run.json and those of the folders
    it was trained from, the last training first; `base` is the model before all of them ("" where nobody knows)."""

    folder: Path
    model: Any
    tokenizer: Any
    thinking: bool
    runs: list[dict]
    base: str


class Export(NamedTuple):
    """What is wished for: the model's name, the number format, the base to name ("": see the format), and where it goes."""

    name: str
    precision: str
    base: str
    place: Path


def load_source(folder: Path) -> Source:
    """The Source in a finished folder. UserError where it cannot be loaded."""
    runs, base = training_history(folder)
    tokenizer = load_tokenizer(str(folder))
    thinking = thinks_by_default(tokenizer)
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    model = load_model(str(folder), torch.float32).eval()
    model.config.use_cache = True  # training turned it off, and the exported model is for answers
    return Source(folder, model, tokenizer, thinking, runs, base)


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
