"""The small files of a model folder, checked before a library builds what they ask for.

The folder may come from a stranger. Its config may ask for no more than its weights hold, its index may name no file elsewhere,
an adapter may bring no patterns to match, and every value is of its type. Reads a few kB: the headers of the weights, not the
weights.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.files import show_path

LARGEST = 8 << 20  # bytes of a small file; Qwen3's are below 15 kB
LONGEST_HEADER = 100_000_000  # bytes: the format's own limit
INDEX = "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)


class Kind(NamedTuple):
    """What a field has to be, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _are_tokens(value):
    return all(map(_is_token, value)) if isinstance(value, list) else value is None or _is_token(value)


def _is_token(value):
    return _is_whole(value) and 0 <= value < 1 << 31


def _or_null(kind):
    return Kind(lambda value: value is None or kind.holds(value), kind.words)


SIZE = Kind(lambda value: _is_whole(value) and 0 < value < 1 << 31, "a whole number above 0")
COUNT = Kind(lambda value: _is_whole(value) and 0 <= value < 1 << 31, "a whole number")
NUMBER = Kind(_is_number, "a number")
SWITCH = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a text")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
TOKENS = Kind(_are_tokens, "the number of a token, or a list of them")
FORMAT = Kind(lambda value: value in ("float32", "bfloat16", "float16", None), "float32, bfloat16 or float16")
NAMES = Kind(
    lambda value: (
        value == "all-linear"
        or isinstance(value, list)
        and len(value) <= 1000
        and all(isinstance(name, str) and re.fullmatch(r"[\w.]{1,200}", name) for name in value)
    ),
    "a list of layer names (patterns are not taken from a file)",
)
NO_PATTERNS = Kind(
    lambda value: (
        isinstance(value, dict)
        and NAMES.holds(list(value))
        and all(_is_number(each) and 0 < each < 1 << 20 for each in value.values())
    ),
    "numbers by layer name",
)
ABSENT = Kind(lambda value: not value, "empty: it is not supported here")

CONFIG = {
    **dict.fromkeys(("max_position_embeddings", *SIZES), SIZE),
    "rms_norm_eps": NUMBER,
    **dict.fromkeys(("attention_dropout", "initializer_range", "rope_theta"), _or_null(NUMBER)),
    **dict.fromkeys(("attention_bias", "tie_word_embeddings", "use_cache"), SWITCH),
    **dict.fromkeys(("use_sliding_window", "output_attentions", "output_hidden_states"), SWITCH),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _or_null(OBJECT)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(("dtype", "torch_dtype"), FORMAT),
    "hidden_act": Kind(lambda value: value == "silu", "silu"),
    "layer_types": _or_null(
        Kind(lambda value: isinstance(value, list) and all(map(TEXT.holds, value)), "a list of texts")
    ),
    **dict.fromkeys(("quantization_config", "transformers_weights"), ABSENT),
}
CONFIG_NEEDS = ("max_position_embeddings", "hidden_act", "rms_norm_eps", *SIZES)
GENERATION = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
        _or_null(NUMBER),
    ),
    **dict.fromkeys(
        ("top_k", "max_new_tokens", "max_length", "min_new_tokens", "num_beams"), _or_null(COUNT)
    ),
    **dict.fromkeys(("do_sample", "use_cache"), _or_null(SWITCH)),
}
ADAPTER = {
    "r": SIZE,
    "base_model_name_or_path": TEXT,
    "peft_type": Kind(lambda value: value == "LORA", "LORA"),
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "target_modules": NAMES,
    **dict.fromkeys(("exclude_modules", "modules_to_save"), _or_null(NAMES)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _or_null(NO_PATTERNS)),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), SWITCH),
    # what would match patterns, import modules or read files that the adapter names
    **dict.fromkeys(("layers_pattern", "megatron_config", "layer_replication", "target_parameters"), ABSENT),
    **dict.fromkeys(("corda_config", "eva_config", "lora_ga_config", "loftq_config", "arrow_config"), ABSENT),
}
ADAPTER_NEEDS = ("peft_type", "r", "target_modules")


def check_files(folder: Path) -> None:
    """UserError, which names the file, where one of the folder's small files is damaged or asks for what its weights do not hold."""
    if (folder / "adapter_config.json").is_file():
        adapter = _fields(folder, "adapter_config.json", ADAPTER, ADAPTER_NEEDS)
        _check_rank(folder, adapter)
    else:
        _check_config(folder)
    if (folder / "generation_config.json").exists():
        _fields(folder, "generation_config.json", GENERATION)
    if (folder / "tokenizer_config.json").exists():
        _fields(folder, "tokenizer_config.json", {"tokenizer_class": _or_null(TEXT)})


def cannot_load(folder: str | Path, name: str, problem: str) -> UserError:
    """The one line for a file of a model folder that stops it from being loaded."""
    return UserError(f"{show_path(folder)} cannot be loaded: {name} {problem}")


