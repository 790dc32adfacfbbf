"""Model folders: find, check, load and save them, and read a run's run.json.

Safetensors only, no remote code, and no network once the models are on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, told_in_one_line
from utils.files import missing, read_json, sha256_of, show_path, write_json
from utils.model.chat_format import DECODING, generation_settings, with_default_mode
from utils.settings import ROOT

if TYPE_CHECKING:  # a wrong folder is refused before these are imported
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from utils.device import Device

INDEX = "model.safetensors.index.json"
RECORD = "run.json"
TOKENS_OF_CONFIG = ("bos_token_id", "pad_token_id")  # in config.json as well as in generation_config.json
# Fields of config.json for what is not done here: quantised weights, weights elsewhere, biases, sliding windows.
NOT_HERE = ("quantization_config", "transformers_weights", "attention_bias", "use_sliding_window")


def is_adapter(folder: str | Path) -> bool:
    """True if a model folder holds a LoRA adapter, not a whole model."""
    return (Path(folder) / "adapter_config.json").is_file()


def check_model(model: str, whole: bool = False) -> str:
    """The folder, as text, of `model` (a folder or a Hub id) if it holds a Qwen3 or a LoRA adapter in safetensors; UserError, in one
    line, otherwise. `whole`: of an adapter, the model in its merged/ folder.

    The folder may be a stranger's: nothing in it is run, no file outside it is read. The weights are judged when they are loaded.
    """
    folder = _find(model)
    if whole and is_adapter(folder):
        if not (folder / "merged").is_dir():  # as in a checkpoint
            raise UserError(
                f"{show_path(folder)} is an adapter without merged/; train the run's finished folder"
            )
        folder = folder / "merged"
    shown, weights = show_path(folder), "*.safetensors"
    if folder.is_file():
        raise UserError(f"{shown} is a file, wanted a model folder")
    if is_adapter(folder):
        weights = "adapter_model.safetensors"  # peft would go on with a pickled adapter_model.bin
        base = adapter_base(folder)
        if not Path(base).is_dir() or is_adapter(base):
            lost = "another adapter" if is_adapter(base) else f"{base}, which is not there"
            raise UserError(f"{shown} is an adapter for {lost}; use its merged/ folder")
        check_model(base)
    elif not (folder / "config.json").is_file():
        nested = [*folder.glob("*/config.json"), *folder.glob("*/adapter_config.json")]
        newest = max(nested, key=lambda path: path.stat().st_mtime, default=None)
        hint = f"did you mean {show_path(newest.parent)}?" if newest else "a model has config.json"
        raise UserError(f"{shown} is not a model folder; {hint}")
    if not list(folder.glob(weights)):
        raise UserError(f"{shown} holds no *.safetensors weights; other formats are not loaded")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{shown} has no tokenizer; copy tokenizer*.json and *.jinja from its base")
    if not is_adapter(folder):
        _check_config(folder)
    elif read_object(folder, "adapter_config.json").get("peft_type") != "LORA":
        raise cannot_load(folder, "adapter_config.json", "is of no LoRA adapter")
    return str(folder)


def _check_config(folder):
    config = read_object(folder, "config.json")
    if config.get("model_type") != "qwen3":
        kind = str(config.get("model_type"))[:40]
        raise UserError(f"{show_path(folder)} is a model of type {kind}; wanted Qwen3")
    for name in NOT_HERE:
        if config.get(name):
            raise cannot_load(folder, "config.json", f"asks for {name}, which is not supported here")
    if not (folder / "model.safetensors").is_file():
        places = read_object(folder, INDEX).get("weight_map")
        for name in set(map(str, places.values())) if isinstance(places, dict) else [""]:
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) or not (folder / name).is_file():
                raise cannot_load(folder, INDEX, f"names {name[:60]!r}; wanted *.safetensors of the folder")


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
    mend = "get the base model with: python model_download/download_model.py"
    if made := re.fullmatch("trainer_output/(sft|lora|dpo)_finetuned", show_path(ROOT / model)):
        mend = f"make it with: python model_finetune/finetune_{made[1]}.py"
    for place in ("trainer_output", "model_download"):
        if (ROOT / place / model).is_dir():
            mend = f"did you mean {place}/{model}?"
    raise missing(path if (ROOT / model).exists() else ROOT / model, mend)


def read_object(folder: Path, name: str) -> dict:
    """The JSON object in a small file of a model folder."""
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise cannot_load(folder, name, "holds no JSON object")
    return found


def cannot_load(folder: str | Path, name: str, problem: str) -> UserError:
    return UserError(f"{show_path(folder)} cannot be loaded: {name} {problem}")


def adapter_base(folder: str | Path) -> str:
    """The base model that a LoRA adapter folder names: a path (relative ones are to the repository) or a Hub id."""
    base = read_object(Path(folder), "adapter_config.json").get("base_model_name_or_path")
    # Windows would log in at a server that a path names.
    if not base or not isinstance(base, str) or base.startswith(("//", "\\\\")):
        wanted = "names no base model on this machine (base_model_name_or_path)"
        raise cannot_load(folder, "adapter_config.json", wanted)
    return str(ROOT / base) if (ROOT / base).is_dir() else base


def find_models() -> list[Path]:
    """Folders that load: finished runs, the newest first, then downloaded models, Qwen3-0.6B before the tiny one."""
    found = []
    for place in ("trainer_output/*/", "trainer_output/demo/*/", "model_download/*/"):
        for folder in sorted(ROOT.glob(place)):
            with contextlib.suppress(UserError, OSError):
                found.append(Path(check_model(str(folder))))
    downloads = ROOT / "model_download"
    return sorted(found, key=lambda folder: 0 if folder.parent == downloads else -written_at(folder))


def written_at(folder: Path) -> float:
    """The time at which the weights in a model folder were written (seconds since 1970): for a run, its end."""
    return max(path.stat().st_mtime for path in folder.glob("*.safetensors"))


def model_sha256(model: str | Path) -> str:
    """One sha256 over the weights, config and tokenizer of a model folder."""
    names = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
    files = Path(model).iterdir()
    counted = [path for path in files if path.suffix in (".safetensors", ".jinja") or path.name in names]
    digests = {path.name: sha256_of(path) for path in counted}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def quiet_offline() -> None:
    """Before transformers is imported: no usage pings, and nothing asks the Hub."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we batch, and threads and forks do not mix
    os.environ["HF_HUB_OFFLINE"] = "1"
    # peft asks transformers for this under its old name; nothing that a user could change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" bars of a fraction of a second


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model folder or adapter folder that check_model has passed."""
    from transformers import AutoTokenizer

    with told_in_one_line(
        f"{model} cannot be loaded: tokenizer.json or tokenizer_config.json is damaged or foreign"
    ):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if not isinstance(tokenizer.chat_template, str) or "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError(f"{model} is no Qwen chat model: its tokenizer has no chat template with <|im_end|>")
    config = read_object(Path(adapter_base(model) if is_adapter(model) else model), "config.json")
    size, last = config.get("vocab_size"), max(tokenizer.get_vocab().values())
    if not isinstance(size, int) or last >= size:
        raise cannot_load(model, "tokenizer.json", f"has token {last:,}, and config.json vocab_size {size}")
    return tokenizer


def load_model(model: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """The causal language model, in `dtype`, of a folder that check_model has passed; an adapter is merged into its base.

    The merge is done in float32 and rounded once, as for a merged/ folder: both give the same answers.
    """
    if not is_adapter(model):
        return _load_whole(model, dtype)
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    base, record = adapter_base(model), read_record(run_folder(model))
    trained_on = record and record["identity"].get("MODEL")
    if trained_on and trained_on != f"sha256 {model_sha256(base)}":
        other = f"was trained on other weights than {show_path(base)} holds now"
        raise UserError(f"{show_path(model)} {other}; use its merged/ folder, or bring that base model back")
    whole = _load_whole(base, torch.float32)
    with told_in_one_line(
        f"{model} cannot be loaded: adapter_config.json, generation_config.json or adapter_model.safetensors is damaged or foreign"
    ):
        merged = PeftModel.from_pretrained(whole, model).merge_and_unload()
        if (Path(model) / "generation_config.json").is_file():
            merged.generation_config = GenerationConfig.from_pretrained(model)
    for weight in merged.parameters():  # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    return merged


def _load_whole(model, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    with told_in_one_line(f"{model} cannot be loaded: config.json or *.safetensors is damaged or foreign"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        config._attn_implementation = "sdpa"  # a name in config.json would be fetched as a kernel
        how = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        loaded, report = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, config=config, **how)
    # transformers would go on with random numbers for those that are missing, and without those that it does not expect
    for name, keys in (("lacks", report["missing_keys"]), ("does not expect", report["unexpected_keys"])):
        if keys:
            raise cannot_load(model, "config.json", f"{name} {sorted(keys)[0]}")
    return loaded


def load_for_lora(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model of a folder with frozen weights, for adapters: norms in float32, linear layers and embeddings in `dtype`, in
    which their products are computed anyway: no copy of them in every step."""
    import torch
    from torch import nn

    loaded = _load_whole(model, "auto")
    for module in loaded.modules():
        held = dtype if isinstance(module, nn.Linear | nn.Embedding) else torch.float32
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(held)
    return loaded.requires_grad_(False)


