"""Metrics: one table of them, how they follow from the results of single items, how sure they are, how two models differ.

To add a metric, add a line to METRICS: the tables, the picture, the model card and the page of a run follow.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from utils.data.exams import SINGLE, TRUE_FALSE
from utils.evaluation.questions import kind_of

Z = 1.96  # a normal distribution holds 95 % within this many standard deviations

# Of a result: True or False (the metric is a share), a number (a mean), or (loss, tokens); None: the metric is not of this result.
Value = Callable[[Any], Any]


class Results(NamedTuple):
    """`items`: one dict per item (utils/evaluation/measure.py); `weights`: the sha256 of the model that was measured."""

    folder: str
    items: list[Any]
    weights: str = ""


class Metric(NamedTuple):
    """One figure of a model.

    `key`: where comparison.json holds it; `form`: how it is written; `lower`: lower is better; `main`: it says which of two models
    is better, and stands in comparison.png and on the model card of an export, too.
    """

    key: str
    label: str
    meaning: str
    value: Value
    form: str = "{:.1%}"
    lower: bool = False
    main: bool = True

    @property
    def name(self) -> str:
        """How comparison.json calls the rest: NAME_interval, NAME_n, NAME_chance, and NAME among the differences."""
        return self.key.removesuffix("_accuracy")

    def values(self, results: Results) -> list[Any]:
        """Those of all results that the metric is of."""
        return [value for item in results.items if (value := self.value(item)) is not None]

    def cell(self, figures: dict[str, Any]) -> str:
        """The figure of one model with its interval: "50.0% (25.0 to 75.0)"."""
        if self.key not in figures:
            return "-"
        ends = [self.form.format(end).rstrip("%") for end in figures.get(f"{self.name}_interval") or []]
        return self.form.format(figures[self.key]) + (f" ({' to '.join(ends)})" if ends else "")


# ---- The table


def _exam(kind: str, field: str) -> Value:
    """Exam questions of this kind, judged by the field that holds the model's choice."""

    def value(item):
        asked = item["test"] == "exam" and kind_of(item) == kind and field in item
        return item[field] == item["answer"] if asked else None

    return value


def _answers(*about: str, field: str = "right", if_alone: bool = False) -> Value:
    """Answers in full. `if_alone`: only if the question was answered right by itself."""

    def value(item):
        return item[field] if item.get("about") in about and (item["alone"] or not if_alone) else None

    return value


# fmt: off
FIRST = ("heldout", "general")
METRICS = [
    Metric("heldout_loss", "held-out loss", "mean cross-entropy of the reference answers to held-out questions, in nats a token, every token "
           "counted once; lower is better", lambda item: (item["loss"], item["tokens"]) if item["test"] == "heldout" else None, "{:.3f}",
           lower=True),
    Metric("exam_accuracy", "exam by option text", "single-choice questions whose right option is the likeliest as an answer, per character; "
           "the options are not shown, so their order plays no part; chance is {chance:.0%}", _exam(SINGLE, "text_choice")),
    Metric("exam_letter_accuracy", "exam by option letter", "the same questions as CMMLU asks them: options listed, the likeliest letter counts; "
           "scores are averaged over every rotation of the options, so that a favourite letter gains nothing; chance is {chance:.0%}. A model "
           "that never saw such questions stays near chance", _exam(SINGLE, "letter_choice")),
    Metric("exam_true_false_accuracy", "true or false, by text", "statements of which the likelier of both words (right, wrong) is the true one; "
           "both are named in the question; chance is {chance:.0%}, and who always says the same word gets the share of statements it fits",
           _exam(TRUE_FALSE, "text_choice")),
    Metric("exam_true_false_letter_accuracy", "true or false, by letter", "the same statements with both words as options A and B, asked and "
           "averaged as the exam by option letter; chance is {chance:.0%}", _exam(TRUE_FALSE, "letter_choice")),
    Metric("preference_accuracy", "preference pairs", "held-out pairs of which the better answer is the likelier one; chance is {chance:.0%}",
           lambda item: item["chosen"] > item["rejected"] if item["test"] == "preference" else None),
    Metric("facts_accuracy", "facts stated right", "generated answers that state exactly the terms (herbs, actions, channels, ...) of the "
           "reference, about what the question names, where the reference repeats that name", _answers("heldout")),
    Metric("second_accuracy", "second question", "some of the same questions asked in a conversation after one other: share of answers that "
           "state the facts right", _answers("second")),
    Metric("second_kept_accuracy", "second question, of those right alone", "share that stays right as second question, of the questions that "
           "the model answers right by themselves", _answers("second", if_alone=True), main=False),
    Metric("fourth_accuracy", "fourth question", "the same questions after three others in one conversation", _answers("fourth")),
    Metric("fourth_kept_accuracy", "fourth question, of those right alone", "share that stays right as fourth question",
           _answers("fourth", if_alone=True), main=False),
    Metric("caution_said", "caution said", "questions to which the better answer of a held-out pair brings a caution: share of generated "
           "answers that bring one", _answers("wanted", field="caution")),
    Metric("caution_accuracy", "caution right", "of the same questions: share of answers whose caution is the right one, word for word",
           _answers("wanted")),
    Metric("caution_unasked", "caution where not asked", "questions to which the worse answer brings a caution: share of generated answers "
           "that bring one; lower is better", _answers("unasked", field="caution"), lower=True),
    Metric("general_accuracy", "general questions right", "generated answers to everyday questions that have nothing to do with Chinese "
           "medicine: what falls here was forgotten. A model that never learned such things has nothing to forget", _answers("general")),
    Metric("ended_share", "answers that end", "share of generated answers that ended by themselves within the limit",
           _answers(*FIRST, field="ended"), main=False),
    Metric("repetition", "repetition", "share of runs of four tokens that the same answer said before", _answers(*FIRST, field="repetition"), main=False),
    Metric("mean_tokens", "mean answer, tokens", "mean length of the generated answers", _answers(*FIRST, field="tokens"), "{:.1f}", main=False),
]
# fmt: on


