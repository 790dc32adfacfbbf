"""Chinese-medicine terms in a text: find them, and compare two texts by them.

The list is data_prepare/sample/terms.jsonl: {"kind", "term"} and, where other terms mean nearly the same, "near".
"""

from collections import defaultdict
from pathlib import Path

from utils.files import read_jsonl

# A single character (a channel such as 肺, a nature such as 温) is a term only where it stands alone: after one of the left
# characters or a border, before one of the right characters or a border.
LEFT, RIGHT = "性味归入属为是、，：。", "经、，。；"


class Terms:
    """The term list of one file."""

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
