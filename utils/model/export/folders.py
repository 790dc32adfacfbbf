"""The finished folder that is exported, and its exports that are folders: of transformers (vLLM, mlx-lm) and of PEFT."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from utils.errors import RunError, UserError
from utils.files import read_json, sha256_of, show_path, write_json
from utils.model.chat_format import with_default_mode
from utils.model.folder import (
    adapter_base,
    is_adapter,
    load_model,
    load_tokenizer,
    run_folder,
    save_model,
    usable_record,
    write_config_for_other_tools,
)
from utils.model.generate import thinks_by_default
from utils.settings import ROOT

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# What transformers 4.57 reads in a Qwen3's config.json, beside rope_theta and rope_scaling, and what it takes for a name that is
# not there. Other names, such as version 5's rope_parameters, it ignores.
CONFIG_OF_4 = {
    **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu"},
    **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "attention_bias": False},
    **{"tie_word_embeddings": False},
}


def training_history(folder: Path) -> tuple[list[dict], str]:
    """(run.json of the folder and of those it was trained from, the last training first; the base of the first of them)."""
    runs: list[dict] = []
    base, above = adapter_base(folder) if is_adapter(folder) else "", run_folder(folder)
    while (record := usable_record(above)) and record not in runs:
        runs.append(record)
        base = record["settings"]["MODEL"]  # inside the repository: relative to it
        above = run_folder(ROOT / base)
    return runs, base


def training_file(run: dict) -> tuple[Path, bool]:
    """(the training file that a run.json names, True if it still holds what the run was trained on)."""
    path = ROOT / str(run["settings"].get("TRAIN_FILE"))
    return path, path.is_file() and run["identity"].get("TRAIN_FILE") == f"sha256 {sha256_of(path)}"


class Export:
    """An export of a finished folder; every format is a subclass with `precisions` (the default first), save, read and commands.

    `name`: of the model; `precision`: the number format; `base`: the base to name ("": see the format); `place`: its folder. After
    load(): `model` is whole (an adapter is merged), float32, on the CPU; `runs`, `origin`: see training_history; `system`: the
    system text of training ("": unknown, none).
    """

    precisions: tuple[str, ...]

    def __init__(self, folder: Path, place: Path, name: str, precision: str, base: str):
        self.folder, self.place, self.name, self.base = folder, place, name, base
        self.precision = precision or self.precisions[0]
        if self.precision not in self.precisions:
            known = " or ".join(self.precisions) or "none"
            raise UserError(f"--precision: wanted {known}, got {precision!r}")

    def check(self) -> None:
        """UserError if this format is not for the folder."""

    def load(self) -> None:
        """Load the model and its tokenizer."""
        self.runs, self.origin = training_history(self.folder)
        self.system = (self.runs[0].get("system") if self.runs else "") or ""
        self.tokenizer = load_tokenizer(str(self.folder))
        self.thinking = thinks_by_default(self.tokenizer)
        self.tokenizer.chat_template = with_default_mode(self.tokenizer.chat_template, self.thinking)
        self.model = load_model(str(self.folder), torch.float32).eval()
        config = self.model.config
        config.use_cache = True  # training turned it off, and the exported model is for answers
        # the flag follows the weights: transformers 4 would drop a head of its own if this said that it is the embedding
        config.tie_word_embeddings = self.model.lm_head.weight is self.model.get_input_embeddings().weight


class FolderExport(Export):
    """A folder that vLLM, mlx-lm, transformers 4 and 5 load."""

    precisions = ("bf16", "fp32")

    def save(self, partial: Path) -> None:
        """Weights in the number format, both forms of config.json, decoding settings, tokenizer with the trained mode."""
        exact = {weight: weight.data for weight in self.model.parameters()}
        for weight in exact:  # not model.to(dtype), which would round the rotary frequencies as well
            weight.data = weight.data.to(DTYPES[self.precision])
        save_model(self.model, self.tokenizer, partial)
        for weight, data in exact.items():
            weight.data = data

    def read(self) -> tuple[Any, Any]:
        """(tokenizer, model in float32) as transformers 4.57 understands the exported files."""
        given = read_json(self.place / "config.json")
        config = {name: given.get(name, default) for name, default in CONFIG_OF_4.items()}
        scaling = given.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": given.get("rope_theta", 10000.0)}
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(self.place.glob("*.safetensors")):
            weights |= load_file(path)
        if config["tie_word_embeddings"]:  # then a head of its own is ignored
            weights.pop("lm_head.weight", None)
        model = build_model(config, weights, torch.Tensor.float)
        return AutoTokenizer.from_pretrained(self.place, trust_remote_code=False), model

    def commands(self, place: str) -> list[str]:
        """How the export is used from where it lies at `place`."""
        prompt = '--prompt "四君子汤由哪些药组成？" --max-tokens 256'
        return [f"vLLM: `vllm serve {place}`", f"mlx-lm: `mlx_lm.generate --model {place} {prompt}`"]


class AdapterExport(Export):
    """A LoRA adapter for PEFT; it names its base by Hub id, or by a path that holds from any working directory."""

    precisions = ("",)  # as it was trained

    def check(self) -> None:
        """UserError if the folder holds a whole model, or was not trained on the model that `base` names."""
        if not is_adapter(self.folder):
            shown = show_path(self.folder)
            raise UserError(f"{shown} is no LoRA adapter; export it with --format folder or gguf")
        named, repo = self._base()
        trained = (run_folder(Path(named)) / "run.json").is_file()
        if self.base and (trained or repo not in ("", self.base)):
            whose = f"{show_path(named)}, a trained model" if trained else repo
            raise UserError(
                f"--base {self.base}: the adapter was trained on {whose}; on another base its answers are others. "
                "--format folder exports the merged model"
            )

    def _base(self):
        """(the base that the adapter names, the Hub id that it came from or "")."""
        named = adapter_base(self.folder)
        source = Path(named) / "source.json"
        repo = read_json(source).get("repo", "") if source.is_file() else ""
        return named, repo if Path(named).is_dir() else named

    def save(self, partial: Path) -> None:
        """adapter_config.json names `base`, or, if that is empty, the base by its absolute path on this machine."""
        config = read_json(self.folder / "adapter_config.json")
        config["base_model_name_or_path"] = self.base or self._base()[0]
        write_json(partial / "adapter_config.json", config)
        shutil.copyfile(self.folder / "adapter_model.safetensors", partial / "adapter_model.safetensors")
        self.model.generation_config.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        write_config_for_other_tools(partial)

    def read(self) -> tuple[Any, Any] | None:
        """(tokenizer, model in float32): the exported adapter, merged by PEFT into the base that it names.

        None if that base is not on this machine: neither a folder, nor one that was downloaded under this name.
        """
        from peft import PeftModel

        base = read_json(self.place / "adapter_config.json")["base_model_name_or_path"]
        named, repo = self._base()
        base = named if base == repo else base
        if not Path(base).is_dir():
            return None
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        model = PeftModel.from_pretrained(whole, self.place).merge_and_unload().eval()
        return AutoTokenizer.from_pretrained(self.place, trust_remote_code=False), model

    def commands(self, place: str) -> list[str]:
        """How the export is used from where it lies at `place`."""
        return [f'PEFT: `AutoPeftModelForCausalLM.from_pretrained("{place}")`']


def build_model(
    config: dict[str, Any], tensors: dict[str, Any], load: Callable, rename: Callable[[str], str] = str
) -> Any:
    """A Qwen3 in float32 of the fields and tensors that another tool reads. `load`: makes a float32 tensor of an entry of `tensors`,
    which is called `rename`(name of the parameter). RunError if one is missing, or nothing would read it."""
    model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    for name, weight in model.named_parameters():  # names a tied weight once
        if rename(name) not in tensors:
            raise RunError(f"the export lacks {name}: a tool would go on with random numbers in its place")
        weight.data = load(tensors.pop(rename(name)))
    if tensors:
        raise RunError(f"the export holds weights that no tool would read: {', '.join(list(tensors)[:3])}")
    return model
