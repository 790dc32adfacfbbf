"""The rows of a JSON text that is too large to load: the objects of one array, or of the arrays in one object.

Rows leave as texts, whole: what is wrong with one is judged later, when it is parsed, and after a damaged one the reading
goes on at the next object.
"""

import json
import re
from collections.abc import Iterator
from typing import TextIO

BLOCK = 1 << 20  # characters read at a time
LARGEST_ELEMENT = 64 << 20  # characters; an element that has not ended by then is not JSON

# Lists that belong to a row: an object with one of these and none of the others is a row, not a wrapper of rows.
ROW_LISTS = (
    *("messages", "conversations", "options", "option", "choices", "history", "chosen", "rejected"),
    *("prompt", "completion", "选项", "content", "tools"),
)

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")
_NEXT_OBJECT = re.compile(r"\}(?=\s*,\s*\{)")
_WRAPPED = re.compile(r'\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,\s*)*"([^"]*)"\s*:\s*\[\s*(?:[{\]]|$)')
_LENIENT = json.JSONDecoder(strict=False, parse_int=str)  # finds where an element ends; parse_row judges it


def wrapper_key(start: str) -> str:
    """The key under which a text that begins like `start` holds its rows: {"data": [{...; "" where it does not."""
    found = _WRAPPED.match(start)
    return found[1] if found and found[1].lower() not in ROW_LISTS else ""


class JsonStream:
    """A JSON text that is read block by block; `at` is the place in `text`, what has been read and not used up yet."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.at, self.line, self.ended = file, file.read(BLOCK), 0, 1, False

    def array_rows(self) -> Iterator[tuple[int, str]]:
        """(line, text) of every element of the array at the next "["; then the place is after its "]"."""
        self._skip_to(self.text.index("[", self.at) + 1)
        while True:
            self._skip_to(_BETWEEN.match(self.text, self.at).end())
            start = self.at
            end = _element_end(self.text, start, self.ended or len(self.text) - start > LARGEST_ELEMENT)
            if end is None:
                self._read_more()
            elif self.text[start:end] in ("", "]"):
                self.at = end
                return
            else:
                yield self.line, self.text[start:end]
                self._skip_to(end)

    def wrapped_rows(self) -> Iterator[tuple[str, int, str]]:
        """(key, line, text) of every element of every array in the object at the beginning of the text."""
        self._skip_to(self.text.index("{") + 1)
        while True:
            while not self.ended and len(self.text) - self.at < BLOCK // 2:
                self._read_more()
            self._skip_to(_BETWEEN.match(self.text, self.at).end())
            try:
                key, end = _LENIENT.raw_decode(self.text, self.at)
                self._skip_to(_SPACE.match(self.text, self.text.index(":", end) + 1).end())
                if self.text.startswith("[", self.at):
                    for line, text in self.array_rows():
                        yield key, line, text
                else:
                    self._skip_to(_LENIENT.raw_decode(self.text, self.at)[1])
            except ValueError:  # the closing bracket, or damage after the rows
                if self.text[self.at :].strip(" \t\r\n}"):
                    yield "", self.line, self.text[self.at :]
                return

    def _skip_to(self, at):
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def _read_more(self):
        # Doubling: a long element is scanned a few times only.
        more = self.file.read(max(BLOCK, len(self.text) - self.at))
        self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more


def _element_end(text, start, final):
    """Where the array element that starts at `start` ends; None if that needs more text than there is yet (not `final`)."""
    if text.startswith("]", start):
        return start + 1
    if start == len(text):
        return start if final else None
    try:
        end = _LENIENT.raw_decode(text, start)[1]
    except json.JSONDecodeError as error:
        if not final and (error.msg.startswith("Unterminated") or error.pos > len(text) - 16):
            return None
        return _next_object(text, error.pos, final)
    except RecursionError:
        return _next_object(text, start, final)
    return end if final or _BETWEEN.match(text, end).end() < len(text) else None


def _next_object(text, damaged, final):
    found = _NEXT_OBJECT.search(text, damaged)
    return found.end() if found else len(text) if final else None
