"""Shared by the tests of answering and of chat: a few questions, and what transformers' own generate says to them."""

import torch

from utils.chat.model import ChatModel, Reply
from utils.device import Device
from utils.model.chat_format import encode_prompt

CPU = Device("cpu", False, "test")
QUESTIONS = ["甘草", "麻黄汤的功效是什么？龘", "What is this? 合谷", "四君子汤由哪些药组成？请一一说明。"]


def prompts_of(chat_model, thinking=None):
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    return [encode_prompt(chat_model.tokenizer, messages, thinking) for messages in asked]


def reference(chat_model, prompt, length, **options):
    """What transformers' generate answers, greedily."""
    ids, options = torch.tensor([prompt]), {"do_sample": False, "max_new_tokens": length, **options}
    found = chat_model.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found[0, len(prompt) :].tolist()


class Echo(ChatModel):
    """Stands in for a ChatModel: answers with the number of the question; a question that holds a word below behaves so."""

    def __init__(self, chat_model, name="echo", context=4096, single=False, system=""):
        self.tokenizer, self.model, self.device = chat_model.tokenizer, chat_model.model, CPU
        self.name, self.context, self.single, self.system, self.seen = name, context, single, system, []

    def answer(self, prompt, options, show):
        text = self.tokenizer.decode(prompt)
        self.seen.append(text)
        stopped = "stop" in text.split("<|im_start|>user")[-1]
        content = "" if stopped and "early" in text else f"答{len(self.seen)}"
        show(content, False)
        end = "Ctrl-C" if stopped else "length" if "long" in text else "stop"
        return Reply(content, "想" if options.thinking else "", 3, 0.5, 5.0, end)


def talk(chat, *lines):
    for line in lines:
        assert chat.handle(line)


def plain(chat):
    return [tuple(message["content"] for message in turn.messages) for turn in chat.turns]
