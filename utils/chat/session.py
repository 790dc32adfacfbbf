"""A conversation at the terminal, with one model or with two at once: its commands, and what is printed about it."""

import difflib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from utils.chat.history import History, Turn, load_history
from utils.chat.model import ChatModel, Reply
from utils.chat.options import KINDS, Options, read_value
from utils.chat.terminal import QUOTES, AnswerPrinter, loading, note, read_message, show_models
from utils.device import Device
from utils.errors import UserError, complain, explain
from utils.files import show_path
from utils.model.chat_format import THINKING_MODES
from utils.model.folder import find_models
from utils.model.generate import thinks_by_default
from utils.settings import ROOT
from utils.text import shorten, side_by_side

COMMANDS = {  # name: (argument, meaning)
    "help": ("", "list these commands; also /?"),
    "clear": ("", "forget the conversation, keep the system text; also /reset"),
    "undo": ("", "take back the last question and its answer"),
    "retry": ("", "answer the last question again"),
    "system": ("TEXT", "set the system text; without TEXT remove it"),
    "think": ("on|off|auto", "think before answering; auto: as the model folder was trained"),
    "set": ("NAME VALUE", f"{', '.join(KINDS)}; temperature 0 is greedy"),
    "save": ("FILE.jsonl", "append the conversation to FILE as a row to train on"),
    "load": ("FILE.jsonl", "go on with the last conversation in FILE"),
    "model": ("FOLDER", "go on with another model; without FOLDER list them"),
    "compare": ("FOLDER", "let a second model answer beside this one; without FOLDER stop that"),
    "exit": ("", "leave, as Ctrl-D does; also /bye, exit, quit"),
}
OTHER_NAMES = {"?": "help", "reset": "clear", "bye": "exit", "quit": "exit"}
# For Tab: a command's argument.
ARGUMENTS = {name: argument for name, (argument, _) in COMMANDS.items()} | dict.fromkeys(OTHER_NAMES, "")


