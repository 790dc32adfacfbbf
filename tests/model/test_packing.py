"""Packing is exact: logits, loss and gradients equal those of plain transformers on each document alone."""

import contextlib
import random

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import cuda_forms
from packed_items import load, some_items

from utils.errors import UserError
from utils.model.lm_head import HeadGradient, cross_entropy_sum, token_logps
from utils.model.packing import PackedRows, collate, item_length, model_inputs, pack
from utils.model.qwen3_train import prepare_packed

pytestmark = pytest.mark.usefixtures("norms_in_float64")


def alone(model, prompt, answer):
    """The logits that plain transformers gives for the tokens of an answer."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


def test_each_item_goes_to_the_fullest_row_that_holds_it():
    """The rows, their order and the order in them are those of this plain form of the rule: a resumed run depends on it."""
    draw = random.Random(1)
    many = [draw.randint(1, 100) for _ in range(2000)]
    assert len(pack(many, 100)) <= 1.1 * sum(many) / 100  # hardly any room is left
    for lengths in (many, [50, 100, 50, 100], [7], []):
        rows, space = [], []  # space: tokens left
        latest = []  # rows in the order in which they were filled last
        for index in random.Random(5).sample(range(len(lengths)), len(lengths)):
            fitting = [row for row in latest if space[row] >= lengths[index]]
            row = min(reversed(fitting), key=lambda row: space[row], default=len(rows))
            if row == len(rows):
                rows.append([])
                space.append(100)
            else:
                latest.remove(row)
            rows[row].append(index)
            space[row] -= lengths[index]
            latest.append(row)
        assert pack(lengths, 100, seed=5) == rows


def test_one_row_is_blind_to_another(folder):
    """Changing every token of one document leaves the loss of the other as it was, to the bit."""
    model = prepare_packed(load(folder, torch.float32))
    one, other = some_items(2, seed=2)
    [document] = other["documents"]
    changed = {"documents": [tuple([token + 1 for token in part] for part in document)]}

    def logps(second):
        batch = collate([[one, second]])
        inputs, targets = model_inputs(batch), batch["targets"]
        with torch.no_grad():
            return token_logps(model(**inputs), model.lm_head.weight, targets)[batch["label_documents"] == 0]

    assert torch.equal(logps(other), logps(changed))


def test_labels_stand_before_their_tokens():
    batch = collate([[{"documents": [([1, 2, 3], [4, 5])], "reference_chosen": -1.5}]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]] and batch["label_positions"].tolist() == [2, 3]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert batch["reference_chosen"].tolist() == [-1.5]


def gradients_of(model, documents, dtype=None, plain=False):
    """Gradients of the summed loss, float64: by plain transformers one document after another, or by ours, packed."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        if plain:
            wanted = [torch.tensor(answer) for _, answer in documents]
            found = [alone(model, *document).float() for document in documents]
            loss = F.cross_entropy(torch.cat(found), torch.cat(wanted), reduction="sum")
        else:
            batch = collate([[{"documents": [document]} for document in documents]])
            inputs, targets = model_inputs(batch), batch["targets"]
            loss = cross_entropy_sum(model(**inputs), model.lm_head.weight, targets, None, HeadGradient())
    loss.backward()
    return [parameter.grad.double() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "forms, dtype", [("cpu", torch.bfloat16), ("cuda", torch.bfloat16), ("cuda", torch.float16)], ids=str
)
def test_a_reduced_format_is_as_near_to_float64_as_plain_transformers(folder, forms, dtype):
    """In the forms for CPUs 5 % further at most: plain attention rounds its scores, which the fused kernel does not. The forms for
    CUDA round heads after their rotation and the weights of their norms too."""
    documents = [item["documents"][0] for item in some_items(40, seed=6)]
    exact = gradients_of(load(folder, torch.float64), documents, plain=True)
    plain = gradients_of(load(folder, torch.float32), documents, dtype, plain=True)
    with cuda_forms() if forms == "cuda" else contextlib.nullcontext():
        ours = gradients_of(prepare_packed(load(folder, torch.float32)), documents, dtype)
    pairs = zip(ours, plain, exact)
    errors = torch.tensor([[(one - right).norm() / right.norm() for one in found] for *found, right in pairs])
    further = 1.05 if forms == "cpu" else 1.3
    assert errors.max() < 0.1 and errors[:, 0].mean() <= further * errors[:, 1].mean(), errors.mean(0)


