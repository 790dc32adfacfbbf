"""A conversation at the terminal: its turns, its commands, and what is printed about it.

Every prompt is rendered from the text anew, by the path that training uses (utils/model/chat_format.py), so the model sees the
conversation as it was trained to see one.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.chat.model import ChatModel, Options
from utils.chat.terminal import QUOTES, AnswerPrinter, note, read_message
from utils.errors import UserError, complain, explain
from utils.files import show_path
from utils.model.chat_format import THINKING_MODES
from utils.model.folder import find_models, written_at
from utils.settings import ROOT
from utils.text import localized, shorten

SINGLE = (
    "(trained on single questions: each starts afresh; /history on shows it the ones before)",
    "（模型只用单个问题训练过：每个问题都重新开始；/history on 让它看到前文）",
)
COMMANDS = "help clear undo retry system history think save model exit".split()  # see help.en.txt
TYPED = [f"/{name}" for name in COMMANDS]  # as Tab completes them


class Turn(NamedTuple):
    """The messages of a question and of its answer; `whole` is False if Ctrl-C or the token limit cut the answer."""

    messages: list[dict]
    whole: bool


class Chat:
    """A session. `load(folder)` makes the ChatModel for /model; `start` is the first turn that still fits the context window."""

    def __init__(self, chat_model: ChatModel, options: Options, load: Callable[[str], ChatModel]):
        self.options, self.load = options, load
        self.turns: list[Turn] = []
        self.listed: list[Path] = []  # the models that /model has shown
        self._talk_to(chat_model)

    def _talk_to(self, chat_model):
        """Go on with this model, with the system text and the history that it was trained on."""
        note(chat_model.describe(self.options))  # a template that is broken is told here, once
        self.chat_model, self.start = chat_model, 0
        if chat_model.single:
            note(localized(*SINGLE))

    def run(self) -> None:
        """Read and answer until Ctrl-D or /exit. Ctrl-C at any point only ends what is being done."""
        while True:
            try:
                if not self.handle(read_message()):
                    return
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                note("\n(stopped; Ctrl-D or /exit leaves)")

    def handle(self, line: str) -> bool:
        """Do what one message asks for; False when that is to leave. Whatever goes wrong, the chat goes on."""
        if line in ("exit", "quit", "/exit", "／exit"):
            return False
        try:
            if line.startswith(("/", "／")):  # the second as Chinese input methods type it
                name, _, text = line[1:].partition(" ")
                if name not in COMMANDS:
                    raise UserError(f"no command /{name}; /help lists them")
                getattr(self, f"_{name}")(text.strip())
            elif question := line.removeprefix(QUOTES).removesuffix(QUOTES).strip():
                self.ask(question)
        except Exception as error:
            unforeseen = f"that failed: {type(error).__name__}: {shorten(str(error), 300)}"
            complain(*(explain(error) or (unforeseen, 1)))
        return True

    def ask(self, question: str) -> None:
        """Answer `question`, and keep both."""
        reply = self.chat_model.answer(self._prompt(question), self.options, AnswerPrinter())
        print(flush=True)
        note(f"[{reply}]")
        if reply.content:
            self.turns.append(
                Turn([{"role": "user", "content": question}, reply.message()], reply.end == "stop")
            )
        else:
            note("(no answer, so the question is not kept)")

    def _prompt(self, question):
        """The ids that ask `question` after the turns, of which the oldest are left out until an answer has room; UserError if the
        question alone is too long."""
        model, count, start = self.chat_model, len(self.turns), min(self.start, len(self.turns))
        while True:
            turns = [] if model.single else self.turns[start:]
            messages = [message for turn in turns for message in turn.messages]
            prompt = model.encode([*messages, {"role": "user", "content": question}], self.options)
            if not turns or len(prompt) + min(self.options.limit, model.context // 2) <= model.context:
                break
            start += 1
        model.check_length(prompt)
        if start > self.start:
            left_out = f"the oldest {start} of {count} turns are left out"
            note(f"(the context window of {model.context} tokens is full: {left_out})")
        self.start = start
        return prompt

    # ---- commands: each takes the text after its name

    def _help(self, text):
        path = Path(__file__).with_name(localized("help.en.txt", "help.zh.txt"))
        note(path.read_text(encoding="utf-8").rstrip())

    def _clear(self, text):
        self.turns.clear()
        note("(the conversation is forgotten)")

    def _undo(self, text):
        if not self.turns:
            raise UserError("nothing to take back")
        note(f"(taken back: {self.turns.pop().messages[0]['content']})")

    def _retry(self, text):
        if not self.turns:
            raise UserError("nothing to answer again")
        self.ask(self.turns.pop().messages[0]["content"])

    def _system(self, text):
        self.chat_model.system = text
        done = "set for this model" if text else "removed"
        note(f"(system text {done}; the conversation goes on, /clear starts a new one)")

    def _history(self, text):
        if text not in ("", "on", "off"):
            raise UserError(f"/history takes on or off, got {text!r}")
        self.chat_model.single = text == "off" if text else self.chat_model.single
        asked = "by itself" if self.chat_model.single else "with the earlier questions and answers"
        note(f"(each question is asked {asked})")

    def _think(self, text):
        if text and text not in THINKING_MODES:
            raise UserError(f"/think takes on, off or auto, got {text!r}")
        self.options.thinking = THINKING_MODES[text] if text else self.options.thinking
        note(self.chat_model.describe(self.options))

    def _save(self, text):
        """Append the turns that came to their end to a JSONL file: as one row to train on, or as one for each question that
        was asked by itself."""
        path = Path(os.path.expanduser(text))
        if path.suffix != ".jsonl":
            raise UserError("/save needs the name of a .jsonl file, as in /save my_chats.jsonl")
        whole = [turn.messages for turn in self.turns if turn.whole]
        if not whole:
            raise UserError("nothing to save: no answer that came to its end")
        system = [{"role": "system", "content": self.chat_model.system}] if self.chat_model.system else []
        rows = [system + turn for turn in whole] if self.chat_model.single else [sum(whole, system)]
        rows = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in rows]
        before = path.read_bytes() if path.exists() else b""
        gap = "\n" if before and not before.endswith(b"\n") else ""  # as a file edited by hand may need it
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(gap + "".join(rows))
        cut = len(self.turns) - len(whole)
        left_out = f"; {cut} with a cut answer left out" if cut else ""
        note(f"({len(whole)} turn{'s' * (len(whole) != 1)} appended to {show_path(path)}{left_out})")

    def _model(self, text):
        """Go on with the model of a folder, found from here or in the repository, of a number as it was listed, or of a Hub id;
        without text list those here."""
        if not text:
            self.listed = find_models()
            for number, folder in enumerate(self.listed, 1):
                finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(written_at(folder)))
                note(f"  {number}  {show_path(folder):<40} {finished}")
            return note(f"({self.chat_model.name} is answering; /model FOLDER or its number changes that)")
        if text.isdecimal() and 1 <= int(text) <= len(self.listed):
            text = str(self.listed[int(text) - 1])
        folder = next((path for path in (Path(os.path.expanduser(text)), ROOT / text) if path.exists()), text)
        note(f"loading {show_path(folder)} ...")
        self._talk_to(self.load(str(folder)))