def _fields(folder, name, kinds, needed=()):
    """The object in a small file, its fields of their kinds."""
    found = _read(folder, name)
    for field in needed:
        if field not in found:
            raise cannot_load(folder, name, f"has no {field}")
    for field, kind in kinds.items():
        if field in found and not kind.holds(found[field]):
            shown = json.dumps(found[field], ensure_ascii=False)[:40]
            raise cannot_load(folder, name, f"says {field} is {shown}; wanted {kind.words}")
    return found


def _read(folder, name):
    path = folder / name
    if not path.is_file():
        raise cannot_load(folder, name, "is no file")
    if path.stat().st_size > LARGEST:
        raise cannot_load(folder, name, f"has {path.stat().st_size} bytes; wanted a small file")
    return _object(path.read_bytes(), folder, name)


def _object(text, folder, name):
    try:
        found = json.loads(text.decode("utf-8-sig"), parse_constant=_no_constant)
    except RecursionError:
        raise cannot_load(folder, name, "is nested too deep") from None
    except ValueError as error:  # not UTF-8, not JSON, numbers of more than 4,300 digits
        raise cannot_load(folder, name, f"is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise cannot_load(folder, name, "holds no JSON object")
    return found


def _no_constant(name):
    raise ValueError(f"{name} is no number of JSON")


def _check_config(folder):
    plain = _read(folder, "config.json")
    kind = plain.get("model_type")
    if kind != "qwen3":
        if plain.get("auto_map"):
            raise UserError(
                f"{show_path(folder)} needs Python code of its own to load, and code from a model is not run here"
            )
        raise UserError(
            f"{show_path(folder)} is a {str(kind)[:40]} model; wanted Qwen3, without sliding windows"
        )
    config = _fields(folder, "config.json", CONFIG, CONFIG_NEEDS)
    listed, layers = config.get("layer_types"), config["num_hidden_layers"]
    if listed is not None and len(listed) != layers:
        raise cannot_load(folder, "config.json", f"lists {len(listed)} layer_types for {layers} layers")
    shapes = {}
    for path in weight_files(folder):
        shapes.update(read_shapes(path))
    _check_sizes(folder, config, shapes)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that hold a whole model: model.safetensors, or those that the index names, which lie in the folder."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        raise cannot_load(folder, "model.safetensors", "is not there")
    places = _read(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise cannot_load(folder, INDEX, "has no weight_map")
    names = {name if isinstance(name, str) else "" for name in places.values()}
    for name in sorted(names):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise cannot_load(
                folder, INDEX, f"names {name[:60]!r}; wanted names of *.safetensors in the folder"
            )
        if not (folder / name).is_file():
            raise cannot_load(folder, name, f"is not there, and {INDEX} names it")
    return [folder / name for name in sorted(names)]


def read_shapes(path: Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a safetensors file, whose header has to agree with its size."""
    folder, name, size = path.parent, path.name, path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, size - 8):
            raise cannot_load(folder, name, "is not whole, or no safetensors file")
        header = _object(file.read(length), folder, name)
    header.pop("__metadata__", None)
    shapes, total = {}, 0
    for tensor, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(map(COUNT.holds, shape)) or entry.get("dtype") not in BYTES:
            raise cannot_load(folder, name, f"holds a tensor of no known form ({tensor[:60]})")
        shapes[tensor] = shape
        total += math.prod(shape) * BYTES[entry["dtype"]]
    told = 8 + length + total
    if told != size:
        raise cannot_load(folder, name, f"is not whole: {size} bytes, its header tells of {told}")
    return shapes


def _check_sizes(folder, config, shapes):
    """What config.json says is what the weights hold: nothing larger is ever built."""
    hidden, head = config["hidden_size"], config["head_dim"]
    in_layers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in shapes)
    said, held = config["num_hidden_layers"], len({found[1] for found in in_layers if found})
    if said != held:
        problem = f"says num_hidden_layers is {said}, the weights have {held}; it is not whole"
        raise cannot_load(folder, "config.json", problem)
    wanted = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.layers.0.self_attn.q_proj.weight": [config["num_attention_heads"] * head, hidden],
        "model.layers.0.self_attn.k_proj.weight": [config["num_key_value_heads"] * head, hidden],
        "model.layers.0.mlp.gate_proj.weight": [config["intermediate_size"], hidden],
    }
    for name, shape in wanted.items():
        if name not in shapes:
            raise UserError(f"{show_path(folder)} is not whole: its weights lack {name}")
        if shapes[name] != shape:
            problem = f"asks for {name} of {shape}, the weights have {shapes[name]}"
            raise cannot_load(folder, "config.json", problem)


def _check_rank(folder, adapter):
    name = "adapter_model.safetensors"
    if not (folder / name).is_file():
        raise cannot_load(folder, name, "is not there")
    shapes = read_shapes(folder / name).items()
    ranks = [shape[0] for tensor, shape in shapes if re.search(r"\.lora_(embedding_)?A\b", tensor) and shape]
    asked, held = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()]), max(ranks, default=0)
    if not ranks or asked > held:
        raise cannot_load(folder, "adapter_config.json", f"asks for rank {asked}, the weights have {held}")
