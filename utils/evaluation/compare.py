"""One model's results, item by item; the figures that follow from them; and what two models' results say of each other.

Results are a list of dicts, one an item, kept as JSON lines, so that a model once measured is not measured again:

    {"test": "model", "folder", "identity", "seconds", "generation_seconds"}      the first line
    {"test": "heldout" or "general", "id", "loss" (nats, sum over the answer), "tokens"}
    {"test": "exam", "id", "question", "options", "answer", "text_choice", "text": {letter: score}, and for those asked by
     letter "letter_choice", "letter", "rotations"}
    {"test": "preference", "id", "kind", "chosen", "rejected"}                    log-probabilities
    {"test": "answer", "about": "heldout" or "general", "id", "question", "reference", "answer", "tokens", "ended", "right",
     "repetition"}
"""

import hashlib
import json
import math
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

from utils.data.terms import Terms
from utils.evaluation.statistics import mcnemar, mean_per_token, share_difference, wilson
from utils.files import read_jsonl, sample_by_id, sha256_of, show_path, write_jsonl
from utils.model.folders import adapter_base, model_sha256
from utils.model.load import load_model, load_tokenizer
from utils.progress import progress

# Settings that decide where results go and how they are shown, not what they are.
NOT_IDENTITY = {"MODELS", "BASE_MODEL", "OUTPUT_DIR", "SHOW", "FRESH", "DEVICE", "PRECISION"}


THINKING_MODES = {"auto": None, "on": True, "off": False}


SHARES = ("exam", "exam_letter", "preference", "facts", "general")


LOSSES = ("heldout", "general")


DIGITS = "0-9一二三四五六七八九十百千"


class Tests(NamedTuple):
    """What every model is asked: rows of the project's files, lists of dicts (empty: this test is left out)."""

    rows: list
    exam: list
    pairs: list
    general: list
    terms: Terms


def results(folder, tests, settings, device):
    """The results of a model folder: read where it was measured before in just this way, else measured and kept."""
    identity = _identity(folder, settings, device)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = settings.OUTPUT_DIR / "comparison" / f"{Path(folder).resolve().name}-{key}.jsonl"
    if path.is_file() and not settings.FRESH:
        print(f"  measured before: {show_path(path)} (--fresh measures again)", flush=True)
        return list(read_jsonl(path, ["test"]))
    began = time.monotonic()
    generation_seconds, items = _measure(folder, tests, settings, device)
    first = {
        "test": "model",
        "folder": show_path(folder),
        "identity": identity,
        "seconds": round(time.monotonic() - began, 1),
        "generation_seconds": generation_seconds,
    }
    write_jsonl(path, [first, *items])
    return [first, *items]


def _identity(folder, settings, device):
    """All that decides the results: weights, files and settings by content, device and number format."""
    identity = {
        name: f"sha256 {sha256_of(value)}"
        if name.endswith("_FILE") and value and value.is_file()
        else str(value)
        for name, value in vars(settings).items()
        if name.isupper() and name not in NOT_IDENTITY
    }
    parts = [folder, adapter_base(folder)] if (Path(folder) / "adapter_config.json").is_file() else [folder]
    stops = Path(folder) / "generation_config.json"
    return identity | {
        "model": [model_sha256(part) for part in parts],
        "stops": sha256_of(stops) if stops.is_file() else "",
        "device": f"{device.name} {'bf16' if device.bf16 else 'fp32'}",
    }


