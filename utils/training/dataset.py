"""From the JSON lines that the data scripts wrote to token ids that the trainers take, nothing cut and nothing dropped unsaid."""

import sys
from pathlib import Path

import numpy

from utils.errors import UserError
from utils.files import show_path
from utils.model.chat_format import answer_pieces, encode_pieces, prompt_pieces
from utils.model.packing import Chosen, PackedRows, Sizes
from utils.text import printable
from utils.training.token_cache import CachedItems, Encoded, cached_items


def load_conversations(path: Path, tokenizer, max_length: int, count: int = 0) -> tuple[PackedRows, bool]:
    """The assistant turns of an sft_*.jsonl file as PackedRows, and whether most of them think (carry reasoning).

    Every turn is an item of one document, trained once in the context that chat would give it. Turns of more than
    `max_length` tokens are left out, counted and reported, never cut. `count`: only so many conversations, drawn evenly.
    """
    items = cached_items(path, tokenizer, "conversations", ["id", "messages"], encode_conversations)
    return _pack(items, path, max_length, count)


def load_pairs(path: Path, tokenizer, max_length: int, count: int = 0) -> tuple[PackedRows, bool]:
    """The preference pairs of a dpo_*.jsonl file as PackedRows (items of two documents, chosen and rejected), and whether
    most of them think. `count`: only so many pairs, drawn evenly.

    UserError, naming the row, where chosen and rejected are the same or one of them is empty: such a pair teaches nothing.
    """
    items = cached_items(path, tokenizer, "pairs", ["id", "prompt", "chosen", "rejected"], encode_pairs)
    return _pack(items, path, max_length, count)


def encode_conversations(tokenizer, rows: list[dict], name: str) -> list[Encoded]:
    """The assistant turns of these rows, each as an item; the ids are those of utils.model.chat_format.encode_turns.

    `name`: of the file, for messages.
    """
    found, texts = [], []  # found: (row, thinking) of each turn; texts: prompts and answers in turn
    for number, row in enumerate(rows):
        for turn, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                thinking = bool(message.get("reasoning_content"))
                found.append((number, thinking))
                texts.append(prompt_pieces(tokenizer, row["messages"][:turn], thinking))
                texts.append(answer_pieces(tokenizer, message))
    ids = encode_pieces(tokenizer, texts)
    return [
        Encoded(*turn, prompt, [answer])
        for turn, prompt, answer in zip(found, ids[::2], ids[1::2], strict=True)
    ]


def encode_pairs(tokenizer, rows: list[dict], name: str) -> list[Encoded]:
    """These pairs, each as an item of two answers. `name`: of the file, for messages."""
    found, texts = [], []  # texts: prompt, chosen and rejected in turn
    for number, row in enumerate(rows):
        answers = [row[side][-1] for side in ("chosen", "rejected")]
        if answers[0] == answers[1] or not all(answer["content"].strip() for answer in answers):
            raise UserError(
                f"{name}, row {row['id']}: chosen and rejected must differ and neither be empty; "
                "make pairs with: python data_prepare/build_preference_pairs.py"
            )
        thinking = bool(answers[0].get("reasoning_content"))
        found.append((number, thinking))
        texts.append(prompt_pieces(tokenizer, row["prompt"], thinking))
        texts += [answer_pieces(tokenizer, answer) for answer in answers]
    ids = encode_pieces(tokenizer, texts)
    return [
        Encoded(*pair, prompt, answers)
        for pair, prompt, *answers in zip(found, ids[::3], ids[1::3], ids[2::3], strict=True)
    ]


def _pack(items: CachedItems, path, max_length, count):
    drawn = items.drawn_lines(count)
    lengths = items.sizes.lengths[drawn]
    kept = numpy.flatnonzero(drawn & (items.sizes.lengths <= max_length))
    if len(kept) < len(lengths):
        enough = int(numpy.sort(lengths)[int(0.99 * (len(lengths) - 1))])
        print(
            f"{show_path(path)}: {len(lengths) - len(kept):,} of {len(lengths):,} are longer than MAX_LENGTH = {max_length} tokens "
            f"and are set aside (longest {lengths.max():,}; --max-length {enough} keeps 99 %)"
        )
    if not len(kept):
        raise UserError(
            f"{show_path(path)}: no row fits into MAX_LENGTH = {max_length} tokens; the shortest needs {lengths.min()}"
        )
    sizes = Sizes(*(part[kept] for part in items.sizes))
    rows = PackedRows(Chosen(items, kept), max_length, sizes, items.keys[kept])
    return rows, bool(items.thinking[drawn].mean() > 0.5)


def show_examples(rows: PackedRows, tokenizer, count: int) -> None:
    """Print the first `count` items as the trainer sees them: prompt tokens grey, trained tokens green ([[...]] in a file)."""
    colour = sys.stdout.isatty()
    for number in range(min(count, len(rows.items))):
        for prompt, answer in rows.items[number]["documents"]:
            untrained, trained = (printable(tokenizer.decode(ids)) for ids in (prompt, answer))
            print(f"\033[90m{untrained}\033[32m{trained}\033[0m" if colour else f"{untrained}[[{trained}]]")
            print(f"-- {len(prompt)} tokens of prompt, {len(answer)} trained")
