"""The forecast of memory: what grows with the tokens is told from what does not, and limits are obeyed."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import LOSSES, batch_for, cuda_shapes, qwen3, without_content
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from utils.device import Device
from utils.model.folder import load_for_lora
from utils.model.lm_head import HeadGradient
from utils.model.packing import ROUNDED, PackedRows, collate, model_inputs
from utils.model.qwen3_train import prepare_packed
from utils.training import memory
from utils.training.memory import MemoryForecast, StepPlan

CPU, BF16 = Device("cpu", False, "test"), Device("cpu", True, "test")


def model_of(place):
    return prepare_packed(AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32))


def rows_of(count, answers=1, max_length=1000):
    """Rows of so many documents of 150 to 170 tokens, or of pairs of two answers to one prompt."""
    items = []
    for number in range(count):
        prompt, answer = [0] * 80, [0] * (70 + 7 * number % 20)
        items.append({"documents": [(prompt, answer + [0] * side) for side in range(answers)]})
    return PackedRows(items, max_length)


@pytest.fixture(scope="module")
def forecast(place):
    return MemoryForecast(model_of(place), CPU, rows_of(30))


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("device", [CPU, BF16], ids=str)
def test_what_is_kept_grows_with_the_tokens_and_the_copies_of_weights_do_not(place, device, answers):
    model, rows = model_of(place), rows_of(60, answers=answers)
    found = MemoryForecast(model, device, rows)
    batch = collate([rows[row] for row in range(6)], device)
    many, tokens = memory.bytes_kept(model, batch, device), batch["input_ids"].shape[1]
    assert found.kept + found.kept_per_token * tokens == pytest.approx(many, rel=0.02)
    linear = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    assert found.kept == pytest.approx(2 * linear if device.bf16 else 0, rel=0.05, abs=0.02 * many)


@pytest.mark.parametrize("device", [CPU, BF16], ids=str)
def test_what_is_counted_on_three_layers_without_memory_is_what_five_keep(place, device):
    """Counted again in a real forward pass, which keeps every tensor that it saves."""
    model, batch = model_of(place), collate([rows_of(10)[0]], device)
    first, last = model.model.layers
    model.model.layers = torch.nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(3)), last])
    counted = memory.bytes_kept(model, batch, device)
    assert len(model.model.layers) == 5 and not first._forward_hooks and not first._forward_pre_hooks
    weights, saved = {weight.untyped_storage()._cdata for weight in model.parameters()}, {}

    def save(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), device.autocast():
        hidden = model(**model_inputs(batch))
    assert counted == sum(saved[key].nbytes() for key in saved.keys() - weights) and hidden.requires_grad


def test_recomputing_keeps_the_input_of_every_layer_and_one_layer_as_a_whole(forecast, monkeypatch):
    """On a GPU that layer finds the room of the head's scores."""
    way, tokens = StepPlan(1, 2, True), forecast.rows.fullest(1)
    tokens += -tokens % ROUNDED
    inputs = (forecast.layers + 1) * forecast.head.shape[1] * 4 * tokens
    layer = forecast.kept_per_token * tokens / forecast.layers
    cpu = forecast.parts(way)
    # bfloat16 copies of all weights stay from the forward pass to the loss, recomputed or not
    assert cpu["activations"] == pytest.approx(inputs + layer + forecast.kept, abs=2)
    monkeypatch.setattr(forecast, "device", Device("cuda", False, "test"))
    cuda = forecast.parts(way)
    room = max(0, layer - cuda["scores"])
    assert cuda["activations"] == pytest.approx(inputs + room + forecast.kept, abs=2)


def test_attention_without_a_fused_kernel_keeps_the_square_of_a_row(forecast, monkeypatch):
    monkeypatch.setattr(forecast, "device", Device("cuda", False, "test", equal_rows=True))
    without = forecast.parts(StepPlan(2, 2, False))["activations"]
    monkeypatch.setattr(forecast, "device", Device("mps", False, "test", equal_rows=True))
    squares = forecast.layers * forecast.heads * 2 * 1000 * 1000 * 4  # two rows
    assert forecast.parts(StepPlan(2, 2, False))["activations"] - without == squares


