"""For tests of the evaluation: questions, files of them, and scores computed the slow way, one sequence at a time."""

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_finetune import compare_models
from utils.device import Device
from utils.errors import run
from utils.files import write_jsonl
from utils.model.qwen3_train import prepare_packed

CPU = Device("cpu", False, "test")
OPTIONS = {"A": "温", "B": "大寒", "C": "平", "D": "微温而辛"}
NAMES = "麻黄 桂枝 甘草 人参 黄芪 当归 川芎 白芍 茯苓 白术".split()
EXAM = [
    {"id": f"{n}", "question": f"{name}的药性是什么？", "answer": "ABCD"[n % 4], "options": OPTIONS, "subject": "中药"}
    for n, name in enumerate(NAMES)
]  # fmt: skip
JUDGED = [
    {"id": f"judged {n}", "question": f"{herb}性温。", "options": dict(zip("AB", words)), "answer": answer, "subject": "中药",
     "kind": "true_false"}
    for n, (herb, words, answer) in enumerate([("麻黄", "对错", "A"), ("石膏", ("正确", "错误"), "B")])
]  # fmt: skip
SEVERAL = {"id": "several", "question": "哪些药性温？", "options": OPTIONS, "answer": "AD", "subject": "", "kind": "multiple"}  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# A question to which one answer brings a caution.
ASKED = [user("麻黄有哪些功效？")]
WITH, WITHOUT = "麻黄的功效是发汗解表。使用注意：孕妇慎用。", "麻黄的功效是发汗解表。"


# ---- An independent path: one sequence at a time, full logits, no packing, prompts written out here


def load_plain(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model


def load_packed(folder):
    return prepare_packed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def prompt_of(tokenizer, question):
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return tokenizer(text)["input_ids"]


def alone(model, prompt, answer):
    """Log-probability of `answer` after `prompt` (lists of ids)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def letters_alone(tokenizer, model, item):
    """[{own letter: log-probability}, ...] for the four rotations of an exam item."""
    rotations = []
    for start in range(4):
        own = ["ABCD"[(start + place) % 4] for place in range(4)]
        lines = "".join(f"{letter}. {item['options'][one]}\n" for letter, one in zip("ABCD", own))
        asked = f"以下是关于{item['subject']}的单项选择题，请直接给出正确答案的选项。\n\n题目：{item['question']}\n"
        prompt = prompt_of(tokenizer, f"{asked}{lines}答案是：")
        with torch.no_grad():
            logps = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        ids = tokenizer.convert_tokens_to_ids([*"ABCD"])
        rotations.append({one: logps[number].item() for one, number in zip(own, ids)})
    return rotations


# ---- The script and its files


def make_arguments(folder):
    """Ten held-out rows, questions of all kinds and pairs as files in `folder`; the arguments that name them."""
    answer, rows, pairs = "药性是温。", [], []
    for item in EXAM:
        rows.append({"id": item["id"], "messages": [user(item["question"]), assistant(answer)]})
    told = [([user(item["question"])], answer, "寒。") for item in EXAM]
    for prompt, good, bad in [*told, (ASKED, WITH, WITHOUT), (ASKED, WITHOUT, WITH)]:
        sides = {"chosen": [assistant(good)], "rejected": [assistant(bad)]}
        pairs.append({"id": str(len(pairs)), "prompt": prompt, **sides, "kind": ""})
    arguments = ["--output-dir", folder / "out", *"--max-new-tokens 6 --device cpu --precision fp32".split()]
    for name, lines in {"eval": rows, "exam": [*EXAM, SEVERAL, *JUDGED], "pairs": pairs}.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
        arguments += [f"--{name}-file", folder / f"{name}.jsonl"]
    return arguments


def compare(*arguments):
    return run(lambda: compare_models.main([*map(str, arguments)]))
