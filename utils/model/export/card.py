"""What an export costs, measured against the folder, and the model card (README.md) that says it and how the model was made."""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from utils.errors import RunError
from utils.files import read_json, render, sha256_of
from utils.model.chat_format import encode_prompt
from utils.model.export.folders import Export, Source
from utils.model.folder import model_sha256, run_folder
from utils.model.generate import generate_tokens, stop_tokens
from utils.settings import ROOT
from utils.text import progress

TEMPLATE = Path(__file__).with_name("card.md.jinja")

# Fields of a Qwen3Config that decide what the model computes. Short answers of a small model hardly tell a RoPE base of 10,000 from
# one of a million; a long conversation does.
DECIDE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias"),
    *("max_position_embeddings", "tie_word_embeddings"),
)
LARGEST_KL = 0.1  # nats a token; q8_0 costs about 0.001, an LM head that is lost more than 0.5
WRONG = "the export is not what the folder is"


def compare_with_export(
    source: Source, tokenizer: Any, exported: Any, questions: list[list[dict]], max_new_tokens: int
) -> str:
    """How many greedy answers to `questions` (conversations up to the user's last turn) are equal, and the mean Kullback-Leibler
    divergence of the export's next-token probabilities. RunError if it would be asked with other prompts, or is another model."""
    for name in DECIDE:
        one, other = getattr(source.model.config, name), getattr(exported.config, name)
        if isinstance(one, dict):
            one, other = ({key: value for key, value in each.items() if value} for each in (one, other))
        if one != other and not (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-6)):
            raise RunError(f"{WRONG}: {name} is read as {other}, wanted {one}")
    prompts = [encode_prompt(source.tokenizer, messages) for messages in questions]
    asked = {"tokenize": False, "add_generation_prompt": True}
    for mode in ({}, {"enable_thinking": True}):  # llama.cpp and mlx-lm always ask for thinking
        for messages, prompt in zip(questions, prompts):
            text = tokenizer.apply_chat_template(messages, **asked, **mode)
            if tokenizer(text, add_special_tokens=False)["input_ids"] != prompt:
                other = "makes another prompt than the folder's"
                raise RunError(f"the export's chat template or tokenizer {other}")
    stop, models = stop_tokens(source.model, source.tokenizer), {"folder": source.model, "export": exported}
    found = {}
    for name, model in models.items():
        watch = progress(f"{len(prompts)} answers: {name}")
        found[name] = generate_tokens(model, prompts, stop, max_new_tokens, watch=watch)
    answers, total = found["folder"], 0.0
    for prompt, answer in progress("probabilities", "answers")(list(zip(prompts, answers))):
        ids, count = torch.tensor([prompt + answer[:-1]]), len(answer)
        with torch.inference_mode():
            logits = [model(input_ids=ids, logits_to_keep=count).logits[0] for model in models.values()]
        # (tokens of the answer, vocabulary)
        ours, theirs = (each.double().log_softmax(-1) for each in logits)
        total += (ours.exp() * (ours - theirs)).sum().item()
    same = sum(one == other for one, other in zip(answers, found["export"]))
    kl = total / sum(map(len, answers))
    counts = f"{same} of {len(answers)} greedy answers the same as the folder's, KL {kl:.1e} nats a token"
    if kl > LARGEST_KL:
        raise RunError(f"{WRONG}: {counts}; do not use it")
    return f"read as other tools do, computed in float32: {counts}"


def model_card(source: Source, export: Export, notes: list[str]) -> str:
    """The card as Markdown. `notes`: what the export cost, how it is used."""
    weights = [path for path in sorted(export.place.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    columns, table = _scores_of(source.folder)
    runs = []
    for run in reversed(source.runs):
        path = ROOT / str(run["settings"].get("TRAIN_FILE"))
        digest = str(run["identity"].get("TRAIN_FILE")).removeprefix("sha256 ")
        unchanged = path.is_file() and sha256_of(path) == digest
        results, numbers = run.get("results", {}), ("steps", "eval_loss_before", "eval_loss")
        whole = all(isinstance(results.get(name), int | float) for name in numbers)
        more = {"results": results if whole and isinstance(run.get("versions"), dict) else None}
        more |= {"model": Path(run["settings"]["MODEL"]).name, "file": path.name, "digest": digest}
        runs.append({**run, **more, "origins": _origins(path.parent) if unchanged else None})
    return render(
        TEMPLATE,
        export=export,
        base=export.base or Path(source.base).name,
        source=source,
        notes=notes,
        runs=runs,
        columns=columns,
        table=table,
        files=[(path.name, sha256_of(path)) for path in weights],
    )


def _origins(folder):
    """The files that the report of a data folder names, with the sources that raw/ beside it knows."""
    report, known = folder / "report.json", {}
    for path in sorted((folder.parent / "raw").glob("*.source.json")):
        source = read_json(path)
        known[source["sha256"]] = source
    files = read_json(report)["files"] if report.is_file() else []
    return [{**file, "file": Path(file["file"]).name, "source": known.get(file["sha256"])} for file in files]


def _scores_of(folder):
    """(the first model compared and this one, the table) of the comparison beside a run, if it measured these very weights;
    else ([], [])."""
    path = run_folder(folder).parent / "comparison.json"
    found, wanted = read_json(path) if path.is_file() else {"models": {}}, model_sha256(folder)
    with contextlib.suppress(KeyError, AttributeError, TypeError):  # of an earlier version
        for name, figures in found["models"].items():
            if figures["weights"] == wanted:
                return list(dict.fromkeys([next(iter(found["models"])), name])), found["table"]
    return [], []
