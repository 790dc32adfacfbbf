"""From the JSON lines that the data scripts wrote to packed token ids, nothing cut and nothing dropped unsaid.

Tokens are made once and kept beside the data in `.tokens/`, as an Arrow file that is mapped into memory: a start takes seconds
and memory does not grow with the rows. The file is sealed (utils/kept.py) with everything that decides the tokens.
"""

import hashlib
import itertools
import json
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import pyarrow
import tokenizers
import transformers
from accelerate import PartialState
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from utils.errors import UserError
from utils.files import atomic_write, id_key, read_jsonl, sha256_of, show_path
from utils.kept import digest, is_kept, seal
from utils.model.chat_format import answer_pieces, encode_pieces, prompt_pieces, without_modes
from utils.model.packing import PackedRows, measure
from utils.text import printable, progress

# Raise it with every change after which the same data would give other tokens (utils/model/chat_format.py, the functions below)
# or other columns: tokens that were kept before it are then made again.
FORMAT = 6
ROWS_AT_ONCE = 1000  # of the data file; 256,000 tokens of usual rows, which take some 50 MB as they are made
MOST_BEFORE = 3  # questions that JOIN_SINGLE puts before another one, at most
FEW = 0.02  # answers with an earlier question, as a share: with fewer, a model is trained on single questions
SCHEMA = pyarrow.schema(
    {
        "line": pyarrow.int64(),  # of the data file, from 0
        "content": pyarrow.uint64(),  # id_key of the row's messages
        "thinking": pyarrow.bool_(),
        "later": pyarrow.bool_(),  # the answer has an earlier question before its own
        "joined": pyarrow.int32(),  # tokens that JOIN_SINGLE has put before it
        "length": pyarrow.int32(),  # tokens, as in utils.model.packing.measure
        "tokens": pyarrow.int32(),
        "trained": pyarrow.int32(),
        # Of an item (utils.model.packing): SFT has one document, DPO two, chosen and rejected.
        "id": pyarrow.string(),
        "documents": pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
    }
)


class Turn(NamedTuple):
    """One item before it is tokens: what stands before the answers, and the answers (SFT: one; DPO: chosen, rejected)."""

    line: int
    row: dict
    before: list[dict]  # messages
    answers: list[dict]  # messages


class Loaded(NamedTuple):
    rows: PackedRows
    thinking: bool  # most of the answers carry reasoning
    conversations: str  # "single" questions, or "several" in a row
    contents: numpy.ndarray  # uint64: one number for each different row of the data


def load_conversations(path: Path, tokenizer, max_length: int, count: int = 0, join: float = 0.0) -> Loaded:
    """The assistant turns of an sft_*.jsonl file, packed into rows.

    Every turn is an item of one document, trained once in the context that chat would give it. Turns of more than
    `max_length` tokens are left out, counted and reported, never cut. `count`: only so many conversations, drawn evenly; `join`: the
    share of single questions that are put behind one to three others (JOIN_SINGLE).
    """
    return _pack(cached_items(path, tokenizer, ["id", "messages"], join, max_length), path, max_length, count)


def load_pairs(path: Path, tokenizer, max_length: int, count: int = 0) -> Loaded:
    """The preference pairs of a dpo_*.jsonl file, packed into rows: items of two documents, chosen and rejected.

    `count`: only so many pairs, drawn evenly. UserError, naming the row, if chosen and rejected are the same or one of them is empty:
    such a pair teaches nothing.
    """
    items = cached_items(path, tokenizer, ["id", "prompt", "chosen", "rejected"])
    return _pack(items, path, max_length, count)


def turns_of(path: Path, line: int, row: dict, pairs: bool) -> list[Turn]:
    """The turns of a row of conversation, or the only one of a pair."""
    if not pairs:
        messages = list(enumerate(row["messages"]))
        answers = [(number, message) for number, message in messages if message["role"] == "assistant"]
        return [Turn(line, row, row["messages"][:number], [message]) for number, message in answers]
    chosen, rejected = row["chosen"][-1], row["rejected"][-1]
    if chosen == rejected or not all(message["content"].strip() for message in (chosen, rejected)):
        raise UserError(
            f"{show_path(path)}, row {row['id']}: chosen and rejected must differ and neither be empty; "
            "make pairs with: python data_prepare/build_preference_pairs.py"
        )
    return [Turn(line, row, row["prompt"], [chosen, rejected])]


def join_single(tokenizer, turns: list[Turn], items: list[dict], join: float, max_length: int) -> None:
    """Put a share of the single questions behind others: rows of one question and one answer, no system text, no reasoning.

    Every answer is trained once, in its own place; the answers before it are only read. The draw depends on the rows alone.
    """
    draw = random.Random(turns[0].row["id"])
    single = [
        place
        for place, turn in enumerate(turns)
        if [message["role"] for message in turn.row["messages"]] == ["user", "assistant"]
        and not turn.answers[0].get("reasoning_content")
    ]
    if len(single) <= MOST_BEFORE or not round(join * len(single)):
        return
    places, joined = draw.sample(single, round(join * len(single))), []
    for place in places:
        count = draw.randint(1, MOST_BEFORE)
        others = [turns[other] for other in draw.sample(single, count + 1) if other != place][:count]
        before = [message for other in others for message in (*other.before, *other.answers)]
        joined.append(turns[place]._replace(before=before + turns[place].before))
    for place, item in zip(places, encode_turns(tokenizer, joined)):
        if item["length"] <= max_length:
            items[place] = item | {"joined": item["tokens"] - items[place]["tokens"]}


