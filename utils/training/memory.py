"""Before hours are spent: the memory and disk a run needs, against what is free. What cannot fit is refused."""

import shutil
from pathlib import Path

import psutil
import torch

from utils.errors import UserError
from utils.files import show_path
from utils.model.lm_head import CHUNK
from utils.model.packing import collate, model_inputs
from utils.text import format_bytes

PROBE_TOKENS = 64  # enough to count what a token costs, cheap enough to compute anywhere


FLOAT = 4  # bytes


CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes that a container may use (cgroup v2), or "max"


def forecast(model, train_rows, args, settings, folder):
    """Print the memory and disk that the run needs and that are free; UserError where it cannot fit.

    Call it before the trainer exists, on the model as it will be trained (adapters on).
    """
    tokens = train_rows.fullest(args.per_device_train_batch_size)
    parts = memory_parts(model, tokens, args)
    needed, free = sum(parts.values()), free_memory(args.device)
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    print(f"memory: {format_bytes(needed)} needed ({listed}), {format_bytes(free)} free")
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    stored = sum(weight.numel() for weight in model.parameters())
    disk = (
        3 * trainable * (settings.KEEP_CHECKPOINTS + 1) + stored
    ) * FLOAT  # weights and two moments a checkpoint
    disk_free = shutil.disk_usage(
        next(place for place in (folder.folder, *folder.folder.parents) if place.is_dir())
    ).free
    print(
        f"disk: {format_bytes(disk)} needed (at most {settings.KEEP_CHECKPOINTS + 1} checkpoints at a time, and the finished model), "
        f"{format_bytes(disk_free)} free"
    )
    if disk > disk_free:
        raise UserError(
            f"{show_path(folder.folder)} needs {format_bytes(disk)} of disk and {format_bytes(disk_free)} are free; free "
            "some, lower KEEP_CHECKPOINTS, or choose another --output-dir"
        )
    if needed > free:
        room = (free - needed + parts["activations"]) / parts["activations"] * tokens
        mend = (
            f"lower MAX_LENGTH x BATCH_SIZE from {tokens:,} to {int(room):,} tokens"
            if room >= 128
            else "train with LoRA, or a smaller model"
        )
        raise UserError(
            f"the run needs {format_bytes(needed)} of memory and {format_bytes(free)} are free; {mend}"
        )


def memory_parts(model, tokens, args):
    """{what: bytes} at the peak of a training step over `tokens` packed tokens."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    head = model.get_output_embeddings().weight
    scores = (
        2 * min(CHUNK, tokens) * head.shape[0] * FLOAT
    )  # logits, and a copy of them (bfloat16: two of half the size)
    if head.requires_grad:
        scores += head.numel() * FLOAT  # the head's gradient before it joins the others
    return {
        "weights": weights,
        "gradients": trainable * FLOAT,
        "optimizer": 2 * trainable * FLOAT,
        "activations": int(bytes_per_token(model, args) * tokens),
        "scores": scores,
        "program": _program(args),
    }


def bytes_per_token(model, args):
    """Bytes that one token leaves in memory between forward and backward pass, counted on a short forward pass.

    Every tensor that autograd saves is seen through saved_tensors_hooks; weights and views of the same storage count once.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor

    item = {"documents": [([0] * (PROBE_TOKENS - 1), [0])]}
    inputs = model_inputs(collate([[item]]))
    inputs = {
        name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()
    }
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            hidden = model.train()(**inputs)
    total = sum(
        storage.nbytes() for storage in seen.values()
    )  # `seen` keeps the storages alive: no address comes twice
    del hidden
    return total / PROBE_TOKENS


def free_memory(device):
    """Bytes that this process has or could still get, on the device that will compute."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    process = psutil.Process().memory_info().rss
    if device.type == "mps":
        return min(torch.mps.recommended_max_memory(), psutil.virtual_memory().available + process)
    free = psutil.virtual_memory().available + process
    try:
        return min(free, int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def _program(args):
    """Python and its libraries, which share the memory with the model unless that is on a GPU of its own."""
    return 0 if args.device.type == "cuda" else 600 * 2**20
