"""How rows are dealt out to the splits, and which of those that agree is kept: each function by itself, on small arrays."""

import numpy

from utils.data.convert import RUN, Run, _runs
from utils.data.dedup import EVALUATION_LEAK, EXACT_DUPLICATE, KEPT, Decisions, _set_repeats_aside
from utils.data.row_index import EVAL, EXAM, KIND, ROW, TRAIN
from utils.data.split import SplitSettings, assign_splits, sample_rows

KEYS = numpy.arange(100, dtype=numpy.uint64)


def rows_of(*kinds, told=()):
    rows = numpy.zeros(len(kinds), dtype=ROW)
    rows["kind"] = [KIND[kind] for kind in kinds]
    rows["content"] = numpy.arange(len(kinds))
    rows["told"][: len(told)] = told
    return rows


def test_what_rows_say_of_their_split_holds_for_their_group():
    rows = rows_of(
        "sft", "sft", "sft", "dpo", "exam", "", "sft", told=(TRAIN, 0, EVAL, 0, TRAIN, TRAIN, TRAIN)
    )
    group = numpy.array([0, 0, 1, 1, 1, 0, 1])
    split = assign_splits(rows, group, KEYS, SplitSettings(0.0, 10, 0))
    assert split.tolist() == [TRAIN, TRAIN, EVAL, EVAL, EXAM, 0, TRAIN]


def test_groups_are_held_out_whole_up_to_the_share():
    rows, group = rows_of(*["sft"] * 100), numpy.arange(100) // 2
    split = assign_splits(rows, group, KEYS, SplitSettings(0.2, 1000, 0))
    assert (split == EVAL).sum() == 20 and (split[::2] == split[1::2]).all() and set(split) == {TRAIN, EVAL}
    assert (assign_splits(rows, group, KEYS, SplitSettings(0.2, 6, 0)) == EVAL).sum() == 6
    assert (assign_splits(rows, group, KEYS, SplitSettings(0.2, 1000, 1)) != split).any()
    one_group = assign_splits(rows, group * 0, KEYS, SplitSettings(0.2, 1000, 0))
    assert (one_group == TRAIN).all()  # too large to be held out


def test_pairs_follow_the_conversations_of_their_group():
    rows, group = rows_of(*["sft"] * 50, *["dpo"] * 50), numpy.tile(numpy.arange(50), 2)
    split = assign_splits(rows, group, KEYS, SplitSettings(0.3, 1000, 0))
    assert (split[:50] == split[50:]).all() and (split == EVAL).any()


def test_of_equal_rows_the_preferred_one_is_kept_then_the_first():
    decisions = Decisions(None, numpy.zeros(6, dtype=numpy.uint8), numpy.full(6, -1))
    equal, shorter = numpy.array([7, 8, 7, 7, 9, 8]), numpy.array([-1, -5, -3, -3, -1, -5])
    _set_repeats_aside(decisions, numpy.arange(6), EXACT_DUPLICATE, (equal,), (shorter,))
    assert decisions.status.tolist() == [EXACT_DUPLICATE, KEPT, KEPT, EXACT_DUPLICATE, KEPT, EXACT_DUPLICATE]
    assert decisions.duplicate_of.tolist() == [2, -1, -1, 2, -1, 1]


def test_rows_are_sampled_by_content_not_by_position():
    rows, among = rows_of(*["sft"] * 20), numpy.arange(20) < 15
    sampled = sample_rows(rows, among, 5, seed=0)
    assert sampled.sum() == 5 and not sampled[15:].any()
    assert set(rows[::-1]["content"][sample_rows(rows[::-1], among[::-1], 5, 0)]) == set(
        rows["content"][sampled]
    )
    assert sample_rows(rows, among, 50, 0).sum() == 15


def test_rows_that_go_to_one_file_are_written_in_runs():
    rows = rows_of(*["sft"] * 3, "", "sft", *["exam"] * (RUN + 5))
    split = numpy.array([TRAIN, TRAIN, EVAL, 0, TRAIN, *[EXAM] * (RUN + 5)])
    status = numpy.zeros(len(rows), dtype=numpy.uint8)
    status[4] = EVALUATION_LEAK
    runs = list(_runs(rows, Decisions(split, status, None), numpy.zeros(len(rows), dtype=bool)))
    assert [run.start for run in runs[1:]] == [run.end for run in runs[:-1]] and runs[-1].end == len(rows)
    outputs = numpy.concatenate([[run.output] * (run.end - run.start) for run in runs])
    assert outputs.tolist() == [0, 0, 1, -1, 0, *[4] * (RUN + 5)]
    assert Run(4, 5, 0, EVALUATION_LEAK, False) in runs and len(runs) < 12
    assert list(_runs(rows[:0], Decisions(split[:0], status[:0], None), split[:0] > 0)) == []
