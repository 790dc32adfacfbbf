"""The one path from a conversation to token ids, used by training, scoring and chat alike.

Qwen3's template has two modes: thinking on (the prompt ends after `<|im_start|>assistant\n`) and thinking off (an empty think block
ends it). A row with reasoning is trained with thinking on, any other with thinking off; earlier assistant turns carry no think
block. A control token that somebody types, `<|im_end|>` or `</think>`, is encoded as the characters it has and ends no turn.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from utils.errors import told_in_one_line

if TYPE_CHECKING:  # --help of the scripts is not to wait for it
    from transformers import PreTrainedTokenizerBase as Tokenizer

END_OF_TURN = "<|im_end|>"
TEXTS = ("content", "reasoning_content")  # of a message
MARK = "\ufdd0"  # no character: Unicode keeps it for use inside a program

# {value of the setting: encode_prompt's `thinking`}
THINKING_MODES = {"auto": None, "on": True, "off": False}

# Qwen's decoding advice for Qwen3, by thinking mode (model card of Qwen/Qwen3-0.6B).
DECODING = {
    True: {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    False: {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
}

# Put in front of a chat template: the mode that holds unless another is asked for. llama.cpp's server and mlx-lm ask every
# template for enable_thinking, so a model trained with thinking off takes that for no wish; encode_prompt sets force_thinking too.
_DEFAULT_MODE = {
    True: "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}",
    False: "{%- set enable_thinking = force_thinking is defined and force_thinking %}",
}


def encode_prompt(tokenizer: Tokenizer, messages: list[dict], thinking: bool | None = None) -> list[int]:
    """Token ids that the model is fed to answer `messages`, the generation prompt included.

    `thinking`: True, False, or None for the default of the tokenizer's own template.
    """
    return encode_pieces(tokenizer, [prompt_pieces(tokenizer, messages, thinking)])[0]


def prompt_pieces(tokenizer: Tokenizer, messages: list[dict], thinking: bool | None = None) -> list[str]:
    """The text of a prompt, cut where control tokens were typed: what encode_pieces takes.

    UserError if the template, which came with the model, refuses the conversation or runs into any error.
    """
    mode = {} if thinking is None else {"enable_thinking": thinking, "force_thinking": thinking}
    messages, mark = _mark_controls(tokenizer, messages)
    with told_in_one_line(f"the chat template of {tokenizer.name_or_path} does not render this conversation"):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **mode)
    return text.split(mark)


def encode_answer(tokenizer: Tokenizer, message: dict) -> list[int]:
    """Token ids of one assistant message as the model has to produce it, `<|im_end|>` included; no merge crosses its border."""
    return encode_pieces(tokenizer, [answer_pieces(tokenizer, message)])[0]


def answer_pieces(tokenizer: Tokenizer, message: dict) -> list[str]:
    """The text of an assistant message, cut where control tokens were typed: what encode_pieces takes."""
    [message], mark = _mark_controls(tokenizer, [message])
    text = message["content"].lstrip("\n")
    if message.get("reasoning_content"):
        reasoning = message["reasoning_content"].strip("\n")
        text = f"<think>\n{reasoning}\n</think>\n\n{text}"
    return (text + END_OF_TURN).split(mark)


def encode_pieces(tokenizer: Tokenizer, texts: list[list[str]]) -> list[list[int]]:
    """Token ids of texts that are given in pieces. Many at a time cost less each, and share the cores."""
    flat = [piece for pieces in texts for piece in pieces]
    encoded = tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = iter(encoded["input_ids"])
    # One piece, as nearly always, is not copied.
    return [next(ids) if len(text) == 1 else [token for _ in text for token in next(ids)] for text in texts]


def _mark_controls(tokenizer, messages):
    """(messages, mark): `mark`, which no text holds, is put behind the first character of every control token in a text.

    A text that is cut there is encoded without that token. An answer's think and tool tags stay: models write them as tokens.
    """
    every, special = _control_patterns(tokenizer)
    texts = [message[name] for message in messages for name in TEXTS if message.get(name)]
    mark = MARK
    while any(mark in text for text in texts):
        mark += MARK
    if not any(map(every.search, texts)):
        return messages, mark
    marked = [dict(message) for message in messages]
    for message in marked:
        for name in TEXTS:
            if message.get(name):
                pattern = special if message["role"] == "assistant" and name == "content" else every
                message[name] = pattern.sub(lambda found: found[0][0] + mark + found[0][1:], message[name])
    return marked, mark


@functools.lru_cache(maxsize=8)
def _control_patterns(tokenizer):
    """Two patterns: the tokenizer's control tokens (special ones and tags), and the special ones alone."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    tags = [token.content for token in added if re.fullmatch("<.+>", token.content) and not token.special]
    patterns = []
    for texts in (special + tags, special):
        longest_first = map(re.escape, sorted(texts, key=len, reverse=True))
        patterns.append(re.compile("|".join(longest_first) or r"(?!)"))  # (?!) is found nowhere
    return patterns


def encode_turns(tokenizer: Tokenizer, messages: list[dict]) -> list[tuple[list[int], list[int]]]:
    """[(prompt_ids, answer_ids), ...]: one pair for each assistant turn, in the context that chat would give it: without the think
    blocks of earlier answers, so that turns cannot share a sequence."""
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(tokenizer, messages[:index], bool(message.get("reasoning_content")))
            turns.append((prompt, encode_answer(tokenizer, message)))
    return turns


def with_default_mode(template: str, thinking: bool) -> str:
    """The chat template with its default thinking mode set, so that any tool that loads it needs no flag."""
    return _DEFAULT_MODE[thinking] + without_modes(template)


def without_modes(template: str) -> str:
    """The chat template as published, without what with_default_mode put in front of it."""
    for mode in _DEFAULT_MODE.values():
        template = template.replace(mode, "")
    return template


def generation_settings(tokenizer: Tokenizer, thinking: bool) -> dict:
    """Fields for generation_config.json: both end tokens, padding, and Qwen's decoding advice for the mode."""
    end, stop = tokenizer.convert_tokens_to_ids([END_OF_TURN, "<|endoftext|>"])
    return {"eos_token_id": [end, stop], "pad_token_id": stop, "bos_token_id": stop, **DECODING[thinking]}
