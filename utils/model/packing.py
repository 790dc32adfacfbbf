"""Packing: many short documents in one row of tokens, without padding and without one seeing another.

A *document* is one sequence (a prompt and its answer). An *item* is what must stay together: one document for SFT, the
chosen and the rejected one for DPO, the options of an exam question. Documents of an item that answer the same prompt
share its tokens: a *tree*, whose branches see the prompt and themselves, not one another. Items are packed into rows of at
most `max_length` tokens once, before training, so that every epoch costs the same and a resumed run finds the same rows; the
trainer shuffles rows, never their content.
"""

import random

import torch

from utils.errors import UserError

IGNORED = -100  # label of a position that is not trained, as everywhere in PyTorch


def pack(lengths, max_length, seed=0):
    """Pack item `lengths` (list of int, each at most max_length) into rows; return a list of lists of item indices.

    The items come in a random order that `seed` fixes, each goes to the fullest row that still holds it. Packing the longest
    first would fill a little better, but makes rows of items of one length, which is one kind: such steps pull the model
    to and fro, and it learns far less from the same tokens. The cost is O(items x max_length) at the very worst.
    """
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    rows, with_space = [], [[] for _ in range(max_length + 1)]  # with_space[s]: rows that have s tokens left
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
    """Rows of packed items. `items`: dicts with "documents", a list of (prompt_ids, answer_ids), and what else they carry:
    an "id" for messages, numbers for the loss.

    An element is the list of items of one row. `tokens` and `trained_tokens` count over all documents, each by itself.
    """

    def __init__(self, items, max_length):
        lengths = [item_length(item) for item in items]
        self.items = items
        self.rows = pack(lengths, max_length)
        self.tokens = sum(len(prompt) + len(answer) for item in items for prompt, answer in item["documents"])
        self.trained_tokens = sum(len(answer) for item in items for _, answer in item["documents"])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return [self.items[item] for item in self.rows[index]]

    def even_out(self, count):
        """Split the rows of most items until the number of rows is a multiple of `count`, as many processes need: the libraries
        would fill up by giving some rows twice. UserError where there are not as many items."""
        while len(self.rows) % count:
            row = max(self.rows, key=len)
            if len(row) == 1:
                raise UserError(
                    f"{len(self.items)} examples cannot be shared out evenly among {count} processes; use fewer"
                )
            self.rows.append(row[len(row) // 2 :])
            del row[len(row) // 2 :]

    def fullest(self, count):
        """Tokens of the `count` fullest rows together: the most that a step of `count` rows can hold."""
        return sum(sorted((sum(map(item_length, row)) for row in self), reverse=True)[:count])


def shared_prefix_groups(item):
    """The item's documents as [(shared, [(rest of the prompt, answer), ...]), ...], in their order.

    Where all have the same prompt, all but its last token is shared: the last one predicts another token in each branch.
    """
    documents = item["documents"]
    prompt = documents[0][0]
    if len(documents) > 1 and all(other == prompt for other, _ in documents):
        return [(prompt[:-1], [(prompt[-1:], answer) for _, answer in documents])]
    return [([], [document]) for document in documents]


def item_length(item):
    """Tokens that an item takes in a row. The last token of an answer predicts nothing, and is not fed."""
    return sum(
        len(shared) + sum(len(rest) + len(answer) - 1 for rest, answer in branches)
        for shared, branches in shared_prefix_groups(item)
    )


def collate(rows):
    """Join the rows of one step into one sequence of T tokens.

    Trees stand in order of their shape, so that attention can take those of one shape together. Returns a dict:
    input_ids, position_ids, shift_labels: (1, T) int64. Positions start at 0 in each document. shift_labels[t] is the token to
    predict AT position t, for the last position of a prompt and those of its answer, and IGNORED elsewhere.
    layout: a tuple (shared tokens, tokens of each branch ...) for each tree, sum T. label_documents: (N,) int64, for each of
    the N labels the number of its document, counted through the items in their order. ids: list of the items' ids.
    Numbers that items carry beside these are joined under their own names as float32 tensors.
    """
    items = [item for row in rows for item in row]
    forest, number = [], 0
    for item in items:
        for shared, branches in shared_prefix_groups(item):
            shape = (len(shared), *(len(rest) + len(answer) - 1 for rest, answer in branches))
            forest.append((shape, number, shared, branches))
            number += len(branches)
    forest.sort(key=lambda tree: tree[:2])
    ids, positions, labels, label_documents = [], [], [], []
    for _, number, shared, branches in forest:
        ids += shared
        positions += range(len(shared))
        labels += [IGNORED] * len(shared)
        for branch, (rest, answer) in enumerate(branches):
            ids += rest + answer[:-1]
            positions += range(len(shared), len(shared) + len(rest) + len(answer) - 1)
            labels += [IGNORED] * (len(rest) - 1) + answer
            label_documents += [number + branch] * len(answer)
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "shift_labels": torch.tensor([labels]),
        "layout": [shape for shape, *_ in forest],
        "label_documents": torch.tensor(label_documents),
        "ids": [item.get("id") for item in items],
    }
    for name in items[0]:
        if name not in ("id", "documents"):
            batch[name] = torch.tensor([item[name] for item in items], dtype=torch.float32)
    return batch


def split_batch(batch):
    """(what the model's forward takes, the N targets as (N,) int64, the rest) of a batch that `collate` made."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "shift_labels", "layout")}
    labels = batch["shift_labels"]
    return (
        inputs,
        labels[labels != IGNORED],
        {name: value for name, value in batch.items() if name not in inputs},
    )
