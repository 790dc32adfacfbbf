"""The small files of a model folder and the headers of its weights, checked before a library builds a model from them."""

import re
import textwrap
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json, show_path

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
