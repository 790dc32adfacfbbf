"""Compare models on what none of them was trained on, and say how sure every difference is.

    python model_finetune/compare_models.py                                          # the base and every finished run
    python model_finetune/compare_models.py --models model_download/Qwen3-0.6B trainer_output/sft_finetuned
    python model_finetune/compare_models.py --exam-file traditional_chinese_medicine.csv       # CMMLU, CMB, CMExam as they are

Reads sft_eval.jsonl, dpo_eval.jsonl and exam.jsonl of data_prepare/qwen3/ and, of data_prepare/sample/, general_questions.jsonl.
Held-out loss, exam (by option text and by option letter; true or false by itself), preference pairs, facts stated (alone, and as
second and fourth question of a conversation), cautions, a control set of general questions, sample answers. Writes comparison.md,
comparison.json and comparison.png to OUTPUT_DIR, every item's scores to OUTPUT_DIR/comparison/, and report.html in each training
folder. A model measured before is not measured again. Exam questions with several right answers are left out, and counted.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.errors import run
from utils.files import prepare_folder, read_jsonl, require_file, sample_by_id, show_path
from utils.model.folder import check_model, find_models, quiet_offline, run_folder, usable_record
from utils.settings import ROOT, read_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--models trainer_output/sft_finetuned) ----
MODELS = []                 # folders to compare, the base first; none: the base and every finished run
BASE_MODEL = "model_download/Qwen3-0.6B"            # the base, where MODELS names none
EVAL_FILE = "data_prepare/qwen3/sft_eval.jsonl"     # held-out conversations
EXAM_FILE = "data_prepare/qwen3/exam.jsonl"         # exam questions: also CMMLU csv, CMB or CMExam json; "": none
PAIRS_FILE = "data_prepare/qwen3/dpo_eval.jsonl"    # held-out preference pairs; "": none
GENERAL_FILE = "data_prepare/sample/general_questions.jsonl"    # questions that are not TCM, to see forgetting; "": none
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # terms by which a generated answer counts as right
OUTPUT_DIR = "trainer_output"                       # where the results go
EVAL_ROWS = 300             # [0, 1, ...] conversations of EVAL_FILE, and as many pairs, that are scored; 0: all
EXAM_ROWS = 0               # [0, 1, ...] exam questions that are scored; 0: all
LETTER_ROWS = 0             # [-1, 0, ...] of these, how many also by option letter: five times as long; 0: all, -1: none
GENERATE = 200              # [0, 1, ...] held-out questions answered in full, beside the general ones; 0: no answers at all
FOLLOW_UPS = 100            # [0, 1, ...] of these, how many again as second and as fourth question of a conversation; 0: none
THINKING = "off"            # [auto | on | off] of answers in full; auto: each folder's own mode; scores are taken with it off
MAX_NEW_TOKENS = 128        # [1, 2, ...] longest generated answer, in tokens
BATCH_SIZE = 64             # [1, 2, ...] answers generated at a time
SHOW = 4                    # [0, 1, ...] sample answers to held-out questions, each of another kind if possible; 0: none at all
SEED = 0                    # [0, 1, ...] which held-out questions are answered
FRESH = False               # measure again what was measured before
DEVICE = "auto"             # [auto | cuda | mps | cpu] auto: CUDA, else MPS, else CPU
PRECISION = "auto"          # [auto | bf16 | fp16 | fp32] auto: bf16 where the hardware computes in it
# ----

SET_ASIDE = r"\.\d{8}-\d{6}$"  # ends the name of a folder that --fresh moved an earlier run to
CONVERT = "python data_prepare/convert_to_qwen3_format.py"
# fmt: on


def main(argv=None):
    settings = read_settings(globals(), argv)

    # 1. Find the models and the tests
    folders = models_to_compare(settings)
    tests, left_out = load_tests(settings)
    quiet_offline()
    settings.show()
    prepare_folder(settings.OUTPUT_DIR)

    # 2. Measure each model, one in memory at a time; what was measured before is read
    from utils.device import pick_device
    from utils.evaluation.measure import measured_or_kept, seen_in_training
    from utils.evaluation.report import make_comparison, terminal_lines, write_report
    from utils.model.prove import prove, prove_answers
    from utils.training.log import write_page

    device = prove_answers(prove(pick_device(settings.DEVICE, settings.PRECISION)))
    print(f"device: {device}")
    warnings = seen_in_training(folders, tests)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    measured = {}
    for number, (name, folder) in enumerate(folders.items(), 1):
        print(f"{number}/{len(folders)} {name} ({show_path(folder)})", flush=True)
        try:
            measured[name] = measured_or_kept(folder, tests, settings, device)
        except KeyboardInterrupt:
            stopped = f"stopped; the same command goes on with {name}: finished models are kept"
            raise KeyboardInterrupt(stopped) from None

    # 3. Metrics, and every two models against each other on the same items
    comparison = make_comparison(measured, settings, device, left_out, warnings)

    # 4. Write and print
    write_report(comparison, settings.OUTPUT_DIR)
    print("\n" + "\n".join(terminal_lines(comparison)))
    place = show_path(settings.OUTPUT_DIR)
    print(f"written: {place}/comparison.md, comparison.json, comparison.png; every item: comparison/")
    for name, folder in folders.items():
        if (usable_record(folder) or {}).get("status") == "finished":
            page = write_page(Path(folder), comparison, name, settings.OUTPUT_DIR)
            print(f"report: {show_path(page)}")


def models_to_compare(settings):
    """{short name: folder}: the given ones, or the base and what is finished under trainer_output/, oldest first."""
    runs = []
    if not settings.MODELS:
        for folder in reversed(find_models()):
            inside = folder.parent == ROOT / "trainer_output" and not re.search(SET_ASIDE, folder.name)
            record = usable_record(folder) if inside else None
            if record and record["status"] == "finished":
                runs.append(folder)
    named = {}
    for number, given in enumerate(settings.MODELS or [settings.BASE_MODEL, *map(str, runs)]):
        model = check_model(given)
        folder = Path(model).resolve()
        run_of = run_folder(folder)
        name = folder.name if run_of == folder else f"{run_of.name}/{folder.name}"
        is_base = number == 0 and not (folder / "run.json").is_file()
        name = "base" if is_base else name.replace("_finetuned", "")
        named[name if name not in named else f"{name} ({number + 1})"] = model
    return named


def load_tests(settings):
    """(utils.evaluation.questions.Tests, {reason: rows of the exam file left out}); UserError for files that are not as wanted."""
    from utils.data.pairs import Terms
    from utils.evaluation.questions import Tests, read_exam

    heldout = read_jsonl(require_file(settings.EVAL_FILE, CONVERT), ["id", "messages"])
    exam, left_out = read_exam(settings.EXAM_FILE) if is_there(settings, "EXAM_FILE", CONVERT) else ([], {})
    for reason, count in left_out.items():
        print(f"{show_path(settings.EXAM_FILE)}: {count:,} rows left out: {reason}")
    pairs, general = [], []
    if is_there(settings, "PAIRS_FILE", "python data_prepare/build_preference_pairs.py"):
        pairs = read_jsonl(settings.PAIRS_FILE, ["id", "prompt", "chosen", "rejected"])
    if is_there(settings, "GENERAL_FILE", "git checkout data_prepare/sample"):
        general = list(read_jsonl(settings.GENERAL_FILE, ["id", "question", "answer", "accept"]))
    for row in general:
        pair = ("user", row["question"]), ("assistant", row["answer"])
        row["messages"] = [{"role": role, "content": text} for role, text in pair]
    return Tests(
        heldout=sample_by_id(heldout, settings.EVAL_ROWS),
        exam=sample_by_id(exam, settings.EXAM_ROWS),
        pairs=sample_by_id(pairs, settings.EVAL_ROWS),
        general=general,
        terms=Terms(require_file(settings.TERMS_FILE, "python data_prepare/sample/make_sample.py")),
    ), left_out


def is_there(settings, name, command):
    """Whether to use the file of a setting: "" and a default that is not there mean no, and the latter is said."""
    path = getattr(settings, name)
    if path and name in settings.overridden:
        require_file(path, command)
    if path and not path.is_file():
        print(f"{show_path(path)} is not there, so its test is left out; make it with: {command}")
    return bool(path) and path.is_file()


if __name__ == "__main__":
    sys.exit(run(main))
