"""The model of a chat: a loaded folder, the options of an answer, and the answer."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.chat.terminal import note
from utils.device import Device
from utils.errors import RunError, UserError
from utils.files import show_path
from utils.model.chat_format import encode_prompt
from utils.model.folder import check_model, load_for_answers, load_tokenizer, read_record
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
    try:
        number = rule.type(value)
    except (ValueError, TypeError, OverflowError):
        number = None
    if number is None or not rule.allowed(number):
        raise UserError(f"{where}: wanted {rule.wanted}, got {value!r}")
    return number


@dataclass
class Options:
    """Options of every answer. `thinking`: True, False or None (the folder's own mode); `decoding`: changes to the folder's
    generation_config, by name; `stop`: texts that end an answer, and are not part of it."""

    thinking: bool | None = None
    max_new_tokens: int = 2048
    show_thinking: bool = True
    stop: tuple[str, ...] = ()
    decoding: dict = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def apply(self, name: str, value: float) -> None:
        """Change one setting to a value that read_value has passed."""
        if name == "max_new_tokens":
            self.max_new_tokens = value
        elif name == "seed":
            self.generator.manual_seed(value)
        elif name == "temperature":  # 0 would divide by zero; its limit is greedy decoding
            self.decoding |= {"do_sample": True, "temperature": value} if value else {"do_sample": False}
        else:
            self.decoding[name] = value

    def seed(self, seed: int) -> None:
        """Begin the random numbers anew: with `seed`, or with any where it is negative."""
        if seed < 0:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)


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
        rate = ""
        if self.tokens > 1 and after_first > 0:
            rate = f"{(self.tokens - 1) / after_first:.1f} tokens/s, "
        return f"{self.tokens} tokens, {rate}first after {self.first:.2f} s"


class ChatModel:
    """A loaded model folder, ready to answer. `record`: the run.json of its training, {} for a model that has none."""

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
        self.record = record_of(folder)

    def encode(self, messages: list[dict], options: Options) -> list[int]:
        """The ids that ask for an answer to `messages`."""
        return encode_prompt(self.tokenizer, messages, options.thinking)

    def check_length(self, prompt: list[int]) -> None:
        """UserError where the ids `prompt` leave no room for an answer."""
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
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if getattr(decoding, name) != (name == "repetition_penalty"):
                how += f", {name} {getattr(decoding, name)}"
        mode = "on" if self.thinks(options) else "off"
        mode += " (the folder's own mode)" if options.thinking is None else ""
        return f"thinking {mode}; {how}; at most {options.max_new_tokens} tokens an answer"

    def answer(self, prompt: list[int], options: Options, show: Callable[[str, bool], None]) -> Reply:
        """Answer the ids `prompt`, handing the text on as it comes to show(text, thinking); Ctrl-C ends it."""
        reader, tokens, first, token, stopped = AnswerReader(self.tokenizer, prompt), 0, 0.0, None, False
        limit = min(options.max_new_tokens, self.context - len(prompt))
        cut = StopTexts(options.stop)
        start = time.perf_counter()
        try:
            for token in self.stream.answer(prompt, self.decoding(options), limit, options.generator):
                tokens += 1
                first = first or time.perf_counter() - start
                text = reader.feed(token)
                show(text if reader.thinking else cut.pass_on(text), reader.thinking)
                if cut.found:
                    break
            text = reader.finish()
            show(text if reader.thinking else cut.pass_on(text, last=True), reader.thinking)
        except KeyboardInterrupt:
            stopped = True
        seconds, ended = time.perf_counter() - start, cut.found or token in self.stream.stop
        content = cut.passed if options.stop else reader.content
        return Reply(content, reader.reasoning, tokens, seconds, first, ended, stopped)


class StopTexts:
    """Ends a text before the first of some texts in it. `passed` (str): what was passed on; `found`: whether one has come."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.passed, self.held, self.found = stops, "", "", False

    def pass_on(self, text: str, last: bool = False) -> str:
        """Take the next piece of the text; return what is certainly before a stop. `last`: nothing comes after it."""
        self.held += "" if self.found else text
        places = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if places:
            self.found, self.held = True, self.held[: min(places)]
        begun = 0 if self.found or last else self._begun()
        passed, self.held = self.held[: len(self.held) - begun], self.held[len(self.held) - begun :]
        self.passed += passed
        return passed

    def _begun(self):
        """How many characters at the end of `held` may be the beginning of a stop."""
        longest = max(map(len, self.stops), default=1) - 1
        ends = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self.held[-n:]) for stop in self.stops)), 0)


def record_of(folder: str) -> dict:
    """The run.json of the training that a model folder came from, {} where there is none. A damaged one is told and not used.

    It lies in the folder itself, or above: `merged/` and `checkpoint-20/` stand in the folder of their run.
    """
    for place in (Path(folder), Path(folder).parent):
        try:
            record = read_record(place)
        except UserError as error:
            note(f"{error}; going on without it")
            return {}
        if record is not None:
            return record
        if not re.fullmatch(r"merged|checkpoint-\d+", Path(folder).name):
            break
    return {}
