"""Text for people: widths, columns, sizes, durations, and nothing that would control the terminal."""

import unicodedata
from itertools import zip_longest

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


def side_by_side(left: str, right: str, columns: int) -> str:
    """Two texts in two columns of together `columns` character cells, wrapped (str of lines)."""
    width = max((columns - 3) // 2, 2)
    pairs = zip_longest(_wrap(printable(left), width), _wrap(printable(right), width), fillvalue="")
    return "\n".join(f"{one}{' ' * (width - text_width(one))} | {two}".rstrip() for one, two in pairs)


def _wrap(text, width):
    for line in text.expandtabs(4).split("\n"):
        start = used = 0
        for index, character in enumerate(line):
            if used + text_width(character) > width:
                yield line[start:index]
                start, used = index, 0
            used += text_width(character)
        yield line[start:]


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
