"""Make preference pairs for DPO from the SFT rows: to each question its good answer (chosen) and a worse one (rejected).

    python data_prepare/build_preference_pairs.py
    python data_prepare/build_preference_pairs.py --kind facts

Reads data_prepare/qwen3/sft_train.jsonl and sft_eval.jsonl, writes dpo_train.jsonl and dpo_eval.jsonl beside them: the split stays.
Kinds: model (what a fine-tuned model itself says wrongly: the worst of several sampled answers), facts (terms of the answer
swapped for wrong ones that stand in the same place elsewhere), mismatch (another question's answer). dpo_report.json keeps the
counts, and how often the pairs can be told apart without the question: what a model could learn instead of facts.
"""

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.data import pairs
from utils.data.terms import Terms
from utils.errors import UserError, run
from utils.files import (
    prepare_folder,
    read_json,
    read_jsonl,
    require_file,
    sample_by_id,
    show_path,
    write_json,
    write_jsonl,
)
from utils.settings import command, read_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--kind mismatch) ----
KIND = "auto"               # [auto | facts | mismatch | model] auto: model if MODEL is a finished run, else facts
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

TOLD_APART = 0.65  # share of the pairs told apart without the question from which a model would learn that
LEAST_PAIRS = 30  # below that, the share says nothing


def main(argv=None):
    settings = read_settings(globals(), argv)
    settings.show()
    kind = settings.KIND
    if kind == "auto":
        kind = "model" if is_finished(settings.MODEL) else "facts"
        print(f"kind {kind}: {settings.MODEL} is {'' if kind == 'model' else 'not '}a finished run")
    prepare_folder(settings.OUTPUT_DIR)
    terms = Terms(require_file(settings.TERMS_FILE, "python data_prepare/sample/make_sample.py"))
    report = {"kind": kind, "settings": settings.as_dict()}
    for split, count in (("train", settings.MAX_TRAIN), ("eval", settings.MAX_EVAL)):
        # 1. Read the SFT rows of this split
        source = require_file(
            settings.INPUT_DIR / f"sft_{split}.jsonl", "python data_prepare/convert_to_qwen3_format.py"
        )
        rows = sample_by_id(read_jsonl(source, wanted=["id", "messages"]), count)

        # 2. Make a worse answer for each
        made, reasons = pair_up(kind, rows, terms, settings, split)
        if not made and settings.KIND == "auto" and kind == "model":
            print(
                f"{split}: the model gives no answer that is clearly wrong ({dict(reasons)}); kind facts instead"
            )
            made, reasons = pair_up("facts", rows, terms, settings, split)
        if not made:
            raise UserError(
                f"no pair could be made from {show_path(source)} ({dict(reasons)}); try --kind mismatch"
            )

        # 3. Write the pairs, and say what could not be paired
        target = settings.OUTPUT_DIR / f"dpo_{split}.jsonl"
        write_jsonl(target, made)
        report[split] = summary(rows, made, reasons)
        show(split, report[split], target)
    write_json(settings.OUTPUT_DIR / "dpo_report.json", report)
    place = settings.OUTPUT_DIR
    files = {"TRAIN_FILE": place / "dpo_train.jsonl", "EVAL_FILE": place / "dpo_eval.jsonl"}
    print(f"next: {command('model_finetune/finetune_dpo.py', MODEL=settings.MODEL, **files)}")


def is_finished(model):
    """Whether a model folder is a finished run of training."""
    record = Path(model) / "run.json"
    return record.is_file() and read_json(record).get("status") == "finished"


def pair_up(kind, rows, terms, settings, split):
    """(pairs, {reason: number of rows}) of `rows`."""
    made, reasons = [], Counter()
    for row, worse in zip(rows, worse_answers(kind, rows, terms, settings, split)):
        pair = pairs.make_pair(row, worse, kind)
        if pair:
            made.append(pair)
        else:
            reasons[worse.reason or "the worse answer is the same"] += 1
    return made, reasons


def worse_answers(kind, rows, terms, settings, split):
    """The maker of this kind at work on `rows`."""
    rng = random.Random(f"{settings.SEED} {split}")
    if kind == "facts":
        return pairs.swapped_facts(rows, terms, rng)
    if kind == "mismatch":
        return pairs.mismatched(rows, terms, rng)
    sampling = pairs.Sampling(
        settings.MODEL,
        settings.SAMPLES,
        settings.TEMPERATURE,
        settings.MAX_NEW_TOKENS,
        settings.BATCH_SIZE,
        settings.SEED,
    )
    return pairs.sampled(rows, terms, sampling, settings.OUTPUT_DIR / f"sampled_{split}")


def summary(rows, made, reasons):
    """What dpo_report.json keeps of a split."""
    return {
        "rows": len(rows),
        "pairs": len(made),
        "not_paired": dict(reasons.most_common()),
        "mean_characters": {
            side: round(sum(len(pair[side][0]["content"]) for pair in made) / len(made), 1)
            for side in ("chosen", "rejected")
        },
        "told_apart": round(pairs.told_apart(made), 4),
    }


def show(split, found, target):
    not_paired = sum(found["not_paired"].values())
    print(
        f"{split}: {found['rows']:,} rows = {found['pairs']:,} pairs + {not_paired:,} not paired -> {show_path(target)}"
    )
    for reason, times in found["not_paired"].items():
        print(f"  {times:>6,}  {reason}")
    lengths = found["mean_characters"]
    print(f"  mean length: chosen {lengths['chosen']}, rejected {lengths['rejected']} characters")
    print(f"  told apart without the question: {found['told_apart']:.0%} of the pairs (chance is 50%)")
    if found["told_apart"] > TOLD_APART and found["pairs"] >= LEAST_PAIRS:
        print(
            f"  warning: above {TOLD_APART:.0%} a model learns to recognise bad text instead of wrong facts"
        )


if __name__ == "__main__":
    sys.exit(run(main))
