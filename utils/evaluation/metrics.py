"""Metrics: one table of them, how they follow from the results of single items, how sure they are, how two models differ.

To add a metric, add a line to METRICS: the tables, the picture, the model card and the page of a run follow.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from utils.data.exams import MULTIPLE, SINGLE, TRUE_FALSE
from utils.evaluation.questions import kind_of

Z = 1.96  # a normal distribution holds 95 % within this many standard deviations

Judge = Callable[[Any], bool | None]  # is this result right? None: the metric is not of such results


class Results(NamedTuple):
    """seconds: in all, and of first answers; `items`: one dict per item (utils/evaluation/measure.py);
    `weights`: the sha256 of the model that was measured."""

    folder: str
    seconds: float
    generation_seconds: float
    items: list[Any]
    weights: str = ""


class Metric(NamedTuple):
    """One figure of a model.

    `key`: where comparison.json holds it; `form`: how it is written; `shown`: also as bars in comparison.png ("panel"), on the model
    card of an export ("card"); `right`: makes it the share of the results that are right; `chance`: the share that guessing gets, if
    the items do not tell it; `lower`: lower is better; `of_all`: it is of the same items for every model, so that two can be compared.
    """

    key: str
    label: str
    form: str
    meaning: str
    shown: str = ""
    right: Judge | None = None
    chance: float = 0
    lower: bool = False
    of_all: bool = True

    @property
    def name(self) -> str:
        """How comparison.json calls the rest: NAME_interval, NAME_n, NAME_chance, and NAME among the differences."""
        return self.key.removesuffix("_accuracy")

    def cell(self, figures: dict[str, Any]) -> str:
        """The figure of one model with its interval: "50.0% (25.0 to 75.0)"."""
        if self.key not in figures:
            return "-"
        ends = [self.form.format(end).rstrip("%") for end in figures.get(f"{self.name}_interval") or []]
        return self.form.format(figures[self.key]) + (f" ({' to '.join(ends)})" if ends else "")


# ---- The table


def _exam(kind: str, field: str) -> Judge:
    """Judges exam questions of this kind by the field that holds the model's choice."""

    def right(item):
        if item["test"] == "exam" and kind_of(item) == kind and field in item:
            return item[field] == item["answer"]

    return right


def _answers(about: str, field: str = "right", if_alone: bool = False) -> Judge:
    """Judges answers in full by one of their fields, which is None if nothing can be told. `if_alone`: only if it was right alone."""

    def right(item):
        if item.get("about") == about and (item["alone"] or not if_alone):
            return item[field]

    return right


# fmt: off
SHARE, BOTH = "{:.1%}", "panel card"
METRICS = [
    Metric("heldout_loss", "held-out loss", "{:.3f}", "mean cross-entropy of the reference answers to held-out questions, in nats a token, "
           "every token counted once; lower is better", BOTH, lower=True),
    Metric("perplexity", "perplexity", "{:.2f}", "e to the held-out loss: among how many equally likely tokens the model hesitates"),
    Metric("exam_accuracy", "exam by option text", SHARE, "single-choice questions whose right option is the likeliest as an answer, per "
           "character; the options are not shown, so their order plays no part; chance is {chance:.0%}", BOTH, _exam(SINGLE, "text_choice")),
    Metric("exam_letter_accuracy", "exam by option letter", SHARE, "the same questions asked as CMMLU asks them: options listed, the likeliest "
           "letter counts; each is asked once for every rotation of its options and the scores are averaged, so that a favourite letter "
           "gains nothing; chance is {chance:.0%}. A model that never saw such questions stays near chance", BOTH,
           _exam(SINGLE, "letter_choice")),
    Metric("exam_true_false_accuracy", "true or false, by text", SHARE, "statements of which the likelier of both words (right, wrong) is the "
           "true one; both are named in the question; chance is {chance:.0%}, and a model that always says the same word gets the share of "
           "statements it fits", BOTH, _exam(TRUE_FALSE, "text_choice")),
    Metric("exam_true_false_letter_accuracy", "true or false, by letter", SHARE, "the same statements with both words as options A and B, asked "
           "and averaged as the exam by option letter; chance is {chance:.0%}", BOTH, _exam(TRUE_FALSE, "letter_choice")),
    Metric("exam_multiple_accuracy", "exam, several answers", SHARE, "questions with several right options: the model writes the letters, and the "
           "set of them has to be exactly the right one, as in CMB; asked once, in the order of the file; guessing among all sets of "
           "options is right in {chance:.1%}", BOTH, _exam(MULTIPLE, "letter_choice")),
    Metric("exam_multiple_named", "answers naming options", "{:.0%}", "share of the answers to these that name any option by its letter; the "
           "others count as wrong"),
    Metric("preference_accuracy", "preference pairs", SHARE, "held-out pairs of which the better answer is the likelier one; chance is 50%", BOTH,
           lambda item: item["chosen"] > item["rejected"] if item["test"] == "preference" else None, chance=0.5),
    Metric("facts_accuracy", "facts stated right", SHARE, "generated answers that state exactly the terms (herbs, actions, channels, ...) of the "
           "reference, about what the question names, where the reference repeats that name", BOTH, _answers("heldout")),
    Metric("names_accuracy", "names right", SHARE, "of the answers that have to repeat a name of the question, such as a herb's, those that do; "
           "the others speak of something else, or garble the name", BOTH, _answers("heldout", "named")),
    Metric("second_accuracy", "second question", SHARE, "some of the same questions asked in a conversation after one other: share of answers that "
           "state the facts right", BOTH, _answers("second")),
    Metric("second_kept_accuracy", "second question, of those right alone", SHARE, "of the questions that the model answers right by themselves: "
           "share that stays right as second question", "", _answers("second", if_alone=True), of_all=False),
    Metric("fourth_accuracy", "fourth question", SHARE, "the same questions after three others in one conversation", BOTH, _answers("fourth")),
    Metric("fourth_kept_accuracy", "fourth question, of those right alone", SHARE, "of the questions that the model answers right by themselves: "
           "share that stays right as fourth question", "", _answers("fourth", if_alone=True), of_all=False),
    Metric("caution_said", "caution said", SHARE, "questions to which the better answer of a held-out pair brings a caution: share of generated "
           "answers that bring one", "", _answers("wanted", "caution")),
    Metric("caution_accuracy", "caution right", SHARE, "of the same questions: share of answers whose caution is the right one, word for word", BOTH,
           _answers("wanted")),
    Metric("caution_unasked", "caution where not asked", SHARE, "questions to which the worse answer brings a caution: share of generated answers "
           "that bring one; lower is better", "panel", _answers("unasked", "caution"), lower=True),
    Metric("general_accuracy", "general questions right", SHARE, "generated answers to everyday questions that have nothing to do with Chinese "
           "medicine: what falls here was forgotten. A model that never learned such things has nothing to forget", "card", _answers("general")),
    Metric("general_loss", "general loss", "{:.3f}", "cross-entropy of the short reference answers to them, in nats a token", "panel", lower=True),
    Metric("ended_share", "answers that end", "{:.0%}", "share of generated answers that ended by themselves within the limit"),
    Metric("repetition", "repetition", SHARE, "share of runs of four tokens that the same answer said before"),
    Metric("mean_tokens", "mean answer, tokens", "{:.1f}", "mean length of the generated answers"),
    Metric("tokens_per_second", "tokens/s", "{:.0f}", "speed of generating, all answers of a batch together, on this machine"),
]
# fmt: on