def load_for_answers(model: str, device: Device) -> PreTrainedModel:
    """The model of a folder on `device`, its weights in the device's form for answers, which is proved first on a GPU."""
    from utils.model.prove import prove_answers
    from utils.model.qwen3_answer import hold_weights

    device = prove_answers(device)
    # Weights that are packed anyway are not widened to float32 before.
    dtype = device.dtype if device.weights == "plain" or is_adapter(model) else "auto"
    loaded = load_model(model, dtype).to(device.name).eval()
    hold_weights(loaded, device.weights)
    return loaded


def remember_mode(model: PreTrainedModel, tokenizer: Tokenizer, thinking: bool) -> None:
    """Make the thinking mode of the training rows the default of all that is saved: checkpoints and finished folder alike.

    Answers are drawn as Qwen advises for the mode; a base that says do_sample false, as the tiny one does, stays greedy.
    """
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    settings = generation_settings(tokenizer, thinking)
    if model.generation_config.do_sample is False:
        settings = {name: value for name, value in settings.items() if name not in DECODING[thinking]}
    model.generation_config.update(**settings)
    model.config.update({name: settings[name] for name in TOKENS_OF_CONFIG})


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Save a model (or adapter), its decoding settings and its tokenizer.

    Weights keep float32: rounding them to bfloat16 would lose updates as small as DPO's.
    """
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)  # an adapter's save_pretrained leaves it out
    tokenizer.save_pretrained(folder)
    write_config_for_other_tools(Path(folder))


def write_config_for_other_tools(folder: Path) -> None:
    """Make a folder that transformers 5 saved readable for transformers 4 too, and for what is built on either.

    4.57 looks for the RoPE base elsewhere, and would compute with 10,000. A tokenizer class that both know is not Qwen2Tokenizer, with
    which 5.x would ignore how tokenizer.json splits words. PEFT's README.md, which names a path of this machine, is removed.
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
    if isinstance(config.get("extra_special_tokens"), list):  # 4.x has another name for a list
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", config)
    (folder / "README.md").unlink(missing_ok=True)


def save_adapter_and_merged(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Save the adapter of a PeftModel at the root of `folder`, the merged model in merged/. `model` is of no use afterwards.

    The base is read from its folder once more, in float32: training may have held it in bfloat16, which would round the merged
    weights further.
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


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a training folder: status, identity, settings, results if it is finished. None without one, UserError if damaged."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    record = read_object(path.parent, RECORD)
    objects = ["identity", "settings"] + ["results"] * (record.get("status") == "finished")
    whole = isinstance(record.get("status"), str) and all(
        isinstance(record.get(key), dict) for key in objects
    )
    if not whole or not isinstance(record["settings"].get("MODEL"), str):
        raise UserError(f"{show_path(path)} is damaged; restore the file, or start over with --fresh")
    return record


def usable_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a training folder; None if it has none, or a damaged one, which is said: for what can do without."""
    try:
        return read_record(folder)
    except UserError as problem:
        print(f"left out: {problem}")
        return None


def run_folder(folder: str | Path) -> Path:
    """The training folder that a model folder belongs to: itself, or the one above merged/ or a checkpoint."""
    folder = Path(folder)
    inside = folder.name == "merged" or folder.name.startswith("checkpoint-")
    return folder.parent if inside and not (folder / RECORD).is_file() else folder
