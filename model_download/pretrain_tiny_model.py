"""Pre-train the built-in tiny base model from scratch, on the plain statements of the built-in sample.

    python model_download/pretrain_tiny_model.py

Reads statements.jsonl, terms.jsonl, world.json, exercises.json and talk.json of data_prepare/sample/, makes
model_download/tiny_qwen3_tcm/: Qwen3's architecture and chat format at 5.2 M parameters, with a byte-level BPE tokenizer of its own.
Of medicine it reads every fact as a statement, and no question. What a question is it learns in an invented world, whose wordings
are close to those of the sample: statements, questions about part of them, and how to carry a name that it never met from a question
into an answer. Half of the questions stand in conversations about other things. It learns to greet, too, and to say what it cannot
do. It stands in for Qwen3-0.6B in the demo and the tests, nowhere else.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `utils` is found from any folder

from data_prepare.sample.entities import Entity, Wordings
from data_prepare.sample.invented import Names, copy_exercises, invent_world
from data_prepare.sample.talk import LINES, TURNS, join, one_turn, small_talk
from data_prepare.sample.texts import rows_of, statements_of
from utils.data.pairs import Terms
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
from utils.model.folder import quiet_offline
from utils.settings import read_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--epochs 10) ----
STATEMENTS_FILE = "data_prepare/sample/statements.jsonl"    # what it reads: {"text"} a line
WORLD_FILE = "data_prepare/sample/world.json"       # the invented world: what there is to know, and how it is asked and stated
EXERCISES_FILE = "data_prepare/sample/exercises.json"    # copying exercises with no medicine in them
TALK_FILE = "data_prepare/sample/talk.json"         # greetings, and what it says that it cannot do
TERMS_FILE = "data_prepare/sample/terms.jsonl"      # where words end: the tokenizer merges inside them, never across
TEMPLATE_FILE = "model_download/tiny_qwen3_tcm/chat_template.jinja"     # Qwen3's chat template, unchanged
OUTPUT_DIR = "model_download/tiny_qwen3_tcm"    # the model folder to write
VOCABULARY = 3136           # [1, 2, ...] tokens: 256 bytes, Qwen3's special tokens, the rest merges of Chinese characters and words
WIDTH = 256                 # [1, 2, ...] hidden size
LAYERS = 6                  # [1, 2, ...] decoder layers
FEED_FORWARD = 704          # [1, 2, ...] inner width of the MLP
EPOCHS = 5                  # [1, 2, ...] passes over the statements; each fact is met about 16 times a pass
TOKENS_PER_STEP = 2048      # [1, 2, ...] packed tokens per step
LEARNING_RATE = 2e-3        # [> 0, at most 0.1] peak; a model this small takes a rate about ten times that of a large one
WARMUP_STEPS = 100          # [0, 1, ...] linear warm-up, then a cosine down to zero
WEIGHT_DECAY = 0.05         # [0 or more] small: the facts are to be remembered word for word
INVENTED = 300              # [1, 2, ...] people, tools, places, kinds of weather and guests of the invented world
ASKED_SHARE = 0.7           # [0 to 1] share of them that questions ask about; the others are only stated
CARDS = 3                   # [1, 2, ...] statements that put all facts of one of them in one line, each in a new order
COPIES = 5000               # [0, 1, ...] exercises a pass in carrying a name from a question into its answer; names are new every time
GREETINGS = 4               # [0, 1, ...] times a pass that it meets each greeting
REFUSALS = 300              # [0, 1, ...] questions a pass that it cannot answer, and a third as many that a physician has to answer
JOINED = 0.5                # [0 to 1] share of all questions that stand in conversations, and of statements that follow others
SEED = 0                    # [0, 1, ...] fixes the initial weights, the invented world, the exercises and the order
PRECISION = "auto"          # [auto | bf16 | fp32] auto: bf16 where the processor computes in it
# ----
# fmt: on

MAKE_SAMPLE = "python data_prepare/sample/make_sample.py"
CHECK_OUT = "git checkout data_prepare/sample model_download/tiny_qwen3_tcm"


def main(argv: list[str] | None = None) -> None:
    settings = read_settings(globals(), argv)
    settings.show()

    # 1. Read the statements, the terms, the invented world's wordings, the exercises' patterns, the small talk and Qwen3's template
    statements_file = require_file(settings.STATEMENTS_FILE, MAKE_SAMPLE)
    statements = [row["text"] for row in read_jsonl(statements_file, wanted=["text"])]
    terms = Terms(require_file(settings.TERMS_FILE, MAKE_SAMPLE))
    world = read_json(require_file(settings.WORLD_FILE, CHECK_OUT))
    patterns = read_json(require_file(settings.EXERCISES_FILE, CHECK_OUT))["copy"]
    talk = read_json(require_file(settings.TALK_FILE, CHECK_OUT))
    template = require_file(settings.TEMPLATE_FILE, CHECK_OUT).read_text(encoding="utf-8")
    prepare_folder(settings.OUTPUT_DIR)

    # 2. Invent a world: statements about all of it, questions about a part; and new copying exercises and small talk for every pass
    quiet_offline()
    import torch

    from model_download import tiny_recipe
    from utils.device import hold_memory, pick_device
    from utils.model.chat_format import encode_turns
    from utils.model.packing import PackedRows

    names = Names(terms, random.Random(settings.SEED))
    invented = invent_world(world, settings.INVENTED, settings.ASKED_SHARE, names)
    for entity in invented:
        statements += statements_of(entity, world, settings.CARDS, names.rng)
    questions = [messages for turn, entity in enumerate(invented) for messages in asked(entity, world, turn)]
    exercises = [
        [
            *copy_exercises(settings.COPIES, patterns, names),
            *small_talk(talk, settings.GREETINGS, settings.REFUSALS, names.rng),
        ]
        for _ in range(settings.EPOCHS)
    ]

    # 3. Train the tokenizer and encode: a text is trained from its first token (after <|endoftext|>) to its end,
    #    of a conversation every answer, in sight of what was said before
    spoken = [message["content"] for messages in questions + exercises[0] for message in messages]
    pieces = tiny_recipe.pieces(statements + spoken, terms)
    tokenizer = tiny_recipe.train_tokenizer(pieces, settings.VOCABULARY, template)
    stop = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    passes = []
    for new in exercises:
        texts = ["\n".join(lines) for lines in join(statements, settings.JOINED, LINES, names.rng)]
        documents = [([stop], ids + [stop]) for ids in tokenizer(texts)["input_ids"]]
        conversations = [sum(parts, []) for parts in join(questions + new, settings.JOINED, TURNS, names.rng)]
        turns = [turn for messages in conversations for turn in encode_turns(tokenizer, messages)]
        items = [{"documents": [document]} for document in documents + turns]
        passes.append(PackedRows(items, settings.TOKENS_PER_STEP))
    print(
        f"a pass: {len(statements):,} statements, {len(questions):,} invented questions, {len(exercises[0]):,} exercises, "
        f"{passes[0].tokens:,} tokens in {len(passes[0])} rows"
    )

    # 4. Train
    device = pick_device("cpu", settings.PRECISION)
    hold_memory()
    model = tiny_recipe.make_model(tokenizer, settings)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, passes)):,} steps on {device}", flush=True)
    log = []
    for entry in tiny_recipe.train(model, passes, settings, device):
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


def asked(entity: Entity, world: Wordings, turn: int) -> Iterator[list[dict]]:
    """Conversations of one question and its answer: for each fact one bare answer and two sentences; none if it is held out."""
    for row in rows_of(entity, world, 3, turn) if not entity.held_out else ():
        question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        yield one_turn(question, row["output"])


if __name__ == "__main__":
    sys.exit(run(main))
