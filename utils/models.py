"""Model folders: find, check, load. Safetensors only, no remote code, and no network for a folder on disk."""

import contextlib
import json
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

from utils.errors import NO_MEMORY, UserError
from utils.files import read_json, sha256_of, show_path
from utils.settings import ROOT

# What makes a folder that a setting names but that is not there yet.
MADE_BY = {
    "model_download/Qwen3-0.6B": "python model_download/download_model.py",
    "trainer_output/sft_finetuned": "python model_finetune/finetune_sft.py",
    "trainer_output/lora_finetuned": "python model_finetune/finetune_lora.py",
    "trainer_output/dpo_finetuned": "python model_finetune/finetune_dpo.py",
}


def check_model(model):
    """Return `model` (a folder as text, or a Hub id) if it can be a causal language model; UserError otherwise.

    Reads a few small files only, so that a wrong folder is refused before torch is imported.
    """
    folder = Path(model)
    if not folder.exists():
        known = Path(ROOT, model).resolve().as_posix()
        for place, command in MADE_BY.items():
            if known == (ROOT / place).as_posix():
                raise UserError(f"the model folder {model} does not exist; make it with: {command}")
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not (ROOT / model).parent.is_dir():
            return model                        # a Hub id such as Qwen/Qwen3-0.6B; not C:/models, ~/models or ./models
        raise UserError(f"the model folder {model} does not exist; download one: python model_download/download_model.py")
    if not folder.is_dir():
        hint = f"; did you mean {show_path(folder.parent)}?" if (folder.parent / "config.json").is_file() else ""
        raise UserError(f"{show_path(folder)} is a file, wanted a model folder{hint}")
    if (folder / "adapter_config.json").is_file():
        base = adapter_base(folder)
        if not Path(base).is_dir():
            raise UserError(f"{show_path(folder)} is a LoRA adapter for {base}, which is not there; use its merged/ folder")
        check_model(base)
    elif not (folder / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        nested = [path for name in ("config.json", "adapter_config.json") for path in folder.glob(f"*/{name}")]
        newest = max(nested, key=lambda path: path.stat().st_mtime, default=None)
        hint = f"did you mean {show_path(newest.parent)}?" if nested else "a model has config.json and *.safetensors"
        raise UserError(f"{show_path(folder)} is not a model folder (it holds {found}); {hint}")
    weights = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "*.safetensors"
    if not list(folder.glob(weights)):      # peft would go on with a pickled adapter_model.bin
        raise UserError(f"{show_path(folder)} holds no *.safetensors weights; other formats are not loaded")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{show_path(folder)} has no tokenizer; copy tokenizer*.json and chat_template.jinja from its base")
    return model


def find_models():
    """Folders (Path) that load: finished runs, the newest first, then downloaded models, Qwen3-0.6B before the tiny one."""
    runs = [folder for folder in (ROOT / "trainer_output").glob("*/") if _is_model(folder)]
    bases = [folder for folder in (ROOT / "model_download").glob("*/") if _is_model(folder)]
    return sorted(runs, key=written_at, reverse=True) + sorted(bases)


def written_at(folder):
    """When the weights in a model folder were written (seconds since 1970): for a run, when it ended."""
    return max(path.stat().st_mtime for path in folder.glob("*.safetensors"))


def _is_model(folder):
    try:
        return bool(check_model(str(folder)))
    except UserError:
        return False


def adapter_base(folder):
    """The base model that a LoRA adapter folder names: a path (relative ones are to the repository) or a Hub id."""
    base = read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{show_path(Path(folder) / 'adapter_config.json')} names no base model (base_model_name_or_path)")
    inside = ROOT / base
    return str(inside) if inside.is_dir() else base


def quiet_offline(*models):
    """Before transformers is imported: no usage pings, and no Hub at all where the models are folders on disk.

    UserError or RunError, in one line, where a Hub id among them cannot be had: the libraries would say so many times over.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # threads and forks do not mix, and we batch anyway
    if all(Path(model).is_dir() for model in models):
        os.environ["HF_HUB_OFFLINE"] = "1"
    for model in models:
        if not Path(model).is_dir():
            _ask_hub(model)
    # peft asks transformers for this under its old name; nothing that a user could change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()              # "Loading weights" bars of a fraction of a second


def _ask_hub(model):
    """UserError or RunError where the Hub does not have `model` or cannot be reached; what is in its cache needs no asking."""
    from huggingface_hub import try_to_load_from_cache

    from utils.hub import Hub

    if not isinstance(try_to_load_from_cache(model, "config.json"), str):
        with contextlib.redirect_stdout(sys.stderr):        # chat's stdout holds answers and nothing else
            Hub(timeout=30, retries=1).look_up("model", model, "main")


def load_tokenizer(model):
    """The tokenizer of a model folder, adapter folder or Hub id."""
    from transformers import AutoTokenizer

    with _told_in_one_line(model):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.chat_template is None or "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError(f"{model} is not a Qwen chat model: its tokenizer has no chat template with <|im_end|>")
    return tokenizer


def load_model(model, dtype):
    """The causal language model of a folder or Hub id in `dtype`; a LoRA adapter comes merged into its base.

    The merge is done in float32 and rounded once, as for a merged/ folder, so that both give the same answers.
    """
    import torch
    from transformers import GenerationConfig

    if not (Path(model) / "adapter_config.json").is_file():
        return _load_whole(model, dtype)
    from peft import PeftModel

    _check_base(Path(model), adapter_base(model))
    base = _load_whole(adapter_base(model), torch.float32)
    with _told_in_one_line(model):
        merged = PeftModel.from_pretrained(base, model).merge_and_unload()
    for weight in merged.parameters():          # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    if (Path(model) / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(model)
    return merged


def load_for_answers(model, device):
    """load_model's result on `device` (utils.device.Device), in its number format for answers."""
    loaded = load_model(model, device.dtype).to(device.name).eval()
    if device.half_weights:
        from utils.half_weights import halve

        halve(loaded)
    return loaded


def _load_whole(model, dtype):
    from transformers import AutoModelForCausalLM

    with _told_in_one_line(model):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    if loaded.config.model_type != "qwen3" or set(loaded.config.layer_types) != {"full_attention"}:
        raise UserError(f"{model} is a {loaded.config.model_type} model; wanted Qwen3, without sliding windows")
    if report["missing_keys"]:      # transformers would go on with random numbers in their place
        raise UserError(f"{model} is not whole: its weights lack {', '.join(sorted(report['missing_keys'])[:3])} ...")
    return loaded


def _check_base(adapter, base):
    """UserError where `base` is not what the adapter was trained on, as its run.json tells: the answers would be noise."""
    for folder in (adapter, adapter.parent):        # a checkpoint belongs to the run in the folder above it
        if (folder / "run.json").is_file():
            trained_on = read_json(folder / "run.json").get("identity", {}).get("MODEL")
            if trained_on and trained_on != f"sha256 {fingerprint(base)}":
                raise UserError(f"{show_path(adapter)} was trained on other weights than {show_path(base)} holds now; "
                                "use its merged/ folder, or bring that base model back")
            return


@contextlib.contextmanager
def _told_in_one_line(model):
    """What the libraries raise for damaged, foreign or unreachable files, as a UserError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if any(sign in str(error) for sign in NO_MEMORY):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{model} needs Python code of its own to load, and code from a model is not run here") from None
        raise UserError(f"{model} cannot be loaded: {textwrap.shorten(str(error), 300)}") from None


def fingerprint(model):
    """One sha256 over the weights, config and tokenizer of a model folder; of a Hub id, over its name."""
    folder = Path(model)
    names = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".jinja") or path.name in
             ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")]
    digests = {path.name: sha256_of(path) for path in names} or {"hub": model}
    return _sha256_text(json.dumps(digests, sort_keys=True))


def _sha256_text(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
