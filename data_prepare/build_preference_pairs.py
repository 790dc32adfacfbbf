"""Make preference pairs for DPO from the SFT rows: to each question its good answer (chosen) and a worse one (rejected).

    python data_prepare/build_preference_pairs.py --kind facts

Reads data_prepare/qwen3/sft_train.jsonl and sft_eval.jsonl, writes dpo_train.jsonl and dpo_eval.jsonl beside them: the split stays.
Kinds: facts (terms of the answer swapped for wrong ones of the same kind), mismatch (another question's answer), model (the
worst of several answers sampled from a model, by agreement with the good one).
"""

import bisect
import collections
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.errors import UserError, run
from utils.files import prepare_folder, read_jsonl, require_file, sample_by_id, show_path, write_jsonl
from utils.model.folders import check_model
from utils.model.load import load_for_answers, load_tokenizer, quiet_offline
from utils.progress import progress
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

LENGTH_TOLERANCE = 0.2  # a rejected answer is at most this much longer or shorter: DPO shall not learn length


def split_row(row):
    """(prompt messages, answer message) of an SFT row: the last assistant turn and what comes before it."""
    last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last], row["messages"][last]


def similar_length(good, bad):
    """Whether `bad` is within LENGTH_TOLERANCE of the length of `good` (always one character of leeway)."""
    return abs(len(good) - len(bad)) <= max(1, LENGTH_TOLERANCE * len(good))


def swapped_facts(rows, settings, rng):
    """For each row (wrong answer, "") or (None, reason): terms swapped."""
    from utils.data.terms import Terms

    terms = Terms(require_file(settings.TERMS_FILE, "python data_prepare/sample/make_sample.py"))
    for row in rows:
        prompt, answer = split_row(row)
        wrong, reason = terms.swap(answer["content"], prompt[-1]["content"], rng)
        if wrong and not similar_length(answer["content"], wrong):
            wrong, reason = None, "the swapped answer has another length"
        yield wrong, reason


def mismatched(rows, settings, rng):
    """For each row (another row's answer, "") or (None, reason): of similar length, about another question."""
    by_length = sorted({split_row(row)[1]["content"] for row in rows}, key=lambda text: (len(text), text))
    lengths = [len(text) for text in by_length]
    for row in rows:
        good = split_row(row)[1]["content"]
        leeway = max(1, LENGTH_TOLERANCE * len(good))
        near = range(
            bisect.bisect_left(lengths, len(good) - leeway), bisect.bisect_right(lengths, len(good) + leeway)
        )
        others = [index for index in rng.sample(near, min(len(near), 8)) if by_length[index] != good]
        yield (by_length[others[0]], "") if others else (None, "no other answer of similar length")


def sampled(rows, settings, rng):
    """For each row (the sampled answer that agrees least with the good one, "") or (None, reason)."""
    check_model(settings.MODEL)
    quiet_offline(settings.MODEL)
    from utils.device import pick_device
    from utils.model.generate import generate_answers

    device = pick_device()
    tokenizer, model = load_tokenizer(settings.MODEL), load_for_answers(settings.MODEL, device)
    prompts = [split_row(row)[0] for row in rows]
    draws = [
        generate_answers(
            model,
            tokenizer,
            prompts,
            settings.MAX_NEW_TOKENS,
            greedy=False,
            seed=settings.SEED + draw,
            watch=progress(f"sampling answers, round {draw + 1} of {settings.SAMPLES}"),
        )
        for draw in range(settings.SAMPLES)
    ]
    for row, answers in zip(rows, zip(*draws)):
        good = split_row(row)[1]["content"]
        fits = [text.strip() for text in answers if text.strip() and similar_length(good, text.strip())]
        worst = min(fits, key=lambda text: agreement(text, good), default=None)
        if worst is None:
            yield None, "no sampled answer of similar length"
        else:
            yield (
                (worst, "")
                if agreement(worst, good) < settings.DIFFERENT
                else (None, "every sampled answer is good")
            )


def agreement(one, other):
    """F1 of the two texts' character pairs (Dice 1945): 1 for the same text, 0 for nothing in common."""
    pairs = [collections.Counter(zip(f" {text}", f"{text} ")) for text in (one, other)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())


KINDS = {"facts": swapped_facts, "mismatch": mismatched, "model": sampled}


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
        pairs, reasons = [], collections.Counter()
        for row, (wrong, reason) in zip(
            rows, KINDS[settings.KIND](rows, settings, random.Random(f"{settings.SEED} {split}"))
        ):
            prompt, answer = split_row(row)
            if wrong is None or wrong == answer["content"]:
                reasons[reason or "the worse answer is the same"] += 1
                continue
            rejected = {**answer, "content": wrong}
            pairs.append(
                {
                    "id": row["id"],
                    "prompt": prompt,
                    "chosen": [answer],
                    "rejected": [rejected],
                    "kind": settings.KIND,
                }
            )
        if not pairs:
            raise UserError(
                f"no pair could be made from {show_path(source)} ({dict(reasons)}); try --kind mismatch"
            )

        # 3. Write the pairs, and say what could not be paired
        target = settings.OUTPUT_DIR / f"dpo_{split}.jsonl"
        write_jsonl(target, pairs)
        lengths = [
            sum(len(pair[side][0]["content"]) for pair in pairs) / len(pairs)
            for side in ("chosen", "rejected")
        ]
        print(
            f"{split}: {len(rows):,} rows = {len(pairs):,} pairs + {sum(reasons.values()):,} not paired -> {show_path(target)}"
        )
        for reason, times in reasons.most_common():
            print(f"  {times:>6,}  {reason}")
        print(f"  mean length: chosen {lengths[0]:.1f}, rejected {lengths[1]:.1f} characters")
    print("next: python model_finetune/finetune_dpo.py")


if __name__ == "__main__":
    sys.exit(run(main))