def _measure(folder, tests, settings, device):
    """(seconds of generating, items)"""
    from utils.evaluation.exams import exam_choices, exam_letter_choices
    from utils.model.chat_format import encode_answer, encode_prompt, encode_turns
    from utils.model.logprobs import answer_logps, pack_for_scoring
    from utils.model.packed_forward import prepare_packed

    tokenizer, model = load_tokenizer(folder), load_model(folder, device.dtype).to(device.name).eval()
    seconds, items = _answers(
        model, tokenizer, tests, settings
    )  # first: prepare_packed changes how the model computes
    prepare_packed(model)

    general = [
        {
            "id": row["id"],
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
        }
        for row in tests.general
    ]
    for test, rows in (("heldout", tests.rows), ("general", general)):
        turns = [(row["id"], turn) for row in rows for turn in encode_turns(tokenizer, row["messages"])]
        if turns:
            logps = answer_logps(
                model,
                pack_for_scoring([{"documents": [turn]} for _, turn in turns]),
                device,
                progress(f"loss on {len(turns):,} {test} answers", always=True),
            )
            items += [
                {"test": test, "id": row_id, "loss": -logp, "tokens": len(answer)}
                for (row_id, (_, answer)), [logp] in zip(turns, logps)
            ]
    if tests.exam:
        by_text = exam_choices(
            model,
            tokenizer,
            tests.exam,
            settings.EXAM_INSTRUCTION,
            device,
            progress(f"exam by option text, {len(tests.exam):,} questions", always=True),
        )
        some = sample_by_id(tests.exam, settings.LETTER_ROWS)
        by_letter = exam_letter_choices(
            model,
            tokenizer,
            some,
            device,
            progress(f"exam by option letter, {len(some):,} questions, every rotation", always=True),
        )
        letters = {
            item["id"]: dict(zip(("letter_choice", "letter", "rotations"), result))
            for item, result in zip(some, by_letter)
        }
        items += [
            {
                "test": "exam",
                "id": item["id"],
                "question": item["question"],
                "options": item["options"],
                "answer": item["answer"],
                "text_choice": text[0],
                "text": text[1],
                **letters.get(item["id"], {}),
            }
            for item, text in zip(tests.exam, by_text)
        ]
    if tests.pairs:
        documents = [
            [
                (
                    encode_prompt(
                        tokenizer, pair["prompt"], bool(pair["chosen"][-1].get("reasoning_content"))
                    ),
                    encode_answer(tokenizer, pair[side][-1]),
                )
                for side in ("chosen", "rejected")
            ]
            for pair in tests.pairs
        ]
        logps = answer_logps(
            model,
            pack_for_scoring([{"documents": pair} for pair in documents]),
            device,
            progress(f"{len(documents):,} preference pairs", always=True),
        )
        items += [
            {
                "test": "preference",
                "id": pair["id"],
                "kind": pair.get("kind", ""),
                "chosen": chosen,
                "rejected": rejected,
            }
            for pair, (chosen, rejected) in zip(tests.pairs, logps)
        ]
    return seconds, items


def _answers(model, tokenizer, tests, settings):
    """(seconds of generating, an item for each answer): some held-out questions and the general ones, answered greedily."""
    from utils.model.chat_format import encode_prompt
    from utils.model.generate import generate_tokens, read_answer, stop_tokens

    if not settings.GENERATE:
        return 0.0, []
    drawn = random.Random(settings.SEED).sample(tests.rows, min(settings.GENERATE, len(tests.rows)))
    asked = [
        ("heldout", row["id"], row["messages"][:-1], row["messages"][-1]["content"], None) for row in drawn
    ]
    asked += [
        ("general", row["id"], [{"role": "user", "content": row["question"]}], row["answer"], row["accept"])
        for row in tests.general
    ]
    prompts = [
        encode_prompt(tokenizer, messages, THINKING_MODES[settings.THINKING])
        for _, _, messages, _, _ in asked
    ]
    stop, began = stop_tokens(model, tokenizer), time.monotonic()
    generated = generate_tokens(
        model,
        prompts,
        stop,
        settings.MAX_NEW_TOKENS,
        batch_size=settings.BATCH_SIZE,
        watch=progress(f"{len(prompts):,} answers in full", always=True),
    )
    seconds, items = time.monotonic() - began, []
    for (about, row_id, messages, reference, accept), prompt, ids in zip(asked, prompts, generated):
        question, answer = messages[-1]["content"], read_answer(tokenizer, prompt, ids).content
        right = (
            states_one_of(answer, accept) if accept else same_facts(tests.terms, reference, answer, question)
        )
        ended = ids[-1] in stop
        items.append(
            {
                "test": "answer",
                "about": about,
                "id": row_id,
                "question": question,
                "reference": reference,
                "answer": answer,
                "tokens": len(ids),
                "ended": ended,
                "right": right,
                "repetition": repetition(ids[:-1] if ended else ids),
            }
        )
    return round(seconds, 3), items


