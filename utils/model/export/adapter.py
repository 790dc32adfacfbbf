"""Export a LoRA adapter for PEFT: it names its base by Hub id or by a path that holds from any working directory."""

import shutil
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import read_json, show_path, write_json
from utils.model.export.source import Export, Source, save_tokenizer
from utils.model.folder import adapter_base, load_model, load_tokenizer

PRECISIONS = ("",)  # as it was trained


def check(folder: Path) -> None:
    """UserError where `folder` holds a whole model."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{show_path(folder)} is no LoRA adapter; export it with --format folder or gguf")


def save(source: Source, export: Export, partial: Path) -> None:
    """adapter_config.json names `export.base`, or, where that is empty, the base by its absolute path on this machine."""
    local = adapter_base(source.folder)
    absolute = str(Path(local).resolve()) if Path(local).is_dir() else local
    config = read_json(source.folder / "adapter_config.json")
    write_json(partial / "adapter_config.json", config | {"base_model_name_or_path": export.base or absolute})
    shutil.copyfile(source.folder / "adapter_model.safetensors", partial / "adapter_model.safetensors")
    source.model.generation_config.save_pretrained(partial)
    save_tokenizer(source, partial)


def read(source: Source, export: Export) -> tuple[Any, Any]:
    """(tokenizer, model in float32): the exported adapter, merged into the base that is here."""
    from peft import PeftModel

    base = load_model(adapter_base(source.folder), torch.float32)
    model = PeftModel.from_pretrained(base, export.place).merge_and_unload().eval()
    model.generation_config = source.model.generation_config
    return load_tokenizer(str(export.place)), model


def commands(export: Export, place: str) -> list[str]:
    """How the export is used from where it lies at `place`."""
    return [f'PEFT: `AutoPeftModelForCausalLM.from_pretrained("{place}")`']
