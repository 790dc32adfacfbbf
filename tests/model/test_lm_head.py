"""The chunked loss over the LM head: value and gradients against the plain computation, in float64 and in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from packed_items import load, some_items

from utils.model import lm_head
from utils.model.lm_head import HeadGradient, cross_entropy_sum
from utils.model.packing import collate, model_inputs
from utils.model.qwen3_train import prepare_packed

pytestmark = pytest.mark.usefixtures("norms_in_float64")


def test_loss_and_gradients_equal_the_plain_computation(folder, monkeypatch):
    monkeypatch.setattr(lm_head, "CHUNK", 7)
    items = some_items(20, seed=1)
    packed, plain = prepare_packed(load(folder, torch.float64)), load(folder, torch.float64)
    batch = collate([items])
    inputs, targets = model_inputs(batch), batch["targets"]
    (cross_entropy_sum(packed(**inputs), packed.lm_head.weight, targets) / len(targets)).backward()
    logits, answers = [], []
    for prompt, answer in (document for item in items for document in item["documents"]):
        logits.append(plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
        answers += answer
    F.cross_entropy(torch.cat(logits), torch.tensor(answers)).backward()
    for (name, one), other in zip(packed.named_parameters(), plain.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12), name


def test_gradients_added_to_grad_at_once_are_those_of_autograd(folder):
    """Two batches, loss over the head and embedding of the same weight, in float64; scaling the loss afterwards is an error."""
    direct, plain = (prepare_packed(load(folder, torch.float64)) for _ in range(2))
    batches = [collate([some_items(8, seed=seed)]) for seed in (1, 2)]
    for model, kept in ((direct, HeadGradient()), (plain, None)):
        for batch in batches:
            weights = torch.full((len(batch["targets"]),), 0.125)
            hidden = model(**model_inputs(batch))
            cross_entropy_sum(hidden, model.lm_head.weight, batch["targets"], weights, kept).backward()
    for (name, one), other in zip(direct.named_parameters(), plain.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-12), name
    before = direct.lm_head.weight.grad.clone()
    with torch.no_grad():  # an evaluation leaves no gradient behind
        hidden = direct(**model_inputs(batches[0]))
        cross_entropy_sum(hidden, direct.lm_head.weight, batches[0]["targets"], None, HeadGradient())
    assert torch.equal(direct.lm_head.weight.grad, before)
    hidden = direct(**model_inputs(batches[0]))
    loss = cross_entropy_sum(hidden, direct.lm_head.weight, batches[0]["targets"], None, HeadGradient())
    with pytest.raises(RuntimeError, match="scaled after its gradient had been added up"):
        (2 * loss).backward()


def test_weighted_loss_gradients_by_finite_rules():
    """Against autograd on the full logits, in float64, with a weight for each token."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    targets, scale = torch.randint(17, (11,)), torch.randn(11, dtype=torch.float64)
    results = []
    for compute in (
        lambda h, w: cross_entropy_sum(h, w, targets, scale),
        lambda h, w: (scale * F.cross_entropy(h @ w.T, targets, reduction="none")).sum(),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = compute(h, w)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-12)


def test_the_head_s_gradient_keeps_its_memory_and_nothing_else():
    """From step to step the block is the same, and what a step left in it is gone."""
    weight, kept = torch.nn.Parameter(torch.randn(50, 4)), HeadGradient()
    hidden, targets = torch.randn(6, 4), torch.arange(6)
    places, gradients = set(), []
    for _ in range(3):
        weight.grad = None  # as Trainer does after a step
        cross_entropy_sum(hidden, weight, targets, None, kept).backward()
        places.add(weight.grad.data_ptr())
        gradients.append(weight.grad.clone())
    assert len(places) == 1 and all(torch.equal(gradients[0], other) for other in gradients)
