"""How many exam items are found in training rows, asked in six ways, and how many innocent rows are set aside with them.

    python tests/benchmarks/bench_leaks.py
    python tests/benchmarks/bench_leaks.py --innocent my_rows.jsonl more.json

Half of about 2,300 items made of the sample's fact tables are the exam. Each is asked once in every way; the other half, in the
same ways, the sample's rows about anything but herbs, and the rows of the files given are innocent. Many items share a stem and differ in their options,
which is what makes innocent rows look guilty. An innocent row that states a right answer of the exam to the same stem would be
no innocent one: items whose stem and right option both are in the exam are left out.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_prepare" / "convert_to_qwen3_format.py"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--innocent", nargs="*", type=Path, default=[], help="more files of innocent rows")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from exam_items import asked_alone, make_items, ways_to_ask

    from utils.files import read_jsonl, write_jsonl

    chance, items = random.Random(0), make_items()
    exam, rest = items[::2], items[1::2]
    known = {(item["question"], item["options"][item["answer"]]) for item in exam}
    rest = [item for item in rest if (item["question"], item["options"][item["answer"]]) not in known]
    guilty, innocent = [], []
    for item in exam:
        guilty += [{**row, "split": "train", "way": way} for way, row in ways_to_ask(item, chance).items()]
        guilty.append({**asked_alone(item), "split": "train", "way": "alone (no bar)"})
    for item in rest:
        innocent += [{**row, "split": "train"} for row in ways_to_ask(item, chance).values()]
    sample = read_jsonl(ROOT / "data_prepare/sample/tcm_sample.jsonl")
    innocent += [row | {"split": "train"} for row in sample if not row["kind"].startswith("herb")]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_jsonl(folder / "exam.jsonl", exam)
        write_jsonl(folder / "guilty.jsonl", guilty)
        write_jsonl(folder / "innocent.jsonl", innocent)
        files = [folder / f"{name}.jsonl" for name in ("exam", "guilty", "innocent")]
        command = [sys.executable, SCRIPT, "--input-files", *files, *given.innocent]
        command += ["--output-dir", folder / "out", "--tokenizer-model", "", "--eval-share", "0"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        found, wrong = Counter(), []
        for line in open(folder / "out/set_aside.jsonl", encoding="utf-8"):
            aside = json.loads(line)
            if aside["reason"] in ("exam leak", "exact duplicate"):
                if aside["file"] == "guilty.jsonl":
                    found[aside["row"]["way"]] += 1
                elif aside["detail"].startswith(
                    "of exam.jsonl"
                ):  # some ways to ask are exam items themselves
                    wrong.append(aside)
        rows = json.loads((folder / "out/report.json").read_text(encoding="utf-8"))["files"]
    print(f"{len(exam):,} exam items")
    for way in dict.fromkeys(row["way"] for row in guilty):
        print(f"  {found[way] / len(exam):7.2%}  found, {way}")
    count = sum(file["rows"] for file in rows if file["file"] not in ("exam.jsonl", "guilty.jsonl"))
    print(f"{count:,} innocent rows, {len(wrong)} set aside: {len(wrong) / count * 1000:.2f} in 1,000")
    for aside in wrong[:5]:
        print("  " + json.dumps(aside["row"], ensure_ascii=False)[:300], aside["detail"])


if __name__ == "__main__":
    main()
