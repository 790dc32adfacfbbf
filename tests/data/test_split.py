"""How rows are dealt out to the splits, and which of those that agree is kept: each function by itself, on a few rows."""

import pytest

from utils.data.convert import Recognised
from utils.data.dedup import EVAL, EXAM, TRAIN, Joined, Row, Shares, assign_splits, set_repeats_aside
from utils.data.report import sample_examples


def rows_of(*kinds, told=(), groups=()):
    """Rows of these kinds; the question of each is its group, or its number."""
    rows = [Row(0, n, 0, 0, kind=kind, content=n, questions=(n,)) for n, kind in enumerate(kinds)]
    for row, split in zip(rows, told):
        row.told = split
    for row, group in zip(rows, groups):
        row.questions = (group,)
    return rows


def splits(rows, *shares):
    assign_splits(rows, {}, Shares(*shares))
    return [row.split for row in rows]


def test_what_rows_say_of_their_split_holds_for_their_group():
    told = (TRAIN, "", EVAL, "", TRAIN, TRAIN, TRAIN)
    rows = rows_of("sft", "sft", "sft", "dpo", "exam", "", "sft", told=told, groups=[0, 0, 1, 1, 1, 0, 1])
    assert splits(rows, 0.0, 10, 0) == [TRAIN, TRAIN, EVAL, EVAL, EXAM, "", TRAIN]


def test_groups_are_held_out_whole_up_to_the_share():
    def dealt(*shares, groups=tuple(n // 2 for n in range(100))):
        return splits(rows_of(*["sft"] * 100, groups=groups), *shares)

    split = dealt(0.2, 1000, 0)
    assert split.count(EVAL) == 20 and split[::2] == split[1::2] and set(split) == {TRAIN, EVAL}
    assert dealt(0.2, 6, 0).count(EVAL) == 6
    assert dealt(0.2, 1000, 1) != split
    assert set(dealt(0.2, 1000, 0, groups=[0] * 100)) == {TRAIN}  # one group is too large to be held out


def test_pairs_follow_the_conversations_of_their_group():
    split = splits(rows_of(*["sft"] * 50, *["dpo"] * 50, groups=[*range(50)] * 2), 0.3, 1000, 0)
    assert split[:50] == split[50:] and EVAL in split


def test_of_equal_rows_the_preferred_one_is_kept_then_the_first():
    rows = rows_of(*["sft"] * 6)
    for row, content, characters in zip(rows, (7, 8, 7, 7, 9, 8), (1, 5, 3, 3, 1, 5)):
        row.content, row.characters = content, characters
    set_repeats_aside(rows, "repeats", lambda row: row.content, lambda row: -row.characters)
    assert [bool(row.reason) for row in rows] == [True, False, False, True, False, True]
    assert [rows.index(row.of) for row in rows if row.of] == [2, 2, 1]


def test_joined_members_are_one_group_named_by_its_smallest():
    joined = Joined()
    for pair in [(5, 9), (7, 8), (9, 7), (2, 3)]:
        joined.join(*pair)
    assert joined.groups() == {5: 5, 7: 5, 8: 5, 9: 5, 2: 2, 3: 2} and joined.group(4) == 4


@pytest.mark.parametrize("count, sampled", [(5, 5), (50, 15)])
def test_rows_are_sampled_by_content_not_by_position(tmp_path, count, sampled):
    found = Recognised(tmp_path)
    found.rows = rows_of(*["sft"] * 20)
    for row in found.rows:
        row.at, row.size = found.write(b"%2d" % row.content), 2
        row.reason = "set aside" if row.content >= 15 else ""
    drawn = sample_examples(found, count, 0)
    found.rows.reverse()
    assert sample_examples(found, count, 0) == drawn[::-1] and len(drawn) == sampled and max(drawn) < 15
