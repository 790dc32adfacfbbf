"""Save a model folder: weights, decoding settings, tokenizer, and the thinking mode it was trained in."""

from utils.model.chat_format import generation_settings, with_default_mode


def remember_mode(model, tokenizer, thinking):
    """Make the thinking mode of the training rows the default of all that is saved: checkpoints and finished folder alike."""
    tokenizer.chat_template = with_default_mode(tokenizer.chat_template, thinking)
    settings = generation_settings(tokenizer, thinking)
    model.generation_config.update(**settings)
    model.config.update({name: settings[name] for name in ("bos_token_id", "pad_token_id")})


def save_model(model, tokenizer, folder):
    """Save a model (or adapter), its decoding settings and its tokenizer.

    Weights keep float32: rounding them to bfloat16 would lose updates as small as DPO's.
    """
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)  # an adapter's save_pretrained leaves it out
    tokenizer.save_pretrained(folder)


def save_adapter_and_merged(model, tokenizer, folder):
    """Save the adapter at the root of `folder` and the merged model in merged/. `model` is merged by this."""
    save_model(model, tokenizer, folder)
    save_model(model.merge_and_unload(), tokenizer, folder / "merged")
