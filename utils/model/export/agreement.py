"""What an export costs: greedy answers and next-token probabilities of the folder and of the export, read back from disk."""

import math
from typing import Any, NamedTuple

import torch

from utils.errors import RunError
from utils.model.chat_format import encode_prompt
from utils.model.export.source import Source
from utils.model.generate import generate_tokens, stop_tokens
from utils.text import progress

# Fields of a Qwen3Config that decide what the model computes.
DECIDE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias"),
    *("max_position_embeddings", "tie_word_embeddings"),
)
LARGEST_KL = 0.1  # nats a token; q8_0 costs about 0.001, a RoPE base or LM head that is lost more than 0.5


class Agreement(NamedTuple):
    """`same` of `answers` greedy answers are equal, token for token. `kl`: mean over the tokens of the folder's answers of the
    Kullback-Leibler divergence, in nats, of the export's next-token probabilities from the folder's."""

    answers: int
    same: int
    kl: float

    def __str__(self):
        return f"read as other tools do, computed in float32: {self.same} of {self.answers} greedy answers the same as the folder's, KL {self.kl:.1e} nats a token"


def check_config(ours: Any, theirs: Any) -> None:
    """RunError if another tool would compute with other sizes, another RoPE, or another head than the folder does.

    Short answers of a small model hardly tell a RoPE base of 10,000 from one of a million; a long conversation does.
    """
    for name in DECIDE:
        one, other = getattr(ours, name), getattr(theirs, name)
        if isinstance(one, dict):
            one, other = ({key: value for key, value in each.items() if value} for each in (one, other))
        if one != other and not (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-6)):
            raise RunError(f"the export is not what the folder is: {name} is read as {other}, wanted {one}")


def compare_with_export(
    source: Source, tokenizer: Any, exported: Any, questions: list[list[dict]], max_new_tokens: int
) -> Agreement:
    """`questions`: conversations that end with the user's turn. Both models compute in float32, so that what differs is what
    the exported weights and settings changed. RunError where the export would be asked with other prompts."""
    check_config(source.model.config, exported.config)
    prompts = [encode_prompt(source.tokenizer, messages) for messages in questions]
    for asked in ({}, {"enable_thinking": True}):  # llama.cpp and mlx-lm always ask for thinking
        for messages, prompt in zip(questions, prompts):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **asked
            )
            if tokenizer(text, add_special_tokens=False)["input_ids"] != prompt:
                raise RunError(
                    "the export's chat template or tokenizer makes another prompt than the folder's"
                )
    stop = stop_tokens(source.model, source.tokenizer)
    answers, others = (
        generate_tokens(
            model, prompts, stop, max_new_tokens, watch=progress(f"{len(prompts)} answers of the {name}")
        )
        for name, model in (("folder", source.model), ("export", exported))
    )
    total = 0.0
    for prompt, answer in progress("probabilities", "answers")(list(zip(prompts, answers))):
        ours, theirs = (_next_token_logps(model, prompt, answer) for model in (source.model, exported))
        total += (ours.exp() * (ours - theirs)).sum().item()
    same = sum(one == other for one, other in zip(answers, others))
    found = Agreement(len(answers), same, total / sum(map(len, answers)))
    if found.kl > LARGEST_KL:
        raise RunError(f"the export is not what the folder is ({found}); do not use it")
    return found


@torch.inference_mode()
def _next_token_logps(model, prompt, answer):
    """Log-probabilities (tokens of the answer, vocabulary) of every next token where an answer's tokens are chosen."""
    ids = torch.tensor([prompt + answer[:-1]])
    return model(input_ids=ids, logits_to_keep=len(answer)).logits[0].double().log_softmax(-1)
