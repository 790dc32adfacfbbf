"""The decode loop against transformers' generate, one conversation and many; from tokens to text."""

import pytest
import torch
from chat_helpers import QUESTIONS, prompts_of, reference

from utils.chat.model import ChatModel
from utils.device import Device
from utils.errors import RunError
from utils.model.chat_format import DECODING, encode_prompt
from utils.model.generate import (
    AnswerReader,
    Decoding,
    TokenStream,
    candidates,
    choose,
    decoding_for,
    generate_answers,
    generate_tokens,
    read_answer,
    stop_tokens,
)
from utils.model.qwen3_answer import CachedModel


def answer(chat_model, prompt, length, decoding=None, stop=()):
    """The ids that a new TokenStream says to a prompt."""
    return list(TokenStream(chat_model.model, set(stop)).answer(prompt, decoding or Decoding(), length))


@pytest.mark.parametrize(
    "dtype, penalty", [(torch.float32, 1.0), (torch.float32, 1.3), (torch.bfloat16, 1.0)]
)
def test_greedy_equals_generate(tiny_folder, dtype, penalty):
    chat_model = ChatModel(str(tiny_folder), Device("cpu", dtype is torch.bfloat16, "test"))
    for prompt in prompts_of(chat_model):
        decoding = Decoding(repetition_penalty=penalty)
        ours = answer(chat_model, prompt, 40, decoding)
        assert generate_tokens(chat_model.model, [prompt], set(), 40, decoding) == [ours]
        assert ours == reference(chat_model, prompt, 40, repetition_penalty=penalty)
        assert len(set(ours)) > 3  # a model that says one token for ever would prove nothing


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.7, 20, 0.8), (1.7, 0, 0.5), (1.0, 10**6, 1.0), (0.01, 3, 0.01)]
)
def test_sampling_equals_the_warpers_of_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    decoding = Decoding(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 3 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    warped = TemperatureLogitsWarper(decoding.temperature)(None, logits)
    if decoding.top_k:
        warped = TopKLogitsWarper(decoding.top_k)(None, warped)
    if decoding.top_p < 1:
        warped = TopPLogitsWarper(decoding.top_p)(None, warped)
    ids, probabilities = candidates(logits, decoding)
    ours = torch.zeros_like(logits).scatter(1, ids, probabilities)
    torch.testing.assert_close(ours, warped.softmax(-1))


def test_sampling_follows_its_probabilities_and_its_seed():
    """Each row by its own."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    decoding = Decoding(do_sample=True, top_k=0)

    def draws(count):
        random = torch.Generator().manual_seed(3)
        return [choose(logits, decoding, random, []) for _ in range(count)]

    for found, expected in zip(zip(*draws(4000)), logits.exp().tolist()):
        shares = [found.count(token) / len(found) for token in range(3)]
        assert shares == pytest.approx(expected, abs=0.03)  # four standard deviations
    assert draws(100) == draws(4000)[:100]


def test_nan_in_one_row_is_a_run_error():
    logits = torch.tensor([[1.0, 2.0], [1.0, float("nan")]])
    for sampled in (False, True):
        assert choose(logits[:1], Decoding(do_sample=sampled, temperature=1e-9), None, [[]]) == [1]
        with pytest.raises(RunError, match="NaN"):
            choose(logits, Decoding(do_sample=sampled), None, [[]] * 2)


def test_batched_equals_one_by_one(chat_model):
    prompts = prompts_of(chat_model)
    stop = [reference(chat_model, prompts[1], 30)[10]]  # one answer ends early, the others go on
    alone = [answer(chat_model, prompt, 30, stop=stop) for prompt in prompts]
    assert alone == [reference(chat_model, prompt, 30, eos_token_id=stop) for prompt in prompts]
    assert len(alone[1]) < max(map(len, alone)) and alone[1][-1] in stop
    for size in (1, 3, 4):
        assert generate_tokens(chat_model.model, prompts, set(stop), 30, batch_size=size) == alone


def test_generate_answers(chat_model):
    conversations = [[{"role": "user", "content": text}] for text in QUESTIONS]
    model, tokenizer = chat_model.model, chat_model.tokenizer
    expected = [
        read_answer(tokenizer, prompt, reference(chat_model, prompt, 20)).content
        for prompt in prompts_of(chat_model)
    ]
    assert generate_answers(model, tokenizer, conversations, max_new_tokens=20) == expected
    how = {"max_new_tokens": 20, "decoding": Decoding(do_sample=True, temperature=2.0)}
    same = [conversations[0]] * 6  # several answers to one question
    sampled = [generate_answers(model, tokenizer, same, seed=seed, **how) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2] and len(set(sampled[0])) > 4


def test_cache_is_reused_and_changes_nothing(chat_model, monkeypatch):
    stream, fed, history = TokenStream(chat_model.model, set()), [], []
    feed = CachedModel.feed
    monkeypatch.setattr(CachedModel, "feed", lambda self, new: (fed.append(new.shape[1]), feed(self, new))[1])
    shared = 0
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        prompt = encode_prompt(chat_model.tokenizer, history, thinking=False)
        fed.clear()
        said = list(stream.answer(prompt, Decoding(), 25))
        assert fed[0] == len(prompt) - shared
        assert said == answer(chat_model, prompt, 25)
        # all but the last prompt's think block
        shared = len(encode_prompt(chat_model.tokenizer, history, thinking=True))
        text = read_answer(chat_model.tokenizer, prompt, said).content
        history.append({"role": "assistant", "content": text})
    fed.clear()
    assert list(stream.answer(prompt, Decoding(), 25)) == said and fed[0] == 1  # /retry


def test_ctrl_c_within_a_pass_leaves_a_usable_cache(chat_model):
    stream = TokenStream(chat_model.model, set())
    prompt = prompts_of(chat_model)[1]
    expected = answer(chat_model, prompt, 12)
    layers = stream.cached.layers
    second = layers[1]  # the first is in the cache already when it comes to this one

    def press(states):
        presses.append(1)
        if len(presses) == stop_at:
            raise KeyboardInterrupt
        return second.gate_up(states)

    for stop_at in (1, 5):  # noqa: B007 - read by press; in the first pass over the prompt, and in that of the fourth token
        presses = []
        layers[1] = second._replace(gate_up=press)
        with pytest.raises(KeyboardInterrupt):
            list(stream.answer(prompt, Decoding(), 12))
        layers[1] = second
        assert list(stream.answer(prompt, Decoding(), 12)) == expected


def test_decoding_comes_from_the_folder_or_from_qwen(chat_model):
    given = chat_model.model, chat_model.tokenizer
    for thinking, mode in ((None, True), (True, True), (False, False)):
        assert decoding_for(*given, thinking) == Decoding(**DECODING[mode])
    ends = given[1].convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_tokens(*given) == set(ends)


def test_text_comes_in_whole_characters(chat_model):
    text = "龘龖先煎 🌿麻黄汤，\n\t𠮷 é <tool_call> \u200d完"
    ids = chat_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = AnswerReader(chat_model.tokenizer, [])
    pieces = [reader.feed(token) for token in ids]
    assert "".join(pieces) == text == reader.content and "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_give_what_decode_gives(chat_model):
    generator = torch.Generator().manual_seed(0)
    tokens = chat_model.tokenizer.convert_ids_to_tokens(range(len(chat_model.tokenizer)))
    outside = [number for number, token in enumerate(tokens) if "think>" not in token]
    for _ in range(20):  # random bytes: most of them no valid text
        ids = [outside[index] for index in torch.randint(len(outside), (50,), generator=generator)]
        ids += chat_model.tokenizer("。")["input_ids"]  # after which no half character is held back
        expected = chat_model.tokenizer.decode(ids, skip_special_tokens=True).lstrip("\n")
        ids.append(10**6)  # an id above the vocabulary is no text
        assert read_answer(chat_model.tokenizer, [], ids).content == expected


@pytest.mark.parametrize(
    "prompt, answer, reasoning, content",
    [
        ("", "<think>\n先想一想。\n\n再想。\n</think>\n\n甘草。", "先想一想。\n\n再想。", "甘草。"),
        ("", "甘草。\n", "", "甘草。\n"),
        ("", "<think>\n\n</think>\n\n甘草。", "", "甘草。"),
        ("", "<think>\n没有想完", "没有想完", ""),
        ("<|im_start|>assistant\n<think>\n", "想。\n</think>\n\n甘草。", "想。", "甘草。"),
    ],
)
def test_thinking_is_told_apart(chat_model, prompt, answer, reasoning, content):
    ids = (chat_model.tokenizer(text)["input_ids"] for text in (prompt, answer))
    reader = read_answer(chat_model.tokenizer, *ids)
    assert (reader.reasoning, reader.content) == (reasoning, content)
