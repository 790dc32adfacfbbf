"""How often preference pairs can be told apart without their questions: what a model could learn from them instead of facts.

    python tests/benchmarks/bench_pairs.py
    python tests/benchmarks/bench_pairs.py my_rows.jsonl more.json

Converts the built-in sample and each file given, makes pairs of the kinds facts and mismatch, and judges the training pairs by
their answers alone: with the log-odds of 1, 2 and 3 characters in a row (five folds), with a bigram language model of the good
answers (five folds), and with what the training pairs teach about the evaluation pairs. 50 % is chance.
"""

import json
import math
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = [ROOT / "data_prepare/sample" / name for name in ("tcm_sample.jsonl", "tcm_exam.jsonl")]
FOLDS = 5


def pieces(text, length):
    text = f"\n{text}\n"
    return [text[at : at + length] for at in range(len(text) - length + 1)]


def log_odds(pairs, length):
    """A scorer of answers, learnt from pairs (good, bad)."""
    good, bad = Counter(), Counter()
    for one, other in pairs:
        good.update(pieces(one, length))
        bad.update(pieces(other, length))
    return lambda text: sum(math.log((good[p] + 0.5) / (bad[p] + 0.5)) for p in pieces(text, length))


def language_model(pairs):
    """A scorer of answers: mean log-probability of a character after the one before it in the good answers."""
    two, one = Counter(), Counter()
    for good, _ in pairs:
        two.update(pieces(good, 2))
        one.update(piece[0] for piece in pieces(good, 2))

    def score(text):
        found = pieces(text, 2)
        return sum(math.log((two[p] + 0.1) / (one[p[0]] + 0.1 * len(one))) for p in found) / len(found)

    return score


def right(score, pairs):
    margins = [score(good) - score(bad) for good, bad in pairs]
    return sum(0.5 if margin == 0 else margin > 0 for margin in margins)


def over_folds(pairs, learn):
    pairs = random.Random(0).sample(pairs, len(pairs))
    found = 0
    for fold in range(FOLDS):
        rest = [pair for number, pair in enumerate(pairs) if number % FOLDS != fold]
        found += right(learn(rest), pairs[fold::FOLDS])
    return found / len(pairs)


def read_pairs(path):
    rows = map(json.loads, open(path, encoding="utf-8"))
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def run_script(name, *arguments):
    command = [sys.executable, str(ROOT / "data_prepare" / name), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main():
    print("told apart:                      pairs   1 char  2 chars  3 chars  language model  train on eval")
    for files in (SAMPLE, *([Path(path)] for path in sys.argv[1:])):
        with tempfile.TemporaryDirectory() as folder:
            run_script(
                "convert_to_qwen3_format.py",
                "--input-files",
                *files,
                "--output-dir",
                folder,
                "--tokenizer-model",
                "",
            )
            for kind in ("facts", "mismatch"):
                flags = ("--kind", kind, "--input-dir", folder, "--output-dir", folder)
                run_script("build_preference_pairs.py", *flags)
                train, held_out = (
                    read_pairs(Path(folder) / f"dpo_{split}.jsonl") for split in ("train", "eval")
                )
                shares = [over_folds(train, lambda pairs, n=n: log_odds(pairs, n)) for n in (1, 2, 3)]
                shares += [over_folds(train, language_model)]
                shares += [right(log_odds(train, 2), held_out) / len(held_out)]
                print(
                    f"{files[0].stem[:22]:<22} {kind:<8} {len(train):>6,}  "
                    + "".join(f"{share:>8.1%}" for share in shares)
                )


if __name__ == "__main__":
    main()
