"""From the JSON lines that the data scripts wrote to token ids that the trainers take, nothing cut and nothing dropped unsaid."""

import sys
from pathlib import Path

from utils.errors import UserError
from utils.files import read_jsonl, sample_by_id, show_path
from utils.model.batching import PackedRows, item_length
from utils.model.chat_format import encode_answer, encode_prompt, encode_turns
from utils.progress import progress
from utils.text import printable


def load_conversations(path: Path, tokenizer, max_length: int, count: int = 0) -> tuple[PackedRows, bool]:
    """The assistant turns of an sft_*.jsonl file as PackedRows, and whether most of them think (carry reasoning).

    Every turn is an item of one document, trained once in the context that chat would give it. Turns of more than
    `max_length` tokens are left out, counted and reported, never cut. `count`: only so many conversations, drawn evenly.
    """
    items, thoughtful = [], 0
    rows = sample_by_id(list(read_jsonl(path, wanted=["id", "messages"])), count)
    for row in progress(f"tokenizing {path.name}", "rows")(rows):
        for turn in encode_turns(tokenizer, row["messages"]):
            items.append({"id": row["id"], "documents": [turn]})
        thoughtful += sum(bool(message.get("reasoning_content")) for message in row["messages"])
    return _pack(items, path, max_length), thoughtful * 2 > len(items)


def load_pairs(path: Path, tokenizer, max_length: int, count: int = 0) -> tuple[PackedRows, bool]:
    """The preference pairs of a dpo_*.jsonl file as PackedRows (items of two documents, chosen and rejected), and whether
    most of them think. `count`: only so many pairs, drawn evenly.

    UserError, naming the row, where chosen and rejected are the same or one of them is empty: such a pair teaches nothing.
    """
    items, thoughtful = [], 0
    rows = sample_by_id(list(read_jsonl(path, wanted=["id", "prompt", "chosen", "rejected"])), count)
    for row in progress(f"tokenizing {path.name}", "pairs")(rows):
        answers = [row[side][-1] for side in ("chosen", "rejected")]
        if answers[0] == answers[1] or not all(answer["content"].strip() for answer in answers):
            raise UserError(
                f"{show_path(path)}, row {row['id']}: chosen and rejected must differ and neither be empty; "
                "make pairs with: python data_prepare/build_preference_pairs.py"
            )
        thinking = bool(answers[0].get("reasoning_content"))
        thoughtful += thinking
        prompt = encode_prompt(tokenizer, row["prompt"], thinking)
        items.append(
            {"id": row["id"], "documents": [(prompt, encode_answer(tokenizer, answer)) for answer in answers]}
        )
    return _pack(items, path, max_length), thoughtful * 2 > len(items)


def _pack(items, path, max_length):
    lengths = sorted(map(item_length, items))
    kept = [item for item in items if item_length(item) <= max_length]
    if len(kept) < len(items):
        enough = lengths[int(0.99 * (len(lengths) - 1))]
        print(
            f"{show_path(path)}: {len(items) - len(kept):,} of {len(items):,} are longer than MAX_LENGTH = {max_length} tokens and "
            f"are set aside (longest {lengths[-1]:,}; --max-length {enough} keeps 99 %)"
        )
    if not kept:
        raise UserError(
            f"{show_path(path)}: no row fits into MAX_LENGTH = {max_length} tokens; the shortest needs {lengths[0]}"
        )
    return PackedRows(kept, max_length)


def show_examples(rows: PackedRows, tokenizer, count: int) -> None:
    """Print the first `count` items as the trainer sees them: prompt tokens grey, trained tokens green ([[...]] in a file)."""
    colour = sys.stdout.isatty()
    for item in rows.items[:count]:
        for prompt, answer in item["documents"]:
            untrained, trained = (printable(tokenizer.decode(ids)) for ids in (prompt, answer))
            print(f"\033[90m{untrained}\033[32m{trained}\033[0m" if colour else f"{untrained}[[{trained}]]")
            print(f"-- {len(prompt)} tokens of prompt, {len(answer)} trained")
