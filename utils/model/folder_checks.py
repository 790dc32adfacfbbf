"""The small files of a model folder and the headers of its weights, checked before a library builds a model from them."""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import NO_MEMORY, UserError
from utils.files import read_json, show_path
from utils.settings import ROOT

if TYPE_CHECKING:  # a wrong folder is refused before it is imported
    from transformers import GenerationConfig

INDEX = "model.safetensors.index.json"
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)


def check_files(folder: Path) -> None:
    """UserError, in one line that names the file, unless the folder holds a sound Qwen3 or a LoRA adapter in safetensors.

    The folder may be a stranger's: nothing in it is run, and no file outside it is read. Only small files and the headers of the
    weights are read, so that this takes milliseconds.
    """
    if (folder / "adapter_config.json").is_file():
        config = read_object(folder, "adapter_config.json")
        shapes, rank = _shapes(folder / "adapter_model.safetensors"), config.get("r")
        held = max((shape[0] for name, shape in shapes.items() if "lora_A" in name), default=0)
        if config.get("peft_type") != "LORA" or not isinstance(rank, int) or not 0 < rank <= held:
            problem = (
                f"asks for {config.get('peft_type')} of rank {rank}; the weights are LORA of rank {held}"
            )
            raise cannot_load(folder, "adapter_config.json", problem)
        return
    config = read_object(folder, "config.json")
    if config.get("model_type") != "qwen3":
        if config.get("auto_map"):
            raise needs_code(show_path(folder))
        kind = str(config.get("model_type"))[:40]
        raise UserError(f"{show_path(folder)} is a {kind} model; wanted Qwen3, without sliding windows")
    for name in ("quantization_config", "transformers_weights", "attention_bias"):
        if config.get(name):
            raise cannot_load(folder, "config.json", f"asks for {name}, which is not supported here")
    sizes = [config.get(name) for name in SIZES]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise cannot_load(folder, "config.json", f"lacks a whole number among {', '.join(SIZES)}")
    vocabulary, hidden, between, layers, heads, kv_heads, width = sizes
    shapes = {}
    for path in _weight_files(folder):
        shapes |= _shapes(path)
    held = len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})
    if layers != held:
        problem = f"says num_hidden_layers is {layers}, the weights have {held}; it is not whole"
        raise cannot_load(folder, "config.json", problem)
    wanted = {
        "model.embed_tokens.weight": [vocabulary, hidden],
        "model.layers.0.self_attn.q_proj.weight": [heads * width, hidden],
        "model.layers.0.self_attn.k_proj.weight": [kv_heads * width, hidden],
        "model.layers.0.mlp.gate_proj.weight": [between, hidden],
    }
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            problem = f"asks for {name} of {shape}, the weights have {shapes.get(name)}"
            raise cannot_load(folder, "config.json", problem)


def read_object(folder: Path, name: str) -> dict:
    """The JSON object in a small file of a model folder."""
    try:
        found = read_json(folder / name)
    except (OSError, UserError) as error:
        raise cannot_load(folder, name, f"is damaged ({textwrap.shorten(str(error), 200)})") from None
    if not isinstance(found, dict):
        raise cannot_load(folder, name, "holds no JSON object")
    return found


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that an index names, which lie in the folder."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    places = read_object(folder, INDEX).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    for name in sorted(names) or [""]:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) or not (folder / name).is_file():
            raise cannot_load(folder, INDEX, f"names {name[:60]!r}; wanted *.safetensors of the folder")
    return [folder / name for name in sorted(names)]


def _shapes(path: Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a safetensors file. The library checks the header against the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise cannot_load(path.parent, path.name, f"is not whole, or no safetensors file ({error})") from None


def cannot_load(folder: str | Path, name: str, problem: str) -> UserError:
    return UserError(f"{show_path(folder)} cannot be loaded: {name} {problem}")


def needs_code(model: str) -> UserError:
    return UserError(f"{model} needs Python code of its own to load, and code from a model is not run here")


def adapter_base(folder: str | Path) -> str:
    """The base model that a LoRA adapter folder names: a path (relative ones are to the repository) or a Hub id."""
    path = Path(folder) / "adapter_config.json"
    base = read_object(Path(folder), path.name).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{show_path(path)} names no base model (base_model_name_or_path)")
    if base.startswith(("//", "\\\\")):  # Windows would log in at a server of the adapter's choice
        raise UserError(f"{show_path(path)} names a base model on another machine")
    try:
        return str(ROOT / base) if (ROOT / base).is_dir() else base
    except OSError:  # the name is too long for a folder
        raise UserError(f"{show_path(path)} names no folder as its base model: {base[:60]} ...") from None


def read_decoding(model: str, folder: Path) -> GenerationConfig | None:
    """The decoding settings of a folder, None if it has none; UserError if one that is used here is no number to compute with."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    with told_in_one_line(model, "generation_config.json"):
        config = GenerationConfig.from_pretrained(folder)
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise cannot_load(model, "generation_config.json", f"says {name} is {str(value)[:40]}")
    ends = config.eos_token_id
    if not all(isinstance(end, int | None) for end in (ends if isinstance(ends, list) else [ends])):
        raise cannot_load(model, "generation_config.json", f"says eos_token_id is {str(ends)[:40]}")
    return config


@contextlib.contextmanager
def told_in_one_line(model: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for damaged or foreign files (any Exception) into a UserError of one line that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            raise
        if "trust_remote_code" in str(error):
            raise needs_code(model) from None
        why = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise UserError(f"{model} cannot be loaded: {name} is damaged or foreign ({why})") from None
