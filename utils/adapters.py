"""LoRA adapters: put on, and saved both as they are and merged into a stand-alone model."""

from peft import LoraConfig, get_peft_model

from utils.training import save_model


def add_lora(model, settings):
    """`model` with an adapter of RANK and ALPHA on every linear layer of its blocks; only the adapters train.

    The embeddings and the LM head, which Qwen3 ties together, are left alone: an adapter on one of them is lost or changes
    both when it is merged. No dropout: with it, gradient checkpointing on Apple GPUs gives wrong gradients.
    """
    config = LoraConfig(r=settings.RANK, lora_alpha=settings.ALPHA, lora_dropout=0.0, target_modules="all-linear",
                        task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    # inside the repository: relative to it, so that adapter and base can move together
    adapted.peft_config["default"].base_model_name_or_path = settings.as_dict()["MODEL"]
    return adapted


def save_adapter_and_merged(model, tokenizer, folder):
    """Save the adapter at the root of `folder` and the merged model in merged/. `model` is merged by this."""
    save_model(model, tokenizer, folder)
    save_model(model.merge_and_unload(), tokenizer, folder / "merged")
