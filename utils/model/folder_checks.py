"""The small files of a model folder and the headers of its weights, checked before a library builds a model from them."""

import contextlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.errors import NO_MEMORY, UserError
from utils.files import read_json, show_path
from utils.settings import ROOT

INDEX = "model.safetensors.index.json"


def check_files(folder: Path) -> None:
    """UserError, in one line that names the file, unless the folder holds a Qwen3 of full weights, or a LoRA adapter, in safetensors.

    The folder may be a stranger's: nothing in it is run, and no file outside it is read. Small files and the headers of the weights
    are read here; the libraries compare all other shapes when they load them.
    """
    if (folder / "adapter_config.json").is_file():
        if read_object(folder, "adapter_config.json").get("peft_type") != "LORA":
            raise cannot_load(folder, "adapter_config.json", "is of no LoRA adapter")
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
    shapes = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "numpy") as file:  # compares the header with the file's size
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise cannot_load(folder, path.name, f"is not whole, or no safetensors file ({error})") from None
    vocabulary, hidden = shapes.get("model.embed_tokens.weight", (0, 0))
    layers = len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})
    held = {"num_hidden_layers": layers, "vocab_size": vocabulary, "hidden_size": hidden}
    for name, count in held.items():
        if config.get(name) != count:
            problem = (
                f"says {name} is {str(config.get(name))[:40]}, the weights have {count}; it is not whole"
            )
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
    return str(ROOT / base) if (ROOT / base).is_dir() else base


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
