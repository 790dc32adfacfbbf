"""From the JSON lines that the data scripts wrote to packed token ids, nothing cut and nothing dropped unsaid.

Tokens are made once and kept beside the data in `.tokens/`, as an Arrow file that is mapped into memory: a start takes seconds
and memory does not grow with the rows. The file is sealed (utils/kept.py) with everything that decides the tokens: content of
the data file, tokenizer, template, versions.
"""

import contextlib
import hashlib
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import tokenizers
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from utils.errors import RunError, UserError
from utils.files import atomic_write, id_key, prepare_folder, read_jsonl, sha256_of, show_path
from utils.kept import digest, is_kept, record_path, seal
from utils.model.chat_format import answer_pieces, encode_pieces, prompt_pieces, without_modes
from utils.model.packing import Chosen, Item, PackedRows, Sizes
from utils.text import printable, progress

# Raise it with every change after which the same data would give other tokens (utils/model/chat_format.py, the encoders below)
# or other columns: tokens that were kept before it are then made again.
FORMAT = 2
FOLDER = ".tokens"
ROWS_AT_ONCE = (
    1000  # of the data file; 256,000 tokens of usual rows, which take some 50 MB while they are made
)
MOST_BEFORE = 3  # questions that JOIN_SINGLE puts before another one, at most
FEW = 0.02  # answers with an earlier question, as a share: with fewer, a model is trained on single questions

_TOKENS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    {
        "line": pyarrow.int64(),  # of the data file, from 0
        "id": pyarrow.string(),
        "key": pyarrow.uint64(),  # id_key(id)
        "thinking": pyarrow.bool_(),
        "later": pyarrow.bool_(),  # the answer has an earlier question before its own
        "joined_tokens": pyarrow.int32(),  # of the questions and answers that JOIN_SINGLE has put before it
        "prompt_tokens": pyarrow.int32(),
        "answer_tokens": pyarrow.int32(),  # of all answers
        "documents": pyarrow.int32(),
        "prompt": _TOKENS,
        "answers": pyarrow.list_(_TOKENS),  # SFT: one; DPO: chosen, rejected
    }
)


class Encoded(NamedTuple):
    """An item as it is kept: `row` is the number of its row among the rows that were given together."""

    row: int
    thinking: bool
    later: bool
    joined_tokens: int
    prompt: list[int]
    answers: list[list[int]]


class Loaded(NamedTuple):
    rows: PackedRows
    thinking: bool  # most of the answers carry reasoning
    conversations: str  # "single" questions, or "several" in a row


def load_conversations(path: Path, tokenizer, max_length: int, count: int = 0, join: float = 0.0) -> Loaded:
    """The assistant turns of an sft_*.jsonl file, packed into rows.

    Every turn is an item of one document, trained once in the context that chat would give it. Turns of more than
    `max_length` tokens are left out, counted and reported, never cut. `count`: only so many conversations, drawn evenly; `join`: the
    share of single questions that are put behind one to three others (JOIN_SINGLE).
    """

    def encode(rows: list[dict], name: str) -> list[Encoded]:
        return encode_conversations(tokenizer, rows, join, max_length)

    options = {"join": join, "max_length": max_length} if join else {}
    items = cached_items(path, tokenizer, {"kind": "conversations", **options}, ["id", "messages"], encode)
    return _pack(items, path, max_length, count)


def load_pairs(path: Path, tokenizer, max_length: int, count: int = 0) -> Loaded:
    """The preference pairs of a dpo_*.jsonl file, packed into rows: items of two documents, chosen and rejected.

    `count`: only so many pairs, drawn evenly. UserError, naming the row, if chosen and rejected are the same or one of them is empty:
    such a pair teaches nothing.
    """

    def encode(rows: list[dict], name: str) -> list[Encoded]:
        return encode_pairs(tokenizer, rows, name)

    items = cached_items(path, tokenizer, {"kind": "pairs"}, ["id", "prompt", "chosen", "rejected"], encode)
    return _pack(items, path, max_length, count)