class Chat:
    """A session. `load(folder)` makes the ChatModel for /model and /compare."""

    def __init__(
        self, chat_model: ChatModel, options: Options, system: str, load: Callable[[str], ChatModel]
    ):
        self.chat_model, self.options, self.load = chat_model, options, load
        self.history = History(system)
        self.other = None  # the second ChatModel, while /compare is on
        self.unanswered = ""  # a question that Ctrl-C took the answer from, for /retry

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
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise UserError(f"no command /{name}; {hint}")
        if name != "exit":
            getattr(self, f"_{name}")(text.strip())
        return name != "exit"

    # ---- questions

    def ask(self, question: str, count: int) -> None:
        """Answer `question` after the first `count` turns of the history, and put it in their place if it was answered."""
        chat_models = [self.chat_model, self.other] if self.other else [self.chat_model]
        prompts = [self._prompt(chat_model, question, count) for chat_model in chat_models]
        self.unanswered = question
        if self.other:
            replies = list(map(self._answer_aside, chat_models, prompts))
            self._show_both([reply.content for reply in replies])
        else:
            printer = AnswerPrinter(self.options.show_thinking)
            replies = [self.chat_model.answer(prompts[0], self.options, printer)]
            print(flush=True)
        for chat_model, reply in zip(chat_models, replies):
            self._show_speed(chat_model, reply)
        reply = replies[0]
        if not reply.content:
            note("(no answer, so the question is not kept; /retry asks it again)")
            return
        self.history.turns[count:] = [Turn(question, reply.content, reply.reasoning, reply.ended)]
        self.unanswered = ""

    def _prompt(self, chat_model, question, count):
        before = self.history.start
        prompt = self.history.prompt(chat_model, self.options, question, count)
        if self.history.start > before:
            note(
                f"(the context window of {chat_model.context} tokens is full: "
                f"the oldest {self.history.start} of {count} turns are left out)"
            )
        return prompt

    def _answer_aside(self, chat_model, prompt):
        note(f"({chat_model.name} is answering ...)")
        reply = chat_model.answer(prompt, self.options, lambda text, thinking: None)
        if reply.stopped:
            raise KeyboardInterrupt
        return reply

    def _show_both(self, answers):
        names = (self.chat_model.name, self.other.name)
        columns = [f"{name}\n\n{answer or '(no answer)'}" for name, answer in zip(names, answers)]
        print(side_by_side(*columns, shutil.get_terminal_size().columns), flush=True)

    def _show_speed(self, chat_model, reply):
        cut = "" if reply.ended else "; cut at the limit (/set max_new_tokens ...)"
        cut = "; stopped by Ctrl-C" if reply.stopped else cut
        who = f"{chat_model.name}: " if self.other else ""
        note(f"[{who}{speed_of(reply)}{cut}]")

    # ---- commands: each takes the text after its name

    def _help(self, text):
        for name, (argument, meaning) in COMMANDS.items():
            note(f"  {f'/{name} {argument}':<20} {meaning}")
        note(f"  Several lines: {QUOTES} before and after them, or \\ at the end of a line. Tab completes.")
        note("  Ctrl-C stops an answer; what there is of it stays.")

    def _clear(self, text):
        self.history, self.unanswered = History(self.history.system), ""
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
        self.history.system = text
        done = "set" if text else "removed"
        note(f"(system text {done}; the conversation goes on, /clear starts a new one)")

    def _think(self, text):
        if text and text not in THINKING_MODES:
            raise UserError(f"/think takes on, off or auto, got {text!r}")
        if text:
            self.options.thinking = THINKING_MODES[text]
        self._show_options()

    def _set(self, text):
        words = text.replace("=", " ").split()
        values = {}
        for name, value in itertools.zip_longest(words[::2], words[1::2], fillvalue=""):
            if name not in KINDS:
                raise UserError(f"/set has no {name}; it has {', '.join(KINDS)}, as in /set temperature 0.6")
            values[name] = read_value(name, value, f"/set {name}")
        for name, value in values.items():  # of a line with a mistake nothing is taken
            self.options.apply(name, value)
        self._show_options()

    def _show_options(self):
        note(f"({describe(self.chat_model, self.options)})")

    def _save(self, text):
        path = _jsonl_path("/save", text)
        count = self.history.save(path)
        left_out = len(self.history.turns) - count
        cut = f"; {left_out} with a cut answer left out" if left_out else ""
        note(f"({_turns(count)} appended to {show_path(path)}{cut})")

    def _load(self, text):
        path = _jsonl_path("/load", text)
        self.history, self.unanswered = load_history(path), ""
        turns = self.history.turns
        last = f"; the last question: {shorten(turns[-1].question)}" if turns else ""
        note(f"({_turns(len(turns))} from {show_path(path)}{last})")

    def _model(self, text):
        if not text:
            show_models(find_models())
            note(f"({self.chat_model.name} is answering; /model FOLDER or its number changes that)")
            return
        self.chat_model = self._load_model(text)
        note(f"({self.chat_model.name} goes on)")
        self._show_options()

    def _compare(self, text):
        if not text:
            self.other = None
            note("(one model answers)")
            return
        self.other = self._load_model(text)
        note(f"({self.other.name} now answers beside {self.chat_model.name}, whose answers make the history)")
        if self.history.turns:
            last = self.history.turns[-1]
            prompt = self._prompt(self.other, last.question, len(self.history.turns) - 1)
            reply = self._answer_aside(self.other, prompt)
            self._show_both([last.answer, reply.content])
            self._show_speed(self.other, reply)

    def _load_model(self, text):
        """The ChatModel of a folder, found from here or in the repository, of a number in the list, or of a Hub id."""
        found = find_models() if text.isdecimal() else []
        if text.isdecimal() and 1 <= int(text) <= len(found):
            text = str(found[int(text) - 1])
        folder = next((path for path in (_user_path(text), ROOT / text) if path.exists()), text)
        loading(show_path(folder))
        chat_model = self.load(str(folder))
        # This renders its template: a broken one is told now, not at every question.
        describe(chat_model, self.options)
        return chat_model


def _turns(count):
    return f"{count} turn{'s' * (count != 1)}"


def _user_path(text):
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise UserError(f"{text}: {error}") from None


def _jsonl_path(command, text):
    path = _user_path(text)
    if path.suffix != ".jsonl":
        raise UserError(f"{command} needs the name of a .jsonl file, as in {command} my_chats.jsonl")
    return path


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
    note(f"[{place}: {speed_of(reply)}{cut}]")
