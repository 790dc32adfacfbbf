"""What the tiny base model is made of: its tokenizer, its shape and its training loop."""

import math
import random
import re
import time
from collections.abc import Iterable, Iterator
from typing import TypedDict

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data_prepare.sample.entities import TABLES
from utils.data.pairs import Terms
from utils.device import Device
from utils.model.chat_format import generation_settings
from utils.model.lm_head import cross_entropy_sum
from utils.model.packing import PackedRows, collate
from utils.model.qwen3_train import forward, prepare_packed
from utils.settings import Settings

# ---- Tokenizer

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
PARTICLES = re.compile("[的是穴]")  # stand beside names, and are never part of a token with others
WORD_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def pieces(texts: list[str], terms: Terms) -> Iterator[str]:
    """The texts cut at the borders of their terms and around 的, 是 and 穴: no token reaches across such a border.

    A fact such as 大寒 then has one form in a statement (药性是|大寒), a question and an answer (大寒), which is what lets the model
    carry it over. Names are cut into their characters: each name is a row of characters, as those of the copying exercises are,
    and none a token that only its own statements use.
    """
    for text in texts:
        end = 0
        for start, stop, term in terms.find(text):
            yield from PARTICLES.split(text[end:start])
            yield from term if is_name(terms, term) else [term]
            end = stop
        yield from PARTICLES.split(text[end:])
    for word in ("system", "user", "assistant", *sorted(set("".join(texts)))):
        yield from [word] * 1000  # one token each: the words of the chat format, and every character


def is_name(terms: Terms, term: str) -> bool:
    """Whether a herb, formula, acupoint or syndrome is called so."""
    return any(kind in TABLES for kind in terms.kinds[term])


def train_tokenizer(texts: Iterable[str], vocabulary: int, template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen3's way of splitting, special tokens and chat template."""
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


# ---- Model and training


def make_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Qwen3ForCausalLM:
    """A Qwen3ForCausalLM with random weights (tied embeddings, as in Qwen3-0.6B)."""
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
    # Greedy: drawing at Qwen's temperature, a model this small says something wrong more often.
    decoding = generation_settings(tokenizer, thinking=False)
    ends = {name: value for name, value in decoding.items() if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(**ends, do_sample=False)
    return model


class LogEntry(TypedDict):
    """One step; seconds since the first began."""

    step: int
    steps: int
    epoch: int
    loss: float
    seconds: float


def train(
    model: Qwen3ForCausalLM, passes: list[PackedRows], settings: Settings, device: Device
) -> Iterator[LogEntry]:
    """Train on each pass's packed rows, one a step, in a random order; yields after every step."""
    prepare_packed(model).train()
    optimizer = make_optimizer(model, settings)
    steps, step, began = sum(map(len, passes)), 0, time.perf_counter()
    rng = random.Random(settings.SEED)
    for epoch, rows in enumerate(passes, 1):
        for number in rng.sample(range(len(rows)), len(rows)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings)
            batch = collate([rows[number]], device, settings.TOKENS_PER_STEP)
            hidden, batch = forward(model, batch, device)
            targets = batch["targets"]
            with device.autocast():
                loss = cross_entropy_sum(hidden, model.lm_head.weight, targets) / len(targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            seconds = round(time.perf_counter() - began, 1)
            yield LogEntry(step=step, steps=steps, epoch=epoch, loss=round(loss.item(), 4), seconds=seconds)


def make_optimizer(model: Qwen3ForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on the weights of the norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to zero. `step` counts from 0."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return settings.LEARNING_RATE * min(cosine, (step + 1) / settings.WARMUP_STEPS)