# The metrics by which two models are compared, by name.
COMPARED = {
    metric.name: metric
    for metric in METRICS
    if metric.right and metric.of_all or metric.key.endswith("_loss")
}


def metrics(results: Results) -> dict[str, Any]:
    """The figures of one model, as in comparison.json; a test that was not made is missing. Losses are nats a token, intervals
    95 %."""
    found: dict[str, Any] = {"folder": results.folder, "weights": results.weights}
    judged = shares(results)
    for metric in [metric for metric in METRICS if metric.name in judged]:
        right = judged[metric.name]
        found[metric.key] = sum(right) / len(right)
        found[f"{metric.name}_interval"] = wilson(sum(right), len(right))
        found[f"{metric.name}_n"] = len(right)
        guessed = [guessed_right(item) for item in results.items if metric.right(item) is not None]
        if guessed[0]:
            found[f"{metric.name}_chance"] = sum(guessed) / len(guessed)
    for name, (sums, tokens) in losses(results).items():
        found[name], found[f"{name}_interval"] = mean_per_token(sums, tokens)
        found[f"{name}_n"] = len(sums)
    found["perplexity"] = math.exp(found["heldout_loss"])
    several = [bool(item["letter_choice"]) for item in results.items if kind_of(item) == MULTIPLE]
    if several:
        found["exam_multiple_named"] = sum(several) / len(several)
    if answers := [item for item in results.items if item["test"] == "answer"]:
        tokens = sum(item["tokens"] for item in answers)
        found["ended_share"] = sum(item["ended"] for item in answers) / len(answers)
        found["repetition"] = sum(item["repetition"] for item in answers) / len(answers)
        found["mean_tokens"] = tokens / len(answers)
        found["tokens_per_second"] = tokens / results.generation_seconds
        found["answers_n"] = len(answers)
    return found | {"seconds": results.seconds}


def guessed_right(item: Any) -> float:
    """The probability that an exam item is guessed: one option of n, or one of the 2^n - 1 sets that hold an option; else 0."""
    count = len(item.get("options", ()))
    sets = 2**count - 1 if kind_of(item) == MULTIPLE else count
    return 1 / sets if count else 0


def shares(results: Results) -> dict[str, list[bool]]:
    """{metric: is each of its items right?}; a test that was not made is missing."""
    found = {}
    for metric in METRICS:
        judged = [metric.right(item) for item in results.items] if metric.right else []
        if right := [right for right in judged if right is not None]:
            found[metric.name] = right
    return found


def losses(results: Results) -> dict[str, tuple[list[float], list[int]]]:
    """{metric: (the sum of losses, the tokens) of each item}; a test that was not made is missing."""
    found = {}
    for test in ("heldout", "general"):
        if items := [item for item in results.items if item["test"] == test]:
            found[f"{test}_loss"] = [item["loss"] for item in items], [item["tokens"] for item in items]
    return found


def differences(one: Results, other: Results) -> dict[str, dict[str, Any]]:
    """{metric: {"difference", "interval", of shares also "p"}}, `other` minus `one`, on the same items.

    Losses a token of two models with different tokenizers cannot be compared: left out.
    """
    found: dict[str, dict[str, Any]] = {}
    ours, theirs = shares(one), shares(other)
    for name in COMPARED:
        if name in ours and name in theirs:
            found[name] = share_difference(ours[name], theirs[name])
    theirs = losses(other)
    for name, (sums, tokens) in losses(one).items():
        other_sums, other_tokens = theirs.get(name, ([], []))
        if tokens == other_tokens:
            mean, interval = mean_per_token([b - a for a, b in zip(sums, other_sums)], tokens)
            found[name] = {"difference": mean, "interval": interval}
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


def mean_per_token(sums: list[float], tokens: list[int]) -> tuple[float, list[float] | None]:
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
