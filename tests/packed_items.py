"""Random items of one or more documents, as the trainers pack them, and the model that they are fed to."""

import random

from transformers import AutoModelForCausalLM


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def some_items(count, seed=0, documents=1):
    draw = random.Random(seed)

    def tokens():
        return [draw.randrange(300) for _ in range(draw.randint(1, 25))]

    return [{"documents": [(tokens(), tokens()) for _ in range(documents)]} for _ in range(count)]
