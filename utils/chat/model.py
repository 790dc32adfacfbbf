"""A model that answers in chat: a loaded folder, and what one answer of it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.chat.options import Options
from utils.device import Device
from utils.errors import RunError, UserError
from utils.files import show_path
from utils.model.chat_format import encode_prompt
from utils.model.folder import check_model, load_for_answers, load_tokenizer
from utils.model.generate import AnswerReader, Decoding, TokenStream, decoding_for, stop_tokens


@dataclass
class Reply:
    """One answer. `first`: seconds to the first token; `ended`: by its end token; `stopped`: by Ctrl-C."""

    content: str
    reasoning: str
    tokens: int
    seconds: float
    first: float
    ended: bool
    stopped: bool


class ChatModel:
    """A loaded model folder, ready to answer."""

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

    def answer(self, prompt: list[int], options: Options, show: Callable[[str, bool], None]) -> Reply:
        """Answer the ids `prompt`, handing the text on as it comes to show(text, thinking); Ctrl-C ends it."""
        reader, tokens, first, token, stopped = AnswerReader(self.tokenizer, prompt), 0, 0.0, None, False
        limit = min(options.max_new_tokens, self.context - len(prompt))
        start = time.perf_counter()
        try:
            for token in self.stream.answer(prompt, self.decoding(options), limit, options.generator):
                tokens += 1
                first = first or time.perf_counter() - start
                show(reader.feed(token), reader.thinking)
            show(reader.finish(), reader.thinking)
        except KeyboardInterrupt:
            stopped = True
        seconds, ended = time.perf_counter() - start, token in self.stream.stop
        return Reply(reader.content, reader.reasoning, tokens, seconds, first, ended, stopped)
