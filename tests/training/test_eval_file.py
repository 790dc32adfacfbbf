"""An evaluation file that shares rows with the training file is told with the number; without one, training says so."""

from utils.files import write_jsonl
from utils.training.rows import tell_shared_rows


def rows(*numbers, place):
    turns = [
        [{"role": "user", "content": f"问{n}"}, {"role": "assistant", "content": f"答{n}"}] for n in numbers
    ]
    write_jsonl(place, [{"id": f"{place.stem}{n}", "messages": both} for n, both in enumerate(turns)])
    return place


def test_shared_rows_are_counted_by_what_they_say(tmp_path, capsys):
    train, held_out = (
        rows(*range(9), place=tmp_path / "a.jsonl"),
        rows(7, 8, 9, 10, place=tmp_path / "b.jsonl"),
    )
    for _ in range(2):  # the second time from what is kept
        tell_shared_rows(train, held_out, ["messages"])
        assert "note: 2 rows of" in capsys.readouterr().out
    rows(9, 10, 11, place=held_out)
    tell_shared_rows(train, held_out, ["messages"])
    assert "too:" not in capsys.readouterr().out
    tell_shared_rows(train, train, ["messages"])
    assert "no evaluation file: the loss is measured on rows that are trained" in capsys.readouterr().out
