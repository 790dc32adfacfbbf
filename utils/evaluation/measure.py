"""Ask one model every question, once: its results are kept in OUTPUT_DIR/comparison/ under all that decides them.

A result is a dict with "test" and "id":
    heldout, general   loss (nats, the sum over an answer), tokens
    exam               the question; text_choice, text, letter_choice, letter, rotations, said: see utils/evaluation/exams.py
    preference         kind; chosen, rejected: the log-probabilities of both answers
    answer, follow_up, caution     see judge() in utils/evaluation/questions.py
"""

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from utils.data.exams import MULTIPLE
from utils.device import Device
from utils.evaluation.exams import choices_by_letter, choices_by_text, choices_of_several, prompt_texts
from utils.evaluation.metrics import Results
from utils.evaluation.questions import (
    ExamQuestion,
    Tests,
    ask_in_conversations,
    caution_questions,
    first_questions,
    judge,
    kind_of,
)
from utils.files import read_jsonl, sample_by_id, sha256_of, show_path
from utils.kept import digest, read_kept, write_kept
from utils.model.chat_format import THINKING_MODES, encode_answer, encode_prompt, encode_turns
from utils.model.export.folders import training_history
from utils.model.folder import adapter_base, load_model, load_tokenizer, model_sha256
from utils.model.generate import generate_tokens, read_answer, stop_tokens
from utils.model.logprobs import answer_logps, pack_for_scoring
from utils.model.qwen3_train import prepare_packed
from utils.settings import ROOT, Settings
from utils.text import progress

# Raise this number with every change of the code that changes a score or what counts as right.
SCORING_VERSION = 5

# Settings that decide where results go and how they are shown, not what they are.
NOT_IDENTITY = {"MODELS", "BASE_MODEL", "OUTPUT_DIR", "SHOW", "FRESH", "DEVICE", "PRECISION"}


def measured_or_kept(folder: str, tests: Tests, settings: Settings, device: Device) -> Results:
    """The results of a model folder: read if it was measured before in just this way, else measured and kept."""
    identity: dict[str, Any] = {}
    for name, value in vars(settings).items():
        if name.isupper() and name not in NOT_IDENTITY:
            by_content = name.endswith("_FILE") and value and value.is_file()
            identity[name] = f"sha256 {sha256_of(value)}" if by_content else str(value)
    parts = [folder, adapter_base(folder)] if (Path(folder) / "adapter_config.json").is_file() else [folder]
    decoding = Path(folder) / "generation_config.json"  # its end tokens
    identity |= {
        "model": [model_sha256(part) for part in parts],
        "generation_config": sha256_of(decoding) if decoding.is_file() else "",
        "prompts": prompt_texts(),
        "scoring_version": SCORING_VERSION,
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "peft")},
        "device": f"{device.name} {device.format}",
    }
    name = f"{Path(folder).resolve().name}-{digest(identity)[:12]}.json"
    path = settings.OUTPUT_DIR / "comparison" / name
    if not settings.FRESH and (kept := read_kept(path, identity)):
        print(f"  measured before: {show_path(path)} (--fresh measures again)", flush=True)
        return Results(**kept)
    began = time.monotonic()
    generation_seconds, items = measure(folder, tests, settings, device)
    seconds = round(time.monotonic() - began, 1)
    results = Results(show_path(folder), seconds, generation_seconds, items, identity["model"][0])
    write_kept(path, identity, results._asdict())
    return results


def seen_in_training(folders: dict[str, str], tests: Tests) -> list[str]:
    """Warnings: the models among {name: folder} that were trained on some of the held-out questions, and how many these are.

    Known of runs whose training files are still what they were: that of the folder, and of the folders it was trained from.
    """

    def question_of(row):
        messages = row["messages"][:-1] if "messages" in row else row["prompt"]
        return str([(message["role"], message["content"]) for message in messages])

    asked = {question_of(row) for row in [*tests.heldout, *tests.pairs]}
    seen: dict[str, set[str]] = {}  # {training file: the questions of `asked` that it holds}
    warnings = []
    for name, folder in folders.items():
        mine = set()
        for run in training_history(Path(folder))[0]:
            path, then = ROOT / str(run["settings"].get("TRAIN_FILE")), run["identity"].get("TRAIN_FILE")
            if path.is_file() and f"sha256 {sha256_of(path)}" == then:
                if then not in seen:
                    seen[then] = asked & {question_of(row) for row in read_jsonl(path, ["id"])}
                mine |= seen[then]
        if mine:
            share = f"{len(mine):,} of {len(asked):,} held-out questions"
            warnings.append(f"{share} are among the training rows of {name}: it knows their answers by heart")
    return warnings


