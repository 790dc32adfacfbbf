"""Our packed DPO loss and gradients equal TRL's DPOTrainer on the same pairs, padded."""

import pytest
import torch
from datasets import Dataset
from packed_items import some_items
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from utils.model.packing import collate, model_inputs
from utils.model.qwen3_train import prepare_packed
from utils.training.losses import dpo_batch_loss

BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def padded(pairs):
    """TRL's batch: chosen then rejected rows, right-padded, with completion masks."""
    documents = [pair["documents"][side] for side in (0, 1) for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in documents)
    rows = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, answer in documents:
        pad = [0] * (width - len(prompt) - len(answer))
        rows["input_ids"].append(prompt + answer + pad)
        rows["attention_mask"].append([1] * (len(prompt) + len(answer)) + pad)
        rows["completion_mask"].append([0] * len(prompt) + [1] * len(answer) + pad)
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    for side in ("chosen", "rejected"):
        batch[f"ref_{side}_logps"] = torch.tensor([pair[f"reference_{side}"] for pair in pairs])
    return batch


@pytest.mark.parametrize("sft_weight, count", [(0.0, 6), (0.5, 1)])
def test_loss_and_gradients_equal_trl(folder, tmp_path, sft_weight, count):
    """float32, tolerance 1e-5 relative. TRL averages its SFT term over the tokens of a batch, ours over pairs, so that it is
    compared on one pair, where both are the same."""
    pairs = some_items(count, seed=5, documents=2)
    for number, pair in enumerate(pairs):
        pair.update(reference_chosen=-40.0 - number, reference_rejected=-45.0 + 2 * number)
        pair["documents"][1] = (pair["documents"][0][0], pair["documents"][1][1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    message = (
        [{"role": "user", "content": "问"}],
        [{"role": "assistant", "content": "答"}],
        [{"role": "assistant", "content": "错"}],
    )
    dataset = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), message))] * 2)
    types = dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, sft_weight]) if sft_weight else {}
    trl = DPOTrainer(
        theirs,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            precompute_ref_log_probs=True,
            report_to="none",
            gradient_checkpointing=False,
            **types,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    expected = trl.compute_loss(theirs, padded(pairs))
    expected.backward()

    model = prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    batch, scale = collate([pairs]), torch.tensor(1 / len(pairs))
    hidden, head = model(**model_inputs(batch)), model.lm_head.weight
    loss = dpo_batch_loss(hidden, head, batch, scale, beta=BETA, sft_weight=sft_weight).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), other in zip(model.named_parameters(), theirs.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name
