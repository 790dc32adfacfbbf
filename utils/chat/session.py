"""A conversation with one model, or with two at once: its history, its commands, and what the models are asked.

The history is kept as questions and answers in plain text; every prompt is rendered from it anew, by the path that
training uses (utils.chat_format), so the model sees the conversation as it was trained to see one.
"""

import difflib
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.chat.terminal import AnswerPrinter, note, read_message
from utils.errors import RunError, UserError, complain, explain_os_error
from utils.files import show_path
from utils.model.chat_format import encode_prompt
from utils.model.folders import check_model
from utils.model.generate import AnswerReader, TokenStream, decoding_for, stop_tokens, thinks_by_default
from utils.model.load import load_for_answers, load_tokenizer
from utils.settings import ROOT
from utils.text import printable, side_by_side

COMMANDS = {
    "help": ("", "list these commands"),
    "reset": ("", "forget the conversation; the system text stays"),
    "undo": ("", "take back the last question and its answer"),
    "retry": ("", "answer the last question again"),
    "system": ("TEXT", "set the system text; without TEXT remove it"),
    "think": ("on|off|auto", "think before answering; auto: as the model folder was trained"),
    "set": (
        "NAME=VALUE ...",
        "temperature (0: greedy), top_p, top_k, repetition_penalty, max_new_tokens, seed",
    ),
    "save": ("FILE.jsonl", "append the conversation to FILE as a row to train on"),
    "compare": ("FOLDER", "let a second model answer beside this one; without FOLDER stop that"),
    "exit": ("", "leave, as Ctrl-D does"),
}


# What /set takes: the type, and the values allowed.
SETTABLE = {
    "temperature": (float, lambda value: 0 <= value <= 10, "a number from 0 to 10"),
    "top_p": (float, lambda value: 0 < value <= 1, "a number above 0, up to 1"),
    "top_k": (int, lambda value: value >= 0, "a whole number, 0 for no limit"),
    "repetition_penalty": (float, lambda value: 0 < value <= 10, "a number above 0, up to 10"),
    "max_new_tokens": (int, lambda value: value > 0, "a whole number from 1"),
    "seed": (int, lambda value: 0 <= value < 2**63, "a whole number from 0"),
}


@dataclass
class Options:
    """What holds for every answer. `thinking`: True, False or None (the folder's own mode); `decoding`: changes to its
    generation_config, by name."""

    thinking: bool | None
    max_new_tokens: int
    show_thinking: bool
    decoding: dict
    random: torch.Generator


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

    def __str__(self):
        after_first = self.seconds - self.first
        rate = (
            f"{(self.tokens - 1) / after_first:.1f} tokens/s, " if self.tokens > 1 and after_first > 0 else ""
        )
        return f"{self.tokens} tokens, {rate}first after {self.first:.2f} s"


class ChatModel:
    """A loaded model folder, ready to answer."""

    def __init__(self, folder, device):
        check_model(folder)
        self.name = show_path(folder) if Path(folder).is_dir() else folder
        self.tokenizer = load_tokenizer(folder)
        try:
            self.model = load_for_answers(folder, device)
        except torch.OutOfMemoryError:
            raise RunError(f"not enough memory on {device.name} for {self.name}; add --device cpu") from None
        self.stream = TokenStream(self.model, stop_tokens(self.model, self.tokenizer))
        self.context = self.model.config.max_position_embeddings

    def check_length(self, prompt):
        """UserError where the ids `prompt` leave no room for an answer."""
        if len(prompt) >= self.context:
            raise UserError(
                f"the question has {len(prompt)} tokens with its frame; the context window takes {self.context}"
            )

    def decoding(self, options):
        return replace(decoding_for(self.model, self.tokenizer, options.thinking), **options.decoding)

    def answer(self, prompt, options, show):
        """Answer the ids `prompt`, handing the text on as it comes to show(text, thinking); Ctrl-C ends it. -> Reply"""
        reader, limit = (
            AnswerReader(self.tokenizer, prompt),
            min(options.max_new_tokens, self.context - len(prompt)),
        )
        start, tokens, first, token, stopped = time.perf_counter(), 0, 0.0, None, False
        try:
            for token in self.stream.answer(prompt, self.decoding(options), limit, options.random):
                tokens += 1
                first = first or time.perf_counter() - start
                show(reader.feed(token), reader.thinking)
            show(reader.finish(), reader.thinking)
        except KeyboardInterrupt:
            stopped = True
        seconds = time.perf_counter() - start
        return Reply(
            reader.content, reader.reasoning, tokens, seconds, first, token in self.stream.stop, stopped
        )


