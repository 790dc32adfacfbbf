"""Shared by the tests of answering and of chat: a few questions, and what transformers' own generate says to them."""

import json
import shutil

import torch

from utils.model.chat_format import encode_prompt

QUESTIONS = ["甘草", "麻黄汤的功效是什么？龘", "What is this? 合谷", "四君子汤由哪些药组成？请一一说明。"]


def prompts_of(chat_model, thinking=None):
    return [
        encode_prompt(chat_model.tokenizer, [{"role": "user", "content": text}], thinking)
        for text in QUESTIONS
    ]


def reference(chat_model, prompt, length, **options):
    """What transformers' generate answers, greedily."""
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=length, **options)
    return chat_model.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()


def damaged(folder, where, **changes):
    """A copy of `folder` with fields of its config.json changed."""
    shutil.copytree(folder, where)
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    (where / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return where