def test_weights_gradients_and_optimizer(forecast, place):
    parts = forecast.parts(StepPlan(1, 2, False))
    assert parts["weights"] == parts["gradients"] == 4 * model_of(place).num_parameters()
    assert parts["optimizer"] == 2 * parts["weights"]
    # With one pass the layers' gradients come as the activations go: of fewer bytes than those, and of more.
    head, whole = forecast.head.nbytes, forecast.gradients
    for rows in (1, 4):
        parts = forecast.parts(StepPlan(rows, 1, False))
        coming = max(0, whole - head - parts["activations"] / 2)
        assert parts["gradients"] == pytest.approx(head + coming, abs=2)


def test_a_frozen_base_is_held_in_the_format_of_its_products(place):
    frozen = load_for_lora(str(place / "base"), torch.bfloat16)
    for name, weight in frozen.named_parameters():
        assert weight.element_size() == (4 if "norm" in name else 2) and not weight.requires_grad


def test_counting_leaves_nothing_behind(place):
    def bytes_alive():
        gc.collect()
        return sum(part.nbytes for part in gc.get_objects() if type(part) is torch.Tensor)

    model, rows = model_of(place), rows_of(8)
    MemoryForecast(model, BF16, rows)
    before = bytes_alive()
    MemoryForecast(model, BF16, rows)
    assert bytes_alive() - before < 10_000


class Peak(TorchDispatchMode):
    """Bytes of all tensors that are alive, counted at every operation. Tensors are fake: shapes without memory."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()
        for tensor in tensors:
            self.track(tensor)

    def track(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.track(tensor)
        return made


def forecast_and_peak(method, tokens, passes, recompute, layers):
    """Bytes of the last pass of a step, as forecast and as counted, on CUDA in bfloat16."""
    batch = batch_for(method, tokens)
    tokens = batch["input_ids"].shape[1]
    with cuda_shapes():
        model = qwen3(layers, method == "lora")
        forecast = MemoryForecast(model, BF16, rows_of(120, 1 + (method == "dpo"), 8192))
        forecast.rows = SimpleNamespace(max_length=tokens, fullest=lambda count: tokens)
        forecast.device = Device("cuda", True, "test")
        forecast = forecast.parts(StepPlan(1, passes, recompute))
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with FakeTensorMode(allow_non_fake_inputs=True):
            trained, kept = without_content(model.train()), HeadGradient()
            head = model.get_output_embeddings().weight
            with Peak(model.parameters()) as counted, BF16.autocast():
                moments = [torch.empty_like(weight) for weight in trained for _ in range(2)]
                kept.memory = torch.empty_like(head) if head.requires_grad else None
                for weight in trained if passes > 1 else ():
                    weight.grad = kept.memory if weight is head else torch.empty_like(weight)
                hidden = model(**model_inputs(batch))
                LOSSES[method](hidden, head, batch, torch.ones(()), kept).loss.backward()
    assert len(moments) == 2 * len(trained)
    return sum(forecast.values()), counted.peak


@pytest.mark.parametrize("tokens, passes, recompute", [(1024, 2, False), (8192, 1, False), (8192, 2, True)])
def test_the_forecast_is_up_to_a_tenth_above_the_counted_peak(method, tokens, passes, recompute):
    """Of Qwen3-0.6B, whose 28 layers take as much more than one as the second takes."""
    one, two = (forecast_and_peak(method, tokens, passes, recompute, layers) for layers in (1, 2))
    forecast, peak = (few + 27 * (more - few) for few, more in zip(one, two))
    print(
        f"{method}, {tokens} tokens: {forecast / 2**30:.2f} of {peak / 2**30:.2f} GiB, {forecast / peak - 1:+.1%}"
    )
    assert peak <= forecast <= 1.1 * peak
