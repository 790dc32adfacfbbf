"""Packing: many short documents in one row of tokens, without padding and without one seeing another.

A *document* is a prompt and its answer. An *item* is what must stay together: one document for SFT, the chosen and the rejected
one for DPO, the options of an exam question. The documents of an item that answer the same prompt form one *shared-prefix
group*: its branches see the prompt and themselves, not one another. Items are packed once, before training, into rows of at
most `max_length` tokens, so that a resumed run finds the same rows. The trainer shuffles rows, never their content.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import numpy
import torch
from numpy import ndarray

from utils.device import Device
from utils.errors import UserError

ROUNDED = 64  # tokens
Document = tuple[list[int], list[int]]  # token ids of a prompt and of its answer
GroupShape = tuple[int, ...]  # tokens of a group's shared prefix, then tokens of each of its branches


class Item(TypedDict):
    """What must stay together in a row. Numbers for the loss, such as "reference_chosen", may stand beside these."""

    documents: list[Document]
    id: NotRequired[str]  # for messages


class PackedBatch(TypedDict):
    """The rows of one forward pass, joined into T tokens with N labels. Further numbers of items are float32 tensors (items,)."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, from 0 in each document
    label_positions: torch.Tensor  # (N,) int64: the positions that predict a trained token
    layout: list[GroupShape]  # the groups in the order in which they stand, T tokens together
    row_length: int  # of rows padded to one length; 0 where they are joined without padding
    targets: torch.Tensor  # (N,) int64: the tokens to predict there
    label_documents: torch.Tensor  # (N,) int64: each label's document, counted through the items in order
    ids: list[str | None]


