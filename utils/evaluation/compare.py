"""Results of a model, measured once and kept; the metrics that follow from them; the differences between two models.

Kept results are JSON lines: one for the model ({"test": "model", "folder", "identity", "seconds", "generation_seconds",
"sha256"}), then one an item, as utils/evaluation/measure.py describes them.
"""

import hashlib
import itertools
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from utils.data.exams import MULTIPLE, SINGLE, TRUE_FALSE
from utils.device import Device
from utils.errors import UserError
from utils.evaluation.exams import prompt_texts
from utils.evaluation.measure import measure
from utils.evaluation.questions import Tests, kind_of
from utils.evaluation.statistics import mcnemar, mean_per_token, share_difference, wilson
from utils.files import read_jsonl, sha256_of, show_path, write_jsonl
from utils.model.folder import adapter_base, model_sha256
from utils.model.hub_models import local_folder
from utils.settings import Settings

# Raise this number with every change of the code that changes a score or what counts as right.
SCORING_VERSION = 4

# The metrics of the exam: what kind of question, and which field of its results holds the choice.
EXAM_METRICS = {
    "exam": (SINGLE, "text_choice"),
    "exam_letter": (SINGLE, "letter_choice"),
    "exam_true_false": (TRUE_FALSE, "text_choice"),
    "exam_true_false_letter": (TRUE_FALSE, "letter_choice"),
    "exam_multiple": (MULTIPLE, "letter_choice"),
}

# Settings that decide where results go and how they are shown, not what they are.
NOT_IDENTITY = {"MODELS", "BASE_MODEL", "OUTPUT_DIR", "SHOW", "FRESH", "DEVICE", "PRECISION"}


class Results(NamedTuple):
    """`items`: dicts of the kinds in utils/evaluation/measure.py; seconds: in all, and of generating answers."""

    folder: str
    seconds: float
    generation_seconds: float
    items: list[Any]

    def of(self, test: str) -> list[Any]:
        return [item for item in self.items if item["test"] == test]


class Difference(TypedDict):
    """`p` (McNemar, exact) for shares only."""

    difference: float
    interval: list[float] | None
    p: NotRequired[float]


# ---- Kept results


def measured_or_kept(folder: str, tests: Tests, settings: Settings, device: Device) -> Results:
    """The results of a model folder: read where it was measured before in just this way, else measured and kept."""
    identity = result_identity(folder, settings, device)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = settings.OUTPUT_DIR / "comparison" / f"{Path(folder).resolve().name}-{key}.jsonl"
    if path.is_file() and not settings.FRESH:
        kept = _read_kept(path, identity)
        if kept:
            print(f"  measured before: {show_path(path)} (--fresh measures again)", flush=True)
            return kept
        print(f"  {show_path(path)} is damaged or edited; measured again", flush=True)
    began = time.monotonic()
    generation_seconds, items = measure(folder, tests, settings, device)
    results = Results(show_path(folder), round(time.monotonic() - began, 1), generation_seconds, items)
    _keep(path, identity, results)
    return results


def result_identity(folder: str, settings: Settings, device: Device) -> dict[str, Any]:
    """All that decides the results: weights, files and settings by content, prompts, code, libraries, number format."""
    identity: dict[str, Any] = {}
    for name, value in vars(settings).items():
        if name.isupper() and name not in NOT_IDENTITY:
            by_content = name.endswith("_FILE") and value and value.is_file()
            identity[name] = f"sha256 {sha256_of(value)}" if by_content else str(value)
    parts = [folder, adapter_base(folder)] if (Path(folder) / "adapter_config.json").is_file() else [folder]
    decoding = Path(local_folder(folder)) / "generation_config.json"  # its end tokens
    libraries = ("torch", "transformers", "tokenizers", "peft")
    return identity | {
        "model": [model_sha256(part) for part in parts],
        "generation_config": sha256_of(decoding) if decoding.is_file() else "",
        "prompts": prompt_texts(),
        "scoring_version": SCORING_VERSION,
        "libraries": {package: version(package) for package in libraries},
        "device": f"{device.name} {'bf16' if device.bf16 else 'fp32'}",
    }


def _keep(path, identity, results):
    first = {"test": "model", "folder": results.folder, "identity": identity}
    first |= {"seconds": results.seconds, "generation_seconds": results.generation_seconds}
    write_jsonl(path, [first | {"sha256": _digest([first, *results.items])}, *results.items])


