"""Turn downloaded data of any common shape into training, preference and exam files, and account for every row.

    python data_prepare/convert_to_qwen3_format.py
    python data_prepare/convert_to_qwen3_format.py --input-files my.json folder --columns question=Content,answer=Summary

Reads .jsonl, .json, .csv, .tsv (UTF-8 or GB18030, also as .gz or .zip), .parquet and .xlsx, and recognises the fields of the usual data sets. Writes
sft_train.jsonl, sft_eval.jsonl, and where such rows were given dpo_train.jsonl, dpo_eval.jsonl, exam.jsonl. What is not kept
goes whole, with file, line and reason, to set_aside.jsonl; report.json sums up. Memory grows by less than a
kilobyte per row: the texts wait in a temporary file in the output folder (about twice their size) until all questions have been compared.
"""

import contextlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.data.inputs import find_input_files
from utils.data.schemas import OUTPUTS, parse_columns
from utils.errors import UserError, run
from utils.files import read_json, show_path, write_json
from utils.settings import command, read_settings
from utils.text import say_next

# fmt: off
# ---- Settings: edit here, or override on the command line (--eval-share 0.1) ----
INPUT_FILES = ["data_prepare/raw"]    # data files, or folders of them
OUTPUT_DIR = "data_prepare/qwen3"     # where the converted files go
COLUMNS = ""                          # fields of an unknown schema, e.g. question=Content,answer=Summary
SYSTEM = ""                           # system text for rows that have none; chat has none by default
EXPLAINED = False                     # exam items with an explanation become conversations with reasoning to train on
EVAL_SHARE = 0.05                     # [0 to 0.9] share of the rows held out, if they do not say their split; of a small set 20 rows or 20 %
MAX_EVAL_ROWS = 1000                  # [0, 1, ...] and at most so many, because every evaluation in training takes its time
NEAR_DUPLICATE = 0.85                 # [0.5 to 1] long questions are alike from this overlap of 3-character shingles (Jaccard) up
MAX_CHARACTERS = 50000                # [1, 2, ...] longer rows are set aside: 32,768 tokens, Qwen3's window, hold about 43,000 of Chinese
MAX_LENGTH = 1024                     # [1, 2, ...] tokens; the report says what share of the rows a trainer with this limit keeps
TOKENIZER_MODEL = "model_download/Qwen3-0.6B"   # its tokenizer counts the tokens, if the folder is there; "": none are counted
TOKEN_ROWS = 3000                     # [1, 2, ...] rows, drawn at random, whose tokens are counted: 30 of them lie beyond the 99 % point
SEED = 0                              # [0, 1, ...] another seed holds out other questions
# ----
# fmt: on

DOWNLOAD = "python data_prepare/download_tcm_data.py"
PAIRS = "python data_prepare/build_preference_pairs.py"
TRAIN = {"sft": "model_finetune/finetune_sft.py", "dpo": "model_finetune/finetune_dpo.py"}
COMPARE = "model_finetune/compare_models.py"


def main(argv=None):
    settings = read_settings(globals(), argv)
    options = row_options(settings)
    settings.show()
    from utils.data import convert, dedup, exam_leaks, report  # numpy, which --help does not need

    # 1. Find the files, tell their encodings and the splits that their names say
    sources, skipped = find_input_files(settings.INPUT_FILES, DOWNLOAD)
    refuse_to_overwrite(sources, settings.OUTPUT_DIR)
    settings.OUTPUT_DIR.mkdir(parents=True, exist_ok=True)

    # 2. Recognise every row; its text waits in a temporary file, only keys of it stay in memory
    found = convert.recognise(sources, options, settings.OUTPUT_DIR)
    problem = report.refusal(sources, found, settings.COLUMNS)
    if problem:
        raise UserError(problem)

    # 3. Decide for every row: its split, and whether it is a duplicate or a leak
    leaks = exam_leaks.find_exam_leaks(found)
    shares = {name.lower(): getattr(settings, name) for name in ("EVAL_SHARE", "MAX_EVAL_ROWS", "SEED")}
    dedup.decide(found, leaks, settings.NEAR_DUPLICATE, **shares)

    # 4. Write every row to its file
    outputs = convert.write_outputs(found, sources, settings.OUTPUT_DIR)

    # 5. Measure, report, and say what comes next
    summary = report.build_report(sources, skipped, found, outputs, settings)
    replaced = list(earlier_inputs(settings))
    write_json(settings.OUTPUT_DIR / "report.json", summary)
    report.show(summary, found)
    print(f"\nwritten to {show_path(settings.OUTPUT_DIR)}; what was set aside, and why: set_aside.jsonl")
    for note in (*report.notes(sources, found), *replaced, *old_files(settings.OUTPUT_DIR, outputs)):
        print(f"note: {note}")
    say_next(next_command(settings.OUTPUT_DIR, outputs))
    return 0


def next_command(folder, outputs):
    """What to do with the files made: train on conversations, else on pairs, else compare models on the exam."""
    for kind, script in TRAIN.items():
        if outputs[f"{kind}_train"]:
            held_out = folder / f"{kind}_eval.jsonl" if outputs[f"{kind}_eval"] else ""
            return command(script, TRAIN_FILE=folder / f"{kind}_train.jsonl", EVAL_FILE=held_out)
    made = {"EVAL_FILE": "sft_eval", "EXAM_FILE": "exam", "PAIRS_FILE": "dpo_eval"}
    return command(
        COMPARE, **{name: folder / f"{output}.jsonl" for name, output in made.items() if outputs[output]}
    )


def row_options(settings):
    """How rows are read (of convert_row), out of the settings; UserError if COLUMNS is wrong."""
    try:
        columns = parse_columns(settings.COLUMNS)
    except ValueError as error:
        raise UserError(f"--columns: {error}") from None
    limits = {"explained": settings.EXPLAINED, "max_characters": settings.MAX_CHARACTERS}
    return {"columns": tuple(columns.items()), "system": settings.SYSTEM, **limits}


def refuse_to_overwrite(sources, folder):
    """UserError where an input file has the name and the place of an output file."""
    written = {
        (folder / name).resolve() for name in ("set_aside.jsonl", *(f"{name}.jsonl" for name in OUTPUTS))
    }
    for source in sources:
        if source.path.resolve() in written:
            raise UserError(
                f"{show_path(source.path)} would be overwritten by its result; choose another --output-dir"
            )


def earlier_inputs(settings):
    """A note on an earlier conversion of other files, whose place this one takes."""
    with contextlib.suppress(OSError, UserError, KeyError, TypeError):  # no report there, or none of ours
        before = read_json(settings.OUTPUT_DIR / "report.json")["settings"]["INPUT_FILES"]
        both = list(dict.fromkeys([*before, *settings.as_dict()["INPUT_FILES"]]))
        if both != settings.as_dict()["INPUT_FILES"]:
            both = shlex.join(both)
            yield f"this replaces the conversion of {', '.join(before)}; to train on both: --input-files {both}"


def old_files(folder, outputs):
    """Notes on files of an earlier run, and on an evaluation set that is missing."""
    names = [f"{name}.jsonl" for name in OUTPUTS if not outputs[name]]
    old = [name for name in names if (folder / name).exists()]
    if old:
        advice = f"; make pairs again with: {PAIRS}" if "dpo_train.jsonl" in old else ""
        yield f"from an earlier run, and not compared with these rows: {', '.join(old)}{advice}"
    if outputs["sft_train"] and not outputs["sft_eval"]:
        yield "no row is held out: training goes on without an evaluation (EVAL_SHARE is 0, or all rows ask one thing)"


if __name__ == "__main__":
    sys.exit(run(main))
