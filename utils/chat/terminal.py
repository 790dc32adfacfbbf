"""The terminal: reading a message that may be Chinese and several lines long, dimmed text, and two texts side by side."""

import os
import sys
from typing import TextIO

from utils.text import printable


def prepare_terminal() -> None:
    """Switch on line editing (arrow keys, history, whole pastes) where Python has readline; Windows edits by itself."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one message


def read_message() -> str:
    """One message (str); a line that ends in a backslash goes on in the next. EOFError at Ctrl-D.

    The prompts hold no colour codes, so that readline counts their width right.
    """
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... "))
    typed = "\n".join(lines).encode("utf-8", "surrogateescape")  # a character may be half deleted
    return typed.decode("utf-8", "replace").strip()


def dim(text: str, stream: TextIO) -> str:
    """`text` with the codes for dim where `stream` is a terminal that may be coloured (https://no-color.org)."""
    return f"\033[2m{text}\033[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text


def note(text: str) -> None:
    """Print a line that is not part of an answer: on stderr, dimmed."""
    sys.stdout.flush()
    print(dim(printable(text), sys.stderr), file=sys.stderr, flush=True)


class AnswerPrinter:
    """Prints the pieces of one answer as they come: the answer on stdout, thinking on stderr, dimmed or only mentioned."""

    def __init__(self, show_thinking: bool, show_answer: bool = True):
        self.show_thinking, self.show_answer = show_thinking, show_answer
        self.thought = False

    def __call__(self, text: str, thinking: bool) -> None:
        if thinking:
            shown = printable(text) if self.show_thinking else "" if self.thought else "thinking ..."
            self.thought = True
            print(dim(shown, sys.stderr) if shown else "", end="", file=sys.stderr, flush=True)
        elif text and self.thought:
            print("\n", file=sys.stderr, flush=True)
            self.thought = False
        if text and self.show_answer and not thinking:
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
