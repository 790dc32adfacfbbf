"""The model of a chat: a loaded folder, the options of an answer, and the answer."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
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


class Rule(NamedTuple):
    """The type of a setting, and the values that it takes: in words, and as a test."""

    type: type
    wanted: str
    allowed: Callable[[Any], bool]


RULES = {
    # below 0.01 the scores overflow; 0 means greedy
    "temperature": Rule(float, "0 (greedy) or a number from 0.01 to 10", lambda v: v == 0 or 0.01 <= v <= 10),
    "top_p": Rule(float, "a number above 0, up to 1", lambda v: 0 < v <= 1),
    "top_k": Rule(int, "a whole number, 0 for no limit", lambda v: v >= 0),
    "repetition_penalty": Rule(float, "a number from 0.1 to 10", lambda v: 0.1 <= v <= 10),
    "presence_penalty": Rule(float, "a number from -2 to 2", lambda v: -2 <= v <= 2),
    "frequency_penalty": Rule(float, "a number from -2 to 2", lambda v: -2 <= v <= 2),
    "max_new_tokens": Rule(int, "a whole number from 1", lambda v: v > 0),
    "seed": Rule(int, "a whole number from 0", lambda v: 0 <= v < 2**63),
}


def read_value(name: str, value: str | float, where: str) -> float:
    """`value` as setting `name` takes it. UserError, with `where` it was given, for any other."""
    rule = RULES[name]
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        number = rule.type(value)
        if rule.allowed(number):
            return number
    raise UserError(f"{where}: wanted {rule.wanted}, got {value!r}")


@dataclass
class Options:
    """Options of every answer. `thinking`: True, False or None (the folder's own mode); `stop`: texts that end an answer;
    `decoding`: changes to the folder's generation_config, by name."""

    thinking: bool | None = None
    max_new_tokens: int = 2048
    show_thinking: bool = True
    stop: tuple[str, ...] = ()
    decoding: dict = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def apply(self, name: str, value: float) -> None:
        """Change one setting to a value that read_value has passed, or the seed to -1: any."""
        if name == "max_new_tokens":
            self.max_new_tokens = value
        elif name == "seed":
            self.generator.seed() if value < 0 else self.generator.manual_seed(value)
        elif name == "temperature":  # 0 would divide by zero; its limit is greedy decoding
            self.decoding |= {"do_sample": True, "temperature": value} if value else {"do_sample": False}
        else:
            self.decoding[name] = value


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

    def speed(self) -> str:
        """Tokens and speed, in words."""
        after_first = self.seconds - self.first
        measured = self.tokens > 1 and after_first > 0
        rate = f"{(self.tokens - 1) / after_first:.1f} tokens/s, " if measured else ""
        return f"{self.tokens} tokens, {rate}first after {self.first:.2f} s"


class ChatModel:
    """A loaded model folder, ready to answer. `record`: the run.json of its training, {} if it has none."""

    def __init__(self, folder: str, device: Device):
        check_model(folder)
        self.name = show_path(folder) if Path(folder).is_dir() else folder
        self.tokenizer = load_tokenizer(folder)
        try:
            self.model = load_for_answers(folder, device)
        except torch.OutOfMemoryError:
            raise RunError(f"not enough memory on {device.name} for {self.name}; add --device cpu") from None
        self.stream = TokenStream(self.model, stop_tokens(self.model, self.tokenizer))
        self.context = self.model.config.max_position_embeddings
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers only
            self.record = usable_record(run_folder(Path(folder))) or {}

    def encode(self, messages: list[dict], options: Options) -> list[int]:
        """The ids that ask for an answer to `messages`."""
        return encode_prompt(self.tokenizer, messages, options.thinking)

    def check_length(self, prompt: list[int]) -> None:
        """UserError if the ids `prompt` leave no room for an answer."""
        if len(prompt) >= self.context:
            raise UserError(
                f"the question has {len(prompt)} tokens with its frame; the context window takes {self.context}"
            )

    def decoding(self, options: Options) -> Decoding:
        return replace(decoding_for(self.model, self.tokenizer, options.thinking), **options.decoding)

    def thinks(self, options: Options) -> bool:
        """Tell whether it thinks before it answers."""
        return thinks_by_default(self.tokenizer) if options.thinking is None else options.thinking

    def describe(self, options: Options) -> str:
        """How the model is going to answer, in one line."""
        decoding, how = self.decoding(options), "greedy"
        if decoding.do_sample:
            how = f"temperature {decoding.temperature}, top_p {decoding.top_p}, top_k {decoding.top_k}"
        for name, neutral in ("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0):
            if getattr(decoding, name) != neutral:
                how += f", {name} {getattr(decoding, name)}"
        mode = "on" if self.thinks(options) else "off"
        mode += " (the folder's own mode)" if options.thinking is None else ""
        return f"thinking {mode}; {how}; at most {options.max_new_tokens} tokens an answer"

    def answer(self, prompt: list[int], options: Options, show: Callable[[str, bool], None]) -> Reply:
        """Answer the ids `prompt`, handing the text on as it comes to show(text, thinking); Ctrl-C ends it."""
        reader, tokens, first, token, stopped = AnswerReader(self.tokenizer, prompt), 0, 0.0, None, False
        shown, found = "", False  # of the content; whether a stop text has come

        def hand_on(text, last=False):
            nonlocal shown, found
            if options.stop and not reader.thinking:
                before = shown
                shown, found = before_stop(reader.content, options.stop, last)
                text = shown[len(before) :]
            show(text, reader.thinking)

        limit = min(options.max_new_tokens, self.context - len(prompt))
        start = time.perf_counter()
        try:
            for token in self.stream.answer(prompt, self.decoding(options), limit, options.generator):
                tokens += 1
                first = first or time.perf_counter() - start
                hand_on(reader.feed(token))
                if found:
                    break
            hand_on(reader.finish(), last=True)
        except KeyboardInterrupt:
            stopped = True
        seconds, ended = time.perf_counter() - start, found or token in self.stream.stop
        content = shown if options.stop else reader.content
        return Reply(content, reader.reasoning, tokens, seconds, first, ended, stopped)


def before_stop(text: str, stops: tuple[str, ...], last: bool) -> tuple[str, bool]:
    """(the text before the first stop, True), or (the text up to what may be the beginning of one, False).

    `last`: nothing comes after the text.
    """
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        return text[: min(places)], True
    ends = () if last else range(max(len(text) - max(map(len, stops)), 0), len(text))
    begun = (place for place in ends if any(stop.startswith(text[place:]) for stop in stops))
    return text[: next(begun, len(text))], False