def test_layers_keep_a_fifth_less_for_the_backward_pass(folder):
    """One document of 600 tokens, all of them trained, against transformers' own layers; weights not counted."""

    def bytes_kept(model, **inputs):
        kept, weights = {}, {parameter.data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
        ):
            model(**inputs)
        return sum(size for place, size in kept.items() if place not in weights)

    inputs = model_inputs(collate([[{"documents": [([1], [2] * 600)]}]]))
    plain = load(folder, torch.float32).model
    ours = bytes_kept(prepare_packed(load(folder, torch.float32)), **inputs)
    assert ours < 0.8 * bytes_kept(plain, input_ids=inputs["input_ids"], use_cache=False)


def test_the_last_layer_computes_only_what_is_trained(folder):
    model, seen = prepare_packed(load(folder, torch.float32)), []
    batch = collate([some_items(30)])
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    states = model(**model_inputs(batch))
    labels, tokens = len(batch["targets"]), batch["input_ids"].shape[1]
    *before, last = seen
    assert set(before) == {tokens} and labels <= last < min(tokens, labels + 64)
    everywhere = model(**model_inputs(batch) | {"label_positions": torch.arange(tokens)})
    torch.testing.assert_close(states, everywhere[batch["label_positions"]])


def test_rows_are_shared_out_evenly_and_none_twice():
    rows = PackedRows([{"documents": [([1] * 5, [2] * (number % 7 + 1))]} for number in range(50)], 40)
    for processes in (2, 3, 8):
        rows.even_out(processes)
        assert len(rows) % processes == 0
        assert sorted(index for row in rows.rows for index in row) == list(range(50))
    with pytest.raises(UserError, match="shared out evenly among 60 processes"):
        rows.even_out(60)


def test_answers_to_one_prompt_share_its_tokens(folder):
    """Log-probabilities and gradients are those of each document alone, in float64; the prompt is computed once."""
    items = some_items(12, seed=4, documents=3)
    for item in items:
        item["documents"] = [(item["documents"][0][0], answer) for _, answer in item["documents"]]
    whole = sum(len(prompt) + len(answer) - 1 for item in items for prompt, answer in item["documents"])
    batch = collate([items[:5], items[5:]])
    saved = sum(2 * (len(item["documents"][0][0]) - 1) for item in items)
    assert batch["input_ids"].shape[1] == sum(map(item_length, items)) == whole - saved
    shared, plain = (prepare_packed(load(folder, torch.float64)) for _ in range(2))
    inputs, targets = model_inputs(batch), batch["targets"]
    logps = token_logps(shared(**inputs), shared.lm_head.weight, targets)
    sums = torch.zeros(36, dtype=torch.float64).index_add_(0, batch["label_documents"], logps)
    cross_entropy_sum(shared(**inputs), shared.lm_head.weight, targets).backward()
    for number, document in enumerate(document for item in items for document in item["documents"]):
        batch = collate([[{"documents": [document]}]])
        inputs, targets = model_inputs(batch), batch["targets"]
        hidden = plain(**inputs)
        expected = token_logps(hidden, plain.lm_head.weight, targets).sum().item()
        assert sums[number].item() == pytest.approx(expected, rel=1e-12)
        cross_entropy_sum(hidden, plain.lm_head.weight, targets).backward()
    for (name, one), other in zip(shared.named_parameters(), plain.parameters()):
        assert (one.grad - other.grad).norm() <= 1e-12 * other.grad.norm(), name
