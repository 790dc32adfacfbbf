"""Do runs with HOURS end in time? And what 1, 8 and 24 hours buy.

    python tests/benchmarks/bench_hours.py                       (3 and 20 minutes, each alone and beside another program)
    python tests/benchmarks/bench_hours.py --minutes 3 --alone
    python tests/benchmarks/bench_hours.py --rates "2 cores, SFT=28" "2 cores, LoRA=45"      (tokens/s: the table alone)

Every run is finetune_sft.py on the demo's tiny model and sample, with more epochs than fit, in a process of its own. Beside another
program: a process that computes on one core during the middle third of the time. "took" is the time from the start of the process to
its end, as the user waits for it. Nothing else may run on the machine.

The table of what hours buy is computed, not measured: tokens/s x hours, as shares of the 113,000 rows of ShenNong, about 28 million
tokens an epoch; of these rows a share is drawn evenly.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.files import read_json, read_jsonl  # noqa: E402

TINY = "model_download/tiny_qwen3_tcm"
FLAGS = "--epochs 100000 --max-length 512 --rows-per-step 2 --learning-rate 5e-4".split()
BUSY = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: sum(range(10000))"
ALLOWED = 0.05  # of the time given
TOKENS = 28e6  # of an epoch of 113,000 rows, computed: 110 MB, 3 bytes a character, 0.76 tokens a character
HOURS = (1, 8, 24)


def prepare(folder: Path) -> list[str]:
    """Convert the sample as the demo does; the flags that name its files."""
    steps = [
        ["data_prepare/download_tcm_data.py", "--dataset", "sample", "--output-dir", folder / "raw"],
        ["data_prepare/convert_to_qwen3_format.py", "--input-files", folder / "raw", "--output-dir", folder / "qwen3"],
    ]  # fmt: skip
    for step in steps:
        subprocess.run([sys.executable, *map(str, step)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    files = {split: str(folder / f"qwen3/sft_{split}.jsonl") for split in ("train", "eval")}
    return ["--model", TINY, "--train-file", files["train"], "--eval-file", files["eval"]]


def measure(minutes: float, beside: bool, data: list[str], folder: Path) -> dict:
    """{"took": seconds, ...} of one run."""
    command = [sys.executable, "model_finetune/finetune_sft.py", *data, *FLAGS]
    command += ["--hours", str(minutes / 60), "--output-dir", str(folder), "--fresh"]
    began = time.monotonic()
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if beside:
        time.sleep(minutes * 20)
        busy = subprocess.Popen([sys.executable, "-c", BUSY.format(seconds=minutes * 20)])
        busy.wait()
    if run.wait():
        sys.exit(f"error: the run of {minutes:g} minutes ended with exit code {run.returncode}")
    took = time.monotonic() - began
    record = read_json(folder / "run.json")
    log = list(read_jsonl(folder / "training_log.jsonl"))
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    return {
        "took": took,
        "off": took / (60 * minutes) - 1,
        "steps": record["results"]["steps"],
        "changes": len(record["schedule"]["plan"]) - 1,
        "last rate": rates[-1] / max(rates),
        "evaluations": len([entry for entry in log if "eval_loss" in entry]),
    }


def print_runs(minutes: list[float], alone: bool) -> None:
    """Run all, print a table, and end with exit code 1 where one was not in time."""
    print(
        "| minutes | beside another program | took | off by | steps | changes of plan | last rate, of the peak | evaluations |"
    )
    print("|---|---|---|---|---|---|---|---|")
    late = False
    with tempfile.TemporaryDirectory() as place:
        data = prepare(Path(place))
        for length in minutes:
            for beside in (False,) if alone else (False, True):
                found = measure(length, beside, data, Path(place) / "run")
                late |= abs(found["off"]) > ALLOWED
                print(
                    f"| {length:g} | {'for a third' if beside else 'no'} | {found['took']:.1f} s | {found['off']:+.1%} | "
                    f"{found['steps']:,} | {found['changes']} | {found['last rate']:.2%} | {found['evaluations']} |",
                    flush=True,
                )
    if late:
        sys.exit(f"error: a run was off by more than {ALLOWED:.0%}")


def print_shares(rates: list[str]) -> None:
    """What HOURS hours buy at these rates, NAME=TOKENS/S each."""
    print("| | tokens/s | " + " | ".join(f"{hours} h" for hours in HOURS) + " | one epoch |")
    print("|---|---|" + "---|" * (len(HOURS) + 1))
    for text in rates:
        name, _, number = text.rpartition("=")
        rate = float(number)
        shares = [rate * 3600 * hours / TOKENS for hours in HOURS]
        told = [f"{share:.1%} of the rows" if share <= 1 else f"{share:.1f} epochs" for share in shares]
        print(f"| {name} | {rate:,.0f} | {' | '.join(told)} | {TOKENS / rate / 3600:,.0f} h |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", nargs="+", type=float, default=[3, 20])
    parser.add_argument("--alone", action="store_true", help="not beside another program")
    parser.add_argument("--rates", nargs="+", metavar="NAME=TOKENS/S", help="print what hours buy, and stop")
    options = parser.parse_args()
    if options.rates:
        return print_shares(options.rates)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the first run"
        if hasattr(os, "getloadavg")
        else ""
    )
    print_runs(options.minutes, options.alone)


if __name__ == "__main__":
    main()
