"""Pre-train the built-in tiny base model from scratch, on the plain statements of the built-in sample.

    python model_download/pretrain_tiny_model.py

Reads statements.jsonl, exercises.json and terms.jsonl of data_prepare/sample/, makes model_download/tiny_qwen3_tcm/: Qwen3's
architecture and chat format at 3.7 M parameters, with a byte-level BPE tokenizer of its own. It reads every fact as a
statement, and of chat only how to carry a name from a question into an answer: what a question asks for is left to
fine-tuning. It stands in for Qwen3-0.6B in the demo and the tests, nowhere else.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from utils.data.terms import Terms
from utils.errors import run
from utils.files import (
    prepare_folder,
    read_json,
    read_jsonl,
    require_file,
    show_path,
    write_folder,
    write_jsonl,
)
from utils.model.load import quiet_offline
from utils.settings import parse_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--epochs 10) ----
STATEMENTS_FILE = "data_prepare/sample/statements.jsonl"    # what it reads: {"text"} a line
EXERCISES_FILE = "data_prepare/sample/exercises.json"    # chat exercises with no medicine in them
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # where words end: the tokenizer merges inside them, never across
TEMPLATE_FILE = "model_download/tiny_qwen3_tcm/chat_template.jinja"     # Qwen3's chat template, unchanged
OUTPUT_DIR = "model_download/tiny_qwen3_tcm"    # the model folder to write
VOCABULARY = 3072           # tokens: 256 bytes, Qwen3's special tokens, the rest merges of Chinese characters and words
WIDTH = 256                 # hidden size
LAYERS = 4                  # decoder layers
FEED_FORWARD = 704          # inner width of the MLP
EPOCHS = 5                  # passes over the statements; each fact is met about 16 times a pass
TOKENS_PER_STEP = 2048      # packed tokens a step
LEARNING_RATE = 2e-3        # peak; a model this small takes a rate about ten times that of a large one
WARMUP_STEPS = 100          # linear warm-up, then a cosine down to a tenth
WEIGHT_DECAY = 0.05         # small: the facts are to be remembered word for word
COPIES = 3000               # exercises in carrying an invented name from a question into its answer
NAMES = 600                 # invented names for those exercises
SEED = 0                    # fixes the initial weights, the exercises and the order
# ----
# fmt: on

MAKE_SAMPLE = "python data_prepare/sample/make_sample.py"
CHECK_OUT = "git checkout data_prepare/sample model_download/tiny_qwen3_tcm"


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(__file__, argv)
    settings.show()

    # 1. Read the statements, the terms, the exercises' patterns and Qwen3's chat template
    statements_file = require_file(settings.STATEMENTS_FILE, MAKE_SAMPLE)
    statements = [row["text"] for row in read_jsonl(statements_file, wanted=["text"])]
    terms = Terms(require_file(settings.TERMS_FILE, MAKE_SAMPLE))
    patterns = read_json(require_file(settings.EXERCISES_FILE, CHECK_OUT))["copy"]
    template = require_file(settings.TEMPLATE_FILE, CHECK_OUT).read_text(encoding="utf-8")
    prepare_folder(settings.OUTPUT_DIR)

    # 2. Make exercises about invented names
    quiet_offline(settings.OUTPUT_DIR)
    import torch

    from model_download import tiny_recipe
    from utils.model.batching import PackedRows
    from utils.model.chat_format import encode_turns

    rng = random.Random(settings.SEED)
    names = tiny_recipe.invent_names(settings.NAMES, terms, rng)
    conversations = list(tiny_recipe.copy_exercises(settings.COPIES, patterns, names, rng))

    # 3. Train the tokenizer and encode: a statement is trained from its first token (after <|endoftext|>) to its end
    spoken = [message["content"] for messages in conversations for message in messages]
    pieces = tiny_recipe.pieces(statements + spoken, terms)
    tokenizer = tiny_recipe.train_tokenizer(pieces, settings.VOCABULARY, template)
    stop = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = [([stop], ids + [stop]) for ids in tokenizer(statements)["input_ids"]]
    documents += [turn for messages in conversations for turn in encode_turns(tokenizer, messages)]
    rows = PackedRows([{"documents": [document]} for document in documents], settings.TOKENS_PER_STEP)
    print(
        f"{len(statements):,} statements, {len(conversations):,} exercises: {rows.tokens:,} tokens in {len(rows)} rows"
    )

    # 4. Train
    model = tiny_recipe.make_model(tokenizer, settings)
    print(f"{model.num_parameters():,} parameters, {settings.EPOCHS * len(rows):,} steps")
    log = []
    for entry in tiny_recipe.train(model, rows, settings):
        log.append(entry)
        step, steps = entry["step"], entry["steps"]
        if step % 50 == 0 or step == steps:
            left = entry["seconds"] / step * (steps - step) / 60
            print(f"step {step}/{steps}  loss {entry['loss']:.3f}  {left:.1f} min left", flush=True)

    # 5. Save: bfloat16 halves the size, and is what Qwen3-0.6B itself is stored in
    model.to(torch.bfloat16)
    write_folder(
        settings.OUTPUT_DIR, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder))
    )
    write_jsonl(settings.OUTPUT_DIR / "training_log.jsonl", log[::10])
    print(f"saved: {show_path(settings.OUTPUT_DIR)}")


if __name__ == "__main__":
    sys.exit(run(main))
