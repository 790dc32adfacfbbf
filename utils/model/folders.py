"""Model folders: which ones there are, whether one can be loaded, and what identifies its content."""

import hashlib
import json
import re
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json, sha256_of, show_path
from utils.model.folder_checks import INDEX, cannot_load, check_files
from utils.model.hub_models import local_folder
from utils.settings import ROOT

# What makes a folder that a setting names but that is not there yet.
MADE_BY = {
    "model_download/Qwen3-0.6B": "python model_download/download_model.py",
    "trainer_output/sft_finetuned": "python model_finetune/finetune_sft.py",
    "trainer_output/lora_finetuned": "python model_finetune/finetune_lora.py",
    "trainer_output/dpo_finetuned": "python model_finetune/finetune_dpo.py",
}


def check_model(model: str, above: tuple[Path, ...] = ()) -> str:
    """Return `model` (a folder as text, or a Hub id) if it can be a causal language model; UserError otherwise.

    Reads a few small files only, so that a wrong folder is refused before torch is imported. `above`: the adapters (resolved
    paths) that `model` is the base of.
    """
    folder, weights = Path(model), "*.safetensors"
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{show_path(folder)} is a link to something that is not there")
    if not folder.exists():
        return _hub_id(model)
    if not folder.is_dir():
        inside = (folder.parent / "config.json").is_file()
        hint = f"; did you mean {show_path(folder.parent)}?" if inside else ""
        raise UserError(f"{show_path(folder)} is a file, wanted a model folder{hint}")
    if (folder / "adapter_config.json").is_file():
        _check_base(folder, above)
        weights = "adapter_model.safetensors"  # peft would go on with a pickled adapter_model.bin
    elif not (folder / "config.json").is_file():
        raise _no_model(folder)
    if not list(folder.glob(weights)):
        raise UserError(f"{show_path(folder)} holds no *.safetensors weights; other formats are not loaded")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{show_path(folder)} has no tokenizer; copy tokenizer*.json and chat_template.jinja from its base"
        )
    return model


def _hub_id(model):
    """`model`, which is no folder here, if it can be a Hub id such as Qwen/Qwen3-0.6B: not C:/models, ~/models or ./models."""
    known = Path(ROOT, model).resolve().as_posix()
    for place, command in MADE_BY.items():
        if known == (ROOT / place).as_posix():
            raise UserError(f"the model folder {model} does not exist; make it with: {command}")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not (ROOT / model).parent.is_dir():
        return model
    raise UserError(
        f"the model folder {model} does not exist; download one: python model_download/download_model.py"
    )


def _check_base(folder, above):
    base = adapter_base(folder)
    if not Path(base).is_dir():
        raise UserError(
            f"{show_path(folder)} is a LoRA adapter for {base}, which is not there; use its merged/ folder"
        )
    if folder.resolve() in above:
        raise cannot_load(folder, "adapter_config.json", "names a base that is an adapter of this one")
    check_model(base, (*above, folder.resolve()))


def _no_model(folder):
    """The UserError for a folder without a config: what it holds, and the newest model folder in it."""
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
    nested = [*folder.glob("*/config.json"), *folder.glob("*/adapter_config.json")]
    hint = "a model has config.json and *.safetensors"
    if nested:
        newest = max(nested, key=lambda path: path.stat().st_mtime)
        hint = f"did you mean {show_path(newest.parent)}?"
    return UserError(f"{show_path(folder)} is not a model folder (it holds {found}); {hint}")


def find_models() -> list[Path]:
    """Folders that load: finished runs, the newest first, then downloaded models, Qwen3-0.6B before the tiny one."""
    runs = [folder for folder in (ROOT / "trainer_output").glob("*/") if _is_model(folder)]
    bases = [folder for folder in (ROOT / "model_download").glob("*/") if _is_model(folder)]
    return sorted(runs, key=written_at, reverse=True) + sorted(bases)


def written_at(folder: Path) -> float:
    """When the weights in a model folder were written (seconds since 1970): for a run, when it ended."""
    return max(path.stat().st_mtime for path in folder.glob("*.safetensors"))


def _is_model(folder):
    try:
        check_model(str(folder))
        check_files(folder)
    except (UserError, OSError):
        return False
    return True


def adapter_base(folder: str | Path) -> str:
    """The base model that a LoRA adapter folder names: a path (relative ones are to the repository) or a Hub id."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str):
        raise UserError(f"{show_path(path)} names no base model (base_model_name_or_path)")
    if base.startswith(("//", "\\\\")):  # Windows would log in at a server of the adapter's choice
        raise UserError(f"{show_path(path)} names a base model on another machine")
    try:
        inside = ROOT / base
        return str(inside) if inside.is_dir() else base
    except OSError:
        raise UserError(
            f"{show_path(path)} names a base model that no folder can be called: {base[:60]} ..."
        ) from None


def model_sha256(model: str | Path) -> str:
    """One sha256 over the weights, config and tokenizer of a model folder, or of the one that a Hub id has in the cache."""
    kinds = (".safetensors", ".jinja")
    names = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
    files = Path(local_folder(str(model))).iterdir()
    digests = {path.name: sha256_of(path) for path in files if path.suffix in kinds or path.name in names}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