def _read_kept(path, identity) -> Results | None:
    """The results that a file holds; None where it is not whole, was edited, or belongs to something else."""
    try:
        first, *items = read_jsonl(path, ["test"])
    except UserError:
        return None
    digest = first.pop("sha256", None)
    if digest != _digest([first, *items]) or first.get("identity") != identity:
        return None
    return Results(first["folder"], first["seconds"], first["generation_seconds"], items)


def _digest(rows):
    return hashlib.sha256("\n".join(json.dumps(row) for row in rows).encode()).hexdigest()


# ---- Metrics and differences


def shares(results: Results) -> dict[str, list[bool]]:
    """{metric: whether each item is right}; a test that was not made is missing."""
    found = {}
    for name, (_, choice) in EXAM_METRICS.items():
        found[name] = [item[choice] == item["answer"] for item in exam_items(results, name)]
    found["preference"] = [item["chosen"] > item["rejected"] for item in results.of("preference")]
    answers = [item for item in results.of("answer") if item["right"] is not None]
    for name, about in (("facts", "heldout"), ("general", "general")):
        found[name] = [item["right"] for item in answers if item["about"] == about]
    found["names"] = [item["named"] for item in results.of("answer") if item["named"] is not None]
    return {name: right for name, right in found.items() if right}


def exam_items(results: Results, metric: str) -> list[Any]:
    """The items that a metric of EXAM_METRICS is of."""
    kind, choice = EXAM_METRICS[metric]
    return [item for item in results.of("exam") if kind_of(item) == kind and choice in item]


def guessed_right(item: Any) -> float:
    """The probability that an exam item is guessed: one option of n, or one of the 2^n - 1 sets that hold an option."""
    count = len(item["options"])
    return 1 / (2**count - 1) if kind_of(item) == MULTIPLE else 1 / count


def losses(results: Results) -> dict[str, tuple[list[float], list[int]]]:
    """{metric: (the sum of losses, the tokens) of each item}; a test that was not made is missing."""
    found = {}
    for test in ("heldout", "general"):
        if items := results.of(test):
            found[f"{test}_loss"] = [item["loss"] for item in items], [item["tokens"] for item in items]
    return found


def metrics(results: Results) -> dict[str, Any]:
    """The metrics of one model, as in comparison.json. Losses are nats a token, intervals 95 %."""
    found: dict[str, Any] = {"folder": results.folder}
    for name, right in shares(results).items():
        found[f"{name}_accuracy"] = sum(right) / len(right)
        found[f"{name}_interval"] = wilson(sum(right), len(right))
        found[f"{name}_n"] = len(right)
    for name, (sums, tokens) in losses(results).items():
        found[name], found[f"{name}_interval"] = mean_per_token(sums, tokens)
        found[f"{name}_n"] = len(sums)
    found["perplexity"] = math.exp(found["heldout_loss"])
    for name in EXAM_METRICS:
        if items := exam_items(results, name):
            found[f"{name}_chance"] = sum(map(guessed_right, items)) / len(items)
    if several := exam_items(results, "exam_multiple"):
        found["exam_multiple_named"] = sum(bool(item["letter_choice"]) for item in several) / len(several)
    if answers := results.of("answer"):
        tokens_in_all = sum(item["tokens"] for item in answers)
        found["ended_share"] = sum(item["ended"] for item in answers) / len(answers)
        found["repetition"] = sum(item["repetition"] for item in answers) / len(answers)
        found["mean_tokens"] = tokens_in_all / len(answers)
        found["tokens_per_second"] = tokens_in_all / results.generation_seconds
        found["answers_n"] = len(answers)
    return found | {"seconds": results.seconds}


def differences(one: Results, other: Results) -> dict[str, Difference]:
    """{metric: Difference}, `other` minus `one`, on the same items.

    Losses a token of two models with different tokenizers cannot be compared: left out.
    """
    found: dict[str, Difference] = {}
    ours, theirs = shares(one), shares(other)
    for name in [name for name in ours if name in theirs]:
        change, interval = share_difference(ours[name], theirs[name])
        found[name] = {"difference": change, "interval": interval, "p": mcnemar(ours[name], theirs[name])}
    before, after = losses(one), losses(other)
    for name in [name for name in before if name in after]:
        (sums, tokens), (other_sums, other_tokens) = before[name], after[name]
        if tokens == other_tokens:
            mean, spread = mean_per_token([b - a for a, b in zip(sums, other_sums)], tokens)
            found[name] = {"difference": mean, "interval": spread}
    return found


def compare_all(measured: dict[str, Results]) -> list[dict[str, Any]]:
    """The "differences" of comparison.json: every two of {name: results}, in their order."""
    return [
        {"from": one, "to": other, **differences(measured[one], measured[other])}
        for one, other in itertools.combinations(measured, 2)
    ]
