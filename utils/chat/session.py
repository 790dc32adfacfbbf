"""A conversation at the terminal: its history, its commands, and what is printed about it.

Every prompt is rendered from the text anew, by the path that training uses (utils/model/chat_format.py), so the model sees the
conversation as it was trained to see one.
"""

import bisect
import difflib
import functools
import itertools
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.chat.model import RULES, ChatModel, Options
from utils.chat.terminal import QUOTES, AnswerPrinter, loading, note, read_message, show_models
from utils.device import Device
from utils.errors import UserError, complain, explain
from utils.files import read_jsonl, show_path
from utils.model.chat_format import THINKING_MODES
from utils.model.folder import find_models
from utils.settings import ROOT, read_number
from utils.text import localized, shorten

NO_ADVICE = ("For study and research only, not medical advice.", "仅供学习和研究，不能代替医生的诊断和建议。")
SINGLE = (
    "(trained on single questions: each starts afresh; /history on shows it the ones before)",
    "（模型只用单个问题训练过：每个问题都重新开始；/history on 让它看到前文）",
)

# ---- History


@dataclass
class Turn:
    """A question and its answer; `whole` is False if Ctrl-C or the token limit cut the answer."""

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


class History:
    """The system text and the turns. `start` is the first turn that the model is shown; `afresh`: it is shown none."""

    def __init__(self, system: str = "", afresh: bool = False):
        self.system, self.afresh, self.start = system, afresh, 0
        self.turns: list[Turn] = []

    def messages(self, turns: list[Turn], question: str = "") -> list[dict]:
        """The system text, some turns, and a question, as a model's messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        last = [{"role": "user", "content": question}] if question else []
        return [*system, *(message for turn in turns for message in turn.messages()), *last]

    def prompt(self, chat_model: ChatModel, options: Options, question: str, count: int) -> list[int]:
        """The ids that ask `question` after the first `count` turns, of which the oldest are left out, whole ones only, until
        an answer has room. UserError if the question alone is too long.

        At most 2 + log2(turns) renderings: a long conversation takes a tenth of a second for each.
        """
        room = min(options.max_new_tokens, chat_model.context // 2)

        @functools.cache
        def render(start):
            return chat_model.encode(self.messages(self.turns[start:count], question), options)

        def fits(start):
            return len(render(start)) + room <= chat_model.context

        chat_model.check_length(render(count))
        start = count if self.afresh else min(self.start, count)
        if not fits(start):
            start += bisect.bisect_left(range(start, count), True, key=fits)
        self.start = 0 if self.afresh else start
        return render(start)

    def save(self, path: Path) -> int:
        """Append the turns that came to their end to a JSONL file, as one row to train on, or one row per question that was
        asked afresh; return how many turns they are."""
        whole = [turn for turn in self.turns if turn.whole]
        if not whole:
            raise UserError("nothing to save: no answer that came to its end")
        conversations = [[turn] for turn in whole] if self.afresh else [whole]
        rows = [json.dumps({"messages": self.messages(turns)}, ensure_ascii=False) for turns in conversations]
        with open(path, "a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            # a file edited by hand may lack its last line break
            line_break = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(line_break + "".join(row + "\n" for row in rows).encode())
        return len(whole)


def load_history(path: Path, afresh: bool = False) -> History:
    """The conversation in the last row of a JSONL file, as History.save writes it. UserError if it is none."""
    [row] = deque(read_jsonl(path, ["messages"]), maxlen=1)
    messages = row["messages"]
    history = History(messages.pop(0)["content"] if messages[0]["role"] == "system" else "", afresh)
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{show_path(path)}, last line: wanted questions and answers in turn")
    for question, answer in zip(messages[::2], messages[1::2]):
        reasoning = str(answer.get("reasoning_content") or "")
        history.turns.append(Turn(question["content"], answer["content"], reasoning, True))
    return history


# ---- Chat

# help.en.txt says what they do
COMMANDS = "help clear undo retry system history think set save load model exit".split()
OTHER_NAMES = {"?": "help", "reset": "clear", "bye": "exit", "quit": "exit"}
TYPED = [f"/{name}" for name in (*COMMANDS, *OTHER_NAMES)]  # as Tab completes them


class Chat:
    """A session. `system`: the system text, None for the one of the model's training; `load(folder)` makes the ChatModel for
    /model."""

    def __init__(
        self, chat_model: ChatModel, options: Options, system: str | None, load: Callable[[str], ChatModel]
    ):
        self.chat_model, self.options, self.load = chat_model, options, load
        self.system_is_given, self.history_is_given = system is not None, False
        self.history = History(system or "")
        self.unanswered = ""  # a question that Ctrl-C took the answer from, for /retry
        self._follow_training()

    def _follow_training(self):
        """Take what the user has not said from the record of the model's training, and tell it."""
        if not self.system_is_given:
            self.history.system = trained_system(self.chat_model)
        if not self.history_is_given:
            self.history.afresh = self.chat_model.record.get("conversations") == "single"
            if self.history.afresh:
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
        """Do what one message asks for; False when that is to leave. Whatever goes wrong, the conversation stays."""
        if line.startswith("／"):  # as Chinese input methods type it
            line = line.replace("／", "/", 1)
        try:
            if line in ("exit", "quit"):
                return False
            if line.startswith("/"):
                return self._command(line)
            if line.startswith(QUOTES):
                line = line.removeprefix(QUOTES).removesuffix(QUOTES).strip()
            if line:
                self.ask(line, len(self.history.turns))
        except Exception as error:
            unforeseen = f"that failed: {type(error).__name__}: {shorten(str(error), 300)}"
            complain(*(explain(error) or (unforeseen, 1)))
        return True

    def _command(self, line):
        name, _, text = line[1:].partition(" ")
        name = OTHER_NAMES.get(name, name)
        if name not in COMMANDS:
            near = difflib.get_close_matches(f"/{name}", TYPED, n=1)
            raise UserError(
                f"no command /{name}; {f'did you mean {near[0]}?' if near else '/help lists them'}"
            )
        if name != "exit":
            getattr(self, f"_{name}")(text.strip())
        return name != "exit"

    def ask(self, question: str, count: int) -> None:
        """Answer `question` after the first `count` turns of the history, and put it in their place if it was answered."""
        before = self.history.start
        prompt = self.history.prompt(self.chat_model, self.options, question, count)
        if self.history.start > before:
            note(
                f"(the context window of {self.chat_model.context} tokens is full: "
                f"the oldest {self.history.start} of {count} turns are left out)"
            )
        self.unanswered = question
        reply = self.chat_model.answer(prompt, self.options, AnswerPrinter(self.options.show_thinking))
        print(flush=True)
        cut = "" if reply.ended else "; cut at the limit (/set max_new_tokens ...)"
        note(f"[{reply.speed()}{'; stopped by Ctrl-C' if reply.stopped else cut}]")
        if not reply.content:
            note("(no answer, so the question is not kept; /retry asks it again)")
            return
        self.history.turns[count:] = [Turn(question, reply.content, reply.reasoning, reply.ended)]
        self.unanswered = ""

    # ---- commands: each takes the text after its name

    def _help(self, text):
        path = Path(__file__).with_name(localized("help.en.txt", "help.zh.txt"))
        note(path.read_text(encoding="utf-8").rstrip().format(settings=", ".join(RULES)))

    def _clear(self, text):
        self.history, self.unanswered = History(self.history.system, self.history.afresh), ""
        note("(the conversation is forgotten)")

    def _undo(self, text):
        if not self.history.turns:
            raise UserError("nothing to take back")
        note(f"(taken back: {self.history.turns.pop().question})")
        self.history.start, self.unanswered = 0, ""

    def _retry(self, text):
        turns = self.history.turns
        if self.unanswered:
            self.ask(self.unanswered, len(turns))
        elif turns:
            self.ask(turns[-1].question, len(turns) - 1)
        else:
            raise UserError("nothing to answer again")

    def _system(self, text):
        self.history.system, self.system_is_given = text, True
        done = "set" if text else "removed"
        note(f"(system text {done}; the conversation goes on, /clear starts a new one)")

    def _history(self, text):
        if text not in ("", "on", "off"):
            raise UserError(f"/history takes on or off, got {text!r}")
        if text:
            self.history.afresh, self.history_is_given = text == "off", True
        seen = "no earlier question" if self.history.afresh else "the earlier questions and answers"
        note(f"(the model is shown {seen} with each question)")

    def _think(self, text):
        if text and text not in THINKING_MODES:
            raise UserError(f"/think takes on, off or auto, got {text!r}")
        if text:
            self.options.thinking = THINKING_MODES[text]
        note(f"({self.chat_model.describe(self.options)})")

    def _set(self, text):
        words = text.replace("=", " ").split()
        values = {}
        for name, value in itertools.zip_longest(words[::2], words[1::2], fillvalue=""):
            if name not in RULES:
                raise UserError(f"/set has no {name}; it has {', '.join(RULES)}, as in /set temperature 0.6")
            values[name] = read_number(f"/set {name}", value, RULES[name])
        for name, value in values.items():  # of a line with a mistake nothing is taken
            self.options.apply(name, value)
        note(f"({self.chat_model.describe(self.options)})")

    def _save(self, text):
        path = _jsonl_path("/save", text)
        count = self.history.save(path)
        left_out = len(self.history.turns) - count
        cut = f"; {left_out} with a cut answer left out" if left_out else ""
        note(f"({_turns(count)} appended to {show_path(path)}{cut})")

    def _load(self, text):
        path = _jsonl_path("/load", text)
        self.history, self.unanswered = load_history(path, self.history.afresh), ""
        turns = self.history.turns
        last = f"; the last question: {shorten(turns[-1].question)}" if turns else ""
        note(f"({_turns(len(turns))} from {show_path(path)}{last})")

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
        chat_model = self.load(str(folder))
        # This renders its template: a broken one is told now, not at every question.
        described = chat_model.describe(self.options)
        self.chat_model = chat_model
        note(f"({chat_model.name} goes on)\n({described})")
        self._follow_training()