def encode_conversations(tokenizer, rows: list[dict], join: float, max_length: int) -> list[Encoded]:
    """The assistant turns of these rows, each as an item; the ids are those of utils.model.chat_format.encode_turns."""
    found, texts = [], []  # found: (row, thinking, later) of each turn; texts: prompts and answers in turn
    for number, row in enumerate(rows):
        for turn, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                thinking, before = bool(message.get("reasoning_content")), row["messages"][:turn]
                later = sum(message["role"] == "user" for message in before) > 1
                found.append((number, thinking, later))
                texts += [prompt_pieces(tokenizer, before, thinking), answer_pieces(tokenizer, message)]
    ids = encode_pieces(tokenizer, texts)
    items = [
        Encoded(*turn, 0, prompt, [answer])
        for turn, prompt, answer in zip(found, ids[::2], ids[1::2], strict=True)
    ]
    return _join_single(tokenizer, rows, items, join, max_length) if join else items


def _join_single(tokenizer, rows, items, join, max_length):
    """Put one to three other questions with their answers before a share of the single ones, as far as they fit into a row.

    Only rows that nothing ties to a place: one question, one answer, no system text, no reasoning. Every answer is trained
    once, in its own place; the answers before it are only read. The draw depends on the rows alone.
    """
    draw = random.Random(rows[0]["id"])
    single = [
        number
        for number, row in enumerate(rows)
        if [message["role"] for message in row["messages"]] == ["user", "assistant"]
        and not row["messages"][1].get("reasoning_content")
    ]
    later = set(draw.sample(single, round(join * len(single)))) if len(single) > MOST_BEFORE else set()
    places = [place for place, item in enumerate(items) if item.row in later]
    if not places:
        return items
    texts = []
    for place in places:
        row, count = items[place].row, draw.randint(1, MOST_BEFORE)
        others = [other for other in draw.sample(single, count + 1) if other != row][:count]
        before = [message for other in others for message in rows[other]["messages"]]
        texts.append(prompt_pieces(tokenizer, [*before, rows[row]["messages"][0]], False))
    for place, prompt in zip(places, encode_pieces(tokenizer, texts), strict=True):
        item = items[place]
        if len(prompt) + len(item.answers[0]) - 1 <= max_length:
            more = len(prompt) - len(item.prompt)
            items[place] = item._replace(later=True, joined_tokens=more, prompt=prompt)
    return items


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
        later = sum(message["role"] == "user" for message in row["prompt"]) > 1
        found.append((number, thinking, later))
        texts.append(prompt_pieces(tokenizer, row["prompt"], thinking))
        texts += [answer_pieces(tokenizer, answer) for answer in answers]
    ids = encode_pieces(tokenizer, texts)
    return [
        Encoded(*pair, 0, prompt, answers)
        for pair, prompt, *answers in zip(found, ids[::3], ids[1::3], ids[2::3], strict=True)
    ]


def _pack(items: "CachedItems", path, max_length, count) -> Loaded:
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
    if joined := int(numpy.count_nonzero(items.joined_tokens[kept])):
        more = int(items.joined_tokens[kept].sum())
        print(
            f"{show_path(path)}: {joined:,} of {len(kept):,} questions stand behind one to {MOST_BEFORE} others (JOIN_SINGLE), "
            f"which costs {more:,} tokens, {more / (rows.tokens - more):.0%} more"
        )
    conversations = "several" if items.later[kept].mean() > FEW else "single"
    return Loaded(rows, bool(items.thinking[drawn].mean() > 0.5), conversations)


def show_examples(rows: PackedRows, tokenizer, count: int) -> None:
    """Print the first `count` items as the trainer sees them: prompt tokens grey, trained tokens green ([[...]] in a file)."""
    colour = sys.stdout.isatty()
    for number in range(min(count, len(rows.items))):
        for prompt, answer in rows.items[number]["documents"]:
            untrained, trained = (printable(tokenizer.decode(ids)) for ids in (prompt, answer))
            print(f"\033[90m{untrained}\033[32m{trained}\033[0m" if colour else f"{untrained}[[{trained}]]")
            print(f"-- {len(prompt)} tokens of prompt, {len(answer)} trained")


# ---- The token cache