def pack(lengths: Sequence[int] | ndarray, max_length: int, seed: int = 0) -> list[list[int]]:
    """Pack items of these lengths (tokens, each at most max_length) into rows: lists of item numbers.

    In a random order that `seed` fixes, each goes to the fullest row that still holds it; of equally full ones, to the one that
    was filled last. Longest first would fill a little better, but then a row holds one kind: the model learns far less from it.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    lengths = numpy.asarray(lengths).tolist()
    shortest = min(lengths, default=0)
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int, int]] = []  # sorted: (tokens left, -step that filled it last, number)
    for step, item in enumerate(order):
        place = bisect.bisect_left(open_rows, (lengths[item],))
        if place == len(open_rows):
            rows.append([])
        left, _, row = open_rows.pop(place) if place < len(open_rows) else (max_length, 0, len(rows) - 1)
        rows[row].append(item)
        if left - lengths[item] >= shortest:
            bisect.insort(open_rows, (left - lengths[item], -step, row))
    return rows


class PackedRows:
    """Rows of packed items; an element is the list of items of one row, read when it is asked for.

    `lengths`: tokens of each item in a row; `tokens` and `trained_tokens` count over all documents, each by itself; `numbers`:
    further numbers of the items for the loss, {"reference_chosen": (items,) array, ...}.
    """

    def __init__(self, items: Sequence[Item], max_length: int, sizes: ndarray | None = None):
        """`sizes`: (items, 3), by measure, if they are known."""
        if sizes is None:
            sizes = numpy.array([measure(item) for item in items], dtype=numpy.int32).reshape(-1, 3)
        self.items, self.max_length, self.lengths = items, max_length, sizes[:, 0]
        self.tokens, self.trained_tokens = sizes[:, 1:].sum(0).tolist()
        self.rows = pack(self.lengths, max_length)
        self.numbers: dict[str, ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Item]:
        numbers = self.numbers.items()
        return [
            self.items[item] | {name: float(values[item]) for name, values in numbers}
            for item in self.rows[index]
        ]

    def even_out(self, count: int) -> None:
        """Split the rows of most items until `count` processes can share them. UserError if there are not as many items."""
        while len(self.rows) % count:
            longest = max(self.rows, key=len)
            if len(longest) == 1:
                examples = f"{len(self.items)} examples"
                raise UserError(f"{examples} cannot be shared out evenly among {count} processes; use fewer")
            self.rows.append(longest[len(longest) // 2 :])
            del longest[len(longest) // 2 :]

    def fullest(self, count: int) -> int:
        """Tokens of the `count` fullest rows together: the most that a batch of `count` rows can hold."""
        lengths = self.lengths.tolist()
        return sum(sorted(sum(lengths[item] for item in row) for row in self.rows)[-count:])


def shared_prefix_groups(item: Item) -> Iterator[tuple[GroupShape, list[int], list[Document]]]:
    """The item's documents as (shape, shared ids, [(rest of the prompt, answer), ...]), in their order.

    Of one prompt for all, all but the last token is shared: the last one predicts another token in each branch. The last token of
    an answer predicts nothing, and is not fed.
    """
    documents = item["documents"]
    prompt = documents[0][0]
    if len(documents) > 1 and all(other == prompt for other, _ in documents):
        groups = [(prompt[:-1], [(prompt[-1:], answer) for _, answer in documents])]
    else:
        groups = [([], [document]) for document in documents]
    for shared, branches in groups:
        yield (len(shared), *(len(rest) + len(answer) - 1 for rest, answer in branches)), shared, branches


def item_length(item: Item) -> int:
    """Tokens that an item takes in a row."""
    return sum(sum(shape) for shape, _, _ in shared_prefix_groups(item))


def measure(item: Item) -> tuple[int, int, int]:
    """(tokens of an item in a row, tokens of its documents, each by itself, tokens of their answers)."""
    prompts, answers = zip(*item["documents"])
    trained = sum(map(len, answers))
    return item_length(item), trained + sum(map(len, prompts)), trained


def collate(rows: list[list[Item]], device: Device | None = None, max_length: int = 0) -> PackedBatch:
    """Join the rows of one forward pass into one sequence, rounded up to ROUNDED tokens for a `device`.

    Tensors of few different sizes find their memory again. A device with `equal_rows` gets every row padded to `max_length`.
    An item of the prompt 1 2 3 with the answers 4 5 6 and 7 8 becomes this, if it were rounded up to 8 tokens:

                        shared | branch 1 | branch 2 | padding      layout = [(2, 3, 2), (1,)]
        input_ids        1  2  | 3  4  5  | 3  7     | 0
        position_ids     0  1  | 2  3  4  | 2  3     | 0
        targets                | 4  5  6  | 7  8     |              at label_positions 2 3 4 5 6
        label_documents        | 0  0  0  | 1  1     |

    Groups stand in order of their shape, so that attention can take those of one shape together; those of equal rows stay inside
    their row. Padding is a group of its own, which sees only itself and has no label.
    """
    row_length = max_length if device and device.equal_rows else 0
    multiple = row_length or (ROUNDED if device else 1)
    groups, number = [], 0  # [(row, shape, number of the first document, shared ids, branches), ...]
    for place, row in enumerate(rows):
        for item in row:
            for group in shared_prefix_groups(item):
                groups.append((place if row_length else 0, group[0], number, *group[1:]))
                number += len(group[2])
    groups.sort(key=lambda group: group[:3])

    ids: list[int] = []
    positions: list[int] = []
    layout: list[GroupShape] = []
    labels: list[tuple[int, list[int], int]] = []  # (position of the first, answer, number of the document)
    for _, of_row in itertools.groupby(groups, key=lambda group: group[0]):
        for _, shape, first, shared, branches in of_row:
            layout.append(shape)
            ids += shared
            positions += range(len(shared))
            for document, (rest, answer) in enumerate(branches, first):
                labels.append((len(ids) + len(rest) - 1, answer, document))
                positions += range(len(shared), len(shared) + len(rest) + len(answer) - 1)
                ids += rest + answer[:-1]
        if missing := -len(ids) % multiple:
            layout.append((missing,))
            ids += [0] * missing
            positions += range(missing)

    items = [item for row in rows for item in row]
    batch = PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        label_positions=torch.tensor([start + i for start, answer, _ in labels for i in range(len(answer))]),
        layout=layout,
        row_length=row_length,
        targets=torch.tensor([token for _, answer, _ in labels for token in answer]),
        label_documents=torch.tensor([document for _, answer, document in labels for _ in answer]),
        ids=[item.get("id") for item in items],
    )
    for name in [name for name in items[0] if name not in ("id", "documents")]:
        batch[name] = torch.tensor([item[name] for item in items], dtype=torch.float32)
    return batch


def to_device(batch: PackedBatch, device: Device) -> PackedBatch:
    """The batch with its tensors on the device. A CUDA device need not be waited for."""
    free, tensors = device.name == "cuda", {name for name, part in batch.items() if torch.is_tensor(part)}
    return batch | {name: batch[name].to(device.name, non_blocking=free) for name in tensors}


def model_inputs(batch: PackedBatch) -> dict:
    """What the forward of a model takes that `prepare_packed` has prepared."""
    names = ("input_ids", "position_ids", "label_positions", "layout", "row_length")
    return {name: batch[name] for name in names}
