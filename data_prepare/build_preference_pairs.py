"""Make preference pairs for DPO from the SFT rows: to each question its good answer (chosen) and a worse one (rejected).

    python data_prepare/build_preference_pairs.py
    python data_prepare/build_preference_pairs.py --kind facts

Reads data_prepare/qwen3/sft_train.jsonl and sft_eval.jsonl, writes dpo_train.jsonl and dpo_eval.jsonl beside them: the split stays.
Kinds: model (what a fine-tuned model itself says wrongly: the worst of several sampled answers), facts (terms of the answer
swapped for wrong ones that stand in the same place elsewhere). dpo_report.json keeps the counts, and how often the pairs can be
told apart without the question: what a model could learn instead of facts. If the evaluation rows yield no pair, a share of the
training rows' pairs is held out.
"""

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.data import pairs
from utils.errors import UserError, run
from utils.files import (
    id_key,
    prepare_folder,
    read_jsonl,
    require_file,
    sample_by_id,
    show_path,
    write_json,
    write_jsonl,
)
from utils.model.folder import usable_record
from utils.settings import command, read_settings
from utils.text import say_next

# fmt: off
# ---- Settings: edit here, or override on the command line (--kind facts) ----
KIND = "auto"               # [auto | facts | model] auto: model if MODEL is a finished run, else facts
INPUT_DIR = "data_prepare/qwen3"        # holds sft_train.jsonl and sft_eval.jsonl
OUTPUT_DIR = "data_prepare/qwen3"       # where dpo_train.jsonl and dpo_eval.jsonl go
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # the words that are facts, by kind
MODEL = "trainer_output/sft_finetuned"  # model: whose answers are sampled
SAMPLES = 4                 # [1, 2, ...] model: answers sampled for a question
TEMPERATURE = 1.0           # [> 0, at most 100] model: of the sampling; 1 draws mistakes as often as the model would make them, less draws fewer
MAX_NEW_TOKENS = 256        # [1, 2, ...] model: longest sampled answer, in tokens
BATCH_SIZE = 16             # [1, 2, ...] model: answers sampled at a time
MAX_TRAIN = 0               # [0, 1, ...] at most this many training pairs, drawn evenly; 0 takes all
MAX_EVAL = 0                # [0, 1, ...] at most this many evaluation pairs; 0 takes all
SEED = 0                    # [0, 1, ...] changes the draws
# ----
# fmt: on

TOLD_APART = 0.65  # share of the pairs told apart without the question from which on a model would learn that
CONVERT = "python data_prepare/convert_to_qwen3_format.py"


def main(argv=None):
    settings = read_settings(globals(), argv)
    settings.show()
    kind = settings.KIND
    if kind == "auto":
        finished = (usable_record(settings.MODEL) or {}).get("status") == "finished"
        kind = "model" if finished else "facts"
        print(f"kind {kind}: {show_path(settings.MODEL)} is {'' if finished else 'not '}a finished run")
    place = settings.OUTPUT_DIR
    prepare_folder(place)
    terms = pairs.Terms(require_file(settings.TERMS_FILE, "python data_prepare/sample/make_sample.py"))

    # 1. Read the SFT rows of both splits; a small set may have no evaluation rows
    rows = {}
    for split, count in (("train", settings.MAX_TRAIN), ("eval", settings.MAX_EVAL)):
        source = settings.INPUT_DIR / f"sft_{split}.jsonl"
        if split == "train" or source.exists():
            rows[split] = sample_by_id(read_jsonl(require_file(source, CONVERT), ["id", "messages"]), count)

    # 2. Make a worse answer for each
    made, reasons = {}, {}
    for split, mine in rows.items():
        made[split], reasons[split] = pair_up(kind, mine, terms, settings, split)
    if not made["train"]:
        source = show_path(settings.INPUT_DIR / "sft_train.jsonl")
        why, other = dict(reasons["train"]), "facts" if kind == "model" else "model with a trained --model"
        raise UserError(
            f"no pair could be made from {source} ({why}); take --kind {other}, or convert rows with prompt, chosen and rejected"
        )
    if not made.get("eval"):
        made["train"], made["eval"] = hold_out(made["train"])
        print(f"eval: no pair of its own; {len(made['eval']):,} of the training rows' pairs are held out")

    # 3. Write the pairs, and say what could not be paired
    report = {"kind": kind, "settings": settings.as_dict()}
    for split in filter(made.get, ("train", "eval")):
        write_jsonl(place / f"dpo_{split}.jsonl", made[split])
        report[split] = summary(rows.get(split, []), made[split], reasons.get(split, Counter()))
        show(split, report[split], place / f"dpo_{split}.jsonl")
    write_json(place / "dpo_report.json", report)
    files = {"TRAIN_FILE": place / "dpo_train.jsonl", "EVAL_FILE": place / "dpo_eval.jsonl"}
    if not made["eval"]:
        files["EVAL_FILE"].unlink(missing_ok=True)
        files["EVAL_FILE"] = ""
    say_next(command("model_finetune/finetune_dpo.py", MODEL=settings.MODEL, **files))


