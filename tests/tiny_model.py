"""A tiny Qwen3 for tests, built in the process: the real architecture, special tokens and chat template, random weights.

folder = make_tiny_model(tmp_path / "model")      # about 0.2 s, 500 kB, loads like any model folder
"""

from pathlib import Path

from utils.model.chat_format import generation_settings

TEMPLATE = Path(__file__).resolve().parents[1] / "model_download/tiny_qwen3_tcm/chat_template.jinja"

# In the order of Qwen3's own added tokens; the last two groups are not "special", so that decoding keeps them.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

# What the merges are learned from: common characters become one token, rare ones stay split into their bytes.
SENTENCES = [
    "麻黄汤由麻黄、桂枝、杏仁、甘草组成。功效：发汗解表，宣肺平喘。",
    "四君子汤由人参、白术、茯苓、甘草组成。功效：益气健脾。",
    "甘草与甘遂相反，属于十八反。",
    "合谷是手阳明大肠经的穴位。",
    "黄芪味甘，性微温，归脾、肺经。功效：补气升阳，固表止汗。",
    "system user assistant\n\n",
    "What is this? You are a helpful assistant.",
]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tiny_tokenizer(folder):
    """Save a byte-level BPE tokenizer of about 400 tokens with Qwen3's own chat template in `folder`; return the tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_tiny_model(folder, seed=0):
    """Save a random Qwen3 (2 layers, width 64, head_dim 16) with its tokenizer as safetensors in `folder`; return `folder`."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tiny_tokenizer(folder)
    # as Qwen3-0.6B: thinking is the template's default
    settings = generation_settings(tokenizer, thinking=True)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_theta=1_000_000,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=settings["bos_token_id"],
        eos_token_id=settings["eos_token_id"][0],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**settings)
    model.save_pretrained(folder)
    return folder
