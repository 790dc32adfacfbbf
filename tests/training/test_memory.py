"""The forecast of memory: what grows with the tokens is told from what does not, and limits are obeyed."""

import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from utils.device import Device
from utils.model.folder import load_for_lora
from utils.model.lora import add_lora
from utils.model.packing import collate, item_length, model_inputs
from utils.model.qwen3_train import prepare_packed
from utils.training import memory
from utils.training.losses import dpo_batch_loss, sft_loss

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


def documents(tokens, pairs):
    """About so many tokens in documents of 148 to 160, 60 % of them trained; of pairs, two answers to one prompt."""
    items, count = [], 0
    while count + (320 if pairs else 160) <= tokens:
        prompt, answer = [0] * 60, [0] * (100 - len(items) % 7 * 2)
        items.append({"documents": [(prompt, answer)]})
        if pairs:
            items[-1] |= {"documents": [(prompt, answer), (prompt, answer[3:])]}
            items[-1] |= {"reference_chosen": 0.0, "reference_rejected": 0.0}
        count += item_length(items[-1])
    return items


@pytest.mark.slow
@pytest.mark.parametrize("tokens, passes, recompute", [(1024, 2, False), (8192, 1, False), (1024, 2, True)])
def test_the_forecast_is_up_to_a_tenth_above_the_counted_peak(method, tokens, passes, recompute):
    """Qwen3-0.6B's layers, four of them, with bfloat16; the second of two steps, as an optimizer has its moments by then."""
    device = Device("cpu", True, "test")
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    if method == "lora":
        for module in model.modules():
            dense = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(torch.bfloat16 if dense else torch.float32)
        settings = SimpleNamespace(RANK=16, ALPHA=32, as_dict=lambda: {"MODEL": "base"})
        model = add_lora(prepare_packed(model.requires_grad_(False)), settings)
    else:
        model = prepare_packed(model)
    batch = collate([documents(tokens, method == "dpo")], device, tokens)
    costs, size = memory.measure_costs(model, device, 160), batch["input_ids"].shape[1]
    forecast = memory.memory_parts(costs, size, recompute, Device("cuda", True, "test"), passes=passes)
    if recompute:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    loss = functools.partial(dpo_batch_loss, beta=0.1, sft_weight=0.2) if method == "dpo" else sft_loss
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.train().modules():
            for name, weight in module.named_parameters(recurse=False):
                fake = torch.nn.Parameter(mode.from_tensor(weight.data), weight.requires_grad)
                module._parameters[name] = fake
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        batch = {
            name: mode.from_tensor(part) if torch.is_tensor(part) else part for name, part in batch.items()
        }
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        with Peak(model.parameters()) as counted:
            for _ in range(2):
                counted.peak = counted.live
                for _ in range(passes):
                    with device.autocast():
                        hidden = model(**model_inputs(batch))
                        head = model.get_output_embeddings().weight
                        result = loss(hidden, head, batch, torch.ones(()))
                    result.loss.backward()
                    del hidden, result
                optimizer.step()
                optimizer.zero_grad()
    softmax = (
        memory.CHUNK * config.vocab_size * memory.FLOAT
    )  # of a chunk: a GPU needs it whole, a CPU takes it in parts
    assert counted.peak <= sum(forecast.values()) <= 1.1 * counted.peak + softmax
