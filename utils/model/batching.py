"""Packing: many short documents in one row of tokens, without padding and without one seeing another.

A *document* is one sequence (a prompt and its answer). An *item* is what must stay together: one document for SFT, the
chosen and the rejected one for DPO, the options of an exam question. The documents of an item that answer the same prompt
form one *shared-prefix group*: its branches see the prompt and themselves, not one another. Items are packed once, before
training, into rows of at most `max_length` tokens, so that every epoch costs the same and a resumed run finds the same rows.
The trainer shuffles rows, never their content.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import torch

from utils.errors import UserError

ROUNDED = 64  # tokens
Document = tuple[list[int], list[int]]  # token ids of a prompt and of its answer
GroupShape = tuple[int, ...]  # tokens of a group's shared prefix, then tokens of each of its branches


class Item(TypedDict):
    """What must stay together in a row. Numbers for the loss, such as "reference_chosen", may stand beside these fields."""

    documents: list[Document]
    id: NotRequired[str]  # for messages


class PackedBatch(TypedDict):
    """The rows of one forward pass, joined into one sequence of T tokens with N labels. Further numbers of the items, such as
    "reference_chosen", are there under their own names as float32 tensors (items,)."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, from 0 in each document
    label_positions: torch.Tensor  # (N,) int64: the positions that predict a trained token
    layout: list[GroupShape]  # the groups in the order in which they stand, T tokens together
    row_length: int  # of rows padded to one length; 0 where they are joined without padding
    targets: torch.Tensor  # (N,) int64: the tokens to predict there
    label_documents: (
        torch.Tensor
    )  # (N,) int64: the document of each label, counted through the items in their order
    ids: list[str | None]


INPUTS = (
    "input_ids",
    "position_ids",
    "label_positions",
    "layout",
    "row_length",
)  # what the model's forward takes


