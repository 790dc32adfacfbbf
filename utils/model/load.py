"""Model folders: find, check, load. Safetensors only, no remote code, and no network once the models are on disk."""

import contextlib
import os
import textwrap
import warnings
from pathlib import Path

from utils.errors import NO_MEMORY, UserError
from utils.files import read_json, show_path
from utils.model.chat_format import without_modes
from utils.model.folder_checks import check_files
from utils.model.folders import adapter_base, check_model, model_sha256
from utils.model.hub_models import fetch, local_folder
from utils.model.run_record import read_record
from utils.model.template_check import problem_of


def quiet_offline(*models):
    """Before transformers is imported: no usage pings, and models named by a Hub id are brought to this machine and checked.

    After that nothing asks the Hub. UserError or RunError, in one line, where such a model cannot be had.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads and forks do not mix, and we batch anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for model in models:
        if not Path(model).is_dir():
            fetch(model)
            check_model(local_folder(model))
    os.environ["HF_HUB_OFFLINE"] = "1"
    # peft asks transformers for this under its old name; nothing that a user could change
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" bars of a fraction of a second


def load_tokenizer(model):
    """The tokenizer of a model folder, adapter folder or Hub id."""
    from transformers import AutoTokenizer

    folder = local_folder(model)
    check_files(Path(folder))
    with _told_in_one_line(model, "tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(tokenizer.chat_template, str) or "<|im_end|>" not in tokenizer.get_vocab():
        raise UserError(
            f"{model} is not a Qwen chat model: its tokenizer has no chat template with <|im_end|>"
        )
    _check_size(tokenizer, folder)
    if problem := problem_of(without_modes(tokenizer.chat_template)):
        raise UserError(f"{model} cannot be loaded: its chat template (chat_template.jinja) {problem}")
    return tokenizer


def _check_size(tokenizer, folder):
    """UserError where the tokenizer has tokens that the model knows no embedding for: that of another model was copied here."""
    while (Path(folder) / "adapter_config.json").is_file():
        base = adapter_base(folder)
        # An exported adapter may name a base that is not here; whoever loads the weights is told.
        try:
            folder = local_folder(base)
        except UserError:
            return
    size, last = read_json(Path(folder) / "config.json")["vocab_size"], max(tokenizer.get_vocab().values())
    if last >= size:
        raise UserError(
            f"{tokenizer.name_or_path} cannot be loaded: tokenizer.json is of another model: it has token {last:,}, "
            f"and the model knows {size:,}"
        )


def load_model(model, dtype):
    """The causal language model of a folder or Hub id in `dtype`; a LoRA adapter comes merged into its base.

    The merge is done in float32 and rounded once, as for a merged/ folder, so that both give the same answers.
    """
    import torch
    from transformers import GenerationConfig

    if not (Path(model) / "adapter_config.json").is_file():
        return _load_whole(model, dtype)
    from peft import PeftModel

    check_model(model)  # no adapter is its own base
    check_files(Path(model))
    _check_base(Path(model), adapter_base(model))
    base = load_model(adapter_base(model), torch.float32)
    with _told_in_one_line(model, "adapter_config.json or adapter_model.safetensors"):
        merged = PeftModel.from_pretrained(base, model).merge_and_unload()
    for weight in merged.parameters():  # not .to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    if (Path(model) / "generation_config.json").is_file():
        with _told_in_one_line(model, "generation_config.json"):
            merged.generation_config = GenerationConfig.from_pretrained(model)
    return merged


def load_for_lora(model, dtype):
    """The model of a folder or Hub id with frozen weights, for adapters.

    Linear layers and embeddings are held in `dtype`, in which their products are computed anyway: with bfloat16 half the memory,
    and no copy of them in every step. The norms stay float32.
    """
    import torch
    from torch import nn

    adapter = (Path(model) / "adapter_config.json").is_file()
    loaded = load_model(model, torch.float32 if adapter else "auto")
    for module in loaded.modules():
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(
                dtype if isinstance(module, nn.Linear | nn.Embedding) else torch.float32
            )
    return loaded.requires_grad_(False)


def load_for_answers(model, device):
    """The model of a folder or Hub id on `device` (utils.device.Device), its weights in the device's form for answers."""
    from utils.model.answer_weights import hold_weights

    adapter = (Path(model) / "adapter_config.json").is_file()
    # Weights that are packed anyway are not widened to float32 before.
    dtype = device.dtype if device.weights == "plain" or adapter else "auto"
    loaded = load_model(model, dtype).to(device.name).eval()
    hold_weights(loaded, device.weights)
    return loaded


def _load_whole(model, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = local_folder(model)
    check_files(Path(folder))
    if (Path(folder) / "generation_config.json").is_file():
        with _told_in_one_line(model, "generation_config.json"):
            GenerationConfig.from_pretrained(folder)
    with _told_in_one_line(model, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._attn_implementation = "sdpa"  # a name in config.json would be fetched as a kernel
    with _told_in_one_line(model, "config.json or *.safetensors"):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            config=config,
        )
    if loaded.config.model_type != "qwen3" or set(loaded.config.layer_types) != {"full_attention"}:
        raise UserError(
            f"{model} is a {loaded.config.model_type} model; wanted Qwen3, without sliding windows"
        )
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        raise UserError(
            f"{model} is not whole: its weights lack {', '.join(sorted(report['missing_keys'])[:3])} ..."
        )
    return loaded


def _check_base(adapter, base):
    """UserError where `base` is not what the adapter was trained on, as its run.json tells: the answers would be noise."""
    for folder in (adapter, adapter.parent):  # a checkpoint belongs to the run in the folder above it
        if record := read_record(folder, {"identity": dict}):
            trained_on = record["identity"].get("MODEL")
            if trained_on and trained_on != f"sha256 {model_sha256(base)}":
                raise UserError(
                    f"{show_path(adapter)} was trained on other weights than {show_path(base)} holds now; "
                    "use its merged/ folder, or bring that base model back"
                )
            return


@contextlib.contextmanager
def _told_in_one_line(model, name):
    """What the libraries raise for damaged, foreign or unreachable files, as a UserError of one line that names the file.

    For such files they raise whatever the values run into, TypeError as well as Exception itself.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{model} needs Python code of its own to load, and code from a model is not run here"
            ) from None
        why = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise UserError(f"{model} cannot be loaded: {name} is damaged or foreign ({why})") from None
