"""Answers from a model, token by token: the one decode loop of chat and of everything else here that generates.

`TokenStream` answers one prompt after another and keeps the KV cache, so that a conversation is not computed again for
every turn. `generate_answers` answers many conversations in batches. Both choose tokens as transformers' `generate` does.
"""

import codecs
from dataclasses import dataclass, fields, replace

import torch
from transformers import DynamicCache

from utils.errors import RunError
from utils.model.cached_forward import CachedModel
from utils.model.chat_format import DECODING, END_OF_TURN, encode_prompt


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; names, defaults and order of application are those of transformers."""

    do_sample: bool = False
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 50  # 0: no limit
    top_p: float = 1.0


def decoding_for(model, tokenizer, thinking=None):
    """The Decoding of the folder's generation_config, or Qwen's advice where `thinking` is not the folder's own mode.

    Of generation_config only the fields of Decoding and the end tokens are used.
    """
    if thinking is not None and thinking != thinks_by_default(tokenizer):
        return Decoding(**DECODING[thinking])
    given = {field.name: getattr(model.generation_config, field.name, None) for field in fields(Decoding)}
    return Decoding(**{name: value for name, value in given.items() if value is not None})


def thinks_by_default(tokenizer):
    """Whether the tokenizer's chat template leaves room for thinking when nobody says which mode to use."""
    question = [{"role": "user", "content": "?"}]
    return encode_prompt(tokenizer, question) != encode_prompt(tokenizer, question, thinking=False)


