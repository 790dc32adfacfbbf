"""Our LoRA layer computes what peft's computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from utils.model.lora import LoraLinear


def layers(dtype, seed):
    """An adapted layer of 24 -> 40 and states for it, the same for the same seed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=["0"])
    layer = next(
        part
        for part in get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=False)), config).modules()
        if isinstance(part, Linear)
    )
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer.to(dtype), torch.randn(1, 50, 24).to(dtype).requires_grad_()


def results(forward, dtype=torch.float32, bf16=False, seed=0):
    """Output and all gradients, float64."""
    layer, states = layers(dtype, seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = forward(layer, states)
    (output * torch.arange(40, dtype=output.dtype)).sum().backward()
    assert layer.base_layer.weight.grad is None
    found = output, states.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    return [tensor.detach().double() for tensor in found]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients_equal_pefts(dtype, tolerance):
    for one, other in zip(results(LoraLinear.forward, dtype), results(Linear.forward, dtype)):
        assert one.shape == other.shape and (one - other).norm() <= tolerance * other.norm()


def test_bf16_is_no_further_from_float64_than_pefts():
    """Over 20 draws: of one, either may be nearer by chance."""
    errors = torch.zeros(2, 4)
    for seed in range(20):
        exact = results(Linear.forward, torch.float64, seed=seed)
        for mine, forward in zip(errors, (LoraLinear.forward, Linear.forward)):
            found = results(forward, bf16=True, seed=seed)
            mine += torch.tensor([(one - right).norm() / right.norm() for one, right in zip(found, exact)])
    assert (errors[0] <= 1.02 * errors[1]).all(), errors / 20