def pair_up(kind, rows, terms, settings, split):
    """(pairs, {reason: number of rows}) of `rows`."""
    able = [row for row in rows if not pairs.ends_in_courtesy(row)]
    made, reasons = [], Counter({"its last turn is a courtesy": len(rows) - len(able)})
    if kind == "facts":
        found = pairs.swapped_facts(able, terms, random.Random(f"{settings.SEED} {split}"))
    else:
        found = pairs.sampled(able, terms, settings, settings.OUTPUT_DIR / f"sampled_{split}")
    for row, (worse, reason) in zip(able, found):
        prompt, answer = pairs.split_row(row)
        if worse is None:
            reasons[reason] += 1
            continue
        sides = {"chosen": [answer], "rejected": [{**answer, "content": worse}]}
        made.append({"id": row["id"], "prompt": prompt, **sides, "kind": kind})
    return made, +reasons


def hold_out(made):
    """(training pairs, evaluation pairs): a twentieth of the questions, of few pairs a fifth, 20 at most, never all of them."""
    questions = sorted({pair["prompt"][-1]["content"] for pair in made}, key=id_key)
    drawn = set(questions[: max(len(questions) // 20, min(20, len(questions) // 5))])
    trained = [pair for pair in made if pair["prompt"][-1]["content"] not in drawn]
    return trained, [pair for pair in made if pair["prompt"][-1]["content"] in drawn]


def summary(rows, made, reasons):
    """What dpo_report.json keeps of a split."""
    lengths = {side: [len(pair[side][0]["content"]) for pair in made] for side in ("chosen", "rejected")}
    return {
        "rows": len(rows),
        "pairs": len(made),
        "not_paired": dict(reasons.most_common()),
        "mean_characters": {side: round(sum(counts) / len(made), 1) for side, counts in lengths.items()},
        "told_apart": round(pairs.told_apart(made), 4),
    }


def show(split, found, target):
    not_paired, count, share = sum(found["not_paired"].values()), found["pairs"], found["told_apart"]
    print(
        f"{split}: {count:,} pairs from {found['rows']:,} rows, {not_paired:,} not paired -> {show_path(target)}"
    )
    for reason, times in found["not_paired"].items():
        print(f"  {times:>6,}  {reason}")
    lengths = found["mean_characters"]
    print(f"  mean length: chosen {lengths['chosen']}, rejected {lengths['rejected']} characters")
    print(f"  told apart without the question: {share:.0%} of the pairs (chance is 50%)")
    # Of few pairs, a share within two standard errors of chance says nothing.
    if share > TOLD_APART and share > 0.5 + count**-0.5:
        print(
            f"  warning: above {TOLD_APART:.0%} a model learns to recognise bad text instead of wrong facts"
        )


if __name__ == "__main__":
    sys.exit(run(main))