def metrics(results: Results) -> dict[str, Any]:
    """The figures of one model, as in comparison.json; a test that was not made is missing. Losses are nats a token, intervals
    95 %."""
    found: dict[str, Any] = {"folder": results.folder, "weights": results.weights}
    for metric in METRICS:
        values = metric.values(results)
        if not values:
            continue
        if isinstance(values[0], tuple):
            found[metric.key], found[f"{metric.name}_interval"] = mean_per_token(*zip(*values))
        else:
            found[metric.key] = sum(values) / len(values)
        if isinstance(values[0], bool):
            found[f"{metric.name}_interval"] = wilson(sum(values), len(values))
            guessed = [guessed_right(item) for item in results.items if metric.value(item) is not None]
            if any(guessed):
                found[f"{metric.name}_chance"] = sum(guessed) / len(guessed)
        found[f"{metric.name}_n"] = len(values)
    return found


def guessed_right(item: Any) -> float:
    """The probability that guessing gets it right: one option of an exam question, one answer of a pair; else 0."""
    pair = 0.5 * (item["test"] == "preference")
    return 1 / len(item["options"]) if "options" in item else pair


def differences(one: Results, other: Results) -> dict[str, dict[str, Any]]:
    """{metric: {"difference", "interval", of shares also "p"}}, `other` minus `one`, on the same items.

    Losses a token of two models with different tokenizers cannot be compared: left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        ours, theirs = metric.values(one), metric.values(other)
        if not metric.main or not ours or not theirs:
            continue
        if isinstance(ours[0], bool):
            found[metric.name] = share_difference(ours, theirs)
            continue
        (our_sums, our_tokens), (their_sums, their_tokens) = zip(*ours), zip(*theirs)
        if our_tokens == their_tokens:
            changes = [b - a for a, b in zip(our_sums, their_sums)]
            mean, interval = mean_per_token(changes, our_tokens)
            found[metric.name] = {"difference": mean, "interval": interval}
    return found


def is_clear(found: dict[str, Any]) -> bool:
    """Chance alone is an unlikely reason for this difference."""
    low, high = found["interval"] or (0, 0)
    return found["p"] < 0.05 if "p" in found else low * high > 0


def difference_cell(found: dict[str, Any] | None) -> str:
    """A difference with its interval and p, and a star if it is clear: "+5.0% (1.0 to 9.0), p 0.021 *"."""
    if found is None:
        return "-"
    scale, digits, sign = (100, 1, "%") if "p" in found else (1, 3, "")
    values = (found["difference"], *(found["interval"] or []))
    change, *ends = [f"{scale * value:+.{digits}f}" for value in values]
    p = "" if "p" not in found else ", p < 0.001" if found["p"] < 0.001 else f", p {found['p']:.3f}"
    return f"{change}{sign} ({' to '.join(ends) or 'no interval'}){p}{' *' * is_clear(found)}"


# ---- How sure a figure is


def wilson(right: int, total: int) -> list[float]:
    """[low, high]: the interval of a share `right` / `total` (Wilson 1927)."""
    share, spread = right / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return [max(0.0, centre - half), min(1.0, centre + half)]  # rounding alone would leave -0.0


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, list[float] | None]:
    """(mean, [low, high]) of sum(sums) / sum(tokens), one of each per item (ratio estimate, Cochran 1977).

    Items count as independent; the tokens of one answer are not. The interval of one item alone is None.
    """
    mean, count = sum(sums) / sum(tokens), len(sums)
    if count < 2:
        return mean, None
    squares = sum((part - mean * weight) ** 2 for part, weight in zip(sums, tokens))
    half = Z * math.sqrt(squares * count / (count - 1)) / sum(tokens)
    return mean, [mean - half, mean + half]


def share_difference(one: list[bool], other: list[bool]) -> dict[str, Any]:
    """The difference of two shares of the same items, `other` minus `one`.

    interval: [low, high], with half an item added to each of the four cells, so that it has a width where no item differs
    (Agresti and Min 2005). p: two-sided and exact, that two models with such answers are equally good (McNemar 1947).
    """
    pairs = list(zip(one, other, strict=True))
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    total, either = len(one) + 2, first + second
    centre = (second - first) / total
    half = Z * math.sqrt((either + 1) / total - centre**2) / math.sqrt(total)
    p = 2 * sum(math.comb(either, k) for k in range(min(first, second) + 1)) / 2**either
    difference = (second - first) / len(one)
    return {"difference": difference, "interval": [centre - half, centre + half], "p": min(1.0, p)}
