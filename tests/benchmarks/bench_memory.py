"""Forecast and measured peak of the training scripts' memory, on the exact shape of Qwen3-0.6B.

    python tests/benchmarks/bench_memory.py
    python tests/benchmarks/bench_memory.py --methods lora --precisions bf16 --lengths 512
    python tests/benchmarks/bench_memory.py --model model_download/tiny_qwen3_tcm --lengths 512

Each measurement is the script itself in a process of its own: two optimizer steps of two packed rows, evaluation, checkpoint and
finished model included. The peak is that of the whole process, as the system counts it. Random weights of the shape are made
once under trainer_output/bench/ (git-ignored); checkpoints go to a temporary folder there, about 10 GB at a time.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

from bench_training import sample_files, shape_of_qwen3  # noqa: E402

DEFAULTS = {"sft": 1024, "lora": 1024, "dpo": 2048}  # tokens a row


def shortened(path: Path, length: int) -> Path:
    """The first rows of a file: enough for four full rows of `length` tokens, and DPO's reference pass over all of them stays short."""
    lines = path.read_text(encoding="utf-8").splitlines()[: 16 + length // 25]
    short = path.with_name(f"short_{length}_{path.name}")
    short.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return short


def cases(methods: list[str], precisions: list[str], lengths: list[int]) -> list[tuple[str, str, int]]:
    """(method, precision, tokens a row), the scripts' default settings first."""
    every = [
        (method, precision, length) for precision in precisions for length in lengths for method in methods
    ]
    return sorted(every, key=lambda case: case[2] != DEFAULTS[case[0]])


def measure(method: str, precision: str, length: int, model: Path, data: Path, more: list[str]) -> dict:
    """{"plan", "forecast", "peak"} of one run, bytes; {"refused": the line} where it was not started."""
    with tempfile.TemporaryDirectory(dir=ROOT / "trainer_output/bench") as folder:
        command = [sys.executable, ROOT / f"model_finetune/finetune_{method}.py", "--model", model]
        command += ["--train-file", data, "--eval-file", data, "--output-dir", Path(folder) / "run"]
        command += ["--max-length", length, "--rows-per-step", 2, "--max-steps", 2, "--eval-rows", 8]
        command += ["--precision", precision, "--keep-checkpoints", 1, *more]
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            return {"refused": said.strip().splitlines()[-1]}
        record = json.loads((Path(folder) / "run/run.json").read_text(encoding="utf-8"))
        forecast = record["memory_forecast_bytes"]
        return {
            "plan": re.search(r"free; (.*)", said)[1],
            "forecast": forecast,
            "peak": usage.ru_maxrss * 1024,
            "training_peak": record["results"]["peak_memory_bytes"],
        }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder; default: the shape with random weights")
    parser.add_argument("--methods", nargs="+", default=["sft", "lora", "dpo"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--output", type=Path, default=ROOT / "trainer_output/bench/memory.json")
    options, more = parser.parse_known_args()
    folder = ROOT / "trainer_output/bench"
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model or shape_of_qwen3(folder / "qwen3_0_6b_random")
    conversations, pairs = sample_files(folder)
    results = []
    print(
        "| | tokens a row | plan | forecast | measured | forecast is |\n|---|---|---|---|---|---|", flush=True
    )
    for method, precision, length in cases(options.methods, options.precisions, options.lengths):
        data = shortened(pairs if method == "dpo" else conversations, length)
        found = measure(method, precision, length, model, data, more)
        results.append({"method": method, "precision": precision, "length": length, **found})
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        name = f"{method.upper()} {precision}"
        if "refused" in found:
            print(f"| {name} | {length:,} | {found['refused']} | | | |", flush=True)
            continue
        forecast, peak = (found[key] / 2**30 for key in ("forecast", "peak"))
        print(
            f"| {name} | {length:,} | {found['plan']} | {forecast:.1f} GiB | {peak:.1f} GiB "
            f"(in training {found['training_peak'] / 2**30:.1f}) | {forecast / peak - 1:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
