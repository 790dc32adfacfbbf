"""Text for people: widths, columns, sizes, durations, progress, and nothing that would control the terminal."""

import locale
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator

PLAIN_SECONDS = 15  # between two lines of progress, off a terminal
QUIET_SECONDS = 2  # shorter work is not mentioned

# Text from a model, a server or a file may hold anything. Control characters would move the cursor or change the terminal,
# and bidirectional ones show letters in another order than they are in: all are shown as U+FFFD.
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN_AS = dict.fromkeys(_CONTROLS, "\ufffd")


def printable(text: str) -> str:
    """`text` without characters that would control the terminal; line breaks and tabs stay."""
    return text.translate(_SHOWN_AS)


def say(text: str, flush: bool = False) -> None:
    """Print on stdout a text that may come from elsewhere. `flush`: at once, as what is told underway has to be."""
    print(printable(text), flush=flush)


def localized(english: str, chinese: str) -> str:
    """Whichever of two texts is in the language that the environment asks for: Chinese or else English."""
    variables = ("LC_ALL", "LC_MESSAGES", "LANG")
    named = next(filter(None, map(os.environ.get, variables)), None) or locale.getlocale()[0] or ""
    return chinese if named.lower().startswith(("zh", "chinese")) else english


def text_width(text: str) -> int:
    """Character cells: Chinese characters and full-width punctuation take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def shorten(text: str, limit: int = 70) -> str:
    """The text in one line of at most `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def format_bytes(count: float) -> str:
    """1503300328 -> "1.40 GiB": binary units, for memory and disk alike."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if count < 1024:
            return f"{count:.{digits}f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """62 -> "62 s", 90 -> "1.5 min", 7300 -> "2.0 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def listed(names: list, most: int = 5) -> str:
    """The first few of `names` for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


# ---- Progress: tqdm's bar on a terminal, a plain line now and then elsewhere


class ByteProgress:
    """`with ByteProgress(name, start, size) as progress: progress.show(done)`, in bytes; `start`: what was there before.

    With `always` False, what takes less than QUIET_SECONDS is not mentioned.
    """

    def __init__(self, name: str, start: int, size: int, always: bool = True):
        self.name, self.start, self.size, self.done, self.always = printable(name), start, size, start, always
        self.began = self.shown = time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            units = {"unit": "iB", "unit_scale": True, "unit_divisor": 1024}
            delay = 0 if always else QUIET_SECONDS
            self.bar = _bar(self.name, total=size, initial=start, delay=delay, **units)

    def __enter__(self):
        if self.start:
            there = f"{format_bytes(self.start)} of {format_bytes(self.size)}"
            print(f"  {self.name}: going on at {there}", flush=True)
        return self

    def show(self, done: int) -> None:
        """Tell that `done` bytes are there."""
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done, now = done, time.monotonic()
        if self.bar is None and now - self.shown >= PLAIN_SECONDS:
            self.shown = now
            self._print_line(now)

    def __exit__(self, *_):
        now = time.monotonic()
        if self.bar is not None:
            self.bar.close()
        elif self.always or now - self.began >= QUIET_SECONDS:
            self._print_line(now)

    def _print_line(self, now):
        seconds = max(now - self.began, 1e-3)
        speed = (self.done - self.start) / seconds
        line = (
            f"  {self.name}  {self.done / max(self.size, 1):4.0%}  "
            f"{format_bytes(self.done)} of {format_bytes(self.size)}  {format_bytes(speed)}/s"
        )
        if self.done >= self.size:
            line += f"  in {duration(seconds)}"
        elif speed:
            line += f"  {duration((self.size - self.done) / speed)} left"
        print(line, flush=True)


def progress(label: str, unit: str = "batches", always: bool = False) -> Callable[..., Iterator]:
    """A function that wraps a list to be gone through: shows how far that is, the time left, and in the end the time it took.

    What is no list is wrapped together with the number of its steps. What takes less than QUIET_SECONDS is not mentioned,
    unless `always`.
    """
    label = printable(label)

    def watch(steps, count=None):
        began, count = time.monotonic(), len(steps) if count is None else count
        if sys.stdout.isatty():
            yield from _bar(label, steps, unit=f" {unit}", total=count, leave=False, delay=QUIET_SECONDS)
        else:
            yield from _with_plain_lines(steps, count, label, unit, began)
        seconds = time.monotonic() - began
        if always or seconds >= QUIET_SECONDS:
            print(f"  {label}: {duration(seconds)}", flush=True)

    return watch


def _with_plain_lines(steps, count, label, unit, began) -> Iterator:
    shown = began
    for number, step in enumerate(steps):
        now = time.monotonic()
        if number and now - shown >= PLAIN_SECONDS:
            shown = now
            left = duration((now - began) / number * (count - number))
            print(f"  {label}: {number:,} of {count:,} {unit}, {left} left", flush=True)
        yield step


def _bar(label, steps: Iterable | None = None, **options):
    from tqdm import tqdm  # a tenth of a second, which --help does not have to wait for

    # A terminal that does not tell its size has 80 columns here; tqdm would take it to have none, and print nothing.
    size = {"ncols": shutil.get_terminal_size().columns - 1, "nrows": 20}
    return tqdm(steps, desc=f"  {label}", file=sys.stdout, mininterval=0.2, **size, **options)
