"""Export a LoRA adapter for PEFT: it names its base by Hub id or by a path that holds from any working directory."""

import shutil
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import read_json, show_path, write_json
from utils.model.export.source import Export, Source, save_tokenizer
from utils.model.folder import adapter_base, run_folder

PRECISIONS = ("",)  # as it was trained


def base_folder(folder: Path) -> Path:
    """The base of an adapter folder as PEFT can load it: of a base that is an adapter itself, its merged/ folder."""
    base = Path(adapter_base(folder))
    return base / "merged" if (base / "adapter_config.json").is_file() else base


def check(folder: Path, base: str) -> None:
    """UserError if `folder` holds a whole model, or was not trained on the model that `base` names (a Hub id, or "")."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{show_path(folder)} is no LoRA adapter; export it with --format folder or gguf")
    local = base_folder(folder)
    if local.name == "merged" and not local.is_dir():
        raise UserError(
            f"{show_path(folder)} was trained on another adapter, {show_path(local.parent)}, and no tool loads two "
            "on one another; --format folder exports the merged model"
        )
    mend = "on another base its answers are others; --format folder exports the merged model"
    if base and (run_folder(local) / "run.json").is_file():
        raise UserError(
            f"--base {base}: the adapter was trained on {show_path(local)}, a trained model; {mend}"
        )
    origin = origin_of(local) if local.is_dir() else adapter_base(folder)
    if base and origin and base != origin:
        raise UserError(f"--base {base}: the adapter was trained on {origin}; {mend}")


def origin_of(folder: Path) -> str:
    """The Hub id that a downloaded model folder came from, by its source.json; "" if it does not tell."""
    path = folder / "source.json"
    found = read_json(path) if path.is_file() else {}
    return str(found.get("repo", "")) if isinstance(found, dict) else ""


def save(source: Source, export: Export, partial: Path) -> None:
    """adapter_config.json names `export.base`, or, if that is empty, the base by its absolute path on this machine."""
    local = base_folder(source.folder)
    absolute = str(local.resolve()) if local.is_dir() else adapter_base(source.folder)
    config = read_json(source.folder / "adapter_config.json")
    write_json(partial / "adapter_config.json", config | {"base_model_name_or_path": export.base or absolute})
    shutil.copyfile(source.folder / "adapter_model.safetensors", partial / "adapter_model.safetensors")
    source.model.generation_config.save_pretrained(partial)
    save_tokenizer(source, partial)


def read(source: Source, export: Export) -> tuple[Any, Any] | None:
    """(tokenizer, model in float32): the exported adapter, merged by PEFT into the base that it names.

    None if that base is not on this machine: neither a folder, nor one that was downloaded under this name.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = read_json(export.place / "adapter_config.json")["base_model_name_or_path"]
    local = base_folder(source.folder)
    base = Path(named) if Path(named).is_dir() else local if origin_of(local) == named else None
    if base is None:
        return None
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(whole, export.place).merge_and_unload().eval()
    return AutoTokenizer.from_pretrained(export.place, trust_remote_code=False), model


def commands(export: Export, place: str) -> list[str]:
    """How the export is used from where it lies at `place`."""
    return [f'PEFT: `AutoPeftModelForCausalLM.from_pretrained("{place}")`']
