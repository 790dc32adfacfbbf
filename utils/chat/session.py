"""A conversation at the terminal: its turns, its commands, and what is printed about it.

Every prompt is rendered from the text anew, by the path that training uses (utils/model/chat_format.py), so the model sees the
conversation as it was trained to see one.
"""

import bisect
import difflib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.chat.model import RULES, ChatModel, Options
from utils.chat.terminal import QUOTES, AnswerPrinter, loading, note, read_message, show_models
from utils.errors import UserError, complain, explain
from utils.files import show_path
from utils.model.chat_format import THINKING_MODES
from utils.model.folder import find_models
from utils.settings import ROOT, read_number
from utils.text import localized, shorten

SINGLE = (
    "(trained on single questions: each starts afresh; /history on shows it the ones before)",
    "（模型只用单个问题训练过：每个问题都重新开始；/history on 让它看到前文）",
)
COMMANDS = "help clear undo retry system history think set save model exit".split()  # see help.en.txt
TYPED = [f"/{name}" for name in COMMANDS]  # as Tab completes them


class Turn(NamedTuple):
    """A question and its answer; `whole` is False if Ctrl-C or the token limit cut the answer."""

    question: str
    answer: str
    reasoning: str
    whole: bool


def as_messages(system: str, turns: list[Turn], question: str = "") -> list[dict]:
    """The system text, some turns, and a question (where they are not empty) as a model's messages."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        reasoning = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer, **reasoning})
    return [*messages, {"role": "user", "content": question}] if question else messages


class Chat:
    """A session. `load(folder)` makes the ChatModel for /model.

    `start` is the first turn that the model is shown; `afresh`: it is shown none.
    """

    def __init__(self, chat_model: ChatModel, options: Options, load: Callable[[str], ChatModel]):
        self.options, self.load = options, load
        self.turns: list[Turn] = []
        self.start, self.system, self.afresh = 0, "", False
        self.given: set[str] = set()  # "system" and "history", where a command has set them
        self._talk_to(chat_model)

    def _talk_to(self, chat_model):
        """Go on with this model. What the user has not set is as in the model's training."""
        note(chat_model.introduce(self.options))  # a template that is broken is told here, once
        self.chat_model = chat_model
        if "system" not in self.given:
            self.system = chat_model.system
        if "history" not in self.given:
            self.afresh = chat_model.single
            if self.afresh:
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
                    near = difflib.get_close_matches(f"/{name}", TYPED, n=1)
                    hint = f"did you mean {near[0]}?" if near else "/help lists them"
                    raise UserError(f"no command /{name}; {hint}")
                getattr(self, f"_{name}")(text.strip())
            elif question := line.removeprefix(QUOTES).removesuffix(QUOTES).strip():
                self.ask(question)
        except Exception as error:
            unforeseen = f"that failed: {type(error).__name__}: {shorten(str(error), 300)}"
            complain(*(explain(error) or (unforeseen, 1)))
        return True

    def ask(self, question: str) -> None:
        """Answer `question`, and keep both."""
        prompt = self._prompt(question)
        reply = self.chat_model.answer(prompt, self.options, AnswerPrinter())
        print(flush=True)
        cut = "" if reply.ended else "; cut at the limit (/set max_new_tokens ...)"
        note(f"[{reply.speed()}{'; stopped by Ctrl-C' if reply.stopped else cut}]")
        if reply.content:
            self.turns.append(Turn(question, reply.content, reply.reasoning, reply.ended))
        else:
            note("(no answer, so the question is not kept)")

    def _prompt(self, question):
        """The ids that ask `question` after the turns, of which the oldest are left out, whole ones only, until an answer has
        room. UserError if the question alone is too long."""

        @functools.cache
        def render(start):
            return self.chat_model.encode(
                as_messages(self.system, self.turns[start:], question), self.options
            )

        def fits(start):
            return len(render(start)) + min(self.options.limit, context // 2) <= context

        context, count = self.chat_model.context, len(self.turns)
        self.chat_model.check_length(render(count))
        if self.afresh:
            return render(count)
        if not fits(self.start):
            self.start = bisect.bisect_left(range(count), True, lo=self.start, key=fits)
            left_out = f"the oldest {self.start} of {count} turns are left out"
            note(f"(the context window of {context} tokens is full: {left_out})")
        return render(self.start)

    # ---- commands: each takes the text after its name

    def _help(self, text):
        path = Path(__file__).with_name(localized("help.en.txt", "help.zh.txt"))
        note(path.read_text(encoding="utf-8").rstrip())

    def _clear(self, text):
        self.turns, self.start = [], 0
        note("(the conversation is forgotten)")

    def _undo(self, text):
        if not self.turns:
            raise UserError("nothing to take back")
        note(f"(taken back: {self.turns.pop().question})")
        self.start = 0

    def _retry(self, text):
        if not self.turns:
            raise UserError("nothing to answer again")
        last = self.turns.pop()
        self.start = min(self.start, len(self.turns))
        self.ask(last.question)

    def _system(self, text):
        self.system = text
        self.given.add("system")
        done = "set" if text else "removed"
        note(f"(system text {done}; the conversation goes on, /clear starts a new one)")

    def _history(self, text):
        if text not in ("", "on", "off"):
            raise UserError(f"/history takes on or off, got {text!r}")
        if text:
            self.afresh = text == "off"
            self.given.add("history")
        asked = "by itself" if self.afresh else "with the earlier questions and answers"
        note(f"(each question is asked {asked})")

    def _think(self, text):
        if text and text not in THINKING_MODES:
            raise UserError(f"/think takes on, off or auto, got {text!r}")
        if text:
            self.options.thinking = THINKING_MODES[text]
        note(f"({self.chat_model.describe(self.options)})")

    def _set(self, text):
        name, _, value = text.replace("=", " ").partition(" ")
        if name and name not in RULES:
            raise UserError(f"/set has no {name}; it has {', '.join(RULES)}, as in /set temperature 0.6")
        if name:
            self.options.numbers[name] = read_number(f"/set {name}", value.strip(), RULES[name])
        note(f"({self.chat_model.describe(self.options)})")

    def _save(self, text):
        """Append the turns that came to their end to a JSONL file: one row to train on, or one for each question that was
        asked afresh."""
        path = Path(os.path.expanduser(text))
        if path.suffix != ".jsonl":
            raise UserError("/save needs the name of a .jsonl file, as in /save my_chats.jsonl")
        whole = [turn for turn in self.turns if turn.whole]
        if not whole:
            raise UserError("nothing to save: no answer that came to its end")
        lines = []
        for turns in [[turn] for turn in whole] if self.afresh else [whole]:
            lines.append(json.dumps({"messages": as_messages(self.system, turns)}, ensure_ascii=False) + "\n")
        with open(path, "a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # a file edited by hand may lack its last line break
                lines.insert(0, "\n")
            file.write("".join(lines).encode())
        cut = len(self.turns) - len(whole)
        left_out = f"; {cut} with a cut answer left out" if cut else ""
        note(f"({len(whole)} turn{'s' * (len(whole) != 1)} appended to {show_path(path)}{left_out})")

    def _model(self, text):
        """Go on with the model of a folder, found from here or in the repository, of a number in the list, or of a Hub id."""
        found = find_models()
        if not text:
            show_models(found)
            note(f"({self.chat_model.name} is answering; /model FOLDER or its number changes that)")
            return
        if text.isdecimal() and 1 <= int(text) <= len(found):
            text = str(found[int(text) - 1])
        folder = next((path for path in (Path(os.path.expanduser(text)), ROOT / text) if path.exists()), text)
        loading(show_path(folder))
        self._talk_to(self.load(str(folder)))
