"""Texts as they are compared: by their letters and digits, and by the Chinese-medicine terms in them.

Letters and digits count whatever the width, case, spacing and punctuation they came in; traditional characters count as
simplified ones by OpenCC's table (one character for one: both texts go through the same table).
"""

import functools
import hashlib
import importlib.util
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from utils.files import read_jsonl

# A single character (a channel such as 肺, a nature such as 温) is a term only where it stands alone: after one of the left
# characters or a border, before one of the right characters or a border.
LEFT, RIGHT = "性味归入属为是、，：。", "经、，。；"
COURTESY_LEFT = 0.15  # of a turn's characters, beside words of courtesy
_COMMON_MARKS = "，。、？；：（）！“”\n "  # signs of nearly every Chinese text
_NOISE = re.compile(r"(?<!\d)(?:[^\w<>=+%±≤≥]|_)+|(?:[^\w<>=+%±≤≥]|_)+(?!\d)")
_FILLER = re.compile(
    "请问|您好|你好|谢谢|是什么|有哪些|是哪些|有什么|什么是|分别|一下|医生|大夫|怎么办|[请吗呢呀啊的了]"
)
# Greetings, thanks and good wishes; words that go with them; and words that make a question of their own beside them.
_COURTESY = re.compile(
    "你好|您好|大家好|hello|hi(?![a-z])|哈喽|早上好|上午好|中午好|下午好|晚上好|早安|晚安|在吗|在不在|在线吗|有人吗|打扰|麻烦|辛苦(?=[了您你医])"
    "|感谢|谢谢|谢了|多谢|不用谢|不谢|不客气|不用客气|没关系|没事|不用担心|明白|知道了|了解|清楚了|收到|好的|再见|拜拜|请教|咨询"
    "|早日康复|恢复健康|身体健康|健康|平安|顺利|愉快|thankyou|thanks|bye"
)
_BESIDE_COURTESY = re.compile(
    "医生|大夫|医师|老师|专家|主任|先生|女士|朋友|非常|十分|太|真的|真是|祝愿?|希望|如果?有|有|问题|疑问|疑惑|需要|随时|联系|告诉|告知"
    "|找我|问我|欢迎|可以|一定|注意|解答|回答|回复|帮助|建议|耐心|指导|支持|信任|配合|按时|其他|别的|任何|早日|恢复|身体|生活|您|你|我们?"
    "|一下|想问|请问|问|个|些|会|请|祝|再|那|就|也|都|很|的|了|吧|啊|哦|嗯|呀|哈|呢|好|去|来|给|这|为|对|向|是|应该|知道|想|再次|一些|还|其"
)
ASKS = re.compile("什么|怎|如何|哪|多少|为何|是否|能不能|可不可以|几|吗$|呢$")


def is_courtesy(text: str) -> bool:
    """True if a turn of a dialogue is nothing but a greeting, thanks or good wishes."""
    text = normalize(text)
    left = _COURTESY.sub("", text)
    if len(left) == len(text) or ASKS.search(left):
        return False
    return len(_BESIDE_COURTESY.sub("", left)) <= COURTESY_LEFT * len(text)


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


@functools.cache
def _simplified():
    """{code of a traditional character: the simplified one}."""
    package = importlib.util.find_spec("opencc").submodule_search_locations[0]
    lines = (Path(package) / "dictionary" / "TSCharacters.txt").read_text(encoding="utf-8-sig").splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line)
    return {ord(old): simplified.split()[0] for old, simplified in pairs if len(old) == 1}


class Terms:
    """The terms of a file of {"kind", "term"[, "near": terms that mean nearly the same]}: data_prepare/sample/terms.jsonl."""

    def __init__(self, path: Path):
        self.kinds: dict[str, list[str]] = {}
        self.near: dict[tuple[str, str], set[str]] = {}
        self.by_kind: dict[str, list[str]] = {}
        for row in read_jsonl(path, wanted=["kind", "term"]):
            self.kinds.setdefault(row["term"], []).append(row["kind"])
            self.near[row["kind"], row["term"]] = set(row.get("near", []))
            self.by_kind.setdefault(row["kind"], []).append(row["term"])
        self.by_first = defaultdict(list)  # {first character: terms, longest first}
        for term in sorted(self.kinds, key=len, reverse=True):
            self.by_first[term[0]].append(term)

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """[(start, end, term), ...] in order, longest terms first, without overlaps."""
        found, at, by_first = [], 0, self.by_first
        while at < len(text):
            for term in by_first.get(text[at], ()):
                if text.startswith(term, at) and (len(term) > 1 or _stands_alone(text, at)):
                    found.append((at, at + len(term), term))
                    at += len(term)
                    break
            else:
                at += 1
        return found

    def stated(self, answer: str, question: str) -> set[str]:
        """The set of terms that `answer` states and `question` does not already name."""
        return {term for _, _, term in self.find(answer) if term not in question}


def _stands_alone(text, at):
    after = text[at + 1 : at + 2]
    return (not at or text[at - 1] in LEFT) and (not after or after in RIGHT or text[at + 1 :] == "\n")
