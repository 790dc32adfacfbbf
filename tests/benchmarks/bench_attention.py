"""Attention of short and long documents on a CPU in bfloat16: plain products, torch's fused kernel, and that kernel in float32.

    python tests/benchmarks/bench_attention.py

Forward and backward pass of one call, milliseconds, median of the passes of 0.3 s, all ways in turn. Where the fastest way changes is
FEW in utils/model/attention.py.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHAPES = {"tiny model": (4, 2, 64), "Qwen3-0.6B": (16, 8, 128)}  # heads, kv heads, head_dim
DOCUMENTS = [(1, 16), (1, 34), (8, 34), (30, 40), (1, 64), (4, 64), (1, 131), (1, 252), (1, 512), (1, 2048)]
SECONDS = 0.3


def pass_of(attend, states, upstream) -> float:
    """Milliseconds of a forward and a backward pass."""
    began = time.perf_counter()
    result = attend(*states, states[0].shape[-1] ** -0.5, {})
    result.backward(upstream.to(result.dtype))
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    options = parser.parse_args()

    import torch

    from utils.model.attention import FEW, fused_attend, plain_attend

    if options.threads:
        torch.set_num_threads(options.threads)

    def fused(query, key, value, scaling, masks, dtype):
        return fused_attend(query.to(dtype), key.to(dtype), value.to(dtype), scaling, masks)

    ways = {
        "plain products": plain_attend,
        "fused": functools.partial(fused, dtype=torch.bfloat16),
        "fused, float32": functools.partial(fused, dtype=torch.float32),
    }
    print(
        f"| | documents | tokens of each | {' | '.join(ways)} | products / FEW |\n|{'---|' * (4 + len(ways))}"
    )
    for name, (heads, kv_heads, width) in SHAPES.items():
        for count, length in DOCUMENTS:
            # as the layers give them: queries and keys in float32 from their norms, values in bfloat16
            query, key, value = (
                torch.randn(count, part, length, width) for part in (heads, kv_heads, kv_heads)
            )
            states = [query.requires_grad_(), key.requires_grad_(), value.bfloat16().requires_grad_()]
            upstream = torch.randn(count, heads, length, width)
            taken = {way: [] for way in ways}
            began = time.perf_counter()
            while time.perf_counter() - began < SECONDS * len(ways) or len(taken["fused"]) < 5:
                for way, attend in ways.items():
                    taken[way].append(pass_of(attend, states, upstream))
            medians = [f"{statistics.median(found[1:]):.2f}" for found in taken.values()]
            share = query.numel() * length / FEW
            print(f"| {name} | {count} | {length} | {' | '.join(medians)} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
