"""Training on a CUDA GPU in bfloat16 or float16: products in that format, weights and their gradients in float32.

torch's autocast does the same with about 1,000 casts a step. Here every weight is rounded once a pass, by one call for all of them,
and the gradient of a weight is summed up in float32 by the product itself. tests/model/test_gpu_counts.py counts launches and traffic.
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


def matmul_dtype(states: Tensor) -> torch.dtype:
    """The dtype of matrix products with `states` here and now, under autocast or not."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def reduced_dtype(states: Tensor) -> torch.dtype | None:
    """The same, if it is a format in which this module computes; else None."""
    dtype = matmul_dtype(states)
    return dtype if on_cuda(states) and dtype in REDUCED else None


class Linear(nn.Linear):
    """A linear layer without bias whose weight may have a `rounded` copy, with which its products are computed."""

    rounded: Tensor | None = None

    @property
    def parts(self) -> tuple[nn.Linear, ...]:
        """The layers whose weights make the product: this one, or a frozen one and the two of its adapter (utils/model/lora.py)."""
        return (self,)

    def forward(self, states: Tensor) -> Tensor:
        """states (..., in features) -> (..., out features)."""
        if reduced_dtype(states) is None:
            return F.linear(states, self.weight)
        return products(states, self)[0]


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every module that has `rounded` its copy for one pass; a weight that is held in `dtype` is its own copy.

    Copies of one shape lie in one memory, in the order of their modules.
    """
    wanting = []
    for module in model.modules():
        if hasattr(module, "rounded"):
            module.rounded = module.weight.detach() if module.weight.dtype == dtype else None
            wanting += [module] if module.rounded is None else []
    if wanting:  # now that the copies of the pass before are gone
        wanting.sort(key=lambda module: module.weight.shape)
        weights = [module.weight for module in wanting]
        sizes = [weight.numel() for weight in weights]
        memory = torch.empty(sum(sizes), dtype=dtype, device=weights[0].device)
        copies = [part.view_as(weight) for part, weight in zip(memory.split(sizes), weights)]
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)
        for module, copy in zip(wanting, copies):
            module.rounded = copy


def products(states: Tensor, *layers: nn.Module) -> list[Tensor]:
    """The results (..., out features) of linear layers that take the same states (..., in features)."""
    if reduced_dtype(states) is None:
        return [layer(states) for layer in layers]
    # The layers' own weights, then, of adapters, all `down` and all `up`.
    parts = [part for kind in zip(*(layer.parts for layer in layers)) for part in kind]
    scaling = layers[0].scaling["default"] if len(parts) > len(layers) else 1.0
    copies, weights = [part.rounded for part in parts], [part.weight for part in parts]
    return _Products.apply(states, len(layers), scaling, copies, *weights)


class _Products(torch.autograd.Function):
    """states (..., I) times the transposed weights (O, I) of `count` layers, and with adapters, down (R, I) and up (O, R), the
    states times down, times scaling, times up. Products take the copies of the weights in the states' format.

    The adapters' `down` copies are one matrix, and an adapter's share is added by the product itself.
    """

    @staticmethod
    def forward(ctx, states, count, scaling, copies, *weights):
        ctx.weights, ctx.scaling, ctx.adapted = weights[:count], scaling, len(copies) > count
        copies, downs, ups = copies[:count], copies[count : 2 * count], copies[2 * count :]
        results = [F.linear(states, copy) for copy in copies]
        down = small = None
        if ctx.adapted:
            # They lie one behind the other: round_weights has put them there.
            down = downs[0].as_strided((sum(map(len, downs)), states.shape[-1]), downs[0].stride())
            small = torch.addmm(down[0, 0], states.flatten(0, -2), down.T, beta=0, alpha=scaling)
            for result, part, up in zip(results, small.split(len(downs[0]), 1), ups):
                result.flatten(0, -2).addmm_(part, up.T)
        ctx.save_for_backward(states, down, small, *copies, *ups)
        return tuple(results)

    @staticmethod
    def backward(ctx, *upstream):
        states, down, small, *copies = ctx.saved_tensors
        count, needed = len(upstream), ctx.needs_input_grad[4:]
        upstream, flat, d_states = [part.flatten(0, -2) for part in upstream], states.flatten(0, -2), None
        d_weights = [None] * count
        for place, (weight, part, need) in enumerate(zip(ctx.weights, upstream, needed)):
            if need and (weight.grad is None or torch.distributed.is_initialized()):
                d_weights[place] = torch.mm(part.T, flat, out_dtype=torch.float32)
            elif need:  # several processes exchange what autograd gets; one adds it up at once
                torch.addmm(weight.grad, part.T, flat, out_dtype=torch.float32, out=weight.grad)
        if ctx.needs_input_grad[0]:
            d_states = upstream[0] @ copies[0]
            for part, copy in zip(upstream[1:], copies[1:]):
                d_states.addmm_(part, copy)
        if ctx.adapted:
            along, rank = torch.empty_like(small), small.shape[1] // count
            for part, up, one in zip(upstream, copies[count:], along.split(rank, 1)):
                torch.addmm(one, part, up, beta=0, alpha=ctx.scaling, out=one)
            if d_states is not None:
                d_states.addmm_(along, down)
            d_weights += torch.mm(along.T, flat, out_dtype=torch.float32).split(rank)
            for part, one in zip(upstream, small.split(rank, 1)):
                d_weights.append(torch.mm(part.T, one, out_dtype=torch.float32))
        return None if d_states is None else d_states.view_as(states), None, None, None, *d_weights


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
