"""The model of a chat: a loaded folder, the options of an answer, and the answer."""

import contextlib
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from utils.device import Device
from utils.errors import RunError, UserError
from utils.files import show_path
from utils.model.chat_format import encode_prompt
from utils.model.folder import check_model, load_for_answers, load_tokenizer, run_folder, usable_record
from utils.model.generate import (
    AnswerReader,
    Decoding,
    TokenStream,
    decoding_for,
    stop_tokens,
    thinks_by_default,
)
from utils.text import localized, shorten

COLDEST = 0.01  # least temperature: below it scores overflow, and the likeliest token is drawn anyway


@dataclass
class Options:
    """How to answer. `thinking`: True, False or None (the folder's own mode); `stop`: texts that end an answer; `numbers`: those
    of Decoding, seed and max_new_tokens that are set; the rest is as in the folder's generation_config."""

    thinking: bool | None = None
    stop: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """The longest answer in tokens."""
        return self.numbers.get("max_new_tokens", 2048)


class Reply(NamedTuple):
    """One answer. `rate`: tokens a second after the first one; `end`: "stop" (an end token or a stop text), "length" (the limit)
    or "Ctrl-C"."""

    content: str
    reasoning: str
    tokens: int
    seconds: float
    rate: float
    end: str

    def message(self) -> dict:
        """The answer as a message of a conversation."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": "assistant", "content": self.content, **reasoning}

    def __str__(self) -> str:
        """Tokens, speed and what cut the answer, in words."""
        ends = {"length": "; cut at the limit (--max-new-tokens)", "Ctrl-C": "; stopped by Ctrl-C"}
        return f"{self.tokens} tokens, {self.rate:.1f} tokens/s{ends.get(self.end, '')}"


class ChatModel:
    """A loaded model folder, ready to answer.

    `single`: each question is asked by itself, as in its training; `system`: the system text in front of conversations, None for
    the one that nearly all rows of its training shared.
    """

    def __init__(self, folder: str, device: Device, system: str | None = None):
        folder = check_model(folder)
        self.name = show_path(folder)
        self.device, self.tokenizer = device, load_tokenizer(folder)
        try:
            self.model = load_for_answers(folder, device)
        except torch.OutOfMemoryError:
            raise RunError(f"not enough memory on {device.name} for {self.name}; add --device cpu") from None
        self.stream = TokenStream(self.model, stop_tokens(self.model, self.tokenizer))
        self.context = self.model.config.max_position_embeddings
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers only
            record = usable_record(run_folder(folder)) or {}
        self.single = record.get("conversations") == "single"
        self.system = record.get("system") or "" if system is None else system

    def encode(self, messages: list[dict], options: Options) -> list[int]:
        """The ids that ask for an answer to `messages`, before which the system text stands unless they bring their own."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return encode_prompt(self.tokenizer, messages, options.thinking)

    def check_length(self, prompt: list[int]) -> None:
        """UserError if the ids `prompt` leave no room for an answer."""
        if len(prompt) >= self.context:
            length = f"the question has {len(prompt)} tokens with its frame"
            raise UserError(f"{length}; the context window takes {self.context}")

    def decoding(self, options: Options) -> Decoding:
        usual = decoding_for(self.model, self.tokenizer, options.thinking)
        numbers = {name: value for name, value in options.numbers.items() if hasattr(usual, name)}
        if numbers.get("temperature", COLDEST) < COLDEST:
            return replace(usual, **numbers | {"do_sample": False, "temperature": 1.0})
        return replace(usual, **numbers, do_sample=usual.do_sample or "temperature" in numbers)

    def thinks(self, options: Options) -> bool:
        """Tell whether it thinks before it answers."""
        return thinks_by_default(self.tokenizer) if options.thinking is None else options.thinking

    def describe(self, options: Options) -> str:
        """What is going to answer, and how, in two or three lines."""
        decoding, device, how = self.decoding(options), self.device, "greedy"
        if decoding.do_sample:
            how = f"temperature {decoding.temperature}, top_p {decoding.top_p}, top_k {decoding.top_k}"
        if decoding.repetition_penalty != 1:
            how += f", repetition_penalty {decoding.repetition_penalty}"
        mode = "on" if self.thinks(options) else "off"
        mode += " (the folder's own mode)" if options.thinking is None else ""
        told = f"{self.name} on {device.name}, {device.answers} ({device.reason})\n"
        told += f"thinking {mode}; {how}; at most {options.limit} tokens an answer"
        system = f"\n{localized('system text', '系统提示')}: {shorten(self.system)}"
        return told + system if self.system else told

    def answer(self, prompt: list[int], options: Options, show: Callable[[str, bool], None]) -> Reply:
        """Answer the ids `prompt`, handing the text on as it comes to show(text, thinking); Ctrl-C ends it."""
        reader, tokens, first, token, end = AnswerReader(self.tokenizer, prompt), 0, 0.0, None, "length"
        shown = ""  # of the content
        # Characters that may be the beginning of a stop text.
        held = max(map(len, options.stop), default=1) - 1

        def hand_on(text, held):
            nonlocal shown, end
            if not reader.thinking:
                before, said = len(shown), reader.content
                places = [said.find(stop) for stop in options.stop if stop in said]
                shown = said[: min(places, default=max(len(said) - held, before))]
                text, end = shown[before:], "stop" if places else end
            show(text, reader.thinking)

        limit, seed = min(options.limit, self.context - len(prompt)), options.numbers.get("seed")
        random = torch.Generator().manual_seed(secrets.randbits(32) if seed is None else seed)
        start = time.perf_counter()
        try:
            for token in self.stream.answer(prompt, self.decoding(options), limit, random):
                tokens += 1
                first = first or time.perf_counter() - start
                hand_on(reader.feed(token), held)
                if end == "stop":
                    break
            hand_on("", 0)
            end = "stop" if token in self.stream.stop else end
        except KeyboardInterrupt:
            end = "Ctrl-C"
        seconds = time.perf_counter() - start
        rate = (tokens - 1) / (seconds - first) if tokens > 1 else 0.0
        return Reply(shown, reader.reasoning, tokens, seconds, rate, end)
