"""The forward pass of chat: its cache against transformers' own pass, and weights held in float16 against float32."""

import pytest
import torch
from conftest import ROOT

from utils.device import Device
from utils.model import qwen3_answer
from utils.model.folder import load_for_answers, load_model
from utils.model.qwen3_answer import CachedModel, hold_weights

TINY = str(ROOT / "model_download/tiny_qwen3_tcm")  # trained, and published in bfloat16 as Qwen3 is
NEEDS_FBGEMM = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="not an x86 CPU with AVX2"
)


def some_ids(count, below=2500):
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def fed(cached, ids):
    """The logits, float32 (vocabulary,), after more tokens of one conversation."""
    return cached.feed(torch.tensor([ids]))[0].float()


def close(ours, theirs, accuracy):
    """Largest difference of two vectors of logits, relative to their spread."""
    return (ours - theirs).abs().max() / theirs.std() < accuracy


@pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_feeding_by_parts_equals_one_pass_of_transformers(dtype, accuracy):
    """Over the borders where the cache grows, in parts of one token and of many, and after going back."""
    model, ids = load_model(TINY, dtype).eval(), some_ids(700)
    cached, exact = CachedModel(model), load_model(TINY, torch.float32).double().eval()
    with torch.no_grad():
        theirs, double = (given(torch.tensor([ids])).logits[0].double() for given in (model, exact))
    start, onednn = 0, torch.backends.mkldnn.enabled
    for end in (*range(1, 4), 255, 256, 257, 300, 301, 450, 699, 700):
        logits = fed(cached, ids[start:end])
        assert cached.length == end and torch.backends.mkldnn.enabled == onednn
        for found in (logits.double(), theirs[end - 1]):
            assert close(found, double[end - 1], accuracy), end
        start = end
    cached.keep(300)
    assert close(fed(cached, ids[300:450]).double(), theirs[449], accuracy)
    cached.keep(900)  # more than there is: nothing to forget
    assert cached.length == 450


@NEEDS_FBGEMM
def test_bfloat16_weights_lose_nothing_as_float16():
    """Products are FBGEMM's and sums float32: the logits are as near to float64 as float32's accuracy goes."""
    ids, exact = some_ids(200), load_model(TINY, torch.float32).double().eval()
    with torch.no_grad():
        double = exact(torch.tensor([ids])).logits[0, -1]
    halved = load_for_answers(TINY, Device("cpu", False, "test", "half"))
    assert not [name for name, _ in halved.named_parameters() if "proj" in name]  # those weights are gone
    assert close(fed(CachedModel(halved), ids).double(), double, 1e-5)
    one_by_one = CachedModel(halved)
    assert close([fed(one_by_one, [token]) for token in ids][-1].double(), double, 1e-5)


@NEEDS_FBGEMM
def test_float32_weights_lose_least_in_half_and_most_in_int8():
    def logits(change):
        torch.manual_seed(0)
        model = load_model(TINY, torch.float32).eval()
        for weight in model.parameters():
            weight.data *= 1 + torch.rand_like(weight) / 100  # now they have 24 bits
        change(model)
        return fed(CachedModel(model), some_ids(100)).double()

    exact = logits(torch.nn.Module.double)
    changes = {
        "half": lambda model: hold_weights(model, "half"),
        "fp16": lambda model: hold_weights(model, "fp16"),
        "bf16": torch.nn.Module.bfloat16,
        "int8": lambda model: hold_weights(model, "int8"),
    }
    off = {name: (logits(change) - exact).norm() / exact.norm() for name, change in changes.items()}
    assert 0 < off["half"] < off["fp16"] < off["bf16"] / 4 and off["half"] < off["int8"] < 0.05, off


@NEEDS_FBGEMM
@pytest.mark.parametrize("form", ["fp16", "half", "int8"])
@pytest.mark.parametrize("value", [float("nan"), 7e4])
def test_weights_that_a_form_cannot_hold_stay(value, form):
    """FBGEMM would make 65504 of each in half, and a diverged model would talk on."""
    model = load_model(TINY, torch.bfloat16).eval()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    hold_weights(model, form)
    assert hasattr(model.model.layers[1].mlp.up_proj, "weight") == (form != "int8" or value != 7e4)
    assert not hasattr(model.model.layers[1].mlp.down_proj, "weight")
    assert torch.isfinite(fed(CachedModel(model), [1, 2])).all() == (value == 7e4)


def test_joined_weights_are_the_model_s_own():
    """No second copy in memory, the same result of transformers' pass, and nothing new in what would be saved."""
    model, ids = load_model(TINY, torch.float32).eval(), torch.tensor([some_ids(50)])
    with torch.no_grad():
        names, before = list(model.state_dict()), model(ids).logits
        CachedModel(model)
        assert list(model.state_dict()) == names and torch.equal(model(ids).logits, before)
    attention, mlp = model.model.layers[2].self_attn, model.model.layers[2].mlp
    for parts in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
    attention.k_proj.weight.data.zero_()  # seen by the joined product
    assert not torch.equal(fed(CachedModel(model), ids[0].tolist()), before[0, -1])


@pytest.mark.parametrize(
    "dtype, accuracy, gpu",
    [(torch.float32, 1e-5, False), (torch.float32, 1e-5, True), (torch.bfloat16, 0.1, False)],
)
def test_several_conversations_equal_each_alone(tiny_folder, dtype, accuracy, gpu, monkeypatch):
    """Of different length, one token after another, over the border where the cache grows, and with one leaving in between."""
    monkeypatch.setattr(qwen3_answer, "on_gpu", lambda tensor: gpu)  # keys repeated, masks as numbers
    model, exact = (load_model(str(tiny_folder), form).eval() for form in (dtype, torch.float32))
    prompts, padding = [some_ids(count, 300) for count in (40, 3, 17)], torch.tensor([0, 37, 23])
    batch, exact = CachedModel(model, padding), exact.double()
    new = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding.tolist(), prompts)])
    for step in range(140):
        logits = batch.feed(new)
        if step == 100:
            batch.keep_rows(torch.tensor([0, 2]))
            logits, prompts = logits[[0, 2]], [prompts[0], prompts[2]]
        if step in (0, 99, 100, 139):
            with torch.no_grad():
                for ours, prompt in zip(logits, prompts, strict=True):
                    theirs = exact(torch.tensor([prompt])).logits[0, -1]
                    assert close(ours.double(), theirs, accuracy), step
        new = torch.tensor([[(7 * step + 13 * row) % 300] for row in range(len(prompts))])
        for prompt, [token] in zip(prompts, new.tolist()):
            prompt.append(token)
