"""Answers from a model, token by token: the one decode loop of chat and of everything else here that generates.

`TokenStream` answers one prompt after another and keeps the KV cache, so that a conversation is not computed again for
every turn. `generate_answers` answers many conversations in batches. Both choose tokens as transformers' `generate` does.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from tokenizers.decoders import DecodeStream
from torch import Generator, Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from utils.errors import RunError
from utils.model.chat_format import DECODING, END_OF_TURN, encode_prompt
from utils.model.qwen3_answer import CachedModel

Ids = list[int]  # of tokens
NOT_NUMBERS = "the model's scores are not numbers (NaN): its training diverged, or its weights are damaged"


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; names, defaults and order of application are those of transformers."""

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50  # 0: no limit
    top_p: float = 1.0


def decoding_for(model: PreTrainedModel, tokenizer: Tokenizer, thinking: bool | None = None) -> Decoding:
    """The Decoding of the folder's generation_config, or Qwen's advice where `thinking` is not the folder's own mode."""
    if thinking is not None and thinking != thinks_by_default(tokenizer):
        return Decoding(**DECODING[thinking])
    given = {field.name: getattr(model.generation_config, field.name, None) for field in fields(Decoding)}
    return Decoding(**{name: value for name, value in given.items() if value is not None})


def thinks_by_default(tokenizer: Tokenizer) -> bool:
    """True if the tokenizer's chat template leaves room for thinking when nobody says which mode to use."""
    question = [{"role": "user", "content": "?"}]
    return encode_prompt(tokenizer, question) != encode_prompt(tokenizer, question, thinking=False)


def stop_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> set[int]:
    """The ids (set of int) that end an answer: those of the folder's generation_config, and `<|im_end|>`."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {*listed, tokenizer.convert_tokens_to_ids(END_OF_TURN)} - {None}


def choose(logits: Tensor, decoding: Decoding, generator: Generator | None, seen: list[Ids]) -> Ids:
    """The next token of each row. `logits`: (rows, vocabulary) on any device, from which only the ids come back; `generator`: on the
    CPU; `seen`: each row's tokens so far. RunError if a diverged model's logits are not numbers."""
    finite, penalty = torch.isfinite(logits).all(), decoding.repetition_penalty
    if penalty != 1:  # Keskar et al. 2019, arXiv:1909.05858
        logits = logits.float().clone()
        for row, ids in zip(logits, seen, strict=True):
            ids = torch.tensor(ids, device=row.device).unique()
            row[ids] = torch.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    if decoding.do_sample:
        ids, probabilities = candidates(logits.float(), decoding)
        chance = torch.rand(len(ids), 1, generator=generator).to(ids.device)
        # The first candidate is drawn whose sum exceeds the chance, which is below 1.
        sums = probabilities.cumsum(-1)
        place = (sums <= chance * sums[:, -1:]).sum(-1, keepdim=True)
        tokens = ids.gather(1, place)[:, 0]
    else:
        tokens = logits.argmax(-1)
    chosen = torch.where(finite, tokens, -1).tolist()
    if -1 in chosen:
        raise RunError(NOT_NUMBERS)
    return chosen


def candidates(logits: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """(ids, probabilities), both (rows, candidates), of what a token is drawn from: after temperature, top_k (no more than these,
    where transformers keeps all that are as likely as the last) and top_p, in that order. `logits`: (rows, vocabulary)."""
    size = logits.shape[1]
    kept, ids = (logits / decoding.temperature).topk(min(decoding.top_k or size, size))
    if decoding.top_p < 1:
        probabilities = kept.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities  # 0 for the likeliest one, which stays in
        kept = kept.masked_fill(likelier >= decoding.top_p, -torch.inf)
    return ids, kept.softmax(-1)


class TokenStream:
    """One model answering prompts in turn. Tokens that a prompt shares with those before it are not computed again."""

    def __init__(self, model: PreTrainedModel, stop: set[int]):
        self.model, self.stop = model, stop
        self.reset()

    def reset(self) -> None:
        """Forget the cache: the next answer depends on its prompt alone, to the last bit."""
        self.cached = CachedModel(self.model)
        self.ids: list[int] = []  # the tokens whose keys and values are in the cache

    def answer(
        self, prompt_ids: Ids, decoding: Decoding, max_new_tokens: int, generator: Generator | None = None
    ) -> Iterator[int]:
        """Yield the answer's token ids one by one, the end token included; it is missing where the limit came first.

        May be left at any point: `ids` grows only after a whole forward pass, and the next call cuts the cache back to it.
        """
        same = len(os.path.commonprefix([self.ids, prompt_ids]))
        shared = min(same, len(prompt_ids) - 1)  # logits come out for a new token
        self.cached.keep(shared)
        del self.ids[shared:]
        new = prompt_ids[shared:]
        for _ in range(max_new_tokens):
            try:
                logits = self.cached.feed(torch.tensor([new], device=self.model.device))
            except torch.OutOfMemoryError:
                tokens = len(self.ids) + len(new)
                self.reset()
                few = f"not enough GPU memory for a conversation of {tokens} tokens; start a shorter one"
                raise RunError(few) from None
            self.ids += new
            new = choose(logits, decoding, generator, [self.ids])
            yield new[0]
            if new[0] in self.stop:
                return


def generate_answers(
    model: PreTrainedModel, tokenizer: Tokenizer, conversations: list[list[dict]], **how
) -> list[str]:
    """The answers, without their thinking, to lists of messages that end with the user's; `how`: what generate_tokens takes."""
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    answers = generate_tokens(model, prompts, stop_tokens(model, tokenizer), **how)
    return [read_answer(tokenizer, prompt, answer).content for prompt, answer in zip(prompts, answers)]


