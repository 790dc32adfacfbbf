"""Ask one model every question: losses, exam, preference pairs, answers in full. One result (a dict) for each item.

The results of a model are kept under all that decides them, in OUTPUT_DIR/comparison/, and measured once.
"""

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from utils.data.exams import MULTIPLE
from utils.device import Device
from utils.evaluation.answers import generated_answers
from utils.evaluation.exams import choices_by_letter, choices_by_text, choices_of_several, prompt_texts
from utils.evaluation.metrics import Results
from utils.evaluation.questions import ExamQuestion, Tests, as_question, kind_of
from utils.files import read_jsonl, sample_by_id, sha256_of, show_path
from utils.hub import local_folder
from utils.kept import digest, read_kept, write_kept
from utils.model.chat_format import encode_answer, encode_prompt, encode_turns
from utils.model.export.source import training_history
from utils.model.folder import adapter_base, load_model, load_tokenizer, model_sha256
from utils.model.generate import stop_tokens
from utils.model.logprobs import answer_logps, pack_for_scoring
from utils.model.qwen3_train import prepare_packed
from utils.settings import ROOT, Settings
from utils.text import progress

# Raise this number with every change of the code that changes a score or what counts as right.
SCORING_VERSION = 5

# Settings that decide where results go and how they are shown, not what they are.
NOT_IDENTITY = {"MODELS", "BASE_MODEL", "OUTPUT_DIR", "SHOW", "FRESH", "DEVICE", "PRECISION"}


class LossResult(TypedDict):
    """test: heldout or general; loss: nats, the sum over the answer."""

    test: str
    id: str
    loss: float
    tokens: int


class ExamResult(ExamQuestion):
    """`text`, `letter`: {option letter: score}; the fields of a way in which a question was not asked are missing.

    Of a question with several right answers there are only letter_choice ("ABD") and `said`, what the model wrote.
    """

    test: str
    text_choice: NotRequired[str]
    text: NotRequired[dict[str, float]]
    said: NotRequired[str]
    letter_choice: NotRequired[str]
    letter: NotRequired[dict[str, float]]
    rotations: NotRequired[list[dict[str, float]]]


class PreferenceResult(TypedDict):
    """`chosen`, `rejected`: log-probabilities of the two answers."""

    test: str
    id: str
    kind: str
    chosen: float
    rejected: float


# ---- Measured once, and kept


def measured_or_kept(folder: str, tests: Tests, settings: Settings, device: Device) -> Results:
    """The results of a model folder: read if it was measured before in just this way, else measured and kept."""
    identity = result_identity(folder, settings, device)
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


def seen_in_training(folders: dict[str, str], tests: Tests) -> list[str]:
    """Warnings: the models among {name: folder} that were trained on some of the held-out questions, and how many these are.

    Known of runs whose training files are still what they were: that of the folder, and of the folders it was trained from.
    """
    asked = {_question_key(row) for row in [*tests.heldout, *tests.pairs]}
    seen: dict[str, set[str]] = {}  # {training file: the questions of `asked` that it holds}
    warnings = []
    for name, folder in folders.items():
        mine = set()
        for run in training_history(Path(local_folder(folder)))[0]:
            path, digest_then = (
                ROOT / str(run["settings"].get("TRAIN_FILE")),
                run["identity"].get("TRAIN_FILE"),
            )
            if path.is_file() and f"sha256 {sha256_of(path)}" == digest_then:
                if digest_then not in seen:
                    seen[digest_then] = asked & {_question_key(row) for row in read_jsonl(path, ["id"])}
                mine |= seen[digest_then]
        if mine:
            warnings.append(
                f"{len(mine):,} of {len(asked):,} held-out questions are among the training rows of {name}: "
                "its answers to them tell what it learned by heart"
            )
    return warnings


