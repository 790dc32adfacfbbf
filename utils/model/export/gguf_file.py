"""Export as GGUF, the one-file format of llama.cpp, Ollama and LM Studio, and the Modelfile that Ollama wants beside it.

Names and metadata follow the architecture "qwen3" of llama.cpp's package `gguf` (gguf-py/gguf/constants.py in ggml-org/llama.cpp).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from utils.errors import RunError, UserError
from utils.files import read_json, render, show_path
from utils.model.chat_format import DECODING, END_OF_TURN
from utils.model.export.folders import Export, build_model
from utils.model.folder import adapter_base, is_adapter
from utils.model.generate import stop_tokens

try:
    import gguf
except ImportError:  # it is optional
    gguf = None

GGUF_PACKAGE = "gguf==0.19.0"
MODELFILE = Path(__file__).with_name("Modelfile.jinja")

# How Qwen splits a text into words before its merges apply. llama.cpp has this under the name "qwen2", and knows no other
# pattern of a file: a tokenizer that splits otherwise would get other tokens there, without a word.
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class GgufExport(Export):
    """A GGUF file and a Modelfile for Ollama."""

    precisions = ("q8_0", "f16", "bf16")

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.precision}.gguf"

    def check(self) -> None:
        """UserError if the package is missing, or the file does not hold, or llama.cpp does not do, what is in the folder."""
        if gguf is None:
            raise UserError(f"--format gguf needs llama.cpp's package: pip install {GGUF_PACKAGE}")
        above = Path(adapter_base(self.folder)) if is_adapter(self.folder) else self.folder
        config, tokenizer = read_json(above / "config.json"), read_json(self.folder / "tokenizer.json")
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        steps = tokenizer["pre_tokenizer"].get("pretokenizers", [])
        split = [step["pattern"].get("Regex") for step in steps if "pattern" in step]
        lost = {
            f"RoPE scaling ({scaling})": scaling != "default",
            "another activation than silu (hidden_act)": config.get("hidden_act", "silu") != "silu",
            "a tokenizer that splits words otherwise than Qwen2's": split != [QWEN2_SPLIT],
        }
        for token in tokenizer.get("added_tokens", []):  # llama.cpp matches tokens as they are
            flags = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
            lost[f"an added token {token['content']!r} with {', '.join(flags)}"] = flags
        for words, there in lost.items():
            if there:
                raise UserError(f"{show_path(self.folder)} has {words}, which --format gguf does not write")

    def save(self, partial: Path) -> None:
        """The GGUF file and a Modelfile."""
        kind, config, tokenizer = self.precision.upper(), self.model.config, self.tokenizer
        writer = gguf.GGUFWriter(partial / self.file_name, "qwen3")
        writer.add_name(self.name)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        tokens, kinds, merges = _vocabulary(tokenizer, config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(END_OF_TURN))
        writer.add_pad_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        writer.add_add_bos_token(False)
        writer.add_chat_template(tokenizer.chat_template)
        _add_weights(writer, self.model, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (partial / "Modelfile").write_text(self._modelfile(), encoding="utf-8", newline="\n")

    def _modelfile(self):
        """Ollama's Modelfile, whose template, in Go's language, takes the place of the one in the GGUF file: it ends in the prompt
        of the trained mode; stops and decoding as in generation_config."""
        if '"""' in self.system:
            raise UserError('the system text of training holds """, which ends a text in a Modelfile')
        greedy, names = self.model.generation_config.do_sample is False, ("temperature", "top_p", "top_k")
        decoding = {"temperature": 0} if greedy else DECODING[self.thinking]
        return render(
            MODELFILE,
            file=self.file_name,
            system=self.system,
            thinking=self.thinking,
            stops=map(self.tokenizer.decode, sorted(stop_tokens(self.model, self.tokenizer))),
            sampling=[(name, decoding[name]) for name in names if name in decoding],
        )

    def read(self) -> tuple[Any, Any]:
        """(tokenizer, model in float32) of the file, made of its own fields and tensors alone, as llama.cpp makes them."""
        reader = gguf.GGUFReader(self.place / self.file_name)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = {
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "max_position_embeddings": fields["qwen3.context_length"],
            "hidden_size": fields["qwen3.embedding_length"],
            "num_hidden_layers": fields["qwen3.block_count"],
            "intermediate_size": fields["qwen3.feed_forward_length"],
            "num_attention_heads": fields["qwen3.attention.head_count"],
            "num_key_value_heads": fields["qwen3.attention.head_count_kv"],
            "head_dim": fields["qwen3.attention.key_length"],
            "rms_norm_eps": fields["qwen3.attention.layer_norm_rms_epsilon"],
            "rope_parameters": {"rope_type": "default", "rope_theta": fields["qwen3.rope.freq_base"]},
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])

        def load(found):
            return torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type), np.float32))

        def rename(name):
            return names.get_name(name, try_suffixes=(".weight",))

        return _tokenizer_of(fields), build_model(config, tensors, load, rename)

    def commands(self, place: str) -> list[str]:
        """How the export is used from where it lies at `place`."""
        file = f"{place}/{self.file_name}"
        return [
            f"Ollama: `ollama create {self.name} -f {place}/Modelfile && ollama run {self.name}`",
            f"llama.cpp: `llama-server --jinja -m {file}`, or `llama-cli --jinja -m {file}`",
            f"LM Studio: `lms import {file}`",
        ]


def _vocabulary(tokenizer, size):
    """(tokens, their types, merges) as GGUF wants them, padded to the `size` of the embedding."""
    tokens, kinds, added = [], [], tokenizer.added_tokens_decoder
    for number in range(size):
        token = added[number].content if number in added else tokenizer.convert_ids_to_tokens(number)
        kind = gguf.TokenType.NORMAL
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        elif token is None:  # the weights have more rows than the tokenizer has tokens
            token, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        tokens.append(token)
        kinds.append(kind)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return tokens, kinds, [" ".join(pair) for pair in merges]


def _add_weights(writer, model, kind):
    """Matrices in the format `kind`, vectors in float32. Tied embeddings are written once, as llama.cpp expects them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_hidden_layers)
    for name, weight in model.named_parameters():  # names a tied weight once
        values = weight.detach().to(torch.float32).numpy()
        form = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(values, form), raw_dtype=form)


def _tokenizer_of(fields):
    """A tokenizer from the fields of a GGUF file alone: byte-level BPE after Qwen2's split into words."""
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "qwen2"):
        raise RunError("the GGUF file names another kind of tokenizer than Qwen's")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    end = tokens[fields["tokenizer.ggml.eos_token_id"]]
    if end != END_OF_TURN or fields["tokenizer.ggml.add_bos_token"]:
        raise RunError(f"the GGUF file names another end token than {END_OF_TURN}, or adds one at the start")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    words = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([words, bytes_]), decoders.ByteLevel()
    for kind, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        added = [token for token, its_kind in zip(tokens, kinds) if its_kind == kind]
        bpe.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    template = fields["tokenizer.chat_template"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, chat_template=template)
