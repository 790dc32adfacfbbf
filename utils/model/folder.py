"""Model folders: find, check, load and save them, and read and write a run's run.json.

Safetensors only, no remote code, and no network once the models are on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import missing, read_json, sha256_of, show_path, write_json
from utils.model.chat_format import DECODING, generation_settings, with_default_mode
from utils.model.folder_checks import (
    INDEX,
    adapter_base,
    cannot_load,
    check_files,
    read_object,
    told_in_one_line,
)
from utils.settings import ROOT

if TYPE_CHECKING:  # a wrong folder is refused before these are imported
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from utils.device import Device

# The commands that make the folders which settings name.
MADE_BY = {
    "model_download/Qwen3-0.6B": "python model_download/download_model.py",
    "trainer_output/sft_finetuned": "python model_finetune/finetune_sft.py",
    "trainer_output/lora_finetuned": "python model_finetune/finetune_lora.py",
    "trainer_output/dpo_finetuned": "python model_finetune/finetune_dpo.py",
}


def check_model(model: str) -> str:
    """The folder, as text, of `model` (a folder or a Hub id) if it can be a causal language model; UserError otherwise.

    Looks at names only, so that a wrong folder is refused before torch is imported.
    """
    folder, weights = _find(model), "*.safetensors"
    if not folder.is_dir():
        inside = (folder.parent / "config.json").is_file()
        hint = f"; did you mean {show_path(folder.parent)}?" if inside else ""
        raise UserError(f"{show_path(folder)} is a file, wanted a model folder{hint}")
    if (folder / "adapter_config.json").is_file():
        weights = "adapter_model.safetensors"  # peft would go on with a pickled adapter_model.bin
        base = adapter_base(folder)
        if not Path(base).is_dir():
            missing = f"is a LoRA adapter for {base}, which is not there"
            raise UserError(f"{show_path(folder)} {missing}; use its merged/ folder")
        if Path(base).resolve() == folder.resolve():
            raise cannot_load(folder, "adapter_config.json", "names itself as its base")
        check_model(base)
    elif not (folder / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        nested = [*folder.glob("*/config.json"), *folder.glob("*/adapter_config.json")]
        hint = "a model has config.json and *.safetensors"
        if nested:
            newest = max(nested, key=lambda path: path.stat().st_mtime)
            hint = f"did you mean {show_path(newest.parent)}?"
        raise UserError(f"{show_path(folder)} is not a model folder (it holds {found}); {hint}")
    if not list(folder.glob(weights)):
        raise UserError(f"{show_path(folder)} holds no *.safetensors weights; other formats are not loaded")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{show_path(folder)} has no tokenizer; copy tokenizer*.json and chat_template.jinja from its base"
        )
    return str(folder)


def _find(model: str) -> Path:
    """The path `model`, or the folder that download_model.py made of a Hub id such as Qwen/Qwen3-0.6B; UserError without it."""
    path, downloaded = Path(model), ROOT / "model_download" / model.rpartition("/")[2]
    if path.exists():
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not (ROOT / model).parent.is_dir():
        source = downloaded / "source.json"
        if source.is_file() and read_object(downloaded, source.name).get("repo") == model:
            return downloaded
        get = f"python model_download/download_model.py --model {model}"
        raise UserError(f"the model {model} is not on this machine; get it with: {get}")
    command = MADE_BY.get(show_path(ROOT / model), "python model_download/download_model.py")
    raise missing(path if (ROOT / model).exists() else ROOT / model, f"make it with: {command}")


def find_models() -> list[Path]:
    """Folders that load: finished runs, the newest first, then downloaded models, Qwen3-0.6B before the tiny one."""
    output = ROOT / "trainer_output"
    runs = filter(_loads, (*output.glob("*/"), *output.glob("demo/*/")))
    bases = filter(_loads, (ROOT / "model_download").glob("*/"))
    return sorted(runs, key=written_at, reverse=True) + sorted(bases)


def _loads(folder: Path) -> bool:
    try:
        check_model(str(folder))
        check_files(folder)
    except (UserError, OSError):
        return False
    return True


def written_at(folder: Path) -> float:
    """The time at which the weights in a model folder were written (seconds since 1970): for a run, its end."""
    return max(path.stat().st_mtime for path in folder.glob("*.safetensors"))


def model_sha256(model: str | Path) -> str:
    """One sha256 over the weights, config and tokenizer of a model folder."""
    kinds = (".safetensors", ".jinja")
    names = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
    files = Path(model).iterdir()
    digests = {path.name: sha256_of(path) for path in files if path.suffix in kinds or path.name in names}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def quiet_offline() -> None:
    """Before transformers is imported: no usage pings, and nothing asks the Hub."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads and forks do not mix, and we batch anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # peft asks transformers for this under its old name; nothing that a user could change
    old_name = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=old_name, category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" bars of a fraction of a second


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or adapter folder."""
    from transformers import AutoTokenizer

    folder = Path(model)
    check_files(folder)
    with told_in_one_line(model, "tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(tokenizer.chat_template, str) or "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError(f"{model} is no Qwen chat model: its tokenizer has no chat template with <|im_end|>")
    while (folder / "adapter_config.json").is_file():
        folder = Path(adapter_base(folder))
        if (
            not folder.is_dir()
        ):  # an exported adapter's base may not be here; whoever loads the weights is told
            return tokenizer
        check_files(folder)
    size, last = read_json(folder / "config.json")["vocab_size"], max(tokenizer.get_vocab().values())
    if last >= size:
        problem = f"is of another model: it has token {last:,}, and the model knows {size:,}"
        raise cannot_load(model, "tokenizer.json", problem)
    return tokenizer


def load_model(model: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """The causal language model of a folder in `dtype`; a LoRA adapter comes merged into its base.

    The merge is done in float32 and rounded once, as for a merged/ folder, so that both give the same answers.
    """
    import torch

    if not (Path(model) / "adapter_config.json").is_file():
        return _load_whole(model, dtype)
    from peft import PeftModel
    from transformers import GenerationConfig

    check_model(model)
    check_files(Path(model))
    path, base = Path(model), adapter_base(model)
    # A checkpoint belongs to the run in the folder above it.
    record = read_record(path, {"identity": dict}) or read_record(path.parent, {"identity": dict})
    trained_on = record and record["identity"].get("MODEL")
    if trained_on and trained_on != f"sha256 {model_sha256(base)}":
        raise UserError(
            f"{show_path(path)} was trained on other weights than {show_path(base)} holds now; "
            "use its merged/ folder, or bring that base model back"
        )
    base = load_model(base, torch.float32)
    with told_in_one_line(model, "adapter_config.json or adapter_model.safetensors"):
        merged = PeftModel.from_pretrained(base, model).merge_and_unload()
    for weight in merged.parameters():  # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    if (path / "generation_config.json").is_file():
        with told_in_one_line(model, "generation_config.json"):
            merged.generation_config = GenerationConfig.from_pretrained(model)
    return merged


def load_for_lora(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder with frozen weights, for adapters.

    Linear layers and embeddings are held in `dtype`, in which their products are computed anyway: with bfloat16 half the memory,
    and no copy of them in every step. The norms stay float32.
    """
    import torch
    from torch import nn

    adapter = (Path(model) / "adapter_config.json").is_file()
    loaded = load_model(model, torch.float32 if adapter else "auto")
    for module in loaded.modules():
        held = dtype if isinstance(module, nn.Linear | nn.Embedding) else torch.float32
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(held)
    return loaded.requires_grad_(False)


