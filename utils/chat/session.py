"""A conversation with one model, or with two at once: its history, its commands, and what is printed about them.

The history is kept as questions and answers in plain text; every prompt is rendered from it anew, by the path that
training uses (utils/model/chat_format.py), so the model sees the conversation as it was trained to see one.
"""

import difflib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.chat.model import ChatModel, Options, Reply
from utils.chat.terminal import AnswerPrinter, note, read_message
from utils.device import Device
from utils.errors import RunError, UserError, complain, explain_os_error
from utils.model.chat_format import encode_prompt
from utils.model.generate import thinks_by_default
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
class Turn:
    """A question and its answer; `whole` is False where Ctrl-C or the token limit cut the answer."""

    question: str
    answer: str
    reasoning: str
    whole: bool

    def messages(self) -> list[dict]:
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer, **reasoning},
        ]


class Chat:
    """A session at the terminal. `load(folder)` makes the ChatModel for /compare."""

    def __init__(
        self, chat_model: ChatModel, options: Options, system: str, load: Callable[[str], ChatModel]
    ):
        self.chat_model, self.options, self.system, self.load = chat_model, options, system, load
        self.other = None  # the second ChatModel, while /compare is on
        self.turns = []
        self.start = 0  # the first turn that still fits into the context window
        self.unanswered = ""  # a question that Ctrl-C took the answer from, for /retry

    def run(self) -> None:
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

    def handle(self, line: str) -> bool:
        """Do what one message asks for; False when it is /exit."""
        if line.startswith("／"):  # as Chinese input methods type it
            line = line.replace("／", "/", 1)
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

    def messages(self, question: str, start: int, count: int) -> list[dict]:
        """The conversation as the model is to see it: system text, turns `start` to `count`, the question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        history = [message for turn in self.turns[start:count] for message in turn.messages()]
        return [*system, *history, {"role": "user", "content": question}]

    def fit(self, chat_model: ChatModel, question: str, count: int) -> list[int]:
        """The ids of the prompt, the oldest turns left out, whole ones only, until an answer has room (and that is said)."""
        room = min(self.options.max_new_tokens, chat_model.context // 2)
        for start in range(min(self.start, count), count + 1):
            prompt = encode_prompt(
                chat_model.tokenizer, self.messages(question, start, count), self.options.thinking
            )
            if len(prompt) + room <= chat_model.context:
                break
        chat_model.check_length(prompt)
        if start > self.start:
            note(
                f"(the context window of {chat_model.context} tokens is full: "
                f"the oldest {start} of {count} turns are left out)"
            )
        self.start = start
        return prompt

    def ask(self, question: str, count: int) -> None:
        """Answer `question` after the first `count` turns of the history, and put it in their place if it was answered."""
        chat_models = [self.chat_model, self.other] if self.other else [self.chat_model]
        prompts = [self.fit(chat_model, question, count) for chat_model in chat_models]
        self.unanswered = question
        if self.other:
            replies = [
                self._answer_aside(chat_model, prompt) for chat_model, prompt in zip(chat_models, prompts)
            ]
            self._show_both([reply.content for reply in replies])
        else:
            printer = AnswerPrinter(self.options.show_thinking)
            replies = [self.chat_model.answer(prompts[0], self.options, printer)]
            print(flush=True)
        for chat_model, reply in zip(chat_models, replies):
            self._tell(chat_model, reply)
        reply = replies[0]
        if not reply.content:
            note("(no answer, so the question is not kept; /retry asks it again)")
            return
        self.turns[count:] = [Turn(question, reply.content, reply.reasoning, reply.ended)]
        self.unanswered = ""

    def _answer_aside(self, chat_model, prompt):
        note(f"({chat_model.name} is answering ...)")
        reply = chat_model.answer(prompt, self.options, lambda text, thinking: None)
        if reply.stopped:
            raise KeyboardInterrupt
        return reply

    def _show_both(self, answers):
        left, right = (
            f"{chat_model.name}\n\n{answer or '(no answer)'}"
            for chat_model, answer in zip((self.chat_model, self.other), answers)
        )
        print(side_by_side(left, right, shutil.get_terminal_size().columns), flush=True)

    def _tell(self, chat_model, reply):
        cut = "" if reply.ended else "; cut at the limit (/set max_new_tokens=...)"
        cut = "; stopped by Ctrl-C" if reply.stopped else cut
        who = f"{chat_model.name}: " if self.other else ""
        note(f"[{who}{speed_of(reply)}{cut}]")

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
            self.options.generator.manual_seed(value)
        elif name == "temperature":  # 0 would divide by zero; its limit is greedy decoding
            self.options.decoding.update(
                {"do_sample": True, "temperature": value} if value else {"do_sample": False}
            )
        else:
            self.options.decoding[name] = value

    def _show_decoding(self):
        note(f"({describe(self.chat_model, self.options)})")

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
            # a file edited by hand may lack its last line break
            line_break = b"" if file.read(1) in (b"", b"\n") else b"\n"
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
        note(f"({self.other.name} now answers beside {self.chat_model.name}, whose answers make the history)")
        if self.turns:
            last = self.turns[-1]
            reply = self._answer_aside(self.other, self.fit(self.other, last.question, len(self.turns) - 1))
            self._show_both([last.answer, reply.content])
            self._tell(self.other, reply)

    def _exit(self, text):
        """Nothing to do: `handle` ends the session."""


def greet(chat_model: ChatModel, options: Options, device: Device) -> None:
    """Say what is going to answer, and how."""
    note(f"{chat_model.name} on {device.name}, {device.answers} ({device.reason})")
    note(describe(chat_model, options))
    note("For study and research only, not medical advice.")


def describe(chat_model: ChatModel, options: Options) -> str:
    """How the model is going to answer, in one line."""
    decoding, how = chat_model.decoding(options), "greedy"
    if decoding.do_sample:
        how = f"temperature {decoding.temperature}, top_p {decoding.top_p}, top_k {decoding.top_k}"
    if decoding.repetition_penalty != 1:
        how += f", repetition_penalty {decoding.repetition_penalty}"
    mode = "on" if options.thinking else "off"
    if options.thinking is None:
        mode = "on" if thinks_by_default(chat_model.tokenizer) else "off"
        mode += " (the folder's own mode)"
    return f"thinking {mode}; {how}; at most {options.max_new_tokens} tokens an answer"


def speed_of(reply: Reply) -> str:
    """Tokens and speed of an answer, in words."""
    after_first = reply.seconds - reply.first
    rate = ""
    if reply.tokens > 1 and after_first > 0:
        rate = f"{(reply.tokens - 1) / after_first:.1f} tokens/s, "
    return f"{reply.tokens} tokens, {rate}first after {reply.first:.2f} s"


def answer_once(
    chat_model: ChatModel, options: Options, system: str, place: str, question: str, as_json: bool
):
    """Answer one question that came from `place` by itself, its cache new: on stdout the answer and nothing else."""
    chat_model.stream.reset()
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    prompt = encode_prompt(chat_model.tokenizer, messages, options.thinking)
    try:
        chat_model.check_length(prompt)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    reply = chat_model.answer(prompt, options, AnswerPrinter(options.show_thinking, show_answer=not as_json))
    if reply.stopped:
        raise KeyboardInterrupt
    if as_json:
        row = {"question": question, "answer": reply.content, "tokens": reply.tokens}
        print(json.dumps(row | {"seconds": round(reply.seconds, 3)}, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    cut = "" if reply.ended else f"; cut at the limit of {options.max_new_tokens} tokens (--max-new-tokens)"
    note(f"[{place}: {speed_of(reply)}{cut}]")
