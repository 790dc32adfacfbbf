"""Time how long a training takes to have its tokens, the first time and later, and the memory that it takes.

    python tests/benchmarks/bench_start.py --model model_download/Qwen3-0.6B
    python tests/benchmarks/bench_start.py --model model_download/tiny_qwen3_tcm --rows 3700000 --characters 110

Makes the rows in a temporary folder, of texts of the built-in sample that are put together at random: 112,000 of about 256 tokens
by default. Each start is a process of its own, which does what a finetune script does before it plans, without loading the
model's weights: imports, tokenizer, tokens of the training and evaluation file, packing, the fullest rows. "tokens" is the
part after the tokenizer. CPU seconds are those of all its threads; where other programs share the cores, they compare better
than seconds. Peak memory is that of the process, "before" what it is without the rows.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

EVAL_ROWS = 2000  # of the evaluation file, of which 200 are drawn


def make_rows(path: Path, count: int, characters: int, seed: int) -> None:
    """Write `count` conversations whose answers have 0.5 to 1.5 times as many characters."""
    from utils.files import read_jsonl, write_jsonl

    sample = list(read_jsonl(ROOT / "data_prepare/sample/tcm_sample.jsonl", ["instruction", "output"]))
    draw = random.Random(seed)

    def row(number):
        wanted, answer = draw.randint(characters // 2, characters * 3 // 2), ""
        while len(answer) < wanted:
            answer += draw.choice(sample)["output"] + "\n"
        question = {"role": "user", "content": f"{draw.choice(sample)['instruction']}（{number}）"}
        answer = {"role": "assistant", "content": answer[:wanted]}
        return {"id": f"{seed}-{number}", "messages": [question, answer], "source": "benchmark"}

    write_jsonl(path, map(row, range(count)))


def start(model: str, folder: Path, max_length: int) -> dict:
    """What a training does up to its plan; seconds, CPU seconds and bytes."""
    from utils.model.folder import load_tokenizer, quiet_offline

    quiet_offline(model)
    from utils.device import Device
    from utils.training.loop import peak_memory  # with all that the loop imports, as in a training
    from utils.training.rows import load_conversations

    tokenizer, device = load_tokenizer(model), Device("cpu", False, "")
    before, began, processor = peak_memory(device), time.perf_counter(), time.process_time()
    rows = load_conversations(folder / "train.jsonl", tokenizer, max_length).rows
    load_conversations(folder / "eval.jsonl", tokenizer, max_length, 200)
    rows.fullest(4)
    return {
        "items": len(rows.items),
        "tokens": rows.tokens,
        "tokens_seconds": time.perf_counter() - began,
        "tokens_cpu": time.process_time() - processor,
        "all_cpu": time.process_time(),
        "before": before,
        "peak": peak_memory(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "model_download/Qwen3-0.6B"))
    parser.add_argument("--rows", type=int, default=112_000)
    parser.add_argument("--characters", type=int, default=275, help="of an answer, on average")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # the start in a process of its own
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(start(options.model, Path(options.folder), options.max_length)))
        return
    with tempfile.TemporaryDirectory() as place:
        for name, count, seed in (("train", options.rows, 0), ("eval", EVAL_ROWS, 1)):
            make_rows(Path(place) / f"{name}.jsonl", count, options.characters, seed)
        size = (Path(place) / "train.jsonl").stat().st_size
        print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB")
        print(f"{'':8}{'all':>8}{'CPU':>8}{'tokens':>8}{'CPU':>8}   peak, before (GiB)")
        for label in ("first", "second", "third"):
            command = [sys.executable, __file__, "--model", options.model, "--folder", place]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, "--max-length", str(options.max_length)], stdout=subprocess.PIPE, check=True
            )
            seconds, found = time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])
            numbers = (seconds, found["all_cpu"], found["tokens_seconds"], found["tokens_cpu"])
            memory = f"{found['peak'] / 2**30:.2f}, {found['before'] / 2**30:.2f}"
            print(f"{label:8}" + "".join(f"{number:8.1f}" for number in numbers) + f"   {memory}", flush=True)
        kept = sum(path.stat().st_size for path in (Path(place) / ".tokens").iterdir())
        print(f"{found['items']:,} items, {found['tokens']:,} tokens, kept in {kept / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
