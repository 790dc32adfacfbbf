"""Model folders: find, check, load. Safetensors only, no remote code, and no network for a folder on disk."""

import json
import os
from pathlib import Path

from utils.errors import UserError
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
        if model.count("/") == 1 and not model.startswith((".", "/")) and not (ROOT / model).parent.is_dir():
            return model                        # a Hub id such as Qwen/Qwen3-0.6B
        raise UserError(f"the model folder {model} does not exist; download one with: python model_download/download_model.py")
    if not folder.is_dir():
        raise UserError(f"{show_path(folder)} is a file, wanted a model folder")
    if (folder / "adapter_config.json").is_file():
        base = adapter_base(folder)
        if not Path(base).is_dir():
            raise UserError(f"{show_path(folder)} is a LoRA adapter for {base}, which is not there; use its merged/ folder")
        return model
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        nested = [show_path(path.parent) for path in sorted(folder.glob("*/config.json"))]
        hint = f"; did you mean {nested[-1]}?" if nested else "; a model folder holds config.json and *.safetensors"
        raise UserError(f"{show_path(folder)} is not a model folder (it holds {found}){hint}")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{show_path(folder)} holds no *.safetensors weights; other formats are not loaded")
    return model


def adapter_base(folder):
    """The base model that a LoRA adapter folder names: a path (relative ones are to the repository) or a Hub id."""
    base = read_json(Path(folder) / "adapter_config.json")["base_model_name_or_path"]
    inside = ROOT / base
    return str(inside) if inside.is_dir() else base


def quiet_offline(model):
    """Before transformers is imported: no usage pings, and no Hub at all where `model` is a folder on disk."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # threads and forks do not mix, and we batch anyway
    if Path(model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()              # "Loading weights" bars of a fraction of a second


def load_tokenizer(model):
    """The tokenizer of a model folder, adapter folder or Hub id."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.chat_template is None or "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError(f"{model} is not a Qwen chat model: its tokenizer has no chat template with <|im_end|>")
    return tokenizer


def load_model(model, dtype):
    """The causal language model of a folder or Hub id in `dtype`; a LoRA adapter comes merged into its base."""
    from transformers import AutoModelForCausalLM

    loading = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if not (Path(model) / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(model, **loading)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(adapter_base(model), **loading)
    return PeftModel.from_pretrained(base, model).merge_and_unload()


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