def _question_key(row):
    """The text of a conversation or a preference pair up to its last answer."""
    messages = row["messages"][:-1] if "messages" in row else row["prompt"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


# ---- One model


def measure(folder: str, tests: Tests, settings: Settings, device: Device) -> tuple[float, list[Any]]:
    """(seconds of generating, the results of all tests) of a model folder. `settings`: those of compare_models.py."""
    tokenizer = load_tokenizer(folder)
    letter_rows, batch_size = settings.LETTER_ROWS, settings.BATCH_SIZE
    by_letter = letter_choices(folder, tokenizer, tests.exam, letter_rows, batch_size, device)
    model = load_model(folder, device.dtype).to(device.name).eval()
    # answers first: prepare_packed changes how the model computes
    seconds, answers = generated_answers(model, tokenizer, tests, settings)
    prepare_packed(model)
    return seconds, [
        *answers,
        *answer_losses(model, tokenizer, "heldout", tests.heldout, device),
        *answer_losses(model, tokenizer, "general", as_conversations(tests.general), device),
        *exam_results(model, tokenizer, tests.exam, by_letter, device),
        *preference_results(model, tokenizer, tests.pairs, device),
    ]


def letter_choices(
    folder: str, tokenizer, exam: list[ExamQuestion], count: int, batch_size: int, device: Device
) -> dict[str, dict]:
    """{question id: its fields letter_choice, letter and rotations} for `count` of the questions (0: all; below: none).

    All questions with several right answers are among them, with letter_choice and `said`: they are asked in no other way.
    Weights and products are float32 whatever the device's number format. An untrained model finds all letters about
    equally likely, and bfloat16 would decide between them by rounding (4 of 60 choices were others).
    """
    several = [item for item in exam if kind_of(item) == MULTIPLE]
    single = [item for item in exam if kind_of(item) != MULTIPLE]
    asked = sample_by_id(single, count) if count >= 0 else []
    if not several and not asked:
        return {}
    model, found = load_model(folder, torch.float32).to(device.name).eval(), {}
    if several:
        watch = progress(f"exam, {len(several):,} questions with several right answers", always=True)
        stop = stop_tokens(model, tokenizer)
        sets = choices_of_several(model, tokenizer, several, stop, batch_size, watch)
        for item, named in zip(several, sets):
            found[item["id"]] = {"letter_choice": named.letters, "said": named.said}
    if asked:
        watch = progress(f"exam by option letter, {len(asked):,} questions, every rotation", always=True)
        exact = replace(device, bf16=False)
        choices = choices_by_letter(prepare_packed(model), tokenizer, asked, exact, watch)
        for item, choice in zip(asked, choices):
            scores = {"letter": choice.scores, "rotations": choice.rotations}
            found[item["id"]] = {"letter_choice": choice.letter, **scores}
    return found


def answer_losses(model, tokenizer, test: str, rows: list[dict], device: Device) -> list[LossResult]:
    """The loss of every assistant turn of conversations. `test`: their name in the results, heldout or general."""
    turns = [(row["id"], turn) for row in rows for turn in encode_turns(tokenizer, row["messages"])]
    if not turns:
        return []
    packed = pack_for_scoring([{"documents": [turn]} for _, turn in turns])
    watch = progress(f"loss on {len(turns):,} {test} answers", always=True)
    return [
        {"test": test, "id": row_id, "loss": -logp, "tokens": len(answer)}
        for (row_id, (_, answer)), [logp] in zip(turns, answer_logps(model, packed, device, watch))
    ]


def as_conversations(general: list[dict]) -> list[dict]:
    """Rows of question and answer as rows of messages."""
    conversations = []
    for row in general:
        messages = [*as_question(row["question"]), {"role": "assistant", "content": row["answer"]}]
        conversations.append({"id": row["id"], "messages": messages})
    return conversations


def exam_results(
    model, tokenizer, exam: list[ExamQuestion], by_letter: dict[str, dict], device: Device
) -> list[ExamResult]:
    """Every question, by option text if it has one right answer, joined with its fields of `letter_choices`, if any."""
    asked, by_text = [item for item in exam if kind_of(item) != MULTIPLE], {}
    if asked:
        watch = progress(f"exam by option text, {len(asked):,} questions", always=True)
        for item, choice in zip(asked, choices_by_text(model, tokenizer, asked, device, watch)):
            by_text[item["id"]] = {"text_choice": choice.letter, "text": choice.scores}
    return [
        {**item, "test": "exam", **by_text.get(item["id"], {}), **by_letter.get(item["id"], {})}
        for item in exam
    ]


def preference_results(model, tokenizer, pairs: list[dict], device: Device) -> list[PreferenceResult]:
    """Log-probabilities of the chosen and the rejected answer of every pair."""
    if not pairs:
        return []
    items = []
    for pair in pairs:
        chosen, rejected = pair["chosen"][-1], pair["rejected"][-1]
        prompt = encode_prompt(tokenizer, pair["prompt"], bool(chosen.get("reasoning_content")))
        answers = [encode_answer(tokenizer, message) for message in (chosen, rejected)]
        items.append({"documents": [(prompt, answer) for answer in answers]})
    watch = progress(f"{len(pairs):,} preference pairs", always=True)
    results = []
    for pair, (good, bad) in zip(pairs, answer_logps(model, pack_for_scoring(items), device, watch)):
        about = {"test": "preference", "id": pair["id"], "kind": pair.get("kind", "")}
        results.append({**about, "chosen": good, "rejected": bad})
    return results
