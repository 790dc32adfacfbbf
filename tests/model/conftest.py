"""A tiny model, and plain transformers as a reference that is exact in float64."""

import pytest
import torch
from tiny_model import make_tiny_model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def norms_in_float64(monkeypatch):
    """transformers' norm rounds to float32 whatever it gets. A reference in float64 must not."""

    def forward(norm, states):
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * exact.to(states.dtype)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)
