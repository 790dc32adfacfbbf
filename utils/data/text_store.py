"""Texts that wait in a temporary file, so that memory does not grow with them."""

import itertools
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path


class TextStore:
    """Texts (bytes) by their number, in the order they came in. Only where each one ends stays in memory: 8 bytes a text."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)
        self.ends = array("q", [0])

    def add(self, texts: bytes, lengths: Iterable[int]) -> None:
        """Take in texts, joined, of these lengths (bytes)."""
        self.file.write(texts)
        self.ends.extend(itertools.islice(itertools.accumulate(lengths, initial=self.ends[-1]), 1, None))

    def read(self, start: int, end: int | None = None) -> bytes:
        """The texts number `start` to `end` - 1, joined; without `end` the one text. Nothing can be added after that."""
        self.file.flush()
        unbuffered, offset = self.file.raw, self.ends[start]  # a buffer would read 8 KB for each text
        unbuffered.seek(offset)
        return unbuffered.read(self.ends[start + 1 if end is None else end] - offset)
