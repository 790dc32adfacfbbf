"""Turn downloaded data of any common shape into training, preference and exam files, and account for every row.

    python data_prepare/convert_to_qwen3_format.py
    python data_prepare/convert_to_qwen3_format.py --input-files my.json folder --columns question=Content,answer=Summary

Reads .jsonl, .json, .csv, .tsv and .parquet (UTF-8 or GB18030) and recognises the fields of the usual data sets. Writes
sft_train.jsonl, sft_eval.jsonl, and where such rows were given dpo_train.jsonl, dpo_eval.jsonl, exam.jsonl. What is not kept
goes whole, with file, line and reason, to set_aside.jsonl; report.json and lengths.png sum up. Memory does not grow with the
text, which waits in temporary files in the output folder (about twice its size) until all questions have been compared.
"""

import os
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.data.readers import data_files, detect_encoding, map_tasks
from utils.data.schemas import parse_columns
from utils.data.text_store import TextStore
from utils.errors import UserError, run
from utils.files import sha256_of, show_path, write_json
from utils.progress import ByteProgress
from utils.settings import parse_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--eval-share 0.1) ----
INPUT_FILES = ["data_prepare/raw"]    # data files, or folders of them
OUTPUT_DIR = "data_prepare/qwen3"     # where the converted files go
COLUMNS = ""                          # fields of an unknown schema, e.g. question=Content,answer=Summary
SYSTEM = ""                           # system text for rows that have none; chat has none by default
EVAL_SHARE = 0.05                     # share of the rows held out, for rows that do not say their split themselves
MAX_EVAL_ROWS = 1000                  # and at most so many, because every evaluation in training takes its time
NEAR_DUPLICATE = 0.85                 # long questions are alike from this overlap of 3-character shingles (Jaccard) up
MAX_CHARACTERS = 50000                # longer rows are set aside: 32,768 tokens, Qwen3's window, hold about 43,000 of Chinese
MAX_LENGTH = 1024                     # tokens; the report says what share of the rows a trainer with this limit keeps
TOKENIZER_MODEL = "model_download/Qwen3-0.6B"   # its tokenizer counts the tokens, if the folder is there
TOKEN_ROWS = 3000                     # rows, drawn at random, whose tokens are counted: 30 of them lie beyond the 99 % point
SEED = 0                              # another seed holds out other questions
WORKERS = 0                           # processes; 0: one for input under 32 MB, else one a core, 8 at most
# ----
# fmt: on

DOWNLOAD = "python data_prepare/download_tcm_data.py"
PAIRS = "python data_prepare/build_preference_pairs.py"
TRAIN = "python model_finetune/finetune_sft.py"
COMPARE = "python model_finetune/compare_models.py"