def pack(lengths: Sequence[int], max_length: int, seed: int = 0) -> list[list[int]]:
    """Pack items of these lengths (tokens, each at most max_length) into rows; return the rows as lists of item indices.

    The items come in a random order that `seed` fixes, each goes to the fullest row that still holds it. Packing the longest
    first would fill a little better, but it makes rows of items of one length, which is one kind: the model learns far less
    from the same tokens. The cost is O(items x max_length) at the very worst.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    rows: list[list[int]] = []
    with_space: list[list[int]] = [
        [] for _ in range(max_length + 1)
    ]  # with_space[s]: rows that have s tokens left
    for index in order:
        space = next((s for s in range(lengths[index], max_length + 1) if with_space[s]), None)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, max_length
        else:
            row = with_space[space].pop()
        rows[row].append(index)
        with_space[space - lengths[index]].append(row)
    return rows


class PackedRows(torch.utils.data.Dataset):
    """Rows of packed items; an element is the list of items of one row.

    `tokens` and `trained_tokens` count over all documents, each by itself.
    """

    def __init__(self, items: list[Item], max_length: int):
        self.items, self.max_length = items, max_length
        self.rows = pack([item_length(item) for item in items], max_length)
        self.tokens = sum(len(prompt) + len(answer) for item in items for prompt, answer in item["documents"])
        self.trained_tokens = sum(len(answer) for item in items for _, answer in item["documents"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Item]:
        return [self.items[item] for item in self.rows[index]]

    def even_out(self, count: int) -> None:
        """Split the rows of most items until the number of rows is a multiple of `count`, as several processes need.

        The libraries would give some rows to two processes otherwise. UserError where there are not as many items.
        """
        while len(self.rows) % count:
            row = max(self.rows, key=len)
            if len(row) == 1:
                raise UserError(
                    f"{len(self.items)} examples cannot be shared out evenly among {count} processes; use fewer"
                )
            self.rows.append(row[len(row) // 2 :])
            del row[len(row) // 2 :]

    def fullest(self, count: int) -> int:
        """Tokens of the `count` fullest rows together: the most that a batch of `count` rows can hold."""
        return sum(sorted((sum(map(item_length, row)) for row in self), reverse=True)[:count])


def shared_prefix_groups(item: Item) -> Iterator[tuple[list[int], list[Document]]]:
    """The item's documents as (shared ids, [(rest of the prompt, answer), ...]), in their order.

    Where all have the same prompt, all but its last token is shared: the last one predicts another token in each branch.
    """
    documents = item["documents"]
    prompt = documents[0][0]
    if len(documents) > 1 and all(other == prompt for other, _ in documents):
        yield prompt[:-1], [(prompt[-1:], answer) for _, answer in documents]
    else:
        yield from (([], [document]) for document in documents)


def item_length(item: Item) -> int:
    """Tokens that an item takes in a row. The last token of an answer predicts nothing, and is not fed."""
    return sum(sum(_shape(shared, branches)) for shared, branches in shared_prefix_groups(item))


def _shape(shared: list[int], branches: list[Document]) -> GroupShape:
    return (len(shared), *(len(rest) + len(answer) - 1 for rest, answer in branches))


class Padding(NamedTuple):
    """How `collate` pads, in tokens. `row_length`: every row to this length, 0: rows are joined; `multiple`: of what they make."""

    row_length: int = 0
    multiple: int = 1


def padding_for(device: str, bf16: bool, max_length: int) -> Padding:
    """The padding of rows of at most `max_length` tokens on a device (torch's type).

    Where attention is by one mask, every row gets the same length. Elsewhere lengths are rounded up: tensors of few different sizes
    find their memory again, and fewer kernels have to be made, for about a hundredth more tokens.
    """
    if wants_rows_of_one_length(device, bf16):
        return Padding(row_length=max_length)
    return Padding(multiple=ROUNDED)


def wants_rows_of_one_length(device: str, bf16: bool) -> bool:
    """Whether attention on this device is by one mask over equal rows (utils.model.attention)."""
    return device == "mps" or (device == "cuda" and not bf16)


def collate(rows: list[list[Item]], padding: Padding = Padding()) -> PackedBatch:  # noqa: B008 - it never changes
    """Join the rows of one forward pass into one sequence.

    Groups stand in order of their shape, so that attention can take those of one shape together; with `padding.row_length` they
    stay inside their row. Padding is a group of its own, which sees only itself and has no label.
    """
    row_length = padding.row_length
    numbered, number = [], 0  # rows of (shape, number of the group's first document, shared ids, branches)
    for row in rows:
        groups = []
        for item in row:
            for shared, branches in shared_prefix_groups(item):
                groups.append((_shape(shared, branches), number, shared, branches))
                number += len(branches)
        numbered.append(groups)
    if not row_length:
        numbered = [[group for groups in numbered for group in groups]]
    ids: list[int] = []
    positions: list[int] = []
    label_positions: list[int] = []
    targets: list[int] = []
    label_documents: list[int] = []
    layout: list[GroupShape] = []
    for groups in numbered:
        for shape, first, shared, branches in sorted(groups, key=lambda group: group[:2]):
            layout.append(shape)
            ids += shared
            positions += range(len(shared))
            for document, (rest, answer) in enumerate(branches, first):
                label_positions += range(len(ids) + len(rest) - 1, len(ids) + len(rest) + len(answer) - 1)
                positions += range(len(shared), len(shared) + len(rest) + len(answer) - 1)
                ids += rest + answer[:-1]
                targets += answer
                label_documents += [document] * len(answer)
        if missing := -len(ids) % (row_length or padding.multiple):
            layout.append((missing,))
            ids += [0] * missing
            positions += range(missing)
    items = [item for row in rows for item in row]
    batch = PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        label_positions=torch.tensor(label_positions),
        layout=layout,
        row_length=row_length,
        targets=torch.tensor(targets),
        label_documents=torch.tensor(label_documents),
        ids=[item.get("id") for item in items],
    )
    numbers = [name for name in items[0] if name not in ("id", "documents")]
    return batch | {
        name: torch.tensor([item[name] for item in items], dtype=torch.float32) for name in numbers
    }


def model_inputs(batch: PackedBatch) -> dict:
    """What the forward of a model takes that `prepare_packed` has prepared."""
    return {name: batch[name] for name in INPUTS}
