"""A step on a CUDA GPU, counted without one: kernels that it launches, bytes that it moves, and that it never waits for the GPU.

The shape is Qwen3-0.6B's, the step 4,096 tokens in bfloat16, half of them trained. One and two layers are counted; 28 are as
many more as the second adds.
"""

import pytest
import torch
from cuda_on_cpu import LOSSES, batch_for, cuda_counts, qwen3, without_content
from torch._subclasses.fake_tensor import FakeTensor

from utils.model.generate import Decoding, choose
from utils.model.lm_head import HeadGradient
from utils.model.packing import model_inputs
from utils.model.qwen3_answer import CachedModel

LAYERS, TOKENS = 28, 4096


def count(method, layers):
    """(launches, bytes moved, hosts' waits) of a second step: the first makes what is kept."""
    batch = batch_for(method, TOKENS)
    model = qwen3(layers, method == "lora").train()
    with cuda_counts() as counts:
        weights, scale = without_content(model), torch.ones(())
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
        kept = HeadGradient() if method != "lora" else None
        with counts:
            for _ in range(2):
                counts.reset()
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = model(**model_inputs(batch))
                    head = model.get_output_embeddings().weight
                    loss = LOSSES[method](hidden, head, batch, scale, kept).loss
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
def test_a_step_on_cuda(method, launches, gigabytes):
    few, more = (count(method, layers) for layers in (1, 2))
    found, moved = (one + (LAYERS - 1) * (other - one) for one, other in zip(few[:2], more))
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
        model = qwen3(layers).eval()
        with cuda_counts() as counts, torch.no_grad():
            for weight in without_content(model):
                weight.data = weight.data.bfloat16()
            cached = CachedModel(model, torch.zeros(rows, dtype=torch.long) if rows > 1 else None)
            feed = CachedModel.feed.__wrapped__  # fake tensors know no inference mode
            feed(cached, torch.zeros(rows, 200, dtype=torch.long))
            with counts:
                logits = feed(cached, torch.zeros(rows, 1, dtype=torch.long))
                assert choose(logits, decoding, torch.Generator(), [[0]] * rows) == [0] * rows
        return counts.launches

    few, more = launches(1), launches(2)
    found = few + (LAYERS - 1) * (more - few)
    print(f"{rows} rows: {found} launches a token")
    assert found <= 700 and read == [8 * rows, 8 * rows]