def generate_tokens(
    model: PreTrainedModel,
    prompts: list[Ids],
    stop: set[int],
    max_new_tokens: int,
    decoding: Decoding = Decoding(),
    batch_size: int = 16,
    seed: int = 0,
    watch: Callable = iter,
) -> list[Ids]:
    """The answers to `prompts` as ids, computed `batch_size` at a time; one that ended by itself has one of `stop` last.

    `watch` wraps the batches, to show progress.
    """
    generator = Generator().manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding in a batch
    answers = {}
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    for rows in watch(batches):
        batch = [prompts[row] for row in rows]
        answers.update(zip(rows, _generate_batch(model, batch, stop, max_new_tokens, decoding, generator)))
    return [answers[row] for row in range(len(prompts))]


@torch.inference_mode()
def _generate_batch(model, prompts, stop, max_new_tokens, decoding, generator):
    def tensor(numbers):
        return torch.tensor(numbers, device=model.device)

    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]  # on the left, so that all answers begin at once
    cached = CachedModel(model, tensor(padding))
    logits = cached.feed(tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts)]))
    seen = [list(prompt) for prompt in prompts]
    going = list(range(len(prompts)))  # the batch shrinks to those that go on
    for left in reversed(range(max_new_tokens)):
        tokens = choose(logits, decoding, generator, [seen[row] for row in going])
        for row, token in zip(going, tokens):
            seen[row].append(token)
        kept = [place for place, token in enumerate(tokens) if token not in stop]
        if not kept or not left:
            break
        if len(kept) < len(going):
            cached.keep_rows(tensor(kept))
        going = [going[place] for place in kept]
        logits = cached.feed(tensor([[tokens[place]] for place in kept]))
    return [ids[len(prompt) :] for ids, prompt in zip(seen, prompts)]


class AnswerReader:
    """Token ids in, text out: never half a character, and thinking told apart from the answer itself.

    `reasoning` and `content` (str) hold what has been read so far; `thinking` tells which of the two comes next. Half a character
    at the end of an answer that was cut is left out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.start, self.end = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
        self.thinking = self.start in prompt_ids[-2:]  # templates of thinking-only models end in "<think>\n"
        self.reasoning = self.content = ""

    def feed(self, token: int) -> str:
        """Take one token id; return the text that became whole with it ("" often: a rare character takes three tokens)."""
        if token in (self.start, self.end):
            self.thinking, self.stream = token == self.start, DecodeStream(skip_special_tokens=True)
            self.reasoning = self.reasoning.rstrip("\n")
            return ""
        text = self.stream.step(self.tokenizer.backend_tokenizer, token) or ""
        part = "reasoning" if self.thinking else "content"
        if not getattr(self, part):
            text = text.lstrip("\n")  # the format's own line breaks around the think block
        setattr(self, part, getattr(self, part) + text)
        return text


def read_answer(tokenizer: Tokenizer, prompt_ids: Sequence[int], answer_ids: Ids) -> AnswerReader:
    """The AnswerReader of a whole answer: its `reasoning` and `content`."""
    reader = AnswerReader(tokenizer, prompt_ids)
    for token in answer_ids:
        reader.feed(token)
    return reader
