"""Training tokens, made once and kept beside the data: an Arrow file that is mapped into memory, so that a start takes seconds.

`<data folder>/.tokens/<data file>-<key>.arrow` holds one row an item (SFT: an assistant turn, DPO: a pair). The .json beside it is
written last: it holds the identity that the tokens were made for (content of the data file, tokenizer, template, versions) and a
checksum, and both are compared at every start. Tokens of other data, and damaged ones, are made again. The tokenizer shares
its work among the cores by threads of its own: no worker process has to start, load it, and hold it in memory.
"""

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import tokenizers
import torch
import transformers
import xxhash
from accelerate import PartialState
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from utils.errors import RunError, UserError
from utils.files import (
    atomic_write,
    id_key,
    prepare_folder,
    read_json,
    read_jsonl,
    sha256_of,
    show_path,
    write_json,
)
from utils.model.chat_format import without_modes
from utils.model.packing import Item, Sizes
from utils.text import progress

# Raise it with every change after which the same data would give other tokens (utils/model/chat_format.py, the encoders in
# dataset.py) or other columns: tokens that were kept before it are then made again.
FORMAT = 1
FOLDER = ".tokens"
ROWS_AT_ONCE = (
    1000  # of the data file; 256,000 tokens of usual rows, which take some 50 MB while they are made
)

