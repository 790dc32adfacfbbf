"""Scores of a model without generating: log-probabilities of answers, and of the next token.

`model` is always one that utils.model.qwen3_train.prepare_packed has prepared; it is moved to `device` (utils.device.Device).
`watch` wraps the sequence of packed rows, to show progress (utils.text.progress).
"""

from collections.abc import Callable

import torch

from utils.device import Device
from utils.model.lm_head import token_logps
from utils.model.packing import Item, PackedRows, collate, item_length
from utils.model.qwen3_train import forward

TOKENS_AT_ONCE = 1024  # packed tokens in one forward pass; more only costs memory, and on CPUs page faults


def answer_logps(
    model, items: list[Item] | PackedRows, device: Device, watch: Callable = iter
) -> list[list[float]]:
    """Log-probability of each document's answer, in nats: one list per item, in order."""
    rows, results = _packed(items), {}
    for row, hidden, batch in _hidden_states(model, rows, device, watch):
        logps = _token_logps(model, hidden, batch["targets"], device)
        counts = [len(rows.items[index]["documents"]) for index in row]
        answers = torch.zeros(sum(counts), dtype=logps.dtype)
        answers.index_add_(0, batch["label_documents"].cpu(), logps)
        results.update(zip(row, (part.tolist() for part in answers.split(counts))))
    return [results[index] for index in range(len(rows.items))]


def next_token_logps(
    model, prompts: list[list[int]], tokens: list[int], device: Device, watch: Callable = iter
) -> list[list[float]]:
    """Log-probability of each of `tokens` (ids) as the next one after each of `prompts` (lists of ids)."""
    # One label each: the position after the prompt.
    rows = _packed([{"documents": [(prompt, tokens[:1])]} for prompt in prompts])
    results, wanted = {}, torch.tensor(tokens)
    for row, hidden, batch in _hidden_states(model, rows, device, watch):
        hidden = hidden[: len(row)].repeat_interleave(len(tokens), 0)
        logps = _token_logps(model, hidden, wanted.repeat(len(row)), device)
        for document, values in zip(batch["label_documents"].tolist(), logps.view(-1, len(tokens)).tolist()):
            results[row[document]] = values
    return [results[index] for index in range(len(prompts))]


def _packed(items):
    if isinstance(items, PackedRows):
        return items
    return PackedRows(items, max([TOKENS_AT_ONCE, *map(item_length, items)]))


@torch.no_grad()
def _hidden_states(model, rows, device, watch):
    """Yield (item numbers of a packed row, hidden states (N, H), the row's batch on the device)."""
    model.eval().to(device.name)
    for row in watch(rows.rows):
        batch = collate([[rows.items[index] for index in row]], device, rows.max_length)
        yield row, *forward(model, batch, device)


@torch.no_grad()
def _token_logps(model, hidden, targets, device):
    with device.autocast():
        return token_logps(hidden, model.get_output_embeddings().weight, targets.to(device.name)).cpu()
