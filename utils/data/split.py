"""Which rows are trained on and which are held out: groups of questions go to one split whole."""

from typing import NamedTuple

import numpy

from utils.data.row_index import EVAL, EXAM, KIND, TRAIN
from utils.data.schemas import OUTPUT_FILES


class SplitSettings(NamedTuple):
    """`eval_share` of the rows of each kind is held out, `max_eval_rows` at most; `seed` chooses which."""

    eval_share: float
    max_eval_rows: int
    seed: int


def assign_splits(
    rows: numpy.ndarray, group: numpy.ndarray, keys: numpy.ndarray, settings: SplitSettings
) -> numpy.ndarray:
    """TRAIN, EVAL or EXAM for every row of `rows` (ROW array), 0 where it cannot be used.

    `group`: of every row, that of its first question, an index into `keys`. Rows that say their split keep it; the others
    of their group follow, to EVAL if it has both; the remaining groups are dealt out.
    """
    split = numpy.where(rows["kind"] == KIND["exam"], EXAM, rows["told"])
    split[rows["kind"] == 0] = 0
    dealt = (rows["kind"] > 0) & (split != EXAM)
    for told in (TRAIN, EVAL):
        members = _groups_of(group[dealt & (rows["told"] == told)], len(keys))
        split[dealt & (rows["told"] == 0) & members[group]] = told
    for kind in [KIND[name] for name, kind in OUTPUT_FILES.items() if kind.dealt]:
        free = numpy.flatnonzero((rows["kind"] == kind) & (rows["told"] == 0))
        free = free[numpy.unique(rows["content"][free], return_index=True)[1]]  # each distinct row once
        told = numpy.count_nonzero((rows["kind"] == kind) & (rows["told"] == EVAL))
        held_out = _held_out_groups(group[free], split[free], keys, told, settings)
        undecided = dealt & (split == 0) & _groups_of(group[free], len(keys))[group]
        split[undecided] = numpy.where(held_out[group[undecided]], EVAL, TRAIN)
    return split


def _held_out_groups(group, split, keys, told, settings):
    """A mask over `keys`: groups drawn for EVAL among the rows of one kind, given their groups and splits so far.

    `told` further rows of the kind say themselves that they are held out: the share is of them, too.
    """
    wanted = max(round(settings.eval_share * (len(split) + told)), 1 if settings.eval_share else 0)
    wanted = min(settings.max_eval_rows, wanted) - told - numpy.count_nonzero(split == EVAL)
    sizes = numpy.bincount(group[split == 0], minlength=len(keys))
    undecided = numpy.flatnonzero(sizes)
    chosen = numpy.zeros(len(keys), dtype=bool)
    for index in undecided[numpy.argsort(mixed(keys[undecided], settings.seed))].tolist():
        if wanted <= 0:
            break
        # A group too large for evaluation is trained on.
        if sizes[index] <= max(wanted, 3) and len(undecided) > 1:
            chosen[index] = True
            wanted -= sizes[index]
    return chosen


def _groups_of(group, count):
    """A mask (count,) of the groups named in `group`."""
    members = numpy.zeros(count, dtype=bool)
    members[group] = True
    return members


def mixed(keys: numpy.ndarray, seed: int) -> numpy.ndarray:
    """Keys (uint64) in a random order that depends on `seed` only (the finaliser of splitmix64)."""
    keys = keys + numpy.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    keys = (keys ^ keys >> numpy.uint64(30)) * numpy.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ keys >> numpy.uint64(27)) * numpy.uint64(0x94D049BB133111EB)
    return keys ^ keys >> numpy.uint64(31)


def sample_rows(rows: numpy.ndarray, among: numpy.ndarray, count: int, seed: int) -> numpy.ndarray:
    """A mask of `count` rows (all, if fewer) of those where `among` is true; random, but the same for the same rows."""
    numbers = numpy.flatnonzero(among)
    sampled = numpy.zeros(len(rows), dtype=bool)
    sampled[numbers[numpy.argsort(mixed(rows["content"][numbers], seed), kind="stable")[:count]]] = True
    return sampled