_TOKENS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    {
        "line": pyarrow.int64(),  # of the data file, from 0
        "id": pyarrow.string(),
        "key": pyarrow.uint64(),  # id_key(id)
        "thinking": pyarrow.bool_(),
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
    prompt: list[int]
    answers: list[list[int]]


class CachedItems(Sequence):
    """All items of a data file, in its order. Tokens are read from disk when an item is asked for; the arrays are in memory."""

    def __init__(self, path: Path, keep: Any = None):
        self._dataset = Dataset.from_file(str(path))
        self._keep = keep  # a temporary folder, which lives as long as this
        self.lines, self.keys, self.thinking, prompts, answers, documents = (
            self._dataset.data.column(name).to_numpy()
            for name in ("line", "key", "thinking", "prompt_tokens", "answer_tokens", "documents")
        )
        # The answers to one prompt share all of it but its last token, which is fed once for each answer; the last token of an
        # answer is not fed (utils.model.packing.item_length).
        self.sizes = Sizes(prompts - 1 + answers, prompts * documents + answers, answers)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Item:
        row = self._dataset[index]
        return {"id": row["id"], "documents": [(row["prompt"], answer) for answer in row["answers"]]}

    def drawn_lines(self, count: int) -> numpy.ndarray:
        """(items,) whether each item is of one of the `count` lines (0: all) that utils.files.sample_by_id draws."""
        firsts = numpy.flatnonzero(numpy.diff(self.lines, prepend=-1))
        if not count or count >= len(firsts):
            return numpy.ones(len(self), dtype=bool)
        drawn = firsts[numpy.argsort(self.keys[firsts], kind="stable")[:count]]
        return numpy.isin(self.lines, self.lines[drawn])


Encoder = Callable[[Any, list[dict], str], list[Encoded]]  # (tokenizer, rows, name of the file for messages)


def cached_items(path: Path, tokenizer, kind: str, wanted: Sequence[str], encode: Encoder) -> CachedItems:
    """The items that `encode` makes of the rows of a JSON lines file: read from what is kept of them, or made and kept.

    `kind` names what `encode` does, and `wanted` the fields that it needs. Where nothing can be kept beside the data (read-only
    folder, full disk), that is said, and the tokens are in a temporary folder until this process ends. Of several processes
    the main one makes them first. UserError as from read_jsonl and from `encode`.
    """
    identity = _identity(path, tokenizer, kind)
    kept = path.parent / FOLDER / f"{path.name}-{_short(identity)}.arrow"
    with _main_process_first():
        damage = _damage(kept, identity)
        if damage is None:
            return CachedItems(kept)
        if reason := damage or _what_changed(kept, path, identity):
            print(f"{reason}; making the tokens again", flush=True)
        try:
            prepare_folder(kept.parent)
            _write(kept, path, identity, tokenizer, wanted, encode)
        except OSError as error:
            why = error.strerror or error
            print(f"no tokens are kept in {show_path(kept.parent)} ({why}); every start makes them anew")
            # a mapped file cannot be removed on Windows: it stays where temporary files are
            place = tempfile.TemporaryDirectory(prefix="tokens-", ignore_cleanup_errors=True)
            temporary = Path(place.name) / kept.name
            _write(temporary, path, identity, tokenizer, wanted, encode)
            return CachedItems(temporary, place)
        _remove_old(kept, path, identity)
        return CachedItems(kept)


def _identity(path: Path, tokenizer, kind: str) -> dict[str, Any]:
    """Everything that decides the tokens."""
    rules = tokenizer.backend_tokenizer.to_str() + without_modes(tokenizer.chat_template)
    return {
        "data": f"sha256 {sha256_of(path)}",
        "tokenizer": f"sha256 {hashlib.sha256(rules.encode()).hexdigest()}",
        "kind": kind,
        "format": FORMAT,
        "versions": {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__},
    }


def _short(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _damage(kept: Path, identity: dict[str, Any]) -> str | None:
    """None: the tokens are there and whole; "": they are not there; else what is wrong with them."""
    if not kept.is_file() or not _record_of(kept).is_file():  # without its record it was never finished
        return ""
    if _read_record(kept) != _record(kept, identity):
        return f"{show_path(kept)} is damaged"
    return None


def _record_of(kept: Path) -> Path:
    return kept.with_suffix(".json")


def _record(kept: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The record of tokens as they are now."""
    return {"identity": identity, "xxh3_128": _checksum(kept)}


def _read_record(kept: Path) -> dict[str, Any]:
    """What the record says; {} where it is not as we write it."""
    try:
        record = read_json(_record_of(kept))
    except (UserError, OSError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("identity"), dict) else {}


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(kept, path, identity, tokenizer, wanted, encode):
    """Make the tokens; `kept` and its record appear when they are whole, the record last."""
    with open(path, "rb") as file:
        count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    rows = progress(f"tokenizing {path.name}", "rows")(read_jsonl(path, wanted), count)
    with atomic_write(kept, "wb") as file, _all_cores():
        with ArrowWriter(schema=SCHEMA, stream=file) as writer:
            for start in itertools.count(0, ROWS_AT_ONCE):
                batch = list(itertools.islice(rows, ROWS_AT_ONCE))
                if not batch:
                    break
                writer.write_table(_as_table(batch, start, encode(tokenizer, batch, show_path(path))))
            writer.finalize(close_stream=False)
        if identity["data"] != f"sha256 {sha256_of(path)}":
            raise RunError(f"{show_path(path)} was changed while it was read; run the same command again")
    write_json(_record_of(kept), _record(kept, identity))


def _as_table(batch: list[dict], start: int, items: list[Encoded]) -> pyarrow.Table:
    ids = [batch[item.row]["id"] for item in items]
    columns = {
        "line": [start + item.row for item in items],
        "id": [name.encode("utf-8", "replace").decode() for name in ids],
        "key": list(map(id_key, ids)),
        "thinking": [item.thinking for item in items],
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


def _others(kept: Path, path: Path) -> Iterator[Path]:
    """What is kept of the same data file for another identity."""
    return (
        other
        for other in kept.parent.glob("*.arrow")
        if other.stem.rpartition("-")[0] == path.name and other != kept
    )


def _what_changed(kept: Path, path: Path, identity: dict[str, Any]) -> str:
    """Why tokens that were kept before are of no use now; "" where there are none."""
    for other in _others(kept, path):
        before = _read_record(other).get("identity", {})
        changed = [name for name in identity if before.get(name) != identity[name]]
        return f"tokens of {show_path(path)} were kept for other {', '.join(changed)}"
    return ""


def _remove_old(kept: Path, path: Path, identity: dict[str, Any]) -> None:
    """Remove what was kept of earlier content of the data file. Tokens of other tokenizers stay: their runs may come again."""
    for other in _others(kept, path):
        before = _read_record(other).get("identity", {})
        if {**before, "tokenizer": ""} != {**identity, "tokenizer": ""}:
            with contextlib.suppress(PermissionError):  # on Windows, while a run has it mapped
                other.unlink(missing_ok=True)
                _record_of(other).unlink(missing_ok=True)


@contextlib.contextmanager
def _main_process_first() -> Iterator[None]:
    """Of processes that were started together, the main one runs the block first."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    with PartialState().main_process_first() if together else contextlib.nullcontext():
        yield