def measure(folder: str, tests: Tests, settings: Settings, device: Device) -> tuple[float, list[Any]]:
    """(seconds of generating, the results of all tests) of a model folder. `settings`: those of compare_models.py."""
    tokenizer = load_tokenizer(folder)
    chosen = letter_choices(folder, tokenizer, tests.exam, settings.LETTER_ROWS, settings.BATCH_SIZE, device)
    model = load_model(folder, device.dtype).to(device.name).eval()
    # answers first: prepare_packed changes how the model computes
    seconds, results = generated_answers(model, tokenizer, tests, settings)
    prepare_packed(model)

    def scores(documents, label):
        """[log-probabilities of the answers, ...] for lists of (prompt, answer) that are packed together."""
        if not documents:
            return []
        packed = pack_for_scoring([{"documents": each} for each in documents])
        return answer_logps(model, packed, device, progress(label))

    for test, rows in (("heldout", tests.heldout), ("general", tests.general)):
        turns = [(row["id"], turn) for row in rows for turn in encode_turns(tokenizer, row["messages"])]
        logps = scores([[turn] for _, turn in turns], f"loss on {len(turns):,} {test} answers")
        for (row_id, (_, answer)), [logp] in zip(turns, logps):
            results.append({"test": test, "id": row_id, "loss": -logp, "tokens": len(answer)})
    asked = [item for item in tests.exam if kind_of(item) != MULTIPLE]
    for item, choice in zip(asked, choices_by_text(model, tokenizer, asked, device)):
        chosen[item["id"]] = choice | chosen.get(item["id"], {})
    results += [{**item, "test": "exam", **chosen.get(item["id"], {})} for item in tests.exam]
    documents = []
    for pair in tests.pairs:
        prompt = encode_prompt(tokenizer, pair["prompt"], bool(pair["chosen"][-1].get("reasoning_content")))
        sides = (pair["chosen"][-1], pair["rejected"][-1])
        documents.append([(prompt, encode_answer(tokenizer, message)) for message in sides])
    for pair, (good, bad) in zip(tests.pairs, scores(documents, f"{len(documents):,} preference pairs")):
        about = {"test": "preference", "id": pair["id"], "kind": pair.get("kind", "")}
        results.append({**about, "chosen": good, "rejected": bad})
    return seconds, results


def generated_answers(model, tokenizer, tests: Tests, settings: Settings) -> tuple[float, list[dict]]:
    """(seconds of generating first answers, results), always the likeliest token: some held-out questions and the general ones,
    some of the former again in conversations, and the questions of preference pairs about cautions."""
    if not settings.GENERATE:
        return 0.0, []
    stop, thinking = stop_tokens(model, tokenizer), THINKING_MODES[settings.THINKING]

    def ask(questions, label):
        prompts = [encode_prompt(tokenizer, asked.messages, thinking) for asked in questions]
        limits = {"max_new_tokens": settings.MAX_NEW_TOKENS, "batch_size": settings.BATCH_SIZE}
        watch, results = progress(f"{len(prompts):,} {label}"), []
        answers = generate_tokens(model, prompts, stop, **limits, watch=watch)
        for asked, prompt, ids in zip(questions, prompts, answers):
            text, ended = read_answer(tokenizer, prompt, ids).content, ids[-1] in stop
            results.append(judge(asked, text, ids[:-1] if ended else ids, ended, tests.terms))
        return results

    questions, began = first_questions(tests, settings.GENERATE, settings.SEED), time.monotonic()
    answers = ask(questions, "answers in full")
    seconds = round(time.monotonic() - began, 3)
    follow_ups = ask_in_conversations(ask, questions, answers, settings.FOLLOW_UPS)
    cautions = ask(caution_questions(tests.pairs)[: settings.GENERATE], "answers about cautions")
    return seconds, [*answers, *follow_ups, *cautions]


def letter_choices(
    folder: str, tokenizer, exam: list[ExamQuestion], count: int, batch_size: int, device: Device
) -> dict[str, dict]:
    """{question id: the fields that choosing letters gives} for `count` of the questions (0: all; below: none), and for all
    with several right answers, which are asked in no other way.

    Weights and products are float32 whatever the device's number format. An untrained model finds all letters about
    equally likely, and bfloat16 would decide between them by rounding (4 of 60 choices were others).
    """
    several = [item for item in exam if kind_of(item) == MULTIPLE]
    single = [item for item in exam if kind_of(item) != MULTIPLE]
    asked = sample_by_id(single, count) if count >= 0 else []
    if not several and not asked:
        return {}
    model = load_model(folder, torch.float32).to(device.name).eval()
    choices = choices_of_several(model, tokenizer, several, stop_tokens(model, tokenizer), batch_size)
    exact = replace(device, bf16=False, fp16=False)
    choices += choices_by_letter(prepare_packed(model), tokenizer, asked, exact)
    return {item["id"]: choice for item, choice in zip([*several, *asked], choices)}
