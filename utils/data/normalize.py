"""Texts as they are compared: their letters and digits, whatever the width, case, spacing and punctuation they came in.

Traditional characters are compared as simplified ones, by OpenCC's table (one character for one; phrases are left out, because
both texts go through the same table).
"""

import functools
import hashlib
import importlib.util
import re
import unicodedata
from pathlib import Path

_COMMON_MARKS = "，。、？；：（）！“”\n "  # signs of nearly every Chinese text
_NOISE = re.compile(r"(?<!\d)(?:[^\w<>=+%±≤≥]|_)+|(?:[^\w<>=+%±≤≥]|_)+(?!\d)")
_FILLER = re.compile(
    "请问|您好|你好|谢谢|是什么|有哪些|是哪些|有什么|什么是|分别|一下|医生|大夫|怎么办|[请吗呢呀啊的了]"
)


def normalize(text: str) -> str:
    """The letters and digits of a text, NFKC and case-folded. A sign between two digits stays (1.5 is not 15)."""
    letters = text
    for mark in _COMMON_MARKS:
        letters = letters.replace(mark, "")
    if letters.isalpha():  # NFKC is quick if nothing has to change; signs count between digits only
        text = letters
    text = unicodedata.normalize("NFKC", text).casefold().translate(_simplified())
    return text if text.isalnum() else _NOISE.sub("", text)


def without_filler(normalised: str) -> str:
    """A normalised question without the words that do not change what is asked (itself, if nothing else would be left)."""
    return _FILLER.sub("", normalised) or normalised


def text_key(text: str) -> int:
    """A 64-bit key of a text, the same in every run. A million texts share one by chance with probability 3e-8."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def traditional_known() -> bool:
    """Whether OpenCC's table is there (opencc-python-reimplemented in requirements.txt)."""
    return importlib.util.find_spec("opencc") is not None


@functools.cache
def _simplified():
    """{code of a traditional character: the simplified one}; {} if the table is not installed."""
    if not traditional_known():
        return {}
    package = importlib.util.find_spec("opencc").submodule_search_locations[0]
    lines = (Path(package) / "dictionary" / "TSCharacters.txt").read_text(encoding="utf-8-sig").splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line)
    return {
        ord(traditional): simplified.split()[0] for traditional, simplified in pairs if len(traditional) == 1
    }
