"""Chinese-medicine terms in a text: find them, swap them for others of the same kind, compare two texts by them.

The list is data_prepare/sample/terms.jsonl: {"kind", "term"} and, where other terms mean nearly the same, "near".
"""

import re

from utils.files import read_jsonl

# A single character (a channel such as 肺, a nature such as 温) is a term only where it stands alone: after one of the left
# characters or a border, before one of the right characters or a border.
LEFT, RIGHT = "性味归入属为是、，：。", "经、，。；"


class Terms:
    """The term list of one file."""

    def __init__(self, path):
        self.kinds, self.near, self.by_kind = {}, {}, {}
        for row in read_jsonl(path, wanted=["kind", "term"]):
            self.kinds.setdefault(row["term"], []).append(row["kind"])
            self.near[row["kind"], row["term"]] = set(row.get("near", []))
            self.by_kind.setdefault(row["kind"], []).append(row["term"])
        longest_first = sorted(self.kinds, key=lambda term: (-len(term), term))
        alone = f"(?:(?<=[{LEFT}])|^)(?:{{}})(?=[{RIGHT}]|$)"
        self.pattern = re.compile("|".join(
            re.escape(term) if len(term) > 1 else alone.format(re.escape(term)) for term in longest_first))

    def find(self, text):
        """[(start, end, term), ...] in order, longest terms first, without overlaps."""
        return [(match.start(), match.end(), match.group()) for match in self.pattern.finditer(text)]

    def stated(self, answer, question):
        """The set of terms that `answer` states and `question` does not already name."""
        return {term for _, _, term in self.find(answer) if term not in question}

    def swap(self, answer, question, rng):
        """(`answer` with about half of its terms, at least one, swapped for wrong ones of the same kind, "") or (None, why not).

        A term that the question names stays. A substitute is not in the question or the answer, means nothing near the
        original, shares no character with it, and is about as long, so that the length gives nothing away.
        """
        found = [place for place in self.find(answer) if place[2] not in question]
        if not found:
            return None, "no known term in the answer"
        used, pieces, swapped, end = {term for _, _, term in found}, [], 0, len(answer)
        chosen = [place for place in found if rng.random() < 0.5] or [rng.choice(found)]
        for start, stop, term in reversed(chosen):
            substitute = self._substitute(term, question, used, rng)
            if substitute:
                used.add(substitute)
                pieces[:0] = [substitute, answer[stop:end]]
                end, swapped = start, swapped + 1
        if not swapped:
            return None, "no other term of the same kind and length"
        return answer[:end] + "".join(pieces), ""

    def _substitute(self, term, question, used, rng):
        kind = rng.choice(self.kinds[term])
        fits = [other for other in self.by_kind[kind]
                if not set(other) & set(term) and other not in used and other not in question
                and other not in self.near[kind, term] and abs(len(other) - len(term)) <= max(1, 0.2 * len(term))]
        return rng.choice(fits) if fits else None