def stop_tokens(model, tokenizer):
    """The ids (set of int) that end an answer: those of the folder's generation_config, and `<|im_end|>`."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {*listed, tokenizer.convert_tokens_to_ids(END_OF_TURN)} - {None}


def choose(logits, decoding, seen, random):
    """The next token id. `logits`: float32 (vocabulary,) on the CPU; `seen`: all ids so far; `random`: torch.Generator.

    Raises RunError where the logits are not numbers, as those of a diverged model are.
    """
    if decoding.repetition_penalty != 1:
        ids = torch.tensor(sorted(set(seen)))
        logits = logits.clone()
        logits[ids] = torch.where(
            logits[ids] < 0,
            logits[ids] * decoding.repetition_penalty,
            logits[ids] / decoding.repetition_penalty,
        )
    best = int(logits.argmax())  # of NaN and numbers, argmax returns NaN
    if not torch.isfinite(logits[best]):
        raise RunError(
            "the model's scores are not numbers (NaN): its training diverged, or its weights are damaged"
        )
    if not decoding.do_sample:
        return best
    ids, probabilities = candidates(logits, decoding)
    return int(ids[torch.multinomial(probabilities, 1, generator=random)])


def candidates(logits, decoding):
    """(ids, probabilities) that a sampled token is drawn from, after temperature, top_k and top_p, in that order.

    Sorting only the top_k saves about 10 ms a token on a vocabulary of 152 thousand.
    """
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < len(logits):
        lowest = torch.topk(logits, decoding.top_k).values[-1]
        ids = (logits >= lowest).nonzero().squeeze(-1)  # ties with the last one stay in, as in transformers
    else:
        ids = torch.arange(len(logits))
    kept, order = logits[ids].sort()
    inside = kept.softmax(-1).cumsum(-1) > 1 - decoding.top_p
    inside[-1] = True
    return ids[order][inside], kept[inside].softmax(-1)


class TokenStream:
    """One model answering prompts in turn. What a prompt shares with the tokens before it is not computed again."""

    def __init__(self, model, stop):
        self.model, self.stop = model, stop
        self.reset()

    def reset(self):
        """Forget the cache: the next answer depends on its prompt alone, to the last bit."""
        self.cached, self.ids = (
            CachedModel(self.model),
            [],
        )  # ids: the tokens whose keys and values are in the cache

    def answer(self, prompt_ids, decoding, max_new_tokens, random=None):
        """Yield the answer's token ids one by one, the end token included; it is missing where the limit came first.

        May be left at any point, by Ctrl-C too: `ids` grows only after a whole forward pass, and the next call cuts the
        cache back to it.
        """
        shared = next(
            (i for i, (old, new) in enumerate(zip(self.ids, prompt_ids)) if old != new),
            min(len(self.ids), len(prompt_ids)),
        )
        shared = min(shared, len(prompt_ids) - 1)  # at least one token has to go in for logits to come out
        self.cached.keep(shared)
        del self.ids[shared:]
        new, seen = prompt_ids[shared:], list(prompt_ids)
        for _ in range(max_new_tokens):
            token = choose(self._logits(new), decoding, seen, random)
            yield token
            if token in self.stop:
                return
            new = [token]
            seen.append(token)

    def _logits(self, new):
        try:
            logits = self.cached.feed(new)
        except torch.OutOfMemoryError:
            length = len(self.ids) + len(new)
            self.reset()
            raise RunError(
                f"not enough GPU memory for a conversation of {length} tokens; start a shorter one"
            ) from None
        self.ids += new
        return logits


def generate_answers(
    model,
    tokenizer,
    conversations,
    max_new_tokens=512,
    greedy=True,
    thinking=None,
    batch_size=16,
    seed=0,
    watch=iter,
):
    """The answers (list of str, without their thinking) to `conversations` (lists of messages that end with the user's).

    Greedy, or decoded as the folder's generation_config says. `thinking`: True, False, or None for the template's default.
    `watch` wraps the batches, to show progress.
    """
    prompts = [encode_prompt(tokenizer, messages, thinking) for messages in conversations]
    decoding = decoding_for(model, tokenizer, thinking)
    decoding = replace(decoding, do_sample=False) if greedy else decoding
    answers = generate_tokens(
        model, prompts, stop_tokens(model, tokenizer), max_new_tokens, decoding, batch_size, seed, watch
    )
    return [read_answer(tokenizer, prompt, answer).content for prompt, answer in zip(prompts, answers)]


def generate_tokens(
    model, prompts, stop, max_new_tokens, decoding=Decoding(), batch_size=16, seed=0, watch=iter
):
    """The answers to `prompts` (lists of ids) as lists of ids, computed `batch_size` at a time.

    An answer that ended by itself has its end token (one of `stop`) last. `watch` wraps the batches, to show progress.
    """
    random = torch.Generator().manual_seed(seed)
    by_length = sorted(
        range(len(prompts)), key=lambda row: len(prompts[row])
    )  # like lengths together: little padding
    answers = {}
    for rows in watch(
        [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    ):
        batch = [prompts[row] for row in rows]
        answers.update(zip(rows, _generate_batch(model, batch, stop, max_new_tokens, decoding, random)))
    return [answers[row] for row in range(len(prompts))]


@torch.inference_mode()
def _generate_batch(model, prompts, stop, max_new_tokens, decoding, random):
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    real = torch.tensor(
        [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device
    )
    # Padding sees itself, and nothing sees it. With no key at all its row would be NaN on some devices, and 0 x NaN spreads.
    square = torch.ones(width, width, dtype=torch.bool, device=device)
    mask = (real[:, None, None, :] & square.tril()) | torch.eye(width, dtype=torch.bool, device=device)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache, answers = DynamicCache(), [[] for _ in prompts]
    going = list(range(len(prompts)))  # the answers that have not ended: the batch shrinks to them
    for _ in range(max_new_tokens):
        logits = (
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
            .cpu()
        )
        for place, row in enumerate(going):
            answers[row].append(choose(logits[place], decoding, prompts[row] + answers[row], random))
        kept = [place for place, row in enumerate(going) if answers[row][-1] not in stop]
        if not kept:
            break
        if len(kept) < len(going):
            going, kept = [going[place] for place in kept], torch.tensor(kept, device=device)
            cache.batch_select_indices(kept)
            real, positions = real[kept], positions[kept]
        ids = torch.tensor([answers[row][-1:] for row in going], device=device)
        real = torch.cat([real, real.new_ones(len(going), 1)], dim=1)
        mask, positions = real[:, None, None, :], positions[:, -1:] + 1
    return answers


class AnswerReader:
    """Token ids in, text out: never half a character, and thinking told apart from the answer itself.

    `reasoning` and `content` (str) hold what has been read so far; `thinking` tells which of the two comes next.
    """

    def __init__(self, tokenizer, prompt_ids):
        self.tokenizer = tokenizer
        self.added = {
            number: "" if token.special else token.content
            for number, token in tokenizer.added_tokens_decoder.items()
        }
        self.start, self.end = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
        self.thinking = self.start in prompt_ids[-2:]  # templates of thinking-only models end in "<think>\n"
        self.reasoning = self.content = ""
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token):
        """Take one token id; return the text that became whole with it ("" often: a rare character takes three tokens)."""
        if token in (self.start, self.end):
            rest = self._add(self.bytes.decode(b"", final=True))
            self.thinking = token == self.start
            return rest
        return self._add(self.bytes.decode(self._bytes_of(token)))

    def finish(self):
        """The answer has ended: return what is left of a cut character, as U+FFFD."""
        rest = self._add(self.bytes.decode(b"", final=True))
        self.reasoning = self.reasoning.rstrip("\n")
        return rest

    def _add(self, text):
        part = "reasoning" if self.thinking else "content"
        text = (
            text if getattr(self, part) else text.lstrip("\n")
        )  # the format's own line breaks around the think block
        setattr(self, part, getattr(self, part) + text)
        return text

    def _bytes_of(self, token):
        if token in self.added:
            return self.added[token].encode()
        text = self.tokenizer.convert_ids_to_tokens(token) or ""  # ids above the vocabulary pad the weights
        return bytes(_BYTES[letter] for letter in text)


def read_answer(tokenizer, prompt_ids, answer_ids):
    """The finished AnswerReader of a whole answer: its `reasoning` and `content`."""
    reader = AnswerReader(tokenizer, prompt_ids)
    for token in answer_ids:
        reader.feed(token)
    reader.finish()
    return reader


def _byte_alphabet():
    """{letter: byte} of byte-level BPE (GPT-2, Radford et al. 2019): printable bytes as themselves, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(rest)
    }


_BYTES = _byte_alphabet()
