"""Rows for the tests of training tokens, and the items that chat's own path makes of them."""

import random

from utils.files import read_jsonl
from utils.model.chat_format import encode_turns

WORDS = "麻黄 桂枝 <think> 甘草 <|im_end|> 人参 白术\n\n 茯苓 黄芪 🌿 温。"


def some_rows(count, seed=0):
    """Conversations of one to three turns, some with a system text, some with reasoning, some with typed control tokens."""
    draw, rows = random.Random(seed), []

    def text():
        return " ".join(draw.choices(WORDS.split(" "), k=draw.randint(1, 30)))

    for number in range(count):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text()})
            messages.append({"role": "assistant", "content": text()})
            if draw.random() < 0.5:
                messages[-1]["reasoning_content"] = text()
        rows.append({"id": f"{seed}-{number}", "messages": messages})
    return rows


def some_pairs(count):
    pairs = []
    for row in some_rows(count, seed=1):
        *prompt, chosen = row["messages"]
        rejected = {"role": "assistant", "content": f"不知道{row['id']}"}
        pairs.append({"id": row["id"], "prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return pairs


def items_of(rows):
    return [
        {"id": item["id"], "documents": [tuple(document) for document in item["documents"]]}
        for item in rows.items
    ]


def direct(path, tokenizer):
    """The items as chat's own path encodes them, in a list."""
    return [
        {"id": row["id"], "documents": [turn]}
        for row in read_jsonl(path)
        for turn in encode_turns(tokenizer, row["messages"])
    ]
