"""Make preference pairs for DPO from the SFT rows: to each question its good answer (chosen) and a worse one (rejected).

    python data_prepare/build_preference_pairs.py --kind facts

Reads data_prepare/qwen3/sft_train.jsonl and sft_eval.jsonl, writes dpo_train.jsonl and dpo_eval.jsonl beside them: the split stays.
Kinds: facts (terms of the answer swapped for wrong ones of the same kind), mismatch (another question's answer), model (the
worst of several answers sampled from a model, by agreement with the good one).
"""

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.data import pairs
from utils.data.terms import Terms
from utils.errors import UserError, run
from utils.files import prepare_folder, read_jsonl, require_file, sample_by_id, show_path, write_jsonl
from utils.settings import parse_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--kind mismatch) ----
KIND = "facts"              # facts, mismatch or model
INPUT_DIR = "data_prepare/qwen3"        # holds sft_train.jsonl and sft_eval.jsonl
OUTPUT_DIR = "data_prepare/qwen3"       # where dpo_train.jsonl and dpo_eval.jsonl go
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # facts: the words that may stand for one another
MODEL = "trainer_output/sft_finetuned"  # model: whose answers are sampled
SAMPLES = 4                 # model: answers sampled for a question
MAX_NEW_TOKENS = 256        # model: longest sampled answer, in tokens
DIFFERENT = 0.8             # model: an answer that agrees with the good one by this much or more is not worse
MAX_TRAIN = 0               # at most this many training pairs, drawn evenly; 0 takes all
MAX_EVAL = 0                # at most this many evaluation pairs; 0 takes all
SEED = 0                    # changes the draws
# ----
# fmt: on

KINDS = ("facts", "mismatch", "model")


def main(argv=None):
    settings = parse_settings(__file__, argv)
    if settings.KIND not in KINDS:
        raise UserError(f"--kind: wanted one of {', '.join(KINDS)}, got {settings.KIND!r}")
    settings.show()
    prepare_folder(settings.OUTPUT_DIR)
    for split, count in (("train", settings.MAX_TRAIN), ("eval", settings.MAX_EVAL)):
        # 1. Read the SFT rows of this split
        source = require_file(
            settings.INPUT_DIR / f"sft_{split}.jsonl", "python data_prepare/convert_to_qwen3_format.py"
        )
        rows = sample_by_id(list(read_jsonl(source, wanted=["id", "messages"])), count)

        # 2. Make a worse answer for each
        made, reasons = [], Counter()
        for row, worse in zip(rows, worse_answers(rows, settings, split)):
            pair = pairs.make_pair(row, worse, settings.KIND)
            if pair:
                made.append(pair)
            else:
                reasons[worse.reason or "the worse answer is the same"] += 1
        if not made:
            raise UserError(
                f"no pair could be made from {show_path(source)} ({dict(reasons)}); try --kind mismatch"
            )

        # 3. Write the pairs, and say what could not be paired
        target = settings.OUTPUT_DIR / f"dpo_{split}.jsonl"
        write_jsonl(target, made)
        print(
            f"{split}: {len(rows):,} rows = {len(made):,} pairs + {reasons.total():,} not paired -> {show_path(target)}"
        )
        for reason, times in reasons.most_common():
            print(f"  {times:>6,}  {reason}")
        chosen, rejected = (mean_length(made, side) for side in ("chosen", "rejected"))
        print(f"  mean length: chosen {chosen:.1f}, rejected {rejected:.1f} characters")
    print("next: python model_finetune/finetune_dpo.py")


def worse_answers(rows, settings, split):
    """The maker of settings.KIND at work on `rows`."""
    rng = random.Random(f"{settings.SEED} {split}")
    if settings.KIND == "facts":
        terms = require_file(settings.TERMS_FILE, "python data_prepare/sample/make_sample.py")
        return pairs.swapped_facts(rows, Terms(terms), rng)
    if settings.KIND == "mismatch":
        return pairs.mismatched(rows, rng)
    sampling = pairs.Sampling(
        settings.MODEL, settings.SAMPLES, settings.MAX_NEW_TOKENS, settings.DIFFERENT, settings.SEED
    )
    return pairs.sampled(rows, sampling)


def mean_length(made, side):
    return sum(len(pair[side][0]["content"]) for pair in made) / len(made)


if __name__ == "__main__":
    sys.exit(run(main))