class CachedItems(Sequence):
    """All items of a data file, in its order. Tokens are read from disk when an item is asked for; the arrays are in memory."""

    def __init__(self, path: Path, keep: Any = None):
        self._dataset = Dataset.from_file(str(path))
        self._keep = keep  # a temporary folder, which lives as long as this
        names = "line key thinking later joined_tokens prompt_tokens answer_tokens documents".split()
        columns = (self._dataset.data.column(name).to_numpy() for name in names)
        self.lines, self.keys, self.thinking, self.later, self.joined_tokens, *sizes = columns
        prompts, answers, documents = sizes
        # The answers to one prompt share all of it but its last token, which is fed once for each answer; the last token of an
        # answer is not fed (utils.model.packing.item_length).
        self.sizes = Sizes(prompts - 1 + answers, prompts * documents + answers, answers)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Item:
        row = self._dataset[index]
        return {"id": row["id"], "documents": [(row["prompt"], answer) for answer in row["answers"]]}

    def drawn_lines(self, count: int) -> numpy.ndarray:
        """(items,) bool: the items of the `count` lines (0: all) that utils.files.sample_by_id draws."""
        firsts = numpy.flatnonzero(numpy.diff(self.lines, prepend=-1))
        if not count or count >= len(firsts):
            return numpy.ones(len(self), dtype=bool)
        drawn = firsts[numpy.argsort(self.keys[firsts], kind="stable")[:count]]
        return numpy.isin(self.lines, self.lines[drawn])


def cached_items(
    path: Path,
    tokenizer,
    options: dict[str, Any],
    wanted: Sequence[str],
    encode: Callable[[list[dict], str], list[Encoded]],
) -> CachedItems:
    """The items that `encode` makes of the rows of a JSON lines file: read from what is kept of them, or made and kept.

    `options` names what `encode` does, and `wanted` the fields that it needs. If nothing can be kept beside the data (read-only
    folder, full disk), that is said, and the tokens are in a temporary folder until this process ends. Of several processes
    the main one makes them first. UserError as from read_jsonl and from `encode`.
    """
    rules = tokenizer.backend_tokenizer.to_str() + without_modes(tokenizer.chat_template)
    identity = {
        "data": sha256_of(path),
        "tokenizer": hashlib.sha256(rules.encode()).hexdigest(),
        "options": options,
        "format": FORMAT,
        "versions": {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__},
    }
    # Tokens of other tokenizers and options stay: their runs may come again. Those of earlier content of the data go.
    lasting = digest({name: identity[name] for name in ("tokenizer", "options")})[:12]
    kept = path.parent / FOLDER / f"{path.name}-{lasting}.arrow"
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    with PartialState().main_process_first() if together else contextlib.nullcontext():
        if is_kept(kept, identity):
            return CachedItems(kept)
        try:
            prepare_folder(kept.parent)
            _write(kept, path, wanted, encode, identity)
            return CachedItems(kept)
        except OSError as error:
            why = error.strerror or error
            print(f"no tokens are kept in {show_path(kept.parent)} ({why}); every start makes them anew")
        # a mapped file cannot be removed on Windows: it stays where temporary files are
        place = tempfile.TemporaryDirectory(prefix="tokens-", ignore_cleanup_errors=True)
        temporary = Path(place.name) / kept.name
        _write(temporary, path, wanted, encode, identity)
        return CachedItems(temporary, place)


def _write(kept, path, wanted, encode, identity):
    """Make the tokens; `kept` and its record appear when they are whole, the record last."""
    record_path(kept).unlink(missing_ok=True)
    with open(path, "rb") as file:
        count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    rows, read = progress(f"tokenizing {path.name}", "rows")(read_jsonl(path, wanted), count), 0
    with atomic_write(kept, "wb") as file, _all_cores():
        with ArrowWriter(schema=SCHEMA, stream=file) as writer:
            for start in itertools.count(0, ROWS_AT_ONCE):
                batch = list(itertools.islice(rows, ROWS_AT_ONCE))
                read += len(batch)
                if not batch:
                    break
                writer.write_table(_as_table(batch, start, encode(batch, show_path(path))))
            writer.finalize(close_stream=False)
        if read < count or identity["data"] != sha256_of(path):
            raise RunError(f"{show_path(path)} was changed while it was read; run the same command again")
    seal(kept, identity)


def _as_table(batch: list[dict], start: int, items: list[Encoded]) -> pyarrow.Table:
    ids = [batch[item.row]["id"] for item in items]
    columns = {
        "line": [start + item.row for item in items],
        "id": [name.encode("utf-8", "replace").decode() for name in ids],
        "key": list(map(id_key, ids)),
        **{name: [getattr(item, name) for item in items] for name in ("thinking", "later", "joined_tokens")},
        "prompt_tokens": [len(item.prompt) for item in items],
        "answer_tokens": [sum(map(len, item.answers)) for item in items],
        "documents": [len(item.answers) for item in items],
        "prompt": [item.prompt for item in items],
        "answers": [item.answers for item in items],
    }
    return pyarrow.Table.from_pydict(columns, schema=SCHEMA)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use threads for the block; elsewhere utils.model.folder keeps it to one."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
