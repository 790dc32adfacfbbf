"""Text for people: widths, columns, sizes, durations, progress, and nothing that would control the terminal."""

import io
import locale
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PLAIN_SECONDS = 15  # between two lines of progress, off a terminal
QUIET_SECONDS = 2  # shorter work is not mentioned

# Control characters would change the terminal, bidirectional ones the order of letters: all are shown as U+FFFD.
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN_AS = dict.fromkeys(_CONTROLS, "\ufffd")


def printable(text: str) -> str:
    """`text`, which may come from anywhere, without what would control the terminal; line breaks and tabs stay."""
    return text.translate(_SHOWN_AS)


def say(text: str, flush: bool = False) -> None:
    """Print on stdout a text that may come from elsewhere. `flush`: at once, as what is told underway has to be."""
    print(printable(with_our_python(text)), flush=flush)


def with_our_python(text: str) -> str:
    """`text`, in which commands name the environment's Python by its path, unless it is activated: `python` would be another."""
    own = Path(__file__).resolve().parents[1] / ".venv"
    if Path(sys.prefix) != own or os.environ.get("VIRTUAL_ENV") == str(own):
        return text
    python = ".venv\\Scripts\\python.exe" if os.name == "nt" else ".venv/bin/python"
    return re.sub(r"\bpython (?=(data_prepare|model_download|model_finetune)/)", lambda _: f"{python} ", text)


def say_next(command: str) -> None:
    """Print the command that comes next. Not in the demo (tasks.py), which runs it itself and says so in its environment."""
    if "RUN_BY_DEMO" not in os.environ:
        say(f"next: {command}")


def localized(english: str, chinese: str) -> str:
    """Whichever of two texts is in the language that the environment asks for: Chinese or else English."""
    named = [os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
    language = next(filter(None, [*named, locale.getlocale()[0]]), "")
    return chinese if language.lower().startswith(("zh", "chinese")) else english


def text_width(text: str) -> int:
    """Character cells: Chinese characters and full-width punctuation take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


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


def progress(label: str, unit: str = "batches") -> Callable[..., Iterator]:
    """A function that shows how far something is and the time left: progress(label)(list) or progress(label)(iterator, count)."""

    def watch(steps, count=None):
        shown = bar(steps, label, unit=f" {unit}", total=len(steps) if count is None else count)
        return iter(shown)  # once: tqdm itself would begin anew, and lose items, with every islice over it

    return watch


def bar(steps: Iterable | None = None, desc: str = "", **options: Any) -> Any:
    """tqdm, set up for this terminal or for a log: `with bar(desc=..., total=...) as meter: meter.update(n)`."""
    from tqdm import tqdm  # a tenth of a second, which --help does not have to wait for

    tqdm.monitor_interval = 0  # no thread that writes at other times
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns - 1  # 80 if unknown: tqdm would then print nothing
        place = {"ncols": columns, "nrows": 20, "mininterval": 0.2, "file": sys.stdout}
    else:
        form = "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f}%), {elapsed} so far, {remaining} left"
        place = {"bar_format": form, "mininterval": PLAIN_SECONDS, "file": _Lines()}
    options = {"delay": QUIET_SECONDS, "miniters": 1, "unit_divisor": 1024, **place, **options}
    return tqdm(steps, desc=f"  {printable(desc)}", **options)


class _Lines(io.TextIOBase):
    """A file for tqdm, which moves the cursor back before it writes: here every text is a line of its own."""

    def write(self, text):
        if text := text.strip("\r\n "):
            print(f"  {text}", flush=True)
