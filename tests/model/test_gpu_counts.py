"""A step on a CUDA GPU, counted without one: kernels that it launches, bytes that it moves, and that it never waits for the GPU.

The shape is Qwen3-0.6B's, the step 4,096 tokens in bfloat16, documents of 100 to 250 tokens with 40 % of them trained. Two and three
layers are counted; 28 are as many more as the third adds.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import cuda_counts
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from utils.device import Device
from utils.model.generate import Decoding, choose
from utils.model.lm_head import HeadGradient, backward_through_head, cross_entropy_sum
from utils.model.lora import add_lora
from utils.model.packing import collate, model_inputs
from utils.model.qwen3_answer import CachedModel
from utils.model.qwen3_train import prepare_packed

LAYERS, TOKENS = 28, 4096


def make_model(layers):
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def some_batch(answers=1):
    draw, items, tokens = random.Random(0), [], 0
    while tokens < TOKENS - 250 * answers:
        length = draw.randint(100, 250)
        trained = int(0.4 * length)
        items.append({"documents": [([0] * (length - trained), [0] * trained)] * answers})
        tokens += length + (answers - 1) * trained
    return collate([items], Device("cuda", True, ""))


def add_adapter(model):
    """As load_for_lora and add_lora make it. PEFT would move its weights, which fake tensors do not allow."""
    for module in model.requires_grad_(False).modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = module.weight.data.bfloat16()
    settings = SimpleNamespace(RANK=16, ALPHA=32, as_dict=lambda: {"MODEL": "base"})
    return add_lora(prepare_packed(model), settings)


def loss_of(method, hidden, head, batch, kept):
    if method != "dpo":
        weights = torch.full((len(batch["targets"]),), 1e-3)
        return cross_entropy_sum(hidden, head, batch["targets"], weights, kept)
    documents = torch.zeros(2 * len(batch["ids"]))

    def loss_of_logps(logps):
        chosen, rejected = documents.index_add(0, batch["label_documents"], logps).view(-1, 2).unbind(1)
        return -torch.nn.functional.logsigmoid(chosen - rejected).sum()

    return backward_through_head(hidden, head, batch["targets"], loss_of_logps, kept)


def count(method, layers, monkeypatch):
    """(launches, bytes moved, hosts' waits) of a second step: the first makes what is kept."""
    monkeypatch.setattr(
        "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer", lambda *_: None
    )
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    batch = some_batch(answers=2 if method == "dpo" else 1)
    with cuda_counts() as counts:
        model = make_model(layers)
        model = add_adapter(model) if method == "lora" else prepare_packed(model)
        weights = [weight for weight in model.train().parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
        kept = HeadGradient() if method != "lora" else None
        with counts:
            for _ in range(2):
                counts.reset()
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = model(**model_inputs(batch))
                    loss = loss_of(method, hidden, model.get_output_embeddings().weight, batch, kept)
                loss.backward()
                norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights], foreach=True)
                optimizer.grad_scale = norm.clamp(min=1.0)
                optimizer.found_inf = norm.isfinite().logical_not().float()
                optimizer.step()
                optimizer.zero_grad()
        return counts.launches, counts.traffic, counts.syncs


@pytest.mark.parametrize(
    "method, launches, gigabytes", [("sft", 1_900, 70), ("lora", 2_600, 60), ("dpo", 2_150, 80)]
)
def test_a_step_on_cuda(method, launches, gigabytes, monkeypatch):
    few, more = (count(method, layers, monkeypatch) for layers in (2, 3))
    found, moved = (one + (LAYERS - 2) * (other - one) for one, other in zip(few[:2], more))
    print(f"{method}: {found:,} launches, {moved / 1e9:.1f} GB")
    assert found <= launches and moved <= gigabytes * 1e9
    assert not few[2] and not more[2]


@pytest.mark.parametrize(
    "rows, decoding", [(1, Decoding()), (64, Decoding(do_sample=True, top_k=20, top_p=0.8))]
)
def test_a_token_of_an_answer_on_cuda(rows, decoding, monkeypatch):
    """At most 700 launches, and only the chosen ids come back to the host."""
    read = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: read.append(tensor.nbytes) or [0] * len(tensor))
    for name in ("cpu", "numpy", "item", "__bool__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, name=name: pytest.fail(f"{name} waits for the GPU")
        )

    def launches(layers):
        with cuda_counts() as counts, torch.no_grad():
            model = make_model(layers).eval()
            for weight in model.parameters():
                weight.data = weight.data.bfloat16()
            cached = CachedModel(model, torch.zeros(rows, dtype=torch.long) if rows > 1 else None)
            feed = CachedModel.feed_rows.__wrapped__  # fake tensors know no inference mode
            feed(cached, torch.zeros(rows, 200, dtype=torch.long))
            with counts:
                logits = feed(cached, torch.zeros(rows, 1, dtype=torch.long))
                assert choose(logits, decoding, torch.Generator(), [[0]] * rows, [[]] * rows) == [0] * rows
        return counts.launches

    few, more = launches(2), launches(3)
    found = few + (LAYERS - 2) * (more - few)
    print(f"{rows} rows: {found} launches a token")
    assert found <= 700 and read == [8 * rows, 8 * rows]