@dataclass
class Turn:
    """A question and its answer; `whole` is False where Ctrl-C or the token limit cut the answer."""

    question: str
    answer: str
    reasoning: str
    whole: bool

    def messages(self):
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer, **reasoning},
        ]


class Chat:
    """A session at the terminal. `load(folder)` makes the ChatModel for /compare."""

    def __init__(self, speaker, options, system, load):
        self.speaker, self.options, self.system, self.load = speaker, options, system, load
        self.other = None  # the second ChatModel, while /compare is on
        self.turns = []
        self.start = 0  # the first turn that still fits into the context window
        self.unanswered = ""  # a question that Ctrl-C took the answer from, for /retry

    def run(self):
        """Read and answer until Ctrl-D or /exit. Ctrl-C at any point only ends what is being done."""
        while True:
            try:
                line = read_message()
                if not self.handle(line):
                    return
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                note("\n(stopped; Ctrl-D or /exit leaves)")

    def handle(self, line):
        """Do what one message asks for; False when it is /exit."""
        line = (
            line.replace("／", "/", 1) if line.startswith("／") else line
        )  # as Chinese input methods type it
        try:
            if not line.startswith("/"):
                if line:
                    self.ask(line, len(self.turns))
                return True
            name, _, text = line[1:].partition(" ")
            if name not in COMMANDS:
                near = difflib.get_close_matches(name, COMMANDS, n=1)
                raise UserError(
                    f"no command /{name}; {f'did you mean /{near[0]}?' if near else '/help lists them'}"
                )
            getattr(self, f"_{name}")(text.strip())
            return name != "exit"
        except (UserError, RunError) as error:
            complain(error, error.exit_code)
        except OSError as error:
            complain(explain_os_error(error), 1)
        return True

    def messages(self, question, start, count):
        """The conversation as the model is to see it: system text, turns `start` to `count`, the question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        history = [message for turn in self.turns[start:count] for message in turn.messages()]
        return [*system, *history, {"role": "user", "content": question}]

    def fit(self, speaker, question, count):
        """The ids of the prompt, the oldest turns left out, whole ones only, until an answer has room (and that is said)."""
        room = min(self.options.max_new_tokens, speaker.context // 2)
        for start in range(min(self.start, count), count + 1):
            prompt = encode_prompt(
                speaker.tokenizer, self.messages(question, start, count), self.options.thinking
            )
            if len(prompt) + room <= speaker.context:
                break
        speaker.check_length(prompt)
        if start > self.start:
            note(
                f"(the context window of {speaker.context} tokens is full: "
                f"the oldest {start} of {count} turns are left out)"
            )
        self.start = start
        return prompt

    def ask(self, question, count):
        """Answer `question` after the first `count` turns of the history, and put it in their place if it was answered."""
        speakers = [self.speaker, self.other] if self.other else [self.speaker]
        prompts = [self.fit(speaker, question, count) for speaker in speakers]
        self.unanswered = question
        if self.other:
            replies = [self._answer_aside(speaker, prompt) for speaker, prompt in zip(speakers, prompts)]
            self._show_both([reply.content for reply in replies])
        else:
            replies = [
                self.speaker.answer(prompts[0], self.options, AnswerPrinter(self.options.show_thinking))
            ]
            print(flush=True)
        for speaker, reply in zip(speakers, replies):
            self._tell(speaker, reply)
        reply = replies[0]
        if not reply.content:
            note("(no answer, so the question is not kept; /retry asks it again)")
            return
        self.turns[count:] = [Turn(question, reply.content, reply.reasoning, reply.ended)]
        self.unanswered = ""

    def _answer_aside(self, speaker, prompt):
        note(f"({speaker.name} is answering ...)")
        reply = speaker.answer(prompt, self.options, lambda text, thinking: None)
        if reply.stopped:
            raise KeyboardInterrupt
        return reply

    def _show_both(self, answers):
        left, right = (
            f"{speaker.name}\n\n{answer or '(no answer)'}"
            for speaker, answer in zip((self.speaker, self.other), answers)
        )
        print(side_by_side(left, right, shutil.get_terminal_size().columns), flush=True)

    def _tell(self, speaker, reply):
        cut = "" if reply.ended else "; cut at the limit (/set max_new_tokens=...)"
        cut = "; stopped by Ctrl-C" if reply.stopped else cut
        who = f"{speaker.name}: " if self.other else ""
        note(f"[{who}{reply}{cut}]")

    def _help(self, text):
        for name, (argument, meaning) in COMMANDS.items():
            note(f"  {f'/{name} {argument}':<22} {meaning}")
        note(
            "  A line that ends in \\ goes on in the next. Ctrl-C stops an answer; what there is of it stays."
        )

    def _reset(self, text):
        self.turns, self.start, self.unanswered = [], 0, ""
        note("(the conversation is forgotten)")

    def _undo(self, text):
        if not self.turns:
            raise UserError("nothing to take back")
        note(f"(taken back: {printable(self.turns.pop().question)})")
        self.start, self.unanswered = 0, ""

    def _retry(self, text):
        if self.unanswered:
            self.ask(self.unanswered, len(self.turns))
        elif self.turns:
            self.ask(self.turns[-1].question, len(self.turns) - 1)
        else:
            raise UserError("nothing to answer again")

    def _system(self, text):
        self.system = text
        note(
            f"(system text {'set' if text else 'removed'}; the conversation goes on, /reset starts a new one)"
        )

    def _think(self, text):
        modes = {"on": True, "off": False, "auto": None}
        if text not in modes:
            raise UserError(f"/think takes on, off or auto, got {text!r}")
        self.options.thinking = modes[text]
        self._show_decoding()

    def _set(self, text):
        values = {}
        for pair in text.split():
            name, _, value = pair.partition("=")
            if name not in SETTABLE:
                raise UserError(
                    f"/set has no {name}; it has {', '.join(SETTABLE)}, as in /set temperature=0.6 top_p=0.9"
                )
            kind, allowed, wanted = SETTABLE[name]
            try:
                values[name] = kind(value)
            except ValueError:
                raise UserError(f"/set {name}: wanted {wanted}, got {value!r}") from None
            if not allowed(values[name]):
                raise UserError(f"/set {name}: wanted {wanted}, got {value}")
        for name, value in values.items():
            self._apply(name, value)
        self._show_decoding()

    def _apply(self, name, value):
        if name == "max_new_tokens":
            self.options.max_new_tokens = value
        elif name == "seed":
            self.options.random.manual_seed(value)
        elif name == "temperature":  # 0 would divide by zero; its limit is greedy decoding
            self.options.decoding.update(
                {"do_sample": True, "temperature": value} if value else {"do_sample": False}
            )
        else:
            self.options.decoding[name] = value

    def _show_decoding(self):
        note(f"({describe(self.speaker, self.options)})")

    def _save(self, text):
        path = Path(text).expanduser()
        if path.suffix != ".jsonl":
            raise UserError("/save needs the name of a .jsonl file, as in /save my_chats.jsonl")
        whole = [turn for turn in self.turns if turn.whole]
        if not whole:
            raise UserError("nothing to save: no answer that came to its end")
        system = [{"role": "system", "content": self.system}] if self.system else []
        row = {"messages": [*system, *(message for turn in whole for message in turn.messages())]}
        with open(path, "a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            line_break = (
                b"" if file.read(1) in (b"", b"\n") else b"\n"
            )  # a file edited by hand may lack its last one
            file.write(line_break + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        left_out = len(self.turns) - len(whole)
        note(
            f"({len(whole)} turns appended to {path}{f'; {left_out} with a cut answer left out' if left_out else ''})"
        )

    def _compare(self, text):
        if not text:
            self.other = None
            note("(one model answers)")
            return
        folder = Path(text).expanduser()
        folder = folder if folder.exists() else ROOT / folder
        self.other = self.load(str(folder) if folder.exists() else text)
        note(f"({self.other.name} now answers beside {self.speaker.name}, whose answers make the history)")
        if self.turns:
            last = self.turns[-1]
            reply = self._answer_aside(self.other, self.fit(self.other, last.question, len(self.turns) - 1))
            self._show_both([last.answer, reply.content])
            self._tell(self.other, reply)

    def _exit(self, text):
        """Nothing to do: `handle` ends the session."""


def describe(speaker, options):
    """How the speaker is going to answer, in one line."""
    decoding = speaker.decoding(options)
    how = "greedy"
    if decoding.do_sample:
        how = f"temperature {decoding.temperature}, top_p {decoding.top_p}, top_k {decoding.top_k}"
    penalty = (
        f", repetition_penalty {decoding.repetition_penalty}" if decoding.repetition_penalty != 1 else ""
    )
    thinks = thinks_by_default(speaker.tokenizer) if options.thinking is None else options.thinking
    own = " (the folder's own mode)" if options.thinking is None else ""
    return f"thinking {'on' if thinks else 'off'}{own}; {how}{penalty}; at most {options.max_new_tokens} tokens an answer"
