"""Scores of a model without generating: log-probabilities of answers, and of the options of an exam question.

`model` is always one that utils.packed_model.prepare_packed prepared; it is moved to `device` (utils.device.Device).
`watch` wraps what is gone through step by step, to show progress (utils.meter.progress).
"""

import torch

from utils.chat_format import encode_prompt
from utils.exams import letter_questions
from utils.packed_model import token_logps
from utils.packing import PackedRows, collate, item_length, split_batch
from utils.schemas import LETTERS

TOKENS_AT_ONCE = 1024       # packed tokens in one forward pass; more only costs memory, and on CPUs page faults


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
    rows = pack_for_scoring([{"documents": [(prompt, tokens[:1])]} for prompt in prompts])      # one label: after the prompt
    results, wanted = {}, torch.tensor(tokens)
    for row, hidden, _, documents in _hidden_states(model, rows, device, watch):
        logps = _token_logps(model, hidden.repeat_interleave(len(tokens), 0), wanted.repeat(len(hidden)), device)
        for document, values in zip(documents.tolist(), logps.view(-1, len(tokens)).tolist()):
            results[row[document]] = values
    return [results[index] for index in range(len(prompts))]


@torch.no_grad()
def _hidden_states(model, rows, device, watch):
    """Yield (item numbers of a packed row, hidden states (N, H), targets (N,), document of each in the row (N,))."""
    model.eval().to(device.name)
    for row in watch(rows.rows):
        inputs, targets, rest = split_batch(collate([[rows.items[index] for index in row]]))
        inputs = {name: value.to(device.name) if torch.is_tensor(value) else value for name, value in inputs.items()}
        with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
            hidden = model(**inputs)
        yield row, hidden, targets, rest["label_documents"]


@torch.no_grad()
def _token_logps(model, hidden, targets, device):
    with torch.autocast(device.name, torch.bfloat16, enabled=device.bf16):
        return token_logps(hidden, model.get_output_embeddings().weight, targets.to(device.name)).cpu()


def exam_choices(model, tokenizer, exam, instruction, device, watch=iter):
    """By option text: for each exam item (letter of the best option, {letter: score}).

    The options are not listed; the score is the log-probability of an option's text as the answer to the question and
    `instruction`, divided by its length in characters, as lm-evaluation-harness's acc_norm does.
    """
    items = []
    for item in exam:
        prompt = _prompt(tokenizer, f"{item['question']}\n{instruction}")
        options = tokenizer(list(item["options"].values()), add_special_tokens=False)["input_ids"]
        items.append({"documents": [(prompt, option) for option in options]})
    choices = []
    for item, logps in zip(exam, answer_logps(model, pack_for_scoring(items), device, watch)):
        scores = {letter: logp / len(text) for (letter, text), logp in zip(item["options"].items(), logps)}
        choices.append((max(scores, key=scores.get), scores))
    return choices


def exam_letter_choices(model, tokenizer, exam, device, watch=iter):
    """By option letter, as CMMLU does: for each exam item (letter of the best option, {letter: score}, rotations).

    The options are listed in the question, and the model's answer is the letter that it finds likeliest. This is asked for
    every rotation of the options; `rotations` holds for each the log-probability of the letter under which an option
    stood, by the option's own letter. The score is the mean over the rotations, so that what a model gives to a letter,
    whatever stands under it, adds the same to every option.
    """
    questions = [letter_questions(item) for item in exam]
    prompts = [_prompt(tokenizer, question) for rotations in questions for question, _ in rotations]
    letters = LETTERS[:max(len(item["options"]) for item in exam)]
    tokens = [token for letter in letters for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert len(tokens) == len(letters), "every tokenizer of bytes has the Latin letters"
    logps, choices = iter(next_token_logps(model, prompts, tokens, device, watch)), []
    for item, rotations in zip(exam, questions):
        rotations = [dict(zip(order, next(logps))) for _, order in rotations]
        scores = {letter: sum(rotation[letter] for rotation in rotations) / len(rotations) for letter in item["options"]}
        choices.append((max(scores, key=scores.get), scores, rotations))
    return choices


def _prompt(tokenizer, question):
    """Thinking off, whatever the folder's own mode: an exam scores what the model says at once."""
    return encode_prompt(tokenizer, [{"role": "user", "content": question}], thinking=False)
