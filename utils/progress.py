"""How far something is, and the time left: one line rewritten in place on a terminal, now and then a new line elsewhere."""

import shutil
import sys
import time

from utils.text import duration, format_bytes

PLAIN_SECONDS = 15  # without a terminal: a line this often


QUIET_SECONDS = 2  # what is over by then needs no line


class Meter:
    """`with Meter(name, start, size) as meter: meter.show(done)`; all three counts in bytes, `start` what was there before.

    With `always` False, what takes less than QUIET_SECONDS is not mentioned.
    """

    def __init__(self, name, start, size, always=True):
        self.name, self.start, self.size, self.done, self.always = name, start, size, start, always
        self.terminal = sys.stdout.isatty()
        self.began = self.shown = time.monotonic()

    def __enter__(self):
        if self.start:
            print(
                f"  {self.name}: going on at {format_bytes(self.start)} of {format_bytes(self.size)}",
                flush=True,
            )
        return self

    def show(self, done):
        """Tell that `done` bytes are there, at most five times a second."""
        self.done, now = done, time.monotonic()
        if now - self.shown >= (0.2 if self.terminal else PLAIN_SECONDS) and (
            self.always or now - self.began >= QUIET_SECONDS
        ):
            self.shown = now
            self._print(self._line(now), "\r" if self.terminal else "\n")

    def __exit__(self, *_):
        now = time.monotonic()
        if self.always or now - self.began >= QUIET_SECONDS:
            self._print(self._line(now), "\n")

    def _line(self, now):
        seconds = max(now - self.began, 1e-3)
        speed = (self.done - self.start) / seconds
        share = (
            f"{self.done / max(self.size, 1):4.0%}  {format_bytes(self.done)} of {format_bytes(self.size)}"
        )
        line = f"  {self.name}  {share}  {format_bytes(speed)}/s"
        if self.done >= self.size:
            return f"{line}  in {duration(seconds)}"
        return f"{line}  {duration((self.size - self.done) / speed)} left" if speed else line

    def _print(self, line, end):
        if self.terminal:  # spaces over what is left of a longer line before
            columns = shutil.get_terminal_size().columns - 1
            line = line[:columns].ljust(columns)
        print(line, end=end, flush=True)


def progress(label, unit="batches", always=False):
    """A function that wraps a list to be gone through: shows how far that is, the time left, and at its end the time it took.

    What takes less than QUIET_SECONDS is not mentioned, unless `always`.
    """

    def watch(steps):
        count, live = len(steps), sys.stdout.isatty()
        began = shown = time.monotonic()
        for number, step in enumerate(steps):
            now = time.monotonic()
            if number and now - began >= QUIET_SECONDS and now - shown >= (0.2 if live else PLAIN_SECONDS):
                shown = now
                line = f"  {label}: {number:,} of {count:,} {unit}, {duration((now - began) / number * (count - number))} left"
                print(f"\r\033[K{line}" if live else line, end="" if live else "\n", flush=True)
            yield step
        seconds = time.monotonic() - began
        if always or seconds >= QUIET_SECONDS:
            line = f"  {label}: {duration(seconds)}"
            print(f"\r\033[K{line}" if live else line, flush=True)

    return watch