def encode_turns(tokenizer, turns: list[Turn]) -> list[dict]:
    """The columns of SCHEMA for each turn."""
    thinking = [bool(turn.answers[0].get("reasoning_content")) for turn in turns]
    texts = []
    for turn, thinks in zip(turns, thinking):
        texts.append(prompt_pieces(tokenizer, turn.before, thinks))
        texts += [answer_pieces(tokenizer, answer) for answer in turn.answers]
    ids, items = iter(encode_pieces(tokenizer, texts)), []
    for turn, thinks in zip(turns, thinking):
        prompt = next(ids)
        documents = [(prompt, next(ids)) for _ in turn.answers]
        length, tokens, trained = measure({"documents": documents})
        says = turn.row.get("messages") or [turn.row["prompt"], turn.row["chosen"]]
        items.append(
            {
                "line": turn.line,
                "content": id_key(json.dumps(says)),
                "thinking": thinks,
                "later": sum(message["role"] == "user" for message in turn.before) > 1,
                "joined": 0,
                "length": length,
                "tokens": tokens,
                "trained": trained,
                "id": turn.row["id"],
                "documents": documents,
            }
        )
    return items


def _pack(items: Dataset, path, max_length, count) -> Loaded:
    """Pack those items that are not too long, of `count` lines (0: all): those that utils.files.sample_by_id draws."""
    line, content, thinking, later, joined, *sizes = (
        items.data.table[name].to_numpy() for name in SCHEMA.names[:8]
    )
    drawn, firsts = numpy.ones(len(items), dtype=bool), numpy.flatnonzero(numpy.diff(line, prepend=-1))
    if 0 < count < len(firsts):
        ids = items.data.table["id"].take(firsts).to_pylist()
        lowest = firsts[sorted(range(len(ids)), key=lambda number: id_key(ids[number]))[:count]]
        drawn = numpy.isin(line, line[lowest])
    lengths = sizes[0][drawn]
    kept = numpy.flatnonzero(drawn & (sizes[0] <= max_length))
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
    chosen = items.select_columns(["id", "documents"]).select(kept)
    rows = PackedRows(chosen, max_length, numpy.stack(sizes, 1)[kept])
    if more := int(joined[kept].sum()):
        print(
            f"{show_path(path)}: {numpy.count_nonzero(joined[kept]):,} of {len(kept):,} questions stand behind one to {MOST_BEFORE} "
            f"others (JOIN_SINGLE), which costs {more:,} tokens, {more / (rows.tokens - more):.0%} more"
        )
    conversations = "several" if later[kept].mean() > FEW else "single"
    return Loaded(rows, bool(thinking[drawn].mean() > 0.5), conversations, numpy.unique(content[kept]))


def tell_shared_rows(train_file: Path, train: Loaded, eval_file: Path, held_out: Loaded) -> None:
    """Print how many of the rows to evaluate on are trained on, too, or that all of them are."""
    shared = len(numpy.intersect1d(train.contents, held_out.contents))
    if eval_file == train_file:
        print(
            "no evaluation file: the loss is measured on rows that are trained, and says only that training works"
        )
    elif shared:
        files = f"{show_path(eval_file)} are in {show_path(train_file)}"
        print(f"note: {shared:,} of the rows of {files}, too: the loss on them says little")


def show_examples(rows: PackedRows, tokenizer, count: int) -> None:
    """Print the first `count` items as the trainer sees them: prompt tokens grey, trained tokens green ([[...]] in a file)."""
    colour = sys.stdout.isatty()
    for number in range(min(count, len(rows.items))):
        for prompt, answer in rows.items[number]["documents"]:
            untrained, trained = (printable(tokenizer.decode(ids)) for ids in (prompt, answer))
            print(f"\033[90m{untrained}\033[32m{trained}\033[0m" if colour else f"{untrained}[[{trained}]]")
            print(f"-- {len(prompt)} tokens of prompt, {len(answer)} trained")


def cached_items(path: Path, tokenizer, wanted: list[str], join: float = 0.0, max_length: int = 0) -> Dataset:
    """All items of a JSON lines file, whose rows have the fields `wanted`: read from what is kept of them, or made and kept.

    Of several processes the main one makes them first. UserError as from read_jsonl and turns_of.
    """
    pairs = "chosen" in wanted
    options = {"fields": wanted, **({"join": join, "max_length": max_length} if join else {})}
    rules = tokenizer.backend_tokenizer.to_str() + without_modes(tokenizer.chat_template)
    identity = {
        "data": sha256_of(path),
        "tokenizer": hashlib.sha256(rules.encode()).hexdigest(),
        "options": options,
        "format": FORMAT,
        "versions": {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__},
    }
    # Tokens of other tokenizers and options stay: their runs may come again. Those of earlier content of the data go.
    lasting = digest([identity["tokenizer"], options])[:12]
    kept = path.parent / ".tokens" / f"{path.name}-{lasting}.arrow"
    with PartialState().main_process_first():
        if not is_kept(kept, identity):
            os.environ["TOKENIZERS_PARALLELISM"] = "true"  # elsewhere one thread: utils.model.folder
            with open(path, "rb") as file:
                count = sum(1 for _ in file)
            rows = progress(f"tokenizing {path.name}", "rows")(read_jsonl(path, wanted), count)
            with atomic_write(kept, "wb") as file, ArrowWriter(schema=SCHEMA, stream=file) as writer:
                for start in range(0, count, ROWS_AT_ONCE):
                    some = enumerate(itertools.islice(rows, ROWS_AT_ONCE), start)
                    turns = [turn for line, row in some for turn in turns_of(path, line, row, pairs)]
                    items = encode_turns(tokenizer, turns)
                    if join:
                        join_single(tokenizer, turns, items, join, max_length)
                    writer.write_table(pyarrow.Table.from_pylist(items, schema=SCHEMA))
                writer.finalize(close_stream=False)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            seal(kept, identity)
        return Dataset.from_file(str(kept))