def same_facts(terms, reference, answer, question):
    """Whether `answer` states exactly the terms that `reference` does; None where that states none beyond the question's."""
    wanted = terms.stated(reference, question)
    return terms.stated(answer, question) == wanted if wanted else None


def states_one_of(answer, accept):
    """Whether one of the texts in `accept` is in the answer; a number has to stand by itself: no 2 in 1024."""
    return any(
        re.search(
            f"(?<![{DIGITS}]){re.escape(text)}(?![{DIGITS}])"
            if re.search(f"[{DIGITS}]", text)
            else re.escape(text),
            answer,
            re.IGNORECASE,
        )
        for text in accept
    )


def repetition(ids, n=4):
    """The share of an answer's runs of `n` tokens that it has said before (seq-rep-4 of Welleck et al. 2019)."""
    runs = list(zip(*(ids[start:] for start in range(n))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def by_measure(items):
    """{measure: its items in order}: for SHARES list of bool, for LOSSES (sums of losses, tokens); what was not tested is
    missing."""
    of = {
        test: [item for item in items if item["test"] == test]
        for test in ("heldout", "general", "exam", "preference")
    }
    answers = [item for item in items if item["test"] == "answer" and item["right"] is not None]
    shares = {
        "exam": [item["text_choice"] == item["answer"] for item in of["exam"]],
        "exam_letter": [
            item["letter_choice"] == item["answer"] for item in of["exam"] if "letter_choice" in item
        ],
        "preference": [item["chosen"] > item["rejected"] for item in of["preference"]],
        "facts": [item["right"] for item in answers if item["about"] == "heldout"],
        "general": [item["right"] for item in answers if item["about"] == "general"],
    }
    losses = {
        f"{test}_loss": ([item["loss"] for item in of[test]], [item["tokens"] for item in of[test]])
        for test in LOSSES
    }
    return {name: right for name, right in shares.items() if right} | {
        name: (sums, tokens) for name, (sums, tokens) in losses.items() if sums
    }


def figures(results):
    """The figures of one model, a dict as in comparison.json. Losses are nats a token, intervals 95 %."""
    (first, *items), found = results, {}
    for name, values in by_measure(items).items():
        if name in SHARES:
            found |= {
                f"{name}_accuracy": sum(values) / len(values),
                f"{name}_interval": wilson(sum(values), len(values)),
                f"{name}_n": len(values),
            }
        else:
            loss, interval = mean_per_token(*values)
            found |= {name: loss, f"{name}_interval": interval, f"{name}_n": len(values[0])}
    found["perplexity"] = math.exp(found["heldout_loss"])
    exam = [item for item in items if item["test"] == "exam"]
    if exam:
        found["exam_chance"] = sum(1 / len(item["text"]) for item in exam) / len(exam)
    answers = [item for item in items if item["test"] == "answer"]
    if answers:
        tokens = sum(item["tokens"] for item in answers)
        found |= {
            "ended_share": _mean(answers, "ended"),
            "repetition": _mean(answers, "repetition"),
            "mean_tokens": tokens / len(answers),
            "tokens_per_second": tokens / first["generation_seconds"],
            "answers_n": len(answers),
        }
    return {"folder": first["folder"], **found, "seconds": first["seconds"]}


def differences(one, other):
    """{measure: {"difference", "interval", "p"}} of two models' results, `other` minus `one`, on the same items.

    p (McNemar, exact) for shares only. Losses a token of two models with different tokenizers cannot be compared: left out.
    """
    ours, theirs, found = by_measure(one), by_measure(other), {}
    for name in [name for name in ours if name in theirs]:
        if name in SHARES:
            change, interval = share_difference(ours[name], theirs[name])
            found[name] = {"difference": change, "interval": interval, "p": mcnemar(ours[name], theirs[name])}
        elif ours[name][1] == theirs[name][1]:
            change, interval = mean_per_token(
                [b - a for a, b in zip(ours[name][0], theirs[name][0])], ours[name][1]
            )
            found[name] = {"difference": change, "interval": interval}
    return found


def _mean(items, name):
    return sum(item[name] for item in items) / len(items)
