"""The terminal: reading a message that may be Chinese and several lines long, Tab completion, dimmed text, answers."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from utils.text import printable

QUOTES = '"""'
LOOPBACK = ("127.0.0.1", "localhost")  # addresses of this machine alone


def prepare_terminal(commands: Sequence[str]) -> None:
    """Switch on line editing (arrow keys, history, whole pastes) where Python has readline; Windows edits by itself. Tab
    completes `commands`, such as "/help"."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one message
    readline.set_completer_delims(" ")
    readline.set_completer(
        lambda begun, number: [*(name for name in commands if begun and name.startswith(begun)), None][number]
    )
    libedit = "libedit" in (readline.__doc__ or "")  # macOS
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


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


class AnswerPrinter:
    """Prints the pieces of one answer as they come: the answer on stdout, and the thinking on stderr, dimmed."""

    thought = False  # the last piece was thinking

    def __call__(self, text: str, thinking: bool) -> None:
        if not text:
            return
        if self.thought and not thinking:
            print("\n", file=sys.stderr, flush=True)
        self.thought = thinking
        if thinking:
            print(dim(printable(text), sys.stderr), end="", file=sys.stderr, flush=True)
        else:
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
