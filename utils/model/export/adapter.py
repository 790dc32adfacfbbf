"""Export a LoRA adapter for PEFT: it names its base by Hub id or by a path that holds from any working directory."""

import shutil
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import read_json, show_path, write_json
from utils.model.export.source import Export, Source, run_folder, save_tokenizer
from utils.model.folder import adapter_base

PRECISIONS = ("",)  # as it was trained


def base_of(folder: Path) -> tuple[str, str]:
    """(the base of an adapter as PEFT can load it, the Hub id that it was downloaded from or "").

    If the base is an adapter itself, it is that one's merged/ folder.
    """
    named = adapter_base(folder)
    if (Path(named) / "adapter_config.json").is_file():
        named = str(Path(named) / "merged")
    origin = Path(named) / "source.json"
    repo = read_json(origin).get("repo", "") if origin.is_file() else ""
    return named, repo if Path(named).is_dir() else named


def check(folder: Path, base: str) -> None:
    """UserError if `folder` holds a whole model, or was not trained on the model that `base` names (a Hub id, or "")."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{show_path(folder)} is no LoRA adapter; export it with --format folder or gguf")
    named, origin = base_of(folder)
    if Path(named).name == "merged" and not Path(named).is_dir():
        raise UserError(
            f"{show_path(folder)} was trained on another adapter, and no tool loads both; use --format folder"
        )
    trained = (run_folder(Path(named)) / "run.json").is_file()
    if base and (trained or origin not in ("", base)):
        whose = f"{show_path(named)}, a trained model" if trained else origin
        raise UserError(
            f"--base {base}: the adapter was trained on {whose}; on another base its answers are others. "
            "--format folder exports the merged model"
        )


def save(source: Source, export: Export, partial: Path) -> None:
    """adapter_config.json names `export.base`, or, if that is empty, the base by its absolute path on this machine."""
    named, _ = base_of(source.folder)
    base = export.base or (str(Path(named).resolve()) if Path(named).is_dir() else named)
    config = read_json(source.folder / "adapter_config.json")
    write_json(partial / "adapter_config.json", config | {"base_model_name_or_path": base})
    shutil.copyfile(source.folder / "adapter_model.safetensors", partial / "adapter_model.safetensors")
    source.model.generation_config.save_pretrained(partial)
    save_tokenizer(source, partial)


def read(source: Source, export: Export) -> tuple[Any, Any] | None:
    """(tokenizer, model in float32): the exported adapter, merged by PEFT into the base that it names.

    None if that base is not on this machine: neither a folder, nor one that was downloaded under this name.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = read_json(export.place / "adapter_config.json")["base_model_name_or_path"]
    named, origin = base_of(source.folder)
    base = wanted if Path(wanted).is_dir() else named if origin == wanted and Path(named).is_dir() else ""
    if not base:
        return None
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(whole, export.place).merge_and_unload().eval()
    return AutoTokenizer.from_pretrained(export.place, trust_remote_code=False), model


def commands(export: Export, place: str) -> list[str]:
    """How the export is used from where it lies at `place`."""
    return [f'PEFT: `AutoPeftModelForCausalLM.from_pretrained("{place}")`']