def main(argv=None):
    settings = parse_settings(__file__, argv)
    options = conversion_options(settings)
    settings.show()
    from utils.data import convert, dedup  # numpy, which --help does not need
    from utils.data.report import count_tokens, lengths, share, show
    from utils.plots import draw_lengths

    # 1. Find the files and tell their encodings
    files = data_files(settings.INPUT_FILES, DOWNLOAD)
    encodings = [detect_encoding(path) for path in files]
    size = sum(path.stat().st_size for path in files)
    workers = settings.WORKERS or (1 if size < 32e6 else min(os.cpu_count() or 1, 8))
    settings.OUTPUT_DIR.mkdir(parents=True, exist_ok=True)

    # 2. Recognise every row; its text waits in temporary files, only keys and signatures of it stay in memory
    collection = dedup.Collection(settings.OUTPUT_DIR)
    made, given = TextStore(settings.OUTPUT_DIR), TextStore(settings.OUTPUT_DIR)
    schemas, reasons, fields = Counter(), Counter(), {}
    tasks = convert.tasks(files, encodings, options, given)
    with ByteProgress("rows recognised", 0, size, always=False) as progress:
        for index, lines, sizes, sketch, recognised, rejected, unfit in map_tasks(
            convert.examine, tasks, workers
        ):
            made.add(lines, sizes)
            collection.add(index, *sketch)
            schemas += recognised
            reasons += rejected
            fields = fields or unfit  # of the first batch that has rows with unknown fields
            progress.show(
                min(given.ends[-1], size - 1)
            )  # about: as JSON lines, tables and arrays take more or less
        progress.show(size)
    refuse_unusable(settings, schemas, reasons, fields)

    # 3. Decide for every row: its side of the split, and whether it is a duplicate or a leak
    collection.finish()
    rows = collection.rows
    if size >= 32e6:
        print(f"  comparing the questions of {len(rows):,} rows, then writing them", flush=True)
    side, fate, twin = dedup.decide(
        collection, settings.NEAR_DUPLICATE, settings.EVAL_SHARE, settings.MAX_EVAL_ROWS, settings.SEED
    )
    trained = (fate == dedup.KEPT) & (rows["kind"] == 1)  # the sft rows that are kept
    drawn = dedup.draw(rows, trained, settings.TOKEN_ROWS, settings.SEED)

    # 4. Put every row in its place
    names = [path.name for path in files]
    counts, aside, examples = convert.write_outputs(
        made, given, settings.OUTPUT_DIR, names, rows, side, fate, twin, drawn
    )
    reasons += aside
    outputs = [settings.OUTPUT_DIR / f"{name}.jsonl" for name in convert.OUTPUTS]
    written = [path for path in outputs if counts[path.stem]]
    remove_stale(outputs, counts)

    # 5. Measure, report, and say what comes next
    kept = rows[trained]
    tokens = count_tokens(settings.TOKENIZER_MODEL, examples)
    report = {
        "rows_in": len(rows),
        "rows_kept": counts.total(),
        "rows_set_aside": reasons.total(),
        "set_aside": dict(reasons.most_common()),
        "outputs": {path.stem: counts[path.stem] for path in written},
        "files": [
            {"file": path.name, "encoding": encoding, "rows": int(count), "sha256": sha256_of(path)}
            for path, encoding, count in zip(files, encodings, dedup.count_by_file(rows, len(files)))
        ],
        "schemas": dict(schemas.most_common()),
        **lengths(kept["characters"], tokens, settings.MAX_LENGTH),
        "reasoning_share": share(kept["reasoning"]),
        "fingerprints": {path.stem: sha256_of(path) for path in written},
        "examples": random.Random(settings.SEED).sample(examples, min(5, len(examples))),
        "settings": settings.as_dict(),
    }
    write_json(settings.OUTPUT_DIR / "report.json", report)
    draw_lengths(settings.OUTPUT_DIR / "lengths.png", kept["characters"], tokens, settings.MAX_LENGTH)
    show(report)
    print(f"\nwritten to {show_path(settings.OUTPUT_DIR)}; what was set aside, and why: set_aside.jsonl")
    for path in (path for path in outputs if path.exists() and path not in written):
        print(
            f"note: {path.name} there is from an earlier run and was not compared with these rows; make it again"
            + (f" with: {PAIRS}" if path.name.startswith("dpo") else "")
        )
    if counts["sft_train"] and not counts["sft_eval"]:
        print(
            "note: no row is held out for evaluation (EVAL_SHARE is 0, or there are too few different questions)"
        )
    print(f"next: {TRAIN if counts['sft_train'] else COMPARE}")
    return 0


def conversion_options(settings):
    """The arguments of convert_row, out of the settings; UserError where a setting makes no sense."""
    if not 0 <= settings.EVAL_SHARE < 1:
        raise UserError(f"--eval-share is {settings.EVAL_SHARE}, wanted 0 or more and less than 1")
    if not 0.5 <= settings.NEAR_DUPLICATE <= 1:
        raise UserError(f"--near-duplicate is {settings.NEAR_DUPLICATE}, wanted 0.5 to 1")
    for name, least in {
        "MAX_CHARACTERS": 1,
        "MAX_LENGTH": 1,
        "MAX_EVAL_ROWS": 0,
        "TOKEN_ROWS": 0,
        "WORKERS": 0,
    }.items():
        if getattr(settings, name) < least:
            raise UserError(
                f"--{name.lower().replace('_', '-')} is {getattr(settings, name)}, wanted {least} or more"
            )
    try:
        columns = parse_columns(settings.COLUMNS)
    except ValueError as error:
        raise UserError(f"--columns: {error}") from None
    return {
        "columns": tuple(columns.items()),
        "system": settings.SYSTEM,
        "max_characters": settings.MAX_CHARACTERS,
    }


def refuse_unusable(settings, schemas, reasons, fields):
    """UserError, with the fields found and a line to copy, if no row can be used or --columns fits none."""
    if schemas and (not settings.COLUMNS or schemas["--columns"]):
        return
    counted = (
        ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "the input is empty"
    )
    names, lengths = next(iter(fields.items()), ((), ()))
    hint = f"; fields found: {', '.join(map(str, names))}" if names else ""
    if len(names) > 1:  # the longest text is most likely the answer, the next one the question
        answer, question = (name for _, name in sorted(zip(lengths, map(str, names)), reverse=True)[:2])
        hint += (
            f"; name them, for example: python data_prepare/convert_to_qwen3_format.py "
            f"--columns question={question},answer={answer}"
        )
    elif reasons["not JSON"] or names:  # pretty-printed, or wrapped in an object
        hint += "; wanted one JSON object for each row: one a line, or all in one array"
    if schemas:
        raise UserError(f"no row has the fields of --columns {settings.COLUMNS}{hint}")
    raise UserError(f"no row could be used ({counted}){hint}")


def remove_stale(outputs, counts):
    """Remove the evaluation file of an earlier run that the new training file does not belong to."""
    for path in outputs:
        if not counts[path.stem] and counts[path.stem.replace("_eval", "_train")]:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run(main))
