"""The forecast of memory: what grows with the tokens is told from what does not, and limits are obeyed."""

import gc
import weakref

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
from utils.model.packing import ROUNDED, item_length, measure, model_inputs
from utils.model.qwen3_train import prepare_packed
from utils.training import memory

CPU, BF16 = Device("cpu", False, "test"), Device("cpu", True, "test")


def model_of(place):
    return prepare_packed(AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32))


@pytest.fixture(scope="module")
def costs(place):
    return memory.measure_costs(model_of(place), CPU, 160)


@pytest.mark.parametrize("shared", [0, 60])
@pytest.mark.parametrize("device", [CPU, BF16], ids=str)
def test_what_is_kept_grows_with_the_tokens_and_the_copies_of_weights_do_not(place, device, shared):
    model = model_of(place)
    costs, row = memory.measure_costs(model, device, 160, shared), memory._probe(17, 160, shared)
    tokens = sum(map(item_length, row))
    assert not tokens % ROUNDED and 17 * 160 <= tokens < 17 * 180
    many = memory._bytes_kept(model, row, device)
    assert costs.kept + costs.kept_per_token * tokens == pytest.approx(many, rel=0.02)
    linear = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    assert costs.kept == pytest.approx(2 * linear if device.bf16 else 0, rel=0.05, abs=0.02 * many)


def test_recomputing_keeps_the_input_of_every_layer_and_one_layer_as_a_whole(costs):
    """On a GPU that layer finds the room of the head's scores."""
    inputs, layer = (
        (costs.layers + 1) * costs.head.shape[1] * 4000,
        costs.kept_per_token * 1000 / costs.layers,
    )
    cpu, cuda = (
        memory.memory_parts(costs, 1000, True, Device(name, False, "test")) for name in ("cpu", "cuda")
    )
    assert cpu["activations"] == pytest.approx(inputs + layer, abs=2)
    assert cuda["activations"] == pytest.approx(inputs + max(0, layer - cuda["scores"]), abs=2)
    # bfloat16 copies of all weights stay from the forward pass to the loss, recomputed or not
    copies = costs._replace(kept=costs.kept + (1 << 30))
    assert memory.memory_parts(copies, 1000, True, CPU)["activations"] > 1 << 30


def test_attention_without_a_fused_kernel_keeps_the_square_of_a_row(costs):
    mps = Device("mps", False, "test", equal_rows=True)
    squares = costs.layers * costs.heads * 2 * 512 * 512 * 4  # two rows
    with_squares = memory.memory_parts(costs, 1024, False, mps, 512)["activations"]
    assert with_squares - memory.memory_parts(costs, 1024, False, mps)["activations"] == squares


def test_weights_gradients_and_optimizer(costs, place):
    parts = memory.memory_parts(costs, 1000, False, CPU)
    assert parts["weights"] == parts["gradients"] == 4 * model_of(place).num_parameters()
    assert parts["optimizer"] == 2 * parts["weights"]


def test_with_one_pass_gradients_come_as_activations_go(costs):
    head, whole = costs.head.nbytes, costs.gradients
    for tokens in (64, 4000):  # fewer bytes of activations than of gradients, and more
        parts = memory.memory_parts(costs, tokens, False, CPU, passes=1)
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

    model = model_of(place)
    memory.measure_costs(model, BF16, 160)
    before = bytes_alive()
    memory.measure_costs(model, BF16, 160)
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
    items = [{"documents": [([0] * 80, [0] * answer) for answer in (81, 78)[: 1 + (method == "dpo")]]}]
    length, alone, _ = measure(items[0])
    with cuda_shapes():
        model = qwen3(layers, method == "lora")
        costs = memory.measure_costs(model, BF16, length, max(0, alone - length - 1))
        forecast = memory.memory_parts(costs, tokens, recompute, Device("cuda", True, "test"), passes=passes)
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
