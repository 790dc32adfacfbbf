"""The forecast of memory: what grows with the tokens is told from what does not, and limits are obeyed."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from utils.device import Device
from utils.model.folder import load_for_lora
from utils.model.qwen3_train import prepare_packed
from utils.training import memory

CPU = Device("cpu", False, "test")


def model_of(place):
    return prepare_packed(AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32))


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_kept_grows_with_the_tokens_and_the_copies_of_weights_do_not(place, bf16):
    model = model_of(place)
    costs = memory.measure_costs(model, Device("cpu", bf16, "test"), 160)
    lengths = [160 + number for number in range(16)] + [160 + 40]
    many = memory._bytes_kept(model, lengths, Device("cpu", bf16, "test"))
    assert costs.kept + costs.kept_per_token * sum(lengths) == pytest.approx(many, rel=0.01)
    linear = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    assert costs.kept == pytest.approx(2 * linear if bf16 else 0, rel=0.05, abs=8000)


def test_recomputing_keeps_the_input_of_every_layer_and_one_layer_as_a_whole(place):
    costs = memory.measure_costs(model_of(place), CPU, 160)
    parts = memory.memory_parts(costs, 1000, True, CPU)
    one_layer = costs.kept_per_token / costs.layers * 1000
    assert parts["activations"] == pytest.approx(costs.layers * costs.hidden * 4 * 1000 + one_layer, rel=1e-3)
    assert parts["activations"] < memory.memory_parts(costs, 1000, False, CPU)["activations"]
    # bfloat16 copies of all weights stay from the forward pass to the loss, recomputed or not
    copies = 1 << 30
    more = memory.memory_parts(costs._replace(kept=costs.kept + copies), 1000, True, CPU)["activations"]
    assert more - parts["activations"] == copies


def test_attention_without_a_fused_kernel_keeps_the_square_of_a_row(place):
    costs = memory.measure_costs(model_of(place), CPU, 160)
    mps = Device("mps", False, "test", equal_rows=True)
    squares = costs.layers * costs.heads * 2 * 512 * 512 * 4  # two rows
    for recompute, layers in ((False, 1), (True, costs.layers)):
        with_squares = memory.memory_parts(costs, 1024, recompute, mps, 512)["activations"]
        without = memory.memory_parts(costs, 1024, recompute, mps)["activations"]
        assert with_squares - without == pytest.approx(squares / layers, abs=2)


def test_weights_gradients_and_optimizer(place):
    model = model_of(place)
    parts = memory.memory_parts(memory.measure_costs(model, CPU, 160), 1000, False, CPU)
    assert parts["weights"] == parts["gradients"] == 4 * model.num_parameters()
    assert parts["optimizer"] == 2 * parts["weights"]


def test_with_one_pass_gradients_come_as_activations_go(place):
    costs = memory.measure_costs(model_of(place), CPU, 160)
    head, whole = costs.head.numel() * 4, costs.trainable * 4
    for tokens in (64, 4000):  # fewer bytes of activations than of gradients, and more
        parts = memory.memory_parts(costs, tokens, False, CPU, passes=1)
        assert parts["gradients"] == pytest.approx(
            head + max(0, whole - head - parts["activations"] / 2), abs=2
        )


@pytest.mark.parametrize(
    "bf16, device, kernels", [(True, "cpu", True), (False, "cpu", False), (True, "mps", False)]
)
def test_kernels_grow_with_the_lengths_of_documents_up_to_what_is_kept(place, bf16, device, kernels):
    costs = memory.measure_costs(model_of(place), CPU, 160)._replace(bf16=bf16)
    few, more, many = (
        memory.memory_parts(costs, 100, False, Device(device, bf16, "test"), lengths=count)["program"]
        for count in (0, 10, 10_000)
    )
    assert (few < more < many < 2 * memory.LIBRARIES) if kernels else (few == more == many)


def test_a_frozen_base_is_held_in_the_format_of_its_products(place):
    whole = {name: weight.numel() for name, weight in model_of(place).named_parameters()}
    frozen = load_for_lora(str(place / "base"), torch.bfloat16)
    sizes = {name: weight.element_size() for name, weight in frozen.named_parameters()}
    assert {name for name, size in sizes.items() if size == 4} == {name for name in whole if "norm" in name}
    assert not any(weight.requires_grad for weight in frozen.parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_counting_leaves_nothing_behind(place, bf16):
    def bytes_alive():
        gc.collect()
        return sum(part.nbytes for part in gc.get_objects() if type(part) is torch.Tensor)

    model = model_of(place)
    memory.measure_costs(model, Device("cpu", bf16, "test"), 160)
    before = bytes_alive()
    memory.measure_costs(model, Device("cpu", bf16, "test"), 160)
    assert bytes_alive() - before < 10_000
