"""The loss scale of float16, and clipping that is folded into the optimizer's step."""

import pytest
import torch
from cuda_on_cpu import cuda_forms
from packed_items import load, some_items

from utils.device import Device
from utils.model.lm_head import HeadGradient, cross_entropy_sum
from utils.model.mixed import FoldedStep
from utils.model.packing import collate
from utils.model.qwen3_train import forward, prepare_packed

FLOAT = Device("cpu", False, "test")
HALF = Device("cpu", False, "test", fp16=True)


class Training:
    """SFT of the tiny model, all rows in every step; `weight`: of each token, so small that float16 would lose its gradient."""

    def __init__(self, folder, device, first=2.0**16, weight=1e-4):
        self.model = prepare_packed(load(folder, torch.float32)).train()
        self.batch = collate([some_items(30, seed=1)], device, 4096)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.device, self.weight, self.kept = device, weight, HeadGradient()
        self.folded = FoldedStep(self.optimizer, device)
        self.folded.scale.mul_(first / self.folded.scale if device.fp16 else 1.0)

    def step(self, max_norm=1.0):
        """(loss, norm of the gradients)"""
        factor = self.folded.scale.clone()
        hidden, batch = forward(self.model, self.batch, self.device)
        weights = (self.weight * factor).expand(len(batch["targets"]))
        with self.device.autocast():
            loss = cross_entropy_sum(hidden, self.model.lm_head.weight, batch["targets"], weights, self.kept)
        loss.backward()
        norm = self.folded.clip(max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (loss.detach() / factor).item(), norm.item()

    def weights(self):
        return torch.cat([weight.detach().flatten() for weight in self.model.parameters()])


def test_float16_learns_as_float32_does(folder):
    with cuda_forms():
        halves, floats = Training(folder, HALF), Training(folder, FLOAT)
        before, found = floats.weights(), [(halves.step(), floats.step()) for _ in range(5)]
    for (loss, norm), (true_loss, true_norm) in found:
        assert loss == pytest.approx(true_loss, rel=2e-3) and norm == pytest.approx(true_norm, rel=1e-2)
    moved = floats.weights() - before
    assert (halves.weights() - floats.weights()).norm() < 0.2 * moved.norm()
    assert found[-1][1][0] < 0.9 * found[0][1][0]


def test_without_a_scale_float16_loses_the_gradient(folder):
    """What the scale is for: weights of 1e-8 a token leave nothing of it."""
    with cuda_forms():
        with_scale, without = (Training(folder, HALF, first, 1e-8).step()[1] for first in (2.0**16, 1.0))
        true = Training(folder, FLOAT, weight=1e-8).step()[1]
    assert with_scale == pytest.approx(true, rel=0.02) and without < 0.8 * true


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(folder):
    with cuda_forms():
        training = Training(folder, HALF, first=2.0**40)
        before = training.weights()
        _, norm = training.step()
        assert not torch.isfinite(torch.tensor(norm)) and torch.equal(training.weights(), before)
        assert training.folded.scale == 2.0**39
        training.folded.scale.fill_(2.0**16)
        training.step()
    assert not torch.equal(training.weights(), before)


def test_clipping_is_that_of_torch(folder):
    """Of float32, where folding changes the last bits at most."""
    folded, plain = Training(folder, FLOAT, weight=1.0), Training(folder, FLOAT, weight=1.0)
    norm = folded.step(max_norm=0.1)[1]
    hidden, batch = forward(plain.model, plain.batch, FLOAT)
    cross_entropy_sum(hidden, plain.model.lm_head.weight, batch["targets"]).backward()
    found = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
    plain.optimizer.step()
    assert norm == pytest.approx(found.item(), rel=1e-5)
    torch.testing.assert_close(folded.weights(), plain.weights(), rtol=1e-4, atol=1e-6)
