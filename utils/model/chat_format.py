"""The one path from a conversation to token ids, used by training, scoring and chat alike.

Because all of them build the prompt here, the ids that a row is trained on up to its answer are the ids that chat feeds
for the same conversation. Qwen3's template has two modes: thinking on (the prompt ends after `<|im_start|>assistant\n`)
and thinking off (an empty think block ends the prompt). A row with reasoning is trained with thinking on, any other with
thinking off; earlier assistant turns carry no think block, as in Qwen3's own rendering of the history.
"""

END_OF_TURN = "<|im_end|>"


# Qwen's decoding advice for Qwen3, by thinking mode (model card of Qwen/Qwen3-0.6B).
DECODING = {
    True: {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    False: {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
}


# Put in front of a chat template: the mode that holds where nobody asks for another. llama.cpp's server and mlx-lm ask every
# template that names enable_thinking for True, so that a model trained with thinking off has to take that for no wish at all;
# who means it sets force_thinking as well, as encode_prompt does.
_DEFAULT_MODE = {
    True: "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}",
    False: "{%- set enable_thinking = force_thinking is defined and force_thinking %}",
}
_ANY_DEFAULT_MODE = [
    *_DEFAULT_MODE.values(),
    _DEFAULT_MODE[True].replace("true", "false"),
]  # the last: earlier folders'


def encode_prompt(tokenizer, messages, thinking=None):
    """Token ids (list of int) that the model is fed to answer `messages`, the generation prompt included.

    `thinking`: True, False, or None for the default of the tokenizer's own template.
    """
    mode = {} if thinking is None else {"enable_thinking": thinking, "force_thinking": thinking}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **mode)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_answer(tokenizer, message):
    """Token ids (list of int) of one assistant message as the model has to produce it, `<|im_end|>` included.

    Encoded apart from the prompt, as generation does: no merge can cross the border between the two.
    """
    text = message["content"].lstrip("\n")
    if message.get("reasoning_content"):
        reasoning = message["reasoning_content"].strip("\n")
        text = f"<think>\n{reasoning}\n</think>\n\n{text}"
    return tokenizer(text + END_OF_TURN, add_special_tokens=False)["input_ids"]


def encode_turns(tokenizer, messages):
    """[(prompt_ids, answer_ids), ...]: one pair for each assistant turn, in the context that chat would give it.

    Qwen3 renders an answer differently once it has become history (its think block is dropped), so the turns of one
    conversation cannot share a sequence; every turn becomes its own example and is trained on once.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            thinking = bool(message.get("reasoning_content"))
            turns.append(
                (encode_prompt(tokenizer, messages[:index], thinking), encode_answer(tokenizer, message))
            )
    return turns


def with_default_mode(template, thinking):
    """The chat template with its default thinking mode set, so that any tool that loads it needs no flag."""
    for mode in _ANY_DEFAULT_MODE:
        template = template.replace(mode, "")
    return _DEFAULT_MODE[thinking] + template


def generation_settings(tokenizer, thinking):
    """Fields for generation_config.json: both end tokens, padding, and Qwen's decoding advice for the mode."""
    end, stop = tokenizer.convert_tokens_to_ids([END_OF_TURN, "<|endoftext|>"])
    return {"eos_token_id": [end, stop], "pad_token_id": stop, "bos_token_id": stop, **DECODING[thinking]}
