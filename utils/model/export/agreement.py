"""What an export costs: the folder against the export as another tool reads it, both computed in float32."""

import math
from typing import Any

import torch

from utils.errors import RunError
from utils.model.chat_format import encode_prompt
from utils.model.export.folders import Source
from utils.model.generate import generate_tokens, stop_tokens
from utils.text import progress

# Fields of a Qwen3Config that decide what the model computes. Short answers of a small model hardly tell a RoPE base of 10,000 from
# one of a million; a long conversation does.
DECIDE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias"),
    *("max_position_embeddings", "tie_word_embeddings"),
)
LARGEST_KL = 0.1  # nats a token; q8_0 costs about 0.001, an LM head that is lost more than 0.5
WRONG = "the export is not what the folder is"


def compare_with_export(
    source: Source, tokenizer: Any, exported: Any, questions: list[list[dict]], max_new_tokens: int
) -> str:
    """How many greedy answers to `questions` (conversations up to the user's last turn) are equal, and the mean Kullback-Leibler
    divergence of the export's next-token probabilities. RunError if it would be asked with other prompts, or is another model."""
    for name in DECIDE:
        one, other = getattr(source.model.config, name), getattr(exported.config, name)
        if isinstance(one, dict):
            one, other = ({key: value for key, value in each.items() if value} for each in (one, other))
        if one != other and not (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-6)):
            raise RunError(f"{WRONG}: {name} is read as {other}, wanted {one}")
    prompts = [encode_prompt(source.tokenizer, messages) for messages in questions]
    asked = {"tokenize": False, "add_generation_prompt": True}
    for mode in ({}, {"enable_thinking": True}):  # llama.cpp and mlx-lm always ask for thinking
        for messages, prompt in zip(questions, prompts):
            text = tokenizer.apply_chat_template(messages, **asked, **mode)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != prompt:
                other = "makes another prompt than the folder's"
                raise RunError(f"the export's chat template or tokenizer {other}")
    stop, models = stop_tokens(source.model, source.tokenizer), {"folder": source.model, "export": exported}
    found = {}
    for name, model in models.items():
        watch = progress(f"{len(prompts)} answers: {name}")
        found[name] = generate_tokens(model, prompts, stop, max_new_tokens, watch=watch)
    answers, total = found["folder"], 0.0
    for prompt, answer in progress("probabilities", "answers")(list(zip(prompts, answers))):
        ids, count = torch.tensor([prompt + answer[:-1]]), len(answer)
        with torch.inference_mode():
            logits = [model(input_ids=ids, logits_to_keep=count).logits[0] for model in models.values()]
        ours, theirs = (
            each.double().log_softmax(-1) for each in logits
        )  # (tokens of the answer, vocabulary)
        total += (ours.exp() * (ours - theirs)).sum().item()
    same = sum(one == other for one, other in zip(answers, found["export"]))
    kl = total / sum(map(len, answers))
    counts = f"{same} of {len(answers)} greedy answers the same as the folder's, KL {kl:.1e} nats a token"
    if kl > LARGEST_KL:
        raise RunError(f"{WRONG}: {counts}; do not use it")
    return f"read as other tools do, computed in float32: {counts}"
