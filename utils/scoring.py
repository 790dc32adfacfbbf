"""Scores of a model without generating: log-probabilities of answers, and what follows from them."""

import math

import torch

from utils.chat_format import encode_prompt
from utils.packed_model import token_logps
from utils.packing import PackedRows, collate, item_length, split_batch

TOKENS_AT_ONCE = 2048       # packed tokens in one forward pass


@torch.no_grad()
def answer_logps(model, rows, device):
    """Log-probability of each document's answer: [[float, ...], ...], one list an item of `rows` (PackedRows), in order.

    `model` is as utils.packed_model.prepare_packed left it; it is moved to `device` (utils.device.Device).
    """
    model.eval().to(device.name)
    head = model.get_output_embeddings().weight
    results = {}
    for row in rows.rows:
        inputs, targets, rest = split_batch(collate([[rows.items[index] for index in row]]))
        inputs = {name: value.to(device.name) if torch.is_tensor(value) else value for name, value in inputs.items()}
        with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
            logps = token_logps(model(**inputs), head, targets.to(device.name)).cpu()
        counts = [len(rows.items[index]["documents"]) for index in row]
        sums = torch.zeros(sum(counts), dtype=logps.dtype).index_add_(0, rest["label_documents"], logps)
        results.update(zip(row, (part.tolist() for part in sums.split(counts))))
    return [results[index] for index in range(len(rows.items))]


def pack_for_scoring(items):
    """PackedRows over `items` (dicts with "documents"), as wide as the longest item needs."""
    return PackedRows(items, max(TOKENS_AT_ONCE, max(map(item_length, items))))


def mean_loss(model, items, device):
    """Mean cross-entropy over all answer tokens of `items`, in nats: each token counts once, whatever its row."""
    rows = pack_for_scoring(items)
    return -sum(map(sum, answer_logps(model, rows, device))) / rows.trained_tokens


def preference_choices(model, items, device):
    """For each pair of `items` (documents [chosen, rejected]) whether the model finds the chosen answer more likely."""
    return [chosen > rejected for chosen, rejected in answer_logps(model, pack_for_scoring(items), device)]


def exam_choices(model, tokenizer, exam, instruction, device):
    """For each exam item (option letter chosen, {letter: score}). The score is the option's log-probability as an answer
    to the question, divided by its length in characters, as lm-evaluation-harness's acc_norm does."""
    items = []
    for item in exam:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": f"{item['question']}\n{instruction}"}])
        options = tokenizer(list(item["options"].values()), add_special_tokens=False)["input_ids"]
        items.append({"documents": [(prompt, option) for option in options]})
    choices = []
    for item, logps in zip(exam, answer_logps(model, pack_for_scoring(items), device)):
        scores = {letter: logp / len(text) for (letter, text), logp in zip(item["options"].items(), logps)}
        choices.append((max(scores, key=scores.get), scores))
    return choices


def wilson(right, total, z=1.96):
    """[low, high]: the 95 % interval of a share `right` / `total` (Wilson 1927)."""
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return [centre - half, centre + half]
