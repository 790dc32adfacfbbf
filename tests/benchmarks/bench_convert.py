"""Time the conversion of many rows against the same normalisation and exact de-duplication written with `datasets`.

    python tests/benchmarks/bench_convert.py
    python tests/benchmarks/bench_convert.py --rows 200000 --runs 3

Makes the rows (about 400 bytes each; 1,000,000 by default) in a temporary folder: template questions, case descriptions, 4 %
exact duplicates, 6 % near-duplicates. Ours is the whole script, near-duplicates, leaks, split and report included; theirs is
one process with load_dataset, map (messages and a normalised key), filter (keys not seen before) and to_json, nothing else.
Prints a table of medians; peak memory is the largest sum over the processes of a run, resident pages counted once a process.
"""

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_prepare" / "convert_to_qwen3_format.py"

WITH_DATASETS = r"""
import re, sys, unicodedata
import datasets

datasets.disable_progress_bars()
noise = re.compile(r"[\W_]+")

def key(text):
    return noise.sub("", unicodedata.normalize("NFKC", text).casefold())

def convert(row):
    question, answer = row["query"].strip(), row["response"].strip()
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "key": key(question) + "\n" + key(answer)}

seen = set()

def is_new(row):
    if row["key"] in seen:
        return False
    seen.add(row["key"])
    return True

rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
rows = rows.map(convert, remove_columns=rows.column_names).filter(is_new)
rows.remove_columns("key").to_json(sys.argv[3], force_ascii=False)
"""


def make_rows(path, count):
    """Write `count` query/response rows, the same for the same count."""
    chance = random.Random(0)
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 2500)]
    words = ["".join(chance.choices(letters, k=chance.choice((1, 2, 2, 2, 3)))) for _ in range(20_000)]
    herbs = ["".join(chance.choices(letters, k=chance.choice((2, 3)))) for _ in range(50_000)]
    templates = ("{}的性味归经是什么？", "{}有哪些功效？", "请问{}怎么炮制？", "{}的用法用量和使用注意分别是什么？", "{}与{}有什么区别？")

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
                query, response = chance.choice(templates).format(*chance.sample(herbs, 2)), text(60, 140)
            else:
                query, response = "患者" + text(40, 70) + "应如何辨证论治？", text(40, 110)
            file.write(json.dumps({"query": query, "response": response}, ensure_ascii=False) + "\n")
            if number % 50 == 0:
                recent = recent[-2000:] + [(query, response)]


def resident(process):
    """Resident bytes of a process and its children now (Linux)."""
    total, todo = 0, [process]
    while todo:
        current = todo.pop()
        try:
            total += int(Path(f"/proc/{current}/statm").read_text(encoding="utf-8").split()[1]) * 4096
            for task in Path(f"/proc/{current}/task").iterdir():
                todo += map(int, (task / "children").read_text(encoding="utf-8").split())
        except (FileNotFoundError, ProcessLookupError):
            continue                    # it ended between two looks
    return total


def measure(command):
    """(seconds, peak resident bytes, output) of a command."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        waiting = threading.Event()
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            waiting.wait(0.2)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(text)
    return time.perf_counter() - start, peak, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=1, help="of each; the table shows medians")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "rows.jsonl"
        make_rows(source, arguments.rows)
        size = source.stat().st_size / 1e6
        print(f"{arguments.rows:,} rows, {size:.0f} MB; Python {platform.python_version()}", flush=True)
        ours = [sys.executable, str(SCRIPT), "--input-files", str(source), "--output-dir", str(folder / "out"),
                "--tokenizer-model", ""]
        results = {"ours": [], "datasets": []}
        for number in range(arguments.runs):
            results["ours"].append(measure(ours))
            cache, output = folder / f"cache{number}", folder / "theirs.jsonl"
            results["datasets"].append(measure([sys.executable, "-c", WITH_DATASETS, str(source), str(cache), str(output)]))
            shutil.rmtree(cache)
        report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
        print(f"ours: kept {report['rows_kept']:,}, set aside {report['set_aside']}")
        print(f"\n{'':<10}{'seconds':>10}{'rows/s':>12}{'peak MiB':>12}")
        medians = {name: [statistics.median(column) for column in list(zip(*runs))[:2]] for name, runs in results.items()}
        for name, (seconds, peak) in medians.items():
            print(f"{name:<10}{seconds:>10.1f}{arguments.rows / seconds:>12,.0f}{peak / 2**20:>12,.0f}")
        print(f"\nours is {medians['datasets'][0] / medians['ours'][0]:.1f} times as fast")


if __name__ == "__main__":
    main()
