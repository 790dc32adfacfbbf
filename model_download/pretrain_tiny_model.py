"""Pre-train the built-in tiny base model from scratch, on the plain statements of the built-in sample.

    python model_download/pretrain_tiny_model.py

Reads statements.jsonl, exercises.json and terms.jsonl of data_prepare/sample/, makes model_download/tiny_qwen3_tcm/: Qwen3's
architecture and chat format at 3.7 M parameters, with a byte-level BPE tokenizer of its own. It reads every fact as a
statement, and of chat only how to carry a name from a question into an answer: what a question asks for is left to
fine-tuning. It stands in for Qwen3-0.6B in the demo and the tests, nowhere else.
"""

import math
import random
import sys
import time
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

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN_ADDED_TOKENS = [  # added like the special ones, but shown when text is decoded, as in Qwen3
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
WORD_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def pieces(texts, terms):
    """The texts cut at the borders of their terms, so that a word is the same token whatever stands beside it.

    A fact such as 温 then has one form in a statement (药性是|温) and in an answer (温), which is what lets the model carry it over.
    """
    for text in texts:
        end = 0
        for start, stop, term in terms.find(text):
            yield text[end:start]
            yield term
            end = stop
        yield text[end:]
    for word in ("system", "user", "assistant"):  # of the chat format: one token each
        yield from [word] * 1000


def train_tokenizer(texts, vocabulary, template):
    """A byte-level BPE tokenizer with Qwen3's way of splitting, special tokens and chat template."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORD_SPLIT), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS) - len(PLAIN_ADDED_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=4 * 3,  # at most four characters
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def invent_names(count, terms, rng):
    """`count` different names of 2 to 4 characters, put together from the characters of real terms, none of them a term."""
    characters, names = sorted(set("".join(terms.kinds))), set()
    while len(names) < count:
        name = "".join(rng.choices(characters, k=rng.choice([2, 3, 3, 4])))
        if name not in terms.kinds:
            names.add(name)
    return sorted(names)


def copy_exercises(count, patterns, names, rng):
    """`count` one-turn conversations about invented names; the answer carries the right one over from the question."""
    for _ in range(count):
        n, m = rng.sample(names, 2)
        question, answer = (text.format(n=n, m=m) for text in rng.choice(patterns))
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_model(tokenizer, settings):
    """A Qwen3ForCausalLM with random weights (tied embeddings, as in Qwen3-0.6B)."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from utils.model.chat_format import generation_settings

    torch.manual_seed(settings.SEED)
    end, stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.WIDTH,
            intermediate_size=settings.FEED_FORWARD,
            num_hidden_layers=settings.LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            rope_theta=10_000,
            tie_word_embeddings=True,
            bos_token_id=stop,
            eos_token_id=end,
        )
    )
    model.generation_config = GenerationConfig(**generation_settings(tokenizer, thinking=False))
    return model


def train(model, rows, settings):
    """AdamW over the packed rows, a cosine schedule; yields one log entry a step."""
    import torch

    from utils.model.lm_head import cross_entropy_sum
    from utils.model.packed_forward import prepare_packed
    from utils.model.packing import collate, model_inputs

    prepare_packed(model).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    steps, rng, began = settings.EPOCHS * len(rows), random.Random(settings.SEED), time.perf_counter()
    for step in range(steps):
        if step % len(rows) == 0:
            order = rng.sample(range(len(rows)), len(rows))
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.LEARNING_RATE * min(cosine, (step + 1) / settings.WARMUP_STEPS)
        batch = collate([rows[order[step % len(rows)]]])
        inputs, targets = model_inputs(batch), batch["targets"]
        loss = cross_entropy_sum(model(**inputs), model.lm_head.weight, targets) / len(targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        yield {
            "step": step + 1,
            "steps": steps,
            "epoch": step // len(rows) + 1,
            "loss": round(loss.item(), 4),
            "seconds": round(seconds, 1),
        }


def main(argv=None):
    settings = parse_settings(__file__, argv)
    settings.show()
    make_sample, check_out = (
        "python data_prepare/sample/make_sample.py",
        "git checkout data_prepare/sample model_download/tiny_qwen3_tcm",
    )
    statements = [
        row["text"]
        for row in read_jsonl(require_file(settings.STATEMENTS_FILE, make_sample), wanted=["text"])
    ]
    terms = Terms(require_file(settings.TERMS_FILE, make_sample))
    exercises = read_json(require_file(settings.EXERCISES_FILE, check_out))
    template = require_file(settings.TEMPLATE_FILE, check_out).read_text(encoding="utf-8")
    prepare_folder(settings.OUTPUT_DIR)

    # 1. Put the texts together: the statements, and exercises about invented names
    quiet_offline(settings.OUTPUT_DIR)
    from utils.model.chat_format import encode_turns
    from utils.model.packing import PackedRows

    rng = random.Random(settings.SEED)
    names = invent_names(settings.NAMES, terms, rng)
    conversations = list(copy_exercises(settings.COPIES, exercises["copy"], names, rng))

    # 2. Train the tokenizer and encode: a statement is trained from its first token (after <|endoftext|>) to its end
    spoken = [message["content"] for messages in conversations for message in messages]
    tokenizer = train_tokenizer(pieces(statements + spoken, terms), settings.VOCABULARY, template)
    stop = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = [([stop], ids + [stop]) for ids in tokenizer(statements)["input_ids"]]
    documents += [turn for messages in conversations for turn in encode_turns(tokenizer, messages)]
    rows = PackedRows([{"documents": [document]} for document in documents], settings.TOKENS_PER_STEP)
    print(
        f"{len(statements):,} statements, {len(conversations):,} exercises: {rows.tokens:,} tokens in {len(rows)} rows"
    )

    # 3. Train
    model = make_model(tokenizer, settings)
    print(f"{model.num_parameters():,} parameters, {settings.EPOCHS * len(rows):,} steps")
    log = []
    for entry in train(model, rows, settings):
        log.append(entry)
        if entry["step"] % 50 == 0 or entry["step"] == entry["steps"]:
            left = entry["seconds"] / entry["step"] * (entry["steps"] - entry["step"]) / 60
            print(
                f"step {entry['step']}/{entry['steps']}  loss {entry['loss']:.3f}  {left:.1f} min left",
                flush=True,
            )

    # 4. Save: bfloat16 halves the size, and is what Qwen3-0.6B itself is stored in
    import torch

    model.to(torch.bfloat16)
    write_folder(
        settings.OUTPUT_DIR, lambda place: (model.save_pretrained(place), tokenizer.save_pretrained(place))
    )
    write_jsonl(settings.OUTPUT_DIR / "training_log.jsonl", log[::10])
    print(f"saved: {show_path(settings.OUTPUT_DIR)}")


if __name__ == "__main__":
    sys.exit(run(main))
