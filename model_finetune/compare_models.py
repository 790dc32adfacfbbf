"""Compare models on what none of them was trained on, and say how sure every difference is.

    python model_finetune/compare_models.py                                          # the base and every finished run
    python model_finetune/compare_models.py --models model_download/Qwen3-0.6B trainer_output/sft_finetuned
    python model_finetune/compare_models.py --exam-file traditional_chinese_medicine.csv       # CMMLU, CMB, CMExam as they are

Reads sft_eval.jsonl, dpo_eval.jsonl and exam.jsonl of data_prepare/qwen3/ and, of data_prepare/sample/, general_questions.jsonl.
Held-out loss, exam (by option text and by option letter), preference pairs, facts stated, a control set of general
questions, sample answers. Writes comparison.md, comparison.json and comparison.png to OUTPUT_DIR, and every item's scores
to OUTPUT_DIR/comparison/. A model measured before is not measured again.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.errors import RunError, UserError, run
from utils.files import (
    atomic_write,
    prepare_folder,
    read_json,
    read_jsonl,
    require_file,
    sample_by_id,
    show_path,
    write_json,
)
from utils.model.folders import check_model, find_models
from utils.model.load import quiet_offline
from utils.settings import ROOT, parse_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--models trainer_output/sft_finetuned) ----
MODELS = []                 # folders to compare, the base first; none: the base and every finished run
BASE_MODEL = "model_download/Qwen3-0.6B"            # the base, where MODELS names none
EVAL_FILE = "data_prepare/qwen3/sft_eval.jsonl"     # held-out conversations
EXAM_FILE = "data_prepare/qwen3/exam.jsonl"         # single-choice questions: also CMMLU csv, CMB or CMExam json; "": none
PAIRS_FILE = "data_prepare/qwen3/dpo_eval.jsonl"    # held-out preference pairs; "": none
GENERAL_FILE = "data_prepare/sample/general_questions.jsonl"    # questions that are not TCM, to see forgetting; "": none
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # terms by which a generated answer counts as right
OUTPUT_DIR = "trainer_output"                       # where the results go
EXAM_INSTRUCTION = "请只写出答案。"                  # put under an exam question that is scored by option text
EVAL_ROWS = 300             # conversations of EVAL_FILE, and as many pairs, that are scored; 0: all
EXAM_ROWS = 0               # exam questions that are scored; 0: all
LETTER_ROWS = 0             # of these, how many also by option letter, which takes five times as long; 0: all
GENERATE = 200              # held-out questions answered in full, beside the general ones; 0: no answers at all
THINKING = "off"            # of answers in full: off, on, or auto (each folder's own mode); scores are taken with it off
MAX_NEW_TOKENS = 128        # longest generated answer, in tokens
BATCH_SIZE = 64             # answers generated at a time
SHOW = 3                    # sample answers shown side by side
SEED = 0                    # which held-out questions are answered
FRESH = False               # measure again what was measured before
DEVICE = "auto"             # auto, cuda, mps or cpu
PRECISION = "auto"          # auto, bf16 or fp32
# ----
# fmt: on


def main(argv=None):
    settings = parse_settings(__file__, argv)

    # 1. Find the models and the tests
    folders = models_to_compare(settings)
    tests, left_out = load_tests(settings)
    quiet_offline(*folders.values())
    settings.show()
    prepare_folder(settings.OUTPUT_DIR)

    # 2. Measure each model, one in memory at a time; what was measured before is read
    import torch

    from utils.device import pick_device
    from utils.evaluation.compare import differences, figures, results

    device = pick_device(settings.DEVICE, settings.PRECISION)
    print(f"device: {device}")
    measured = {}
    for number, (name, folder) in enumerate(folders.items(), 1):
        print(f"{number}/{len(folders)} {name} ({show_path(folder)})", flush=True)
        try:
            measured[name] = results(folder, tests, settings, device)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; the same command goes on with {name}: finished models are kept"
            ) from None
        except torch.OutOfMemoryError:
            raise RunError(
                f"not enough memory on {device.name} for {name}; try --batch-size 8, or --device cpu"
            ) from None

    # 3. Figures, and every two models against each other on the same items
    models = {name: figures(items) for name, items in measured.items()}
    pairs = [
        {"from": one, "to": other, **differences(measured[one], measured[other])}
        for one, other in itertools.combinations(models, 2)
    ]

    # 4. Write and print
    from utils.evaluation.report import markdown_lines, terminal_lines
    from utils.plots import plot_comparison

    place = settings.OUTPUT_DIR
    plot_comparison(models, place / "comparison.png")
    with atomic_write(place / "comparison.md") as file:
        file.write("\n".join(markdown_lines(models, pairs, measured, settings, device, left_out)) + "\n")
    write_json(
        place / "comparison.json",
        {
            "models": models,
            "differences": pairs,
            "settings": settings.as_dict(),
            "device": str(device),
            "exam_rows_left_out": left_out,
        },
    )
    print("\n" + "\n".join(terminal_lines(models, pairs, measured, settings.SHOW)))
    print(
        f"written: {show_path(place)}/comparison.md, comparison.json, comparison.png; every item: comparison/"
    )


def models_to_compare(settings):
    """{short name: folder or Hub id}: the given ones, or the base and what is finished under trainer_output/, oldest first."""
    runs = [
        folder
        for folder in reversed(find_models())
        if (folder / "run.json").is_file()
        and folder.parent == ROOT / "trainer_output"
        and read_json(folder / "run.json")["status"] == "finished"
    ]
    named = {}
    for number, given in enumerate(settings.MODELS or [settings.BASE_MODEL, *map(str, runs)]):
        folder = Path(check_model(given)).resolve()
        inside = folder.name == "merged" or folder.name.startswith("checkpoint-")
        name = (f"{folder.parent.name}/" if inside else "") + folder.name
        name = (
            "base" if number == 0 and not (folder / "run.json").is_file() else name.replace("_finetuned", "")
        )
        named[name if name not in named else f"{name} ({number + 1})"] = given
    return named


def load_tests(settings):
    """(utils.evaluation.compare.Tests, {reason: rows of the exam file left out}); UserError for files that are not as wanted."""
    from utils.data.terms import Terms
    from utils.evaluation.compare import THINKING_MODES, Tests
    from utils.evaluation.exams import read_exam

    if settings.THINKING not in THINKING_MODES:
        raise UserError(f"--thinking: wanted auto, on or off, got {settings.THINKING!r}")
    make_pairs, make_sample = (
        "python data_prepare/build_preference_pairs.py",
        "python data_prepare/sample/make_sample.py",
    )
    convert = "python data_prepare/convert_to_qwen3_format.py"
    rows = list(read_jsonl(require_file(settings.EVAL_FILE, convert), ["id", "messages"]))
    exam, left_out = read_exam(settings.EXAM_FILE) if optional(settings, "EXAM_FILE", convert) else ([], {})
    pairs = (
        list(read_jsonl(settings.PAIRS_FILE, ["id", "prompt", "chosen", "rejected"]))
        if optional(settings, "PAIRS_FILE", make_pairs)
        else []
    )
    general = (
        list(read_jsonl(settings.GENERAL_FILE, ["id", "question", "answer", "accept"]))
        if optional(settings, "GENERAL_FILE", "git checkout data_prepare/sample")
        else []
    )
    for reason, count in left_out.items():
        print(f"{show_path(settings.EXAM_FILE)}: {count:,} rows left out: {reason}")
    return Tests(
        sample_by_id(rows, settings.EVAL_ROWS),
        sample_by_id(exam, settings.EXAM_ROWS),
        sample_by_id(pairs, settings.EVAL_ROWS),
        general,
        Terms(require_file(settings.TERMS_FILE, make_sample)),
    ), left_out


def optional(settings, name, command):
    """Whether to use the file of a setting: "" and a default that is not there mean no, and the latter is said."""
    path = getattr(settings, name)
    if path and name in settings.overridden:
        require_file(path, command)
    if path and not path.is_file():
        print(f"{show_path(path)} is not there, so its test is left out; make it with: {command}")
    return path and path.is_file()


if __name__ == "__main__":
    sys.exit(run(main))
