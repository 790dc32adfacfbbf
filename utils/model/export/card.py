"""What an export costs, measured against the folder, and the model card (README.md) that says it and how the model was made."""

import math
from pathlib import Path
from typing import Any

import torch

from utils.errors import RunError
from utils.files import atomic_write, read_json, render, sha256_of
from utils.model.chat_format import encode_prompt
from utils.model.export.folders import CONFIG_OF_4, Export, training_file
from utils.model.folder import model_sha256, run_folder
from utils.model.generate import generate_tokens, stop_tokens
from utils.text import progress

TEMPLATE = Path(__file__).with_name("card.md.jinja")

# Fields of a Qwen3Config that decide what the model computes. Short answers of a small model hardly tell a RoPE base of 10,000 from
# one of a million; a long conversation does.
DECIDE = (*CONFIG_OF_4, "rope_parameters")
LARGEST_KL = 0.1  # nats a token; q8_0 costs about 0.001, an LM head that is lost more than 0.5
WRONG, OTHER_PROMPT = "the export is not what the folder is", "makes another prompt than the folder's"


def compare_with_export(
    export: Export, tokenizer: Any, exported: Any, questions: list[list[dict]], max_new_tokens: int
) -> str:
    """How many greedy answers to `questions` (conversations up to the user's last turn) are equal, and the mean Kullback-Leibler
    divergence of the export's next-token probabilities. RunError if it would be asked with other prompts, or is another model."""
    for name in DECIDE:
        one, other = getattr(export.model.config, name), getattr(exported.config, name)
        if one != other and not (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-6)):
            raise RunError(f"{WRONG}: {name} is read as {other}, wanted {one}")
    prompts = [encode_prompt(export.tokenizer, messages) for messages in questions]
    for mode in ({}, {"enable_thinking": True}):  # llama.cpp and mlx-lm always ask for thinking
        for messages, prompt in zip(questions, prompts):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **mode)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != prompt:
                raise RunError(f"the export's chat template or tokenizer {OTHER_PROMPT}")
    stop = stop_tokens(export.model, export.tokenizer)
    watch = progress(f"{len(prompts)} answers of the folder")
    answers = generate_tokens(export.model, prompts, stop, max_new_tokens, watch=watch)
    same, total = 0, 0.0
    for prompt, answer in progress("the same of the export")(list(zip(prompts, answers))):
        ids, count = torch.tensor([prompt + answer[:-1]]), len(answer)
        with torch.inference_mode():  # (tokens of the answer, vocabulary)
            ours, theirs = (
                model(input_ids=ids, logits_to_keep=count).logits[0].double().log_softmax(-1)
                for model in (export.model, exported)
            )
        same += theirs.argmax(-1).tolist() == answer  # then it would give this answer
        total += (ours.exp() * (ours - theirs)).sum().item()
    kl = total / sum(map(len, answers))
    counts = f"{same} of {len(answers)} greedy answers the same as the folder's, KL {kl:.1e} nats a token"
    if not kl <= LARGEST_KL:  # nor is it a number, if weights were too large for the format
        raise RunError(f"{WRONG}: {counts}; do not use it")
    return f"read as other tools do, computed in float32: {counts}"


def write_card(export: Export, notes: list[str]) -> None:
    """Write README.md of an export. `notes`: what the export cost, how it is used."""
    weights = [path for path in sorted(export.place.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    columns, table = _scores_of(export.folder)
    runs = []
    for run in reversed(export.runs):
        path, is_same = training_file(run)
        digest = str(run["identity"].get("TRAIN_FILE")).removeprefix("sha256 ")
        about = {"model": Path(run["settings"]["MODEL"]).name, "file": path.name, "digest": digest}
        runs.append({**run, **about, "origins": _origins(path.parent) if is_same else None})
    text = render(
        TEMPLATE,
        export=export,
        base=export.base or Path(export.origin).name,
        notes=notes,
        runs=runs,
        columns=columns,
        table=table,
        files=[(path.name, sha256_of(path)) for path in weights],
    )
    with atomic_write(export.place / "README.md") as file:
        file.write(text)


def _origins(folder):
    """The files that the report of a data folder names, with the sources that raw/ beside it knows."""
    sources = map(read_json, sorted((folder.parent / "raw").glob("*.source.json")))
    known = {source["sha256"]: source for source in sources}
    report = folder / "report.json"
    files = read_json(report)["files"] if report.is_file() else []
    return [{**file, "file": Path(file["file"]).name, "source": known.get(file["sha256"])} for file in files]


def _scores_of(folder):
    """(the first model compared and this one, the table) of the comparison beside a run, if it measured these very weights;
    else ([], [])."""
    path = run_folder(folder).parent / "comparison.json"
    found, wanted = read_json(path) if path.is_file() else {"models": {}}, model_sha256(folder)
    for name, figures in found["models"].items():
        if figures.get("weights") == wanted:
            return list(dict.fromkeys([next(iter(found["models"])), name])), found["table"]
    return [], []
