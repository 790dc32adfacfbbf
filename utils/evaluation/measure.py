"""Ask one model every question, once: its results are kept in OUTPUT_DIR/comparison/ under all that decides them.

A result is a dict with "test" and "id":
    heldout            loss (nats, the sum over an answer), tokens
    exam               the question; text_choice, text, letter_choice, letter, rotations: see utils/evaluation/exams.py
    preference         chosen, rejected: the log-probabilities of both answers
    answer             see judge() in utils/evaluation/questions.py
"""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from utils.device import Device
from utils.evaluation.exams import choices_by_letter, choices_by_text
from utils.evaluation.metrics import Results
from utils.evaluation.questions import (
    ExamQuestion,
    Tests,
    ask_in_conversations,
    caution_questions,
    first_questions,
    judge,
)
from utils.files import read_jsonl, sample_by_id, sha256_of, show_path
from utils.kept import digest, read_kept, write_kept
from utils.model.chat_format import THINKING_MODES, encode_answer, encode_prompt, encode_turns
from utils.model.export.folders import training_file, training_history
from utils.model.folder import adapter_base, is_adapter, load_model, load_tokenizer, model_sha256
from utils.model.generate import generate_tokens, read_answer, stop_tokens
from utils.model.logprobs import answer_logps
from utils.model.qwen3_train import prepare_packed
from utils.settings import Settings
from utils.text import progress

# Raise this number with every change of the code or of a prompt that changes a score or what counts as right.
SCORING_VERSION = 6

# Settings that decide where results go and how they are shown, not what they are.
NOT_IDENTITY = {"MODELS", "BASE_MODEL", "OUTPUT_DIR", "SHOW", "FRESH", "DEVICE", "PRECISION"}


def measured_or_kept(folder: str, tests: Tests, settings: Settings, device: Device) -> Results:
    """The results of a model folder: read if it was measured before in just this way, else measured and kept."""
    weights, end_tokens = model_sha256(folder), Path(folder) / "generation_config.json"
    identity = {
        "model": [weights, model_sha256(adapter_base(folder)) if is_adapter(folder) else ""],
        "generation_config": sha256_of(end_tokens) if end_tokens.is_file() else "",
        "scoring_version": SCORING_VERSION,
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "peft")},
        "device": f"{device.name} {device.format}",
    }
    for name, value in vars(settings).items():
        if name.isupper() and name not in NOT_IDENTITY:
            is_file = isinstance(value, Path) and value.is_file()
            identity[name] = sha256_of(value) if is_file else str(value)
    name = f"{Path(folder).resolve().name}-{digest(identity)[:12]}.json"
    path = settings.OUTPUT_DIR / "comparison" / name
    items = None if settings.FRESH else read_kept(path, identity)
    if items:
        print(f"  measured before: {show_path(path)} (--fresh measures again)", flush=True)
    else:
        items = measure(folder, tests, settings, device)
        write_kept(path, identity, items)
    return Results(show_path(folder), items, weights)


def seen_in_training(folders: dict[str, str], tests: Tests) -> list[str]:
    """Warnings: the models among {name: folder} that were trained on some of the held-out questions, and how many these are.

    Known of runs whose training files are still what they were: that of the folder, and of the folders it was trained from.
    """

    def question_of(row):
        messages = row["messages"][:-1] if "messages" in row else row["prompt"]
        return str([(message["role"], message["content"]) for message in messages])

    asked, warnings = {question_of(row) for row in [*tests.heldout, *tests.pairs]}, []
    for name, folder in folders.items():
        seen = set()
        for run in training_history(Path(folder))[0]:
            path, is_same = training_file(run)
            if is_same:
                seen |= asked & {question_of(row) for row in read_jsonl(path, ["id"])}
        if seen:
            share = f"{len(seen):,} of {len(asked):,} held-out questions"
            warnings.append(f"{share} are among the training rows of {name}: it knows their answers by heart")
    return warnings


def measure(folder: str, tests: Tests, settings: Settings, device: Device) -> list[dict]:
    """The results of all tests of a model folder. `settings`: those of compare_models.py."""
    tokenizer = load_tokenizer(folder)
    count = settings.LETTER_ROWS
    asked = sample_by_id(tests.exam, count) if count >= 0 else []
    by_letter = letter_choices(folder, tokenizer, asked, device) if asked else {}
    model = load_model(folder, device.dtype).to(device.name).eval()
    # answers first: prepare_packed changes how the model computes
    results = generated_answers(model, tokenizer, tests, settings) if settings.GENERATE else []
    prepare_packed(model)

    turns = [(row["id"], turn) for row in tests.heldout for turn in encode_turns(tokenizer, row["messages"])]
    items = [{"documents": [turn]} for _, turn in turns]
    watch = progress(f"loss on {len(turns):,} held-out answers")
    for (row_id, (_, answer)), [logp] in zip(turns, answer_logps(model, items, device, watch)):
        results.append({"test": "heldout", "id": row_id, "loss": -logp, "tokens": len(answer)})
    for item, choice in zip(tests.exam, choices_by_text(model, tokenizer, tests.exam, device)):
        results.append({**item, "test": "exam", **choice, **by_letter.get(item["id"], {})})
    items, watch = [], progress(f"{len(tests.pairs):,} preference pairs")
    for pair in tests.pairs:
        prompt = encode_prompt(tokenizer, pair["prompt"], bool(pair["chosen"][-1].get("reasoning_content")))
        sides = (pair["chosen"][-1], pair["rejected"][-1])
        items.append({"documents": [(prompt, encode_answer(tokenizer, message)) for message in sides]})
    for pair, (good, bad) in zip(tests.pairs, answer_logps(model, items, device, watch)):
        results.append({"test": "preference", "id": pair["id"], "chosen": good, "rejected": bad})
    return results


def generated_answers(model, tokenizer, tests: Tests, settings: Settings) -> list[dict]:
    """Answers in full, always the likeliest token: to some held-out questions and the general ones, to some of the former again
    in conversations, and to the questions of preference pairs about cautions."""
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

    questions = first_questions(tests, settings.GENERATE, settings.SEED)
    answers = ask(questions, "answers in full")
    follow_ups = ask_in_conversations(ask, questions, answers, settings.FOLLOW_UPS)
    cautions = ask(caution_questions(tests.pairs)[: settings.GENERATE], "answers about cautions")
    return [*answers, *follow_ups, *cautions]


def letter_choices(folder: str, tokenizer, exam: list[ExamQuestion], device: Device) -> dict[str, dict]:
    """{question id: what choices_by_letter gives}.

    Weights and products are float32 whatever the device's number format. An untrained model finds all letters about
    equally likely, and bfloat16 would decide between them by rounding (4 of 60 choices were others).
    """
    model = prepare_packed(load_model(folder, torch.float32).to(device.name).eval())
    exact = replace(device, bf16=False, fp16=False)
    choices = choices_by_letter(model, tokenizer, exam, exact)
    return {item["id"]: choice for item, choice in zip(exam, choices)}
