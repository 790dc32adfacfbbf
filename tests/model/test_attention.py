"""The three forms of attention over a packed row agree: by document, by torch's varlen kernel, by one mask over equal rows."""

import functools
import math

import pytest
import torch
from cuda_on_cpu import varlen_as_documented
from packed_items import load, some_items

from utils.device import Device
from utils.model import attention, mixed
from utils.model.attention import PlainAttention, by_document, by_mask, by_varlen, fused_attend
from utils.model.lm_head import CHUNK, cross_entropy_sum, token_logps
from utils.model.packing import collate, model_inputs
from utils.model.qwen3_train import prepare_packed

HEADS, KV_HEADS, WIDTH = 4, 2, 16
CPU = torch.device("cpu")
EQUAL = Device("mps", False, "", equal_rows=True)


def plain_attend(*given, dtype=torch.bfloat16):
    return PlainAttention.apply(*given, dtype)


def states_for(tokens, dtype=torch.float64):
    torch.manual_seed(tokens)
    return [torch.randn(1, heads, tokens, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def items(shared):
    """Documents of one item each, or three answers to one prompt."""
    found = some_items(14, seed=3, documents=3 if shared else 1)
    for item in found:
        item["documents"] = [(item["documents"][0][0], answer) for _, answer in item["documents"]]
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_one_mask_and_the_varlen_kernel_give_what_each_document_gives(shared, monkeypatch):
    found = items(shared)
    batch = collate([found[:5], found[5:9], found[9:]], EQUAL, 600)
    layout, states = batch["layout"], states_for(1800)
    assert batch["input_ids"].shape == (1, 1800) and sum(map(sum, layout)) == 1800
    masks = attention.row_masks(layout, 600, CPU)
    # A row that sees nothing is NaN on some devices.
    assert masks.shape == (3, 1, 600, 600) and masks.any(dim=-1).all()
    one, other = by_mask(*states, 0.25, masks), by_document(*states, 0.25, layout, {})
    assert one.shape == (1, 1800, HEADS, WIDTH) and torch.allclose(one, other, atol=1e-12)

    monkeypatch.setattr(attention, "varlen_attn", varlen_as_documented)
    key_index, sequences = attention.varlen_sequences(layout, CPU)
    assert (key_index is not None) == shared
    one = by_varlen(*states, 0.25, key_index, sequences)
    assert one.dtype == torch.bfloat16 and torch.allclose(one.double(), other, atol=0.03)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "block, dtype, atol", [(7, torch.float64, 1e-12), (256, torch.float32, 2e-5), (7, torch.bfloat16, None)]
)
def test_plain_products_give_what_the_fused_kernel_gives(shared, block, dtype, atol, monkeypatch):
    """Results and gradients, for documents shorter and longer than a block. In bfloat16 both are compared with float64: plain
    products round the scores, and may be twice as far from it."""
    monkeypatch.setattr(attention, "BLOCK", block)
    layout = collate([items(shared)])["layout"]
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    given = states_for(sum(map(sum, layout)), exact)
    upstream = torch.randn(1, given[0].shape[2], HEADS, WIDTH, dtype=exact)

    def computed(attend, dtype):
        states = [states.to(dtype).requires_grad_() for states in given]
        result = by_document(*states, 0.25, layout, {}, attend)
        return [result, *torch.autograd.grad(result, states, upstream.to(result.dtype))]

    plain = computed(functools.partial(plain_attend, dtype=dtype), exact)
    fused, true = computed(fused_attend, dtype), computed(fused_attend, torch.float64)
    assert [found.dtype for found in plain] == [dtype, exact, exact, exact]
    for one, other, right in zip(plain, fused, true):
        if atol:
            assert torch.allclose(one, other, atol=atol)
        else:
            assert (one - right).norm() < 2 * (other - right).norm() < 0.03 * right.norm()


def test_plain_products_keep_nothing_that_grows_with_the_square():
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.untyped_storage().data_ptr(): tensor.nbytes}), lambda none: none
    ):
        states = [part.requires_grad_() for part in states_for(700, torch.float32)]
        by_document(*states, 0.25, [(0, 600), (0, 100)], {}, plain_attend)
    assert 0 < sum(kept.values()) <= 700 * (HEADS + 2 * KV_HEADS) * WIDTH * 2


def test_few_products_are_made_in_float32_under_autocast_too():
    """Results and gradients are those of float32, and from the next token on those of plain products in bfloat16."""
    fitting = math.isqrt(attention.FEW // (HEADS * WIDTH))
    for length, same in ((fitting, fused_attend), (fitting + 1, plain_attend)):
        found = []
        for attend in (attention.attend_in_bfloat16, same):
            states = [part.requires_grad_() for part in states_for(length, torch.float32)]
            with torch.autocast("cpu", torch.bfloat16, enabled=attend is attention.attend_in_bfloat16):
                result = attend(*states, 0.25, {})
            upstream = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype)
            found.append([result, *torch.autograd.grad(result, states, upstream)])
        for one, other in zip(*found):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_form_follows_device_and_format():
    layout = [(0, 5), (3, 2, 2)]
    for dtype, attend in ((torch.float32, fused_attend), (torch.bfloat16, attention.attend_in_bfloat16)):
        planned = attention.plan_attention(layout, 0, torch.empty(0), dtype)
        assert planned.func is by_document and planned.keywords["attend"] is attend
    assert attention.plan_attention(layout, 12, torch.empty(0), torch.float32).func is by_mask


def test_padding_changes_no_loss_and_no_gradient(folder, monkeypatch):
    """Padded rows, rounded lengths, and labels filled up to a few fixed counts, as Apple GPUs get them."""
    found, results = items(True), []
    for device, fixed in ((None, ()), (EQUAL, ("cpu",)), (Device("cuda", True, ""), ())):
        monkeypatch.setattr(mixed, "FIXED_SIZES", fixed)
        model = prepare_packed(load(folder, torch.float64))
        batch = collate([found[:7], found[7:]], device, 500)
        hidden, targets = model(**model_inputs(batch)), batch["targets"]
        assert len(hidden) == (math.ceil(len(targets) / CHUNK) * CHUNK if fixed else len(targets))
        assert len(token_logps(hidden, model.lm_head.weight, targets)) == len(targets)
        loss = cross_entropy_sum(hidden, model.lm_head.weight, targets)
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    for found in zip(*results):
        assert all(torch.allclose(one, found[0], rtol=1e-9, atol=1e-12) for one in found)
