"""Export as a transformers folder: what vLLM, mlx-lm, transformers 4 and 5 load."""

from pathlib import Path
from typing import Any

import torch

from utils.model.export.source import Export, Source, save_tokenizer
from utils.model.folder import load_model, load_tokenizer

PRECISIONS = ("bf16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check(folder: Path) -> None:
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
    """(tokenizer, model in float32) of the exported folder."""
    return load_tokenizer(str(export.place)), load_model(str(export.place), torch.float32).eval()


def commands(export: Export, place: str) -> list[str]:
    """How the export is used from where it lies at `place`."""
    return [
        f"vLLM: `vllm serve {place}`",
        f'mlx-lm: `mlx_lm.generate --model {place} --prompt "四君子汤由哪些药组成？" --max-tokens 256`',
    ]
