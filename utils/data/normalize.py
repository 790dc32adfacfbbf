"""Texts as they are compared: their letters and digits, whatever the width, case, spacing and punctuation they came in.

Traditional characters are compared as simplified ones, by OpenCC's table (one character for one; phrases are left out, because
both texts go through the same table).
"""

import functools
import importlib.util
import re
import unicodedata
from pathlib import Path

import numpy

_COMMON_MARKS = "，。、？；：（）！“”\n "  # what NFKC would have to work on in nearly every Chinese text
_NOISE = re.compile(r"(?<!\d)(?:[^\w<>=+%±≤≥]|_)+|(?:[^\w<>=+%±≤≥]|_)+(?!\d)")
_FILLER = re.compile(
    "请问|您好|你好|谢谢|是什么|有哪些|是哪些|有什么|什么是|分别|一下|医生|大夫|怎么办|[请吗呢呀啊的了]"
)

# In the tables: a sign that is left out, the end of a text, and what only normalize itself can judge.
_NOTHING, _END, _UNKNOWN = 0, 1, 0xFFFF


def normalize(text: str) -> str:
    """The letters and digits of a text, NFKC and case-folded. A sign between two digits stays (1.5 is not 15)."""
    letters = text
    for mark in _COMMON_MARKS:  # a shortcut: NFKC leaves text at once that holds nothing to change
        letters = letters.replace(mark, "")
    if letters.isalpha():  # else there may be digits, between which signs count, or what will become digits
        text = letters
    text = unicodedata.normalize("NFKC", text).casefold().translate(_simplified())
    return text if text.isalnum() else _NOISE.sub("", text)


def traditional_known() -> bool:
    """Whether OpenCC's table is there (opencc-python-reimplemented in requirements.txt)."""
    return importlib.util.find_spec("opencc") is not None


@functools.cache
def _simplified() -> dict[int, str]:
    """{code of a traditional character: the simplified one}; {} where the table is not installed."""
    if not traditional_known():
        return {}
    package = importlib.util.find_spec("opencc").submodule_search_locations[0]
    lines = (Path(package) / "dictionary" / "TSCharacters.txt").read_text(encoding="utf-8-sig").splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line)
    return {
        ord(traditional): simplified.split()[0] for traditional, simplified in pairs if len(traditional) == 1
    }


def normalize_all(texts: list[str]) -> list[str]:
    """`[normalize(text) for text in texts]`, several times as fast: one table look-up for all characters at once."""
    joined = "\0".join(texts)
    if joined.count("\0") != len(texts) - 1:
        return [normalize(text) for text in texts]
    letters, signs = _tables()
    given = numpy.frombuffer(joined.encode("utf-16-le", "surrogatepass"), dtype=numpy.uint16)
    codes = letters.take(given)
    _keep_signs_between_digits(codes, given, signs)
    done = codes.tobytes().decode("utf-16-le").replace(chr(_NOTHING), "").split(chr(_END))
    return [normalize(text) if chr(_UNKNOWN) in short else short for text, short in zip(texts, done)]


def _keep_signs_between_digits(codes, given, signs):
    """Put the signs of the texts `given` that stand between two digits back into their normalised `codes`, in place."""
    digits = codes - numpy.uint16(ord("0")) < 10  # below "0" it wraps around to large numbers
    if digits.any():
        between = numpy.flatnonzero((codes[1:-1] == _NOTHING) & digits[:-2] & digits[2:]) + 1
        codes[between] = signs[given[between]]


@functools.cache
def _tables():
    """Two uint16 arrays over the 16-bit characters: what becomes of one by itself, and of a sign between two digits.

    Unknown stay those that may join with their neighbours (combining marks, Korean letters), that become several characters,
    digits that are not ASCII, and halves of characters beyond 16 bits.
    """
    letters = numpy.full(1 << 16, _UNKNOWN, dtype=numpy.uint16)
    signs = numpy.full(1 << 16, _NOTHING, dtype=numpy.uint16)
    letters[0] = _END
    letters[0x3400:0xA000] = numpy.arange(0x3400, 0xA000)
    for code, character in _simplified().items():
        if code <= 0xFFFF:
            letters[code] = ord(character) if character <= "\uffff" else _UNKNOWN
    for code in (*range(2, 0x3400), *range(0x4DC0, 0x4E00), *range(0xF900, 0xFFFE)):
        text = unicodedata.normalize("NFKC", chr(code)).casefold().translate(_simplified())
        kept = _NOISE.sub("", text)
        if any(map(_joins_or_is_wide, text)):
            continue
        if not kept:
            letters[code] = _NOTHING
            signs[code] = ord(text) if len(text) == 1 else _NOTHING
        elif len(kept) == 1 and (not kept.isdecimal() or kept.isascii() and kept == text):
            letters[code] = ord(kept)
    return letters, signs


def _joins_or_is_wide(character):
    """Whether it joins with its neighbours (marks, Korean letters), or lies beyond 16 bits."""
    mark = unicodedata.category(character)[0] == "M"
    return mark or "\u1100" <= character <= "\u11ff" or character > "\uffff"


def without_filler(normalised: str) -> str:
    """A normalised question without the words that do not change what is asked (itself, if nothing else would be left)."""
    return _FILLER.sub("", normalised) or normalised
