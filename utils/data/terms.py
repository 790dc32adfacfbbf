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
        self.pattern = re.compile(
            "|".join(
                re.escape(term) if len(term) > 1 else alone.format(re.escape(term)) for term in longest_first
            )
        )

    def find(self, text):
        """[(start, end, term), ...] in order, longest terms first, without overlaps."""
        return [(match.start(), match.end(), match.group()) for match in self.pattern.finditer(text)]

    def stated(self, answer, question):
        """The set of terms that `answer` states and `question` does not already name."""
        return {term for _, _, term in self.find(answer) if term not in question}

    def swap(self, answer, question, rng):
        """(`answer` made wrong by swapping terms for others of the same kind, "") or (None, why not).

        Where the answer names what the question asks about, that name: for one of those most like it, because mixing up
        血海 and 照海 is what small models do. Elsewhere about half of the terms, at least one: a substitute means nothing
        near the original, and shares no character with it but what most of their kind share. No substitute is in the
        question or the answer, and lengths stay about the same, so that they give nothing away.
        """
        found = self.find(answer)
        names = [place for place in found if place[2] in question and len(place[2]) > 1]
        facts = [place for place in found if place[2] not in question]
        if not names and not facts:
            return None, "no known term in the answer"
        if names:
            chosen, substitute = [rng.choice(names)], self._other_name
        else:
            chosen, substitute = (
                [place for place in facts if rng.random() < 0.5] or [rng.choice(facts)],
                self._other_fact,
            )
        used, pieces, swapped, end = {term for _, _, term in found}, [], 0, len(answer)
        for start, stop, term in reversed(chosen):
            other = substitute(term, question, used, rng)
            if other:
                used.add(other)
                pieces[:0] = [other, answer[stop:end]]
                end, swapped = start, swapped + 1
        if not swapped:
            return None, "no other term of the same kind and length"
        return answer[:end] + "".join(pieces), ""

    def _other_fact(self, term, question, used, rng):
        kind = rng.choice(self.kinds[term])
        kin = self.by_kind[kind]
        own = {c for c in term if 2 * sum(c in other for other in kin) < len(kin)}  # of 足太阴脾经: not 经
        fits = [other for other in self._like(kind, term, question, used) if not own & set(other)]
        return rng.choice(fits) if fits else None

    def _other_name(self, term, question, used, rng):
        fits = self._like(rng.choice(self.kinds[term]), term, question, used)
        shared = {other: len(set(other) & set(term)) + (other[0] == term[0]) for other in fits}
        alike = sorted((other for other in fits if shared[other]), key=shared.get, reverse=True)[:3] or fits
        return rng.choice(alike) if alike else None

    def _like(self, kind, term, question, used):
        return [
            other
            for other in self.by_kind[kind]
            if other not in used
            and other not in question
            and other not in self.near[kind, term]
            and abs(len(other) - len(term)) <= max(1, 0.2 * len(term))
        ]