def _turns(count):
    return f"{count} turn{'s' * (count != 1)}"


def _jsonl_path(command, text):
    path = Path(os.path.expanduser(text))
    if path.suffix != ".jsonl":
        raise UserError(f"{command} needs the name of a .jsonl file, as in {command} my_chats.jsonl")
    return path


# ---- Before and without a chat


def greet(chat_models: list[ChatModel], options: Options, device: Device) -> None:
    """Say what is going to answer, and how."""
    for chat_model in chat_models:
        note(f"{chat_model.name} on {device.name}, {device.answers} ({device.reason})")
        note(chat_model.describe(options))
    note(localized(*NO_ADVICE))


def trained_system(chat_model: ChatModel) -> str:
    """The system text that nearly all rows of the model's training shared, which is said; "" if they shared none."""
    system = chat_model.record.get("system") or ""
    if system:
        note(
            f"({localized('the system text of its training is used', '使用训练时的系统提示')}: {shorten(system)})"
        )
    return system


def answer_once(
    chat_model: ChatModel, options: Options, system: str, place: str, question: str, as_json: bool
) -> None:
    """Answer one question that came from `place` by itself, its cache new: on stdout the answer and nothing else."""
    chat_model.stream.reset()
    prompt = chat_model.encode(History(system).messages([], question), options)
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
    note(f"[{place}: {reply.speed()}{cut}]")
