"""Time the conversion of many rows against the same normalisation and exact de-duplication written with `datasets`.

    python tests/benchmarks/bench_convert.py
    python tests/benchmarks/bench_convert.py --rows 200000 --runs 3

Makes the rows (about 430 bytes each; 1,000,000 by default) in a temporary folder: template questions, case descriptions, 4 %
exact duplicates, 6 % near-duplicates. Ours is the whole script as it is started by a user, near-duplicates, leaks, split and
report included. Theirs is load_dataset, map (messages, and a key by our own normalisation), filter (keys not seen before) and
to_json in one process with batched=True, its quickest form; it looks for no near-duplicates and writes no report. Where other
programs share the cores, CPU seconds compare better than seconds.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_prepare" / "convert_to_qwen3_format.py"

WITH_DATASETS = """
import sys
import datasets
from utils.data.convert import normalize, text_key

source, cache, output = sys.argv[1:]
datasets.disable_progress_bars()
seen = set()

def convert(queries, responses):
    texts = [(question.strip(), answer.strip()) for question, answer in zip(queries, responses)]
    roles = "user", "assistant"
    messages = [[{"role": role, "content": said} for role, said in zip(roles, both)] for both in texts]
    # A key is less 2**63: int64 is what Arrow makes of a number.
    return {"messages": messages, "key": [text_key("\\n".join(map(normalize, both))) - 2**63 for both in texts]}

def are_new(keys):
    return [not (key in seen or seen.add(key)) for key in keys]

rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
fields = ["query", "response"]
rows = rows.map(convert, batched=True, input_columns=fields, remove_columns=fields)
rows = rows.filter(are_new, batched=True, input_columns="key")
rows.remove_columns("key").to_json(output, force_ascii=False)
print(f"datasets: kept {len(rows):,}")
"""
TEMPLATES = "{}的性味归经是什么？ {}有哪些功效？ 请问{}怎么炮制？ {}的用法用量和使用注意分别是什么？ {}与{}有什么区别？".split()


def make_rows(path, count):
    """Write `count` query/response rows, the same for the same count."""
    chance = random.Random(0)
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]
    words = ["".join(chance.choices(letters, k=chance.choice((1, 2, 2, 2, 3)))) for _ in range(20_000)]
    herbs = ["".join(chance.choices(letters, k=chance.choice((2, 3)))) for _ in range(50_000)]

    def text(shortest, longest):
        length, parts = chance.randint(shortest, longest), []
        while sum(map(len, parts)) < length:
            parts += chance.choices(words, k=5) + [chance.choice("，，，。；")]
        return "".join(parts)

    recent = []
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            dice = chance.random()
            if recent and dice < 0.10:
                query, response = chance.choice(recent)
                if dice > 0.07:
                    query = "请问" + query.replace("，", " , ")
                elif dice > 0.04:
                    query = query[:-1] + chance.choice(("，怎么办？", "，急！", "。"))
            elif dice < 0.55:
                query, response = chance.choice(TEMPLATES).format(*chance.sample(herbs, 2)), text(60, 140)
            else:
                query, response = "患者" + text(40, 70) + "应如何辨证论治？", text(40, 110)
            file.write(json.dumps({"query": query, "response": response}, ensure_ascii=False) + "\n")
            if number % 50 == 0:
                recent = recent[-2000:] + [(query, response)]


def measure(command):
    """(seconds, CPU seconds, peak resident MiB, last line of output) of a command."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(text)
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10, text.splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=1, help="of each; the table shows medians")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source, cache = folder / "rows.jsonl", folder / "cache"
        make_rows(source, arguments.rows)
        megabytes, versions = (
            source.stat().st_size / 1e6,
            f"Python {platform.python_version()}, datasets {version('datasets')}",
        )
        print(f"{arguments.rows:,} rows, {megabytes:.0f} MB; {os.cpu_count()} cores; {versions}", flush=True)
        words = ["--input-files", source, "--output-dir", folder / "out", "--tokenizer-model", ""]
        commands = {
            "ours": [sys.executable, SCRIPT, *words],
            "datasets, batched": [
                sys.executable,
                "-c",
                WITH_DATASETS,
                source,
                cache,
                folder / "theirs.jsonl",
            ],
        }
        results = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                *figures, said = measure(command)
                results[name].append(figures)
            print(said)
            shutil.rmtree(cache)
        report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
        print(f"ours: kept {report['rows_kept']:,}, set aside {report['set_aside']}")
    print(f"\n{'':<22}{'seconds':>10}{'CPU s':>10}{'rows/s':>10}{'peak MiB':>10}{'ours is':>16}")
    medians = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in results.items()}
    for name, (seconds, used, peak) in medians.items():
        speed, times = arguments.rows / seconds, seconds / medians["ours"][0]
        print(f"{name:<22}{seconds:>10.1f}{used:>10.1f}{speed:>10,.0f}{peak:>10,.0f}{times:>10.1f} x fast")


if __name__ == "__main__":
    main()
