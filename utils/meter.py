"""How far a transfer is: one line rewritten in place on a terminal, a new line every ten seconds elsewhere."""

import shutil
import sys
import time


class Meter:
    """`with Meter(name, start, size) as meter: meter.show(done)`; all three counts in bytes, `start` what was there before."""

    def __init__(self, name, start, size):
        self.name, self.start, self.size, self.done = name, start, size, start
        self.terminal = sys.stdout.isatty()
        self.began = self.shown = time.monotonic()

    def __enter__(self):
        if self.start:
            print(f"  {self.name}: going on at {format_bytes(self.start)} of {format_bytes(self.size)}", flush=True)
        return self

    def show(self, done):
        """Tell that `done` bytes are there, at most five times a second."""
        self.done, now = done, time.monotonic()
        if now - self.shown >= (0.2 if self.terminal else 10):
            self.shown = now
            self._print(self._line(now), "\r" if self.terminal else "\n")

    def __exit__(self, *_):
        self._print(self._line(time.monotonic()), "\n")

    def _line(self, now):
        seconds = max(now - self.began, 1e-3)
        speed = (self.done - self.start) / seconds
        share = f"{self.done / max(self.size, 1):4.0%}  {format_bytes(self.done)} of {format_bytes(self.size)}"
        line = f"  {self.name}  {share}  {format_bytes(speed)}/s"
        if self.done >= self.size:
            return f"{line}  in {format_seconds(seconds)}"
        return f"{line}  {format_seconds((self.size - self.done) / speed)} left" if speed else line

    def _print(self, line, end):
        if self.terminal:                               # spaces over what is left of a longer line before
            columns = shutil.get_terminal_size().columns - 1
            line = line[:columns].ljust(columns)
        print(line, end=end, flush=True)


def format_bytes(count):
    """1503300328 -> "1.503 GB"; decimal units, as the Hub's pages show them."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if count < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.3f} GB"


def format_seconds(seconds):
    """62 -> "1:02", 3723 -> "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
