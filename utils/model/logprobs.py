"""Scores of a model without generating: log-probabilities of answers, and of the options of an exam question.

`model` is always one that utils.packed_model.prepare_packed prepared; it is moved to `device` (utils.device.Device).
`watch` wraps what is gone through step by step, to show progress (utils.meter.progress).
"""

import torch

from utils.model.lm_head import token_logps
from utils.model.packing import PackedRows, collate, item_length, split_batch

TOKENS_AT_ONCE = 1024  # packed tokens in one forward pass; more only costs memory, and on CPUs page faults


def pack_for_scoring(items):
    """PackedRows over `items` (dicts with "documents"), as wide as the longest item needs."""
    return PackedRows(items, max(TOKENS_AT_ONCE, max(map(item_length, items))))


def answer_logps(model, rows, device, watch=iter):
    """Log-probability of each document's answer: [[float, ...], ...], one list an item of `rows` (PackedRows), in order."""
    results = {}
    for row, hidden, targets, documents in _hidden_states(model, rows, device, watch):
        logps = _token_logps(model, hidden, targets, device)
        counts = [len(rows.items[index]["documents"]) for index in row]
        sums = torch.zeros(sum(counts), dtype=logps.dtype).index_add_(0, documents, logps)
        results.update(zip(row, (part.tolist() for part in sums.split(counts))))
    return [results[index] for index in range(len(rows.items))]


def next_token_logps(model, prompts, tokens, device, watch=iter):
    """Log-probability of each of `tokens` (ids) as the next one after each of `prompts` (lists of ids): [[float, ...], ...]."""
    rows = pack_for_scoring(
        [{"documents": [(prompt, tokens[:1])]} for prompt in prompts]
    )  # one label: after the prompt
    results, wanted = {}, torch.tensor(tokens)
    for row, hidden, _, documents in _hidden_states(model, rows, device, watch):
        logps = _token_logps(
            model, hidden.repeat_interleave(len(tokens), 0), wanted.repeat(len(hidden)), device
        )
        for document, values in zip(documents.tolist(), logps.view(-1, len(tokens)).tolist()):
            results[row[document]] = values
    return [results[index] for index in range(len(prompts))]


@torch.no_grad()
def _hidden_states(model, rows, device, watch):
    """Yield (item numbers of a packed row, hidden states (N, H), targets (N,), document of each in the row (N,))."""
    model.eval().to(device.name)
    for row in watch(rows.rows):
        inputs, targets, rest = split_batch(collate([[rows.items[index] for index in row]]))
        inputs = {
            name: value.to(device.name) if torch.is_tensor(value) else value for name, value in inputs.items()
        }
        with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
            hidden = model(**inputs)
        yield row, hidden, targets, rest["label_documents"]


@torch.no_grad()
def _token_logps(model, hidden, targets, device):
    with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
        return token_logps(hidden, model.get_output_embeddings().weight, targets.to(device.name)).cpu()