def load_for_answers(model: str, device: Device) -> PreTrainedModel:
    """The model of a folder on `device`, its weights in the device's form for answers."""
    from utils.model.qwen3_answer import hold_weights

    adapter = (Path(model) / "adapter_config.json").is_file()
    # Weights that are packed anyway are not widened to float32 before.
    dtype = device.dtype if device.weights == "plain" or adapter else "auto"
    loaded = load_model(model, dtype).to(device.name).eval()
    hold_weights(loaded, device.weights)
    return loaded


def _load_whole(model, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    check_files(Path(model))
    with told_in_one_line(model, "config.json"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        config._attn_implementation = "sdpa"  # a name in config.json would be fetched as a kernel
    with told_in_one_line(model, "config.json or *.safetensors"):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            config=config,
        )
    if set(loaded.config.layer_types) != {"full_attention"}:
        raise UserError(f"{model} is a qwen3 model; wanted Qwen3, without sliding windows")
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"{model} is not whole: its weights lack {', '.join(missing[:3])} ...")
    return loaded


TOKENS_OF_CONFIG = ("bos_token_id", "pad_token_id")  # in config.json as well as in generation_config.json


def remember_mode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Make the thinking mode of the training rows the default of all that is saved: checkpoints and finished folder alike.

    Answers are drawn as Qwen advises for the mode; a base that says do_sample false, as the tiny one does, stays greedy.
    """
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    settings = generation_settings(tokenizer, thinking)
    if model.generation_config.do_sample is False:
        settings = {name: value for name, value in settings.items() if name not in DECODING[thinking]}
    model.generation_config.update(**settings)
    model.config.update({name: settings[name] for name in TOKENS_OF_CONFIG})


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a model (or adapter), its decoding settings and its tokenizer.

    Weights keep float32: rounding them to bfloat16 would lose updates as small as DPO's.
    """
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)  # an adapter's save_pretrained leaves it out
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "adapter_config.json"
    if path.is_file():  # PEFT writes its sets of names in an order that differs from run to run
        config = read_json(path)
        for value in config.values():
            if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
                value.sort()
        write_json(path, config)
    write_config_for_other_tools(Path(folder))


