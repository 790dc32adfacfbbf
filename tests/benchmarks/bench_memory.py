"""Forecast and measured peak of the training scripts' memory, on the exact shape of Qwen3-0.6B.

    python tests/benchmarks/bench_memory.py
    python tests/benchmarks/bench_memory.py --methods lora --precisions bf16 --lengths 512
    python tests/benchmarks/bench_memory.py --model model_download/tiny_qwen3_tcm --lengths 512

Each measurement is the script itself in a process of its own: two optimizer steps of two packed rows, evaluation, checkpoint and
finished model included. The peak is that of the whole process, as the system counts it. Random weights of the shape are made
once under trainer_output/bench/ (git-ignored); checkpoints go to a temporary folder there, about 10 GB at a time.
"""

import argparse
import itertools
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

HEADER = "| | tokens a row | plan | forecast | measured | forecast is |\n|---|---|---|---|---|---|"


def shortened(path: Path, length: int) -> Path:
    """The first rows of a file: enough for four full rows of `length` tokens, and DPO's reference pass over all of them stays short."""
    lines = path.read_text(encoding="utf-8").splitlines()[: 16 + length // 25]
    short = path.with_name(f"short_{length}_{path.name}")
    short.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return short


def measure(method: str, precision: str, length: int, model: Path, data: Path, more: list[str]) -> str:
    """Plan, forecast and peak of one run, as cells of the table; or why it was not started."""
    with tempfile.TemporaryDirectory(dir=ROOT / "trainer_output/bench") as folder:
        command = [sys.executable, ROOT / f"model_finetune/finetune_{method}.py", "--model", model]
        command += ["--train-file", data, "--eval-file", data, "--output-dir", Path(folder) / "run"]
        command += ["--max-length", length, "--rows-per-step", 2, "--max-steps", 2, "--eval-rows", 8]
        command += ["--precision", precision, "--keep-checkpoints", 1, *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        process = subprocess.Popen(list(map(str, command)), **pipes)
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            return f"{said.strip().splitlines()[-1]} | | |"
        record = json.loads((Path(folder) / "run/run.json").read_text(encoding="utf-8"))
    sizes = record["memory_forecast_bytes"], usage.ru_maxrss * 1024, record["results"]["peak_memory_bytes"]
    forecast, peak, training = (size / 2**30 for size in sizes)
    plan = re.search(r"free; (.*)", said)[1]
    measured = f"{peak:.1f} GiB (in training {training:.1f})"
    return f"{plan} | {forecast:.1f} GiB | {measured} | {forecast / peak - 1:+.0%}"


def main():
    shown = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**shown)
    parser.add_argument("--model", type=Path, help="a model folder; default: the shape with random weights")
    parser.add_argument("--methods", nargs="+", default=["sft", "lora", "dpo"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    options, more = parser.parse_known_args()
    folder = ROOT / "trainer_output/bench"
    folder.mkdir(parents=True, exist_ok=True)
    model = options.model or shape_of_qwen3(folder / "qwen3_0_6b_random")
    conversations, pairs = sample_files(folder)
    print(HEADER, flush=True)
    for case in itertools.product(options.precisions, options.lengths, options.methods):
        precision, length, method = case
        data = shortened(pairs if method == "dpo" else conversations, length)
        cells = measure(method, precision, length, model, data, more)
        print(f"| {method.upper()} {precision} | {length:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
