"""Training on a CUDA GPU in bfloat16 or float16: products in that format, weights and their gradients in float32.

torch's autocast does the same with about 1,000 casts a step. Here every weight is rounded once a pass, by one call for all of them,
a norm gives its result in the format of the products that take it, and the gradient of a weight is summed up in float32 by the
product itself. Elsewhere than on CUDA nothing here is used. tests/model/test_gpu_counts.py counts the launches and the traffic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.device import Device

DEVICES = ("cuda",)
FIXED_SIZES = ("mps",)  # devices that keep memory and a graph for every shape they have seen
REDUCED = (torch.bfloat16, torch.float16)


def on_cuda(tensor: Tensor) -> bool:
    """True if the forms for CUDA compute with `tensor`."""
    return tensor.device.type in DEVICES


def on_gpu(tensor: Tensor) -> bool:
    """True if `tensor` is on a GPU, of NVIDIA's or Apple's: what the host reads of it is waited for."""
    return on_cuda(tensor) or tensor.device.type == "mps"


def reduced_dtype(tensor: Tensor) -> torch.dtype | None:
    """The format of products with `tensor` here and now, if it is one that this module computes; else None."""
    if not (on_cuda(tensor) and torch.is_autocast_enabled(tensor.device.type)):
        return None
    dtype = torch.get_autocast_dtype(tensor.device.type)
    return dtype if dtype in REDUCED else None


class Linear(nn.Linear):
    """A linear layer without bias whose weight may have a `rounded` copy, with which its products are computed."""

    rounded: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """states (..., in features) -> (..., out features)."""
        if reduced_dtype(states) is None:
            return F.linear(states, self.weight)
        return _Product.apply(states, self.weight, self.rounded)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every Linear of `model` its `rounded` copy for one pass; a weight that is held in `dtype` is its own copy."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for linear in linears:
        linear.rounded = linear.weight.detach() if linear.weight.dtype == dtype else None
    wanting = [linear for linear in linears if linear.rounded is None]
    for linear in wanting:  # once the copies of the pass before are gone
        linear.rounded = torch.empty_like(linear.weight, dtype=dtype, requires_grad=False)
    if wanting:
        copies, weights = ([getattr(linear, name) for linear in wanting] for name in ("rounded", "weight"))
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)


class _Product(torch.autograd.Function):
    """states (..., I) times the transposed weight (O, I), of which `rounded` is a copy in the states' format."""

    @staticmethod
    def forward(ctx, states, weight, rounded):
        ctx.save_for_backward(states, rounded)
        ctx.weight = weight
        return F.linear(states, rounded)

    @staticmethod
    def backward(ctx, upstream):
        states, rounded = ctx.saved_tensors
        flat, d_states, d_weight = upstream.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            d_states = (flat @ rounded).view_as(states)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(ctx.weight, flat.T, states.flatten(0, -2))
        return d_states, d_weight, None


def weight_gradient(weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """left (O, T) x right (T, I), summed in float32: added to `weight.grad`, or returned if there is none yet.

    Several processes exchange the gradients that autograd gets, so that it gets all of them there.
    """
    if weight.grad is None or torch.distributed.is_initialized():
        return torch.mm(left, right, out_dtype=torch.float32)
    torch.addmm(weight.grad, left, right, out_dtype=torch.float32, out=weight.grad)
    return None


class FusedRMSNorm(torch.autograd.Function):
    """RMSNorm by torch's kernel, given in `dtype`; with cos and sin (1, T, head_dim), heads are rotated by `rotate` after it."""

    @staticmethod
    def forward(ctx, states, weight, epsilon, cos, sin, dtype, rotate):
        given = weight.to(states.dtype)
        normed, factor = torch.ops.aten._fused_rms_norm(states, given.shape, given, epsilon)
        ctx.save_for_backward(states, factor, given, cos, sin)
        ctx.rotate, ctx.weight_dtype = rotate, weight.dtype
        normed = normed.to(dtype)
        return normed if cos is None else rotate(normed, cos, sin)

    @staticmethod
    def backward(ctx, upstream):
        states, factor, weight, cos, sin = ctx.saved_tensors
        if cos is not None:
            upstream = ctx.rotate(upstream, cos, sin, back=True)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        d_states, d_weight = torch.ops.aten._fused_rms_norm_backward(
            upstream.to(states.dtype), states, weight.shape, factor, weight, wanted
        )
        return d_states, d_weight.to(ctx.weight_dtype) if wanted[1] else None, None, None, None, None, None


class FoldedStep:
    """Clipping, and the loss scale of float16, folded into fused AdamW: no further pass over the gradients, and no wait for the GPU.

    The loss is to be multiplied by `scale` before its gradient is formed: float16 has no numbers below 6e-8. A step whose gradient is
    not finite changes no weight and halves the scale; 2,000 good ones in a row double it (Micikevicius et al. 2018, arXiv:1710.03740).
    """

    FIRST, PATIENCE = 2.0**16, 2000

    def __init__(self, optimizer: torch.optim.Optimizer, device: Device):
        self.optimizer, self.fp16 = optimizer, device.fp16
        self.scale = torch.full((), self.FIRST if device.fp16 else 1.0, device=device.name)
        self.good = torch.zeros((), dtype=torch.int32, device=device.name)

    def clip(self, max_norm: float) -> Tensor:
        """The norm of the gradients, unscaled; the optimizer's next step divides them by the scale and down to `max_norm`."""
        weights = (weight for group in self.optimizer.param_groups for weight in group["params"])
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True) / self.scale
        overflow = norm.isfinite().logical_not().float()
        self.optimizer.grad_scale = self.scale * (norm / max_norm).clamp(min=1.0)
        self.optimizer.found_inf = overflow
        if self.fp16:
            torch._amp_update_scale_(self.scale, self.good, overflow, 2.0, 0.5, self.PATIENCE)
        return norm
