"""How far something is: what is said of it, and when."""

import sys
from types import SimpleNamespace

from utils import progress


def test_progress_tells_the_time_left_and_nothing_of_what_is_soon_over(capsys, monkeypatch):
    def seconds_of(times):
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=iter(times).__next__))
        assert list(progress.progress("tokenizing rows.jsonl", "rows")([1, 2, 3])) == [1, 2, 3]
        return capsys.readouterr().out

    assert seconds_of([0, 0, 0.5, 1, 1.5]) == ""
    assert seconds_of([0, 0, 100, 200, 300]) == (
        "  tokenizing rows.jsonl: 1 of 3 rows, 3.3 min left\n  tokenizing rows.jsonl: 2 of 3 rows, 1.7 min left\n"
        "  tokenizing rows.jsonl: 5.0 min\n"
    )
    assert seconds_of([0, 0, 5, 10, 15]) == "  tokenizing rows.jsonl: 15 s\n"  # a line every 15 s at most
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert seconds_of([0, 0, 5, 10, 15]).count("\r\033[K") == 3
