"""Export as a transformers folder: what vLLM, mlx-lm, transformers 4 and 5 load."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from utils.files import read_json
from utils.model.export.source import Export, Source, build_model, save_tokenizer

PRECISIONS = ("bf16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# What transformers 4.57 reads in a Qwen3's config.json, and what it takes for a name that is not there. Other names, such as
# version 5's rope_parameters, it ignores.
CONFIG_OF_4 = {
    **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu"},
    **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "attention_bias": False},
    **{"tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None},
}


def check(folder: Path, base: str) -> None:
    """Any folder that loads can be exported so."""


def save(source: Source, export: Export, partial: Path) -> None:
    """Weights in the number format, both forms of config.json, decoding settings, tokenizer with the trained mode."""
    exact = {weight: weight.data for weight in source.model.parameters()}
    for weight in exact:  # not model.to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(DTYPES[export.precision])
    try:
        source.model.save_pretrained(partial)
    finally:
        for weight, data in exact.items():
            weight.data = data
    source.model.generation_config.save_pretrained(partial)
    save_tokenizer(source, partial)


def read(source: Source, export: Export) -> tuple[Any, Any]:
    """(tokenizer, model in float32) as transformers 4.57 understands the exported files."""
    given = read_json(export.place / "config.json")
    config = {name: given.get(name, default) for name, default in CONFIG_OF_4.items()}
    rope = {
        "rope_type": "default",
        **(config.pop("rope_scaling") or {}),
        "rope_theta": config.pop("rope_theta"),
    }
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(export.place.glob("*.safetensors")):
        weights |= load_file(path)
    if config["tie_word_embeddings"]:  # then a head of its own is ignored
        weights.pop("lm_head.weight", None)
    model = build_model(config | {"rope_parameters": rope}, weights, torch.Tensor.float)
    return AutoTokenizer.from_pretrained(export.place, trust_remote_code=False), model


def commands(export: Export, place: str) -> list[str]:
    """How the export is used from where it lies at `place`."""
    return [
        f"vLLM: `vllm serve {place}`",
        f'mlx-lm: `mlx_lm.generate --model {place} --prompt "四君子汤由哪些药组成？" --max-tokens 256`',
    ]
