"""The terminal: reading a message that may be Chinese and several lines long, Tab completion, dimmed text, answers."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from utils.files import show_path
from utils.model.folder import written_at
from utils.text import printable

QUOTES = '"""'
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses of this machine alone


def prepare_terminal(commands: Sequence[str]) -> None:
    """Switch on line editing (arrow keys, history, whole pastes) where Python has readline; Windows edits by itself. Tab
    completes `commands`, such as "/help"."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one message
    readline.set_completer_delims(" ")
    readline.set_completer(lambda begun, number: [*completions(begun, commands), None][number])
    libedit = "libedit" in (readline.__doc__ or "")  # macOS
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completions(begun: str, commands: Sequence[str]) -> list[str]:
    """The commands that begin so."""
    return [command for command in commands if begun.startswith("/") and command.startswith(begun)]


def read_message() -> str:
    """One message, of several lines until the quotes that begin it are closed; EOFError at Ctrl-D.

    The prompts hold no colour codes, so that readline counts their width right.
    """
    text = input("> ")
    while (begun := text.strip()).startswith(QUOTES) and not (len(begun) >= 6 and begun.endswith(QUOTES)):
        text += "\n" + input("... ")
    typed = text.encode("utf-8", "surrogateescape")  # a character may be half deleted
    return typed.decode("utf-8", "replace").strip()


def dim(text: str, stream: TextIO) -> str:
    """`text` with the codes for dim if `stream` is a terminal that may be coloured (https://no-color.org)."""
    return f"\033[2m{text}\033[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text


def note(text: str) -> None:
    """Print a line that is not part of an answer: on stderr, dimmed."""
    sys.stdout.flush()
    print(dim(printable(text), sys.stderr), file=sys.stderr, flush=True)


def loading(name: str) -> None:
    """Say at a terminal that `name` is being loaded, which takes seconds."""
    if sys.stderr.isatty():
        note(f"loading {name} ...")


def show_models(found: list[Path]) -> None:
    """List model folders with a number, and when they were finished."""
    for number, folder in enumerate(found, 1):
        finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(written_at(folder)))
        note(f"  {number}  {show_path(folder):<40} {finished}")


class AnswerPrinter:
    """Prints the pieces of one answer as they come: the answer on stdout, if wanted, and the thinking on stderr, dimmed."""

    def __init__(self, show_answer: bool = True):
        self.show_answer, self.thought = show_answer, False

    def __call__(self, text: str, thinking: bool) -> None:
        if thinking and text:
            self.thought = True
            print(dim(printable(text), sys.stderr), end="", file=sys.stderr, flush=True)
        elif text and self.thought:
            self.thought = False
            print("\n", file=sys.stderr, flush=True)
        if text and self.show_answer and not thinking:
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
