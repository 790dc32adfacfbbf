"""Loss and gradient of the LM head on Qwen3-0.6B's shape: ours, torch's F.linear_cross_entropy, and the whole matrix of logits.

    python tests/benchmarks/bench_lm_head.py
    python tests/benchmarks/bench_lm_head.py --positions 880 --precisions fp32

Every measurement is a process of its own: the median of the passes after the first, and how far the peak of the memory rises.
torch's has no autocast of its own: bfloat16 inputs stand for it, so that its loss is rounded to bfloat16 as well.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
VOCABULARY, HIDDEN, PASSES = 151936, 1024, 4
WAYS = ("ours", "ours, into .grad", "torch, compact", "torch, balanced", "whole logits")


def loss_of(way: str, hidden, weight, targets, bf16: bool):
    import torch
    import torch.nn.functional as F

    from utils.model.lm_head import HeadGradient, cross_entropy_sum

    if way.startswith("ours"):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return cross_entropy_sum(hidden, weight, targets, kept=HeadGradient() if "into" in way else None)
    if way == "whole logits":
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    if bf16:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy=way.split(", ")[1])
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def measure(way: str, positions: int, precision: str) -> dict:
    import torch

    from utils.device import hold_memory

    hold_memory()
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN) * 0.02)
    hidden, targets = (
        torch.randn(positions, HIDDEN, requires_grad=True),
        torch.randint(VOCABULARY, (positions,)),
    )
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(PASSES):
        weight.grad = hidden.grad = None
        began = time.perf_counter()
        loss = loss_of(way, hidden, weight, targets, precision == "bf16")
        loss.backward()
        seconds.append(time.perf_counter() - began)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return {"seconds": statistics.median(seconds[1:]), "gib": rise, "loss": loss.item() / positions}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--positions", nargs="+", type=int, default=[219, 880], help="trained tokens of a batch"
    )
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a measurement, by the call below
    options = parser.parse_args()
    if options.one:
        way, positions, precision = options.one
        print(json.dumps(measure(way, int(positions), precision)))
        return
    print(
        "| | positions | way | seconds | peak rises by | loss a position |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for precision in options.precisions:
        for positions in options.positions:
            for way in options.ways:
                call = [sys.executable, __file__, "--one", way, str(positions), precision]
                found = subprocess.run(call, capture_output=True, text=True, encoding="utf-8", check=True)
                found = json.loads(found.stdout.splitlines()[-1])
                print(
                    f"| {precision} | {positions} | {way} | {found['seconds']:.2f} | {found['gib']:.2f} GiB | "
                    f"{found['loss']:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
