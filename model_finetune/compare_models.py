"""Compare models on what none of them was trained on: held-out loss, exam, preference pairs, facts stated, sample answers.

    python model_finetune/compare_models.py

Compares the base model and every finished run under trainer_output/ (or --models FOLDER ...). Writes comparison.json,
comparison.md and comparison.png to OUTPUT_DIR and prints the table.
"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.errors import UserError, run
from utils.files import atomic_write, draw_evenly, read_jsonl, require_file, show_path, write_json
from utils.models import check_model, load_model, load_tokenizer, quiet_offline
from utils.settings import ROOT, parse_settings

# ---- Settings: edit here, or override on the command line (--models trainer_output/sft_finetuned) ----
MODELS = []                 # folders to compare, the base first; none: the base and every finished run
BASE_MODEL = "model_download/Qwen3-0.6B"            # the base, where MODELS names none
EVAL_FILE = "data_prepare/qwen3/sft_eval.jsonl"     # held-out conversations
EXAM_FILE = "data_prepare/qwen3/exam.jsonl"         # single-choice questions; skipped where there is no such file
PAIRS_FILE = "data_prepare/qwen3/dpo_eval.jsonl"    # held-out preference pairs; skipped where there is no such file
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # terms by which a generated answer counts as right
OUTPUT_DIR = "trainer_output"                       # where the three files go
EXAM_INSTRUCTION = "请只写出答案。"                  # put under each exam question
EVAL_ROWS = 300             # conversations of EVAL_FILE, and as many pairs, that are scored; 0: all
GENERATE = 200              # held-out questions answered in full by each model, to count the facts they state right
MAX_NEW_TOKENS = 128        # longest generated answer, in tokens
SHOW = 3                    # sample answers shown side by side
SEED = 0                    # which held-out questions are answered
DEVICE = "auto"             # auto, cuda, mps or cpu
PRECISION = "auto"          # auto, bf16 or fp32
# ----

COLUMNS = [     # key in comparison.json, heading, format
    ("heldout_loss", "held-out loss", "{:.3f}"), ("exam_accuracy", "exam", "{:.1%}"),
    ("preference_accuracy", "preference", "{:.1%}"), ("facts_accuracy", "facts stated right", "{:.1%}"),
    ("ended_share", "answers that end", "{:.0%}"), ("seconds", "seconds", "{:.0f}"),
]


def models_to_compare(settings):
    """{short name: folder or Hub id}: the given ones, or the base and what is finished under trainer_output/."""
    folders = settings.MODELS or [settings.BASE_MODEL, *(
        str(ROOT / "trainer_output" / f"{method}_finetuned") for method in ("sft", "lora", "dpo")
        if (ROOT / "trainer_output" / f"{method}_finetuned" / "generation_config.json").is_file())]
    named = {}
    for number, folder in enumerate(folders):
        name = Path(check_model(folder)).name.removesuffix("_finetuned")
        name = "base" if number == 0 and not (Path(folder) / "run.json").is_file() else name
        named[name if name not in named else f"{name}-{number}"] = folder
    return named


def load_tests(settings):
    """(held-out rows, exam items or [], pairs or [], Terms)."""
    from utils.terms import Terms

    source = require_file(settings.EVAL_FILE, "python data_prepare/convert_to_qwen3_format.py")
    rows = draw_evenly(list(read_jsonl(source, ["id", "messages"])), settings.EVAL_ROWS)
    exam = list(read_jsonl(settings.EXAM_FILE, ["question", "options", "answer"])) if settings.EXAM_FILE.is_file() else []
    pairs = list(read_jsonl(settings.PAIRS_FILE, ["id", "prompt", "chosen"])) if settings.PAIRS_FILE.is_file() else []
    pairs = draw_evenly(pairs, settings.EVAL_ROWS)
    return rows, exam, pairs, Terms(require_file(settings.TERMS_FILE, "python data_prepare/sample/make_sample.py"))


def measure(folder, tests, settings, device):
    """The figures of one model, a dict as in comparison.json, and its answers to the held-out questions."""
    from utils.chat_format import encode_answer, encode_prompt, encode_turns
    from utils.generation import generate_tokens, read_answer, stop_tokens
    from utils.packed_model import prepare_packed
    from utils.scoring import exam_choices, mean_loss, preference_choices, wilson

    began = time.monotonic()
    rows, exam, pairs, terms = tests
    tokenizer, model = load_tokenizer(folder), load_model(folder, device.dtype).to(device.name).eval()
    figures = {"folder": show_path(folder)}

    # Answers in full, first: the scores below change how the model computes
    asked = random.Random(settings.SEED).sample(rows, min(settings.GENERATE, len(rows)))
    prompts = [encode_prompt(tokenizer, row["messages"][:-1]) for row in asked]
    stop = stop_tokens(model, tokenizer)
    generated = generate_tokens(model, prompts, stop, settings.MAX_NEW_TOKENS, batch_size=32)
    answers = [read_answer(tokenizer, prompt, ids).content for prompt, ids in zip(prompts, generated)]
    judged = [(terms.stated(row["messages"][-1]["content"], row["messages"][-2]["content"]),
               terms.stated(answer, row["messages"][-2]["content"])) for row, answer in zip(asked, answers)]
    judged = [wanted == stated for wanted, stated in judged if wanted]
    if judged:
        figures |= {"facts_accuracy": sum(judged) / len(judged), "facts_interval": wilson(sum(judged), len(judged)),
                    "facts_n": len(judged)}
    figures["ended_share"] = sum(ids[-1] in stop for ids in generated) / len(generated)

    prepare_packed(model)
    items = [{"documents": [turn]} for row in rows for turn in encode_turns(tokenizer, row["messages"])]
    figures |= {"heldout_loss": mean_loss(model, items, device), "heldout_n": len(items)}
    if exam:
        choices = exam_choices(model, tokenizer, exam, settings.EXAM_INSTRUCTION, device)
        right = sum(choice == item["answer"] for (choice, _), item in zip(choices, exam))
        figures |= {"exam_accuracy": right / len(exam), "exam_interval": wilson(right, len(exam)), "exam_n": len(exam)}
    if pairs:
        items = [{"documents": [(encode_prompt(tokenizer, pair["prompt"], False), encode_answer(tokenizer, pair[side][-1]))
                                for side in ("chosen", "rejected")]} for pair in pairs]
        right = sum(preference_choices(model, items, device))
        figures |= {"preference_accuracy": right / len(pairs), "preference_interval": wilson(right, len(pairs)),
                    "preference_n": len(pairs)}
    figures["seconds"] = round(time.monotonic() - began, 1)
    return figures, [(row["messages"][-2]["content"], row["messages"][-1]["content"], answer)
                     for row, answer in zip(asked, answers)]


def table(models):
    """The comparison as lines of a Markdown table, which reads well in a terminal too."""
    columns = [column for column in COLUMNS if any(column[0] in figures for figures in models.values())]
    lines = [["model", *(heading for _, heading, _ in columns)]]
    for name, figures in models.items():
        cells = [name]
        for key, _, form in columns:
            cell = form.format(figures[key]) if key in figures else "-"
            interval = figures.get(key.replace("accuracy", "interval"))
            cells.append(f"{cell} ({interval[0]:.0%} to {interval[1]:.0%})" if isinstance(interval, list) else cell)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return [rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]]


def main(argv=None):
    settings = parse_settings(__file__, argv)

    # 1. Find the models and the tests
    folders = models_to_compare(settings)
    tests = load_tests(settings)
    if not folders:
        raise UserError("nothing to compare; give folders with --models")
    quiet_offline(next(iter(folders.values())))

    # 2. Measure each model, one in memory at a time
    from utils.device import pick_device
    from utils.plots import plot_comparison

    device = pick_device(settings.DEVICE, settings.PRECISION)
    print(f"device: {device}")
    models, answers = {}, {}
    for name, folder in folders.items():
        print(f"measuring {name} ({show_path(folder)}) on {len(tests[0]):,} held-out rows, {len(tests[1]):,} exam questions, "
              f"{len(tests[2]):,} pairs", flush=True)
        models[name], answers[name] = measure(folder, tests, settings, device)

    # 3. Sample answers side by side
    samples = []
    for number in range(min(settings.SHOW, len(tests[0]), settings.GENERATE)):
        question, wanted, _ = next(iter(answers.values()))[number]
        samples.append("\n".join([f"- **{question}**", f"  - reference: {wanted}",
                                  *(f"  - {name}: {answers[name][number][2]}" for name in models)]))

    # 4. Print and write
    lines = table(models)
    place = settings.OUTPUT_DIR
    write_json(place / "comparison.json", {"models": models})
    with atomic_write(place / "comparison.md") as file:
        file.write("\n".join(["# Comparison", "", *lines, "", "Shares with their 95 % interval (Wilson). All questions are held "
                              "out: no model was trained on them.", "", "## Sample answers", "", *samples, ""]))
    plot_comparison(models, place / "comparison.png")
    print("\n" + "\n".join([*lines, "", *samples]))
    print(f"\nwritten: {show_path(place)}/comparison.json, comparison.md, comparison.png")


if __name__ == "__main__":
    sys.exit(run(main))
