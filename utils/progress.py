"""How far something is, and the time left: tqdm's bar on a terminal, a plain line now and then elsewhere."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from utils.text import duration, format_bytes, printable

PLAIN_SECONDS = 15  # off a terminal: a line this often
QUIET_SECONDS = 2  # what is over by then needs no line


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