def write_config_for_other_tools(folder: Path) -> None:
    """Make a folder that transformers 5 saved readable for transformers 4 too, and for what is built on either.

    config.json gets the RoPE base where 4.x looks for it: without it, 4.57 computes with 10,000 and says nothing. The
    tokenizer gets a class that both know. It is not Qwen2Tokenizer, with which 5.x would ignore how tokenizer.json splits words.
    PEFT's README.md, a form to fill in with a path of this machine, is removed.
    """
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        rope = dict(config["rope_parameters"])
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        write_json(folder / "config.json", config)
    config = read_json(folder / "tokenizer_config.json")
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):
        # the name that 4.x has for such a list, and 5.x takes
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", config)
    (folder / "README.md").unlink(missing_ok=True)


def save_adapter_and_merged(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the adapter of a PeftModel at the root of `folder`, the merged model in merged/. `model` is of no use afterwards.

    The base is read from its folder once more, in float32: in training it may have been held in bfloat16, and the merged
    weights are to be rounded no further than those of a base that was not.
    """
    import torch

    from utils.device import release_memory

    save_model(model, tokenizer, folder)
    for weight in model.parameters():  # two models at once would be the peak of the whole run
        if not weight.requires_grad:
            weight.data = weight.data.new_empty(0)
    release_memory()
    merged = load_model(str(folder), torch.float32)
    merged.config.update({name: getattr(model.config, name) for name in TOKENS_OF_CONFIG})
    save_model(merged, tokenizer, folder / "merged")


RECORD = "run.json"
# The fields that a run needs to go on, and of what type they are.
RECORD_FIELDS: dict[str, type] = {"status": str, "identity": dict, "settings": dict}


def read_record(folder: str | Path, fields: dict[str, type] | None = None) -> dict[str, Any] | None:
    """The record of a training folder; None where it has none. UserError where it is damaged or lacks one of `fields`."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    record, wanted = read_json(path), dict(fields or {})
    if not isinstance(record, dict):
        raise UserError(f"{show_path(path)} is damaged: it holds no object")
    if fields and record.get("status") == "finished":
        wanted["results"] = dict
    for name, kind in wanted.items():
        if not isinstance(record.get(name), kind):
            problem = f"its {name} is no {kind.__name__}; restore the file, or start over with --fresh"
            raise UserError(f"{show_path(path)} is damaged: {problem}")
    return record


def run_folder(folder: Path) -> Path:
    """The training folder that a model folder belongs to: itself, or the one above merged/ or a checkpoint."""
    inside = folder.name == "merged" or folder.name.startswith("checkpoint-")
    return folder.parent if inside and not (folder / RECORD).is_file() else folder


def usable_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a training folder; None if it has none, or a damaged one, which is said: for what can do without."""
    try:
        record = read_record(folder, RECORD_FIELDS)
        if record and not isinstance(record["settings"].get("MODEL"), str):
            raise UserError(f"{show_path(Path(folder) / RECORD)} is damaged: it names no MODEL")
        return record
    except UserError as problem:
        print(f"left out: {problem}")
        return None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a training folder."""
    write_json(folder / RECORD, record)
