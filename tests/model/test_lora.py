"""Our LoRA layers compute what peft's compute, each by itself and, on CUDA, those that take the same states together."""

import contextlib

import pytest
import torch
from cuda_on_cpu import cuda_forms
from peft import LoraConfig, get_peft_model
from torch import nn

from utils.model.lora import prepare_adapters
from utils.model.mixed import products, round_weights
from utils.model.qwen3_train import prepare_packed

OUT = {"q_proj": 40, "k_proj": 16, "v_proj": 16}


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        for name, width in OUT.items():
            setattr(self, name, nn.Linear(24, width, bias=False))


def results(ours, dtype=torch.float32, bf16=False, cuda=False, seed=0):
    """Outputs and all gradients, float64, of layers and states that are the same for the same seed."""
    torch.manual_seed(seed)
    plain, states = Projections().requires_grad_(False), torch.randn(1, 50, 24)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(OUT))
    model = get_peft_model(prepare_packed(plain) if ours else plain, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    model, states = (
        (prepare_adapters(model) if ours else model).to(dtype),
        states.to(torch.bfloat16 if cuda else dtype).requires_grad_(),
    )
    layers = [getattr(model.base_model.model, name) for name in OUT]
    with (
        cuda_forms() if cuda else contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        if cuda:
            round_weights(model, torch.bfloat16)
        outputs = products(states, *layers) if ours else [layer(states) for layer in layers]
        torch.autograd.backward(outputs, [torch.randn(part.shape).to(part.dtype) for part in outputs])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trained) == 6 and all(weight.grad.dtype == weight.dtype for weight in trained)
    assert not any(weight.grad is not None for weight in model.parameters() if not weight.requires_grad)
    return [part.detach().double() for part in (*outputs, states.grad, *(one.grad for one in trained))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients_equal_pefts(dtype, tolerance):
    for one, other in zip(results(True, dtype), results(False, dtype), strict=True):
        assert one.shape == other.shape and (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("cuda", [False, True])
def test_bf16_is_no_further_from_float64_than_pefts(cuda):
    """Over 20 draws: of one, either may be nearer by chance. States are rounded to bf16 on CUDA, as a norm gives them."""
    errors = torch.zeros(2, 10)
    for seed in range(20):
        exact = results(False, torch.float64, seed=seed)
        for mine, ours in zip(errors, (True, False)):
            found = results(ours, bf16=True, cuda=cuda and ours, seed=seed)
            mine += torch.tensor([(one - right).norm() / right.norm() for one, right in zip(found, exact)])
    assert (errors[0] <= 1.02 * errors[1]).all(), errors / 20
