"""The model of a chat: a loaded folder, the options of an answer, and the answer."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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

# What /set and a request may change, by the rules of utils/settings.py.
RULES = {
    "temperature": "0 to 10",  # 0: greedy
    "top_p": "> 0, at most 1",
    "top_k": "0, 1, ...",  # 0: no limit
    "repetition_penalty": "0.1 to 10",
    "max_new_tokens": "1, 2, ...",
    "seed": "0, 1, ...",
}
COLDEST = 0.01  # least temperature: below it scores overflow, and the likeliest token is drawn anyway


@dataclass
class Options:
    """How to answer. `thinking`: True, False or None (the folder's own mode); `stop`: texts that end an answer; `numbers`: those
    of RULES that are set, by name; the rest is as in the folder's generation_config."""

    thinking: bool | None = None
    stop: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """The longest answer in tokens."""
        return self.numbers.get("max_new_tokens", 2048)

    def generator(self) -> torch.Generator:
        """What an answer is drawn by: the same for the same seed, another one every time without."""
        generator = torch.Generator()
        if "seed" in self.numbers:
            return generator.manual_seed(self.numbers["seed"])
        generator.seed()
        return generator


@dataclass
class Reply:
    """One answer. `first`: seconds to the first token; `ended`: by its end token or a stop text; `stopped`: by Ctrl-C."""

    content: str
    reasoning: str
    tokens: int
    seconds: float
    first: float
    ended: bool
    stopped: bool

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 if there is one alone."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else 0.0

    def speed(self) -> str:
        """Tokens and speed, in words."""
        rate = f"{self.rate:.1f} tokens/s, " if self.rate else ""
        return f"{self.tokens} tokens, {rate}first after {self.first:.2f} s"


class ChatModel:
    """A loaded model folder, ready to answer.

    `single`: it was trained on single questions only; `system`: the system text in front of conversations, None for the one
    that nearly all rows of its training shared.
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
        """The ids that ask for an answer to `messages`."""
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

    def introduce(self, options: Options) -> str:
        """What is going to answer, and how, in two or three lines."""
        device = self.device
        told = f"{self.name} on {device.name}, {device.answers} ({device.reason})\n{self.describe(options)}"
        system = f"\n{localized('system text', '系统提示')}: {shorten(self.system)}"
        return told + system if self.system else told

    def describe(self, options: Options) -> str:
        """How the model is going to answer, in one line."""
        decoding, how = self.decoding(options), "greedy"
        if decoding.do_sample:
            how = f"temperature {decoding.temperature}, top_p {decoding.top_p}, top_k {decoding.top_k}"
        if decoding.repetition_penalty != 1:
            how += f", repetition_penalty {decoding.repetition_penalty}"
        mode = "on" if self.thinks(options) else "off"
        mode += " (the folder's own mode)" if options.thinking is None else ""
        return f"thinking {mode}; {how}; at most {options.limit} tokens an answer"

    def answer(self, prompt: list[int], options: Options, show: Callable[[str, bool], None]) -> Reply:
        """Answer the ids `prompt`, handing the text on as it comes to show(text, thinking); Ctrl-C ends it."""
        reader, tokens, first, token, stopped = AnswerReader(self.tokenizer, prompt), 0, 0.0, None, False
        shown, found = "", False  # of the content; whether a stop text has come

        def hand_on(text, last=False):
            nonlocal shown, found
            if not reader.thinking:
                before = len(shown)
                shown, found = before_stop(reader.content, options.stop, last)
                text = shown[before:]
            show(text, reader.thinking)

        limit = min(options.limit, self.context - len(prompt))
        start = time.perf_counter()
        try:
            for token in self.stream.answer(prompt, self.decoding(options), limit, options.generator()):
                tokens += 1
                first = first or time.perf_counter() - start
                hand_on(reader.feed(token))
                if found:
                    break
            hand_on(reader.finish(), last=True)
        except KeyboardInterrupt:
            stopped = True
        seconds, ended = time.perf_counter() - start, found or token in self.stream.stop
        return Reply(shown, reader.reasoning, tokens, seconds, first, ended, stopped)


def before_stop(text: str, stops: tuple[str, ...], last: bool) -> tuple[str, bool]:
    """(the text before the first stop, True), or (the text up to what may be the beginning of one, False).

    `last`: nothing comes after the text.
    """
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        return text[: min(places)], True
    longest = 0 if last else max(map(len, stops), default=0)
    for place in range(max(len(text) - longest, 0), len(text)):
        if any(stop.startswith(text[place:]) for stop in stops):
            return text[:place], False
    return text, False
