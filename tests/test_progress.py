"""How far something is: plain lines off a terminal, tqdm's bar with the time left on one."""

import os
import re
import sys
from types import SimpleNamespace

import pytest

from utils import text
from utils.text import ByteProgress


def test_progress_shows_speed_and_time_left(capsys, monkeypatch):
    seconds = iter([0, 20, 25, 100, 100])
    monkeypatch.setattr("utils.text.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    mib = 1 << 20
    with ByteProgress("model.safetensors", 500 * mib, 1500 * mib) as bytes_done:
        bytes_done.show(700 * mib)
        bytes_done.show(800 * mib)  # five seconds later: too soon for another line
        bytes_done.show(1500 * mib)
    assert capsys.readouterr().out.splitlines() == [
        "  model.safetensors: going on at 500.0 MiB of 1.46 GiB",
        "  model.safetensors   47%  700.0 MiB of 1.46 GiB  10.0 MiB/s  80 s left",
        "  model.safetensors  100%  1.46 GiB of 1.46 GiB  10.0 MiB/s  in 1.7 min",
        "  model.safetensors  100%  1.46 GiB of 1.46 GiB  10.0 MiB/s  in 1.7 min",
    ]


def test_progress_tells_the_time_left_and_nothing_of_what_is_soon_over(capsys, monkeypatch):
    def seconds_of(times):
        monkeypatch.setattr(text, "time", SimpleNamespace(monotonic=iter(times).__next__))
        assert list(text.progress("tokenizing rows.jsonl", "rows")([1, 2, 3])) == [1, 2, 3]
        return capsys.readouterr().out

    assert seconds_of([0, 0, 0.5, 1, 1.5]) == ""
    assert seconds_of([0, 0, 100, 200, 300]) == (
        "  tokenizing rows.jsonl: 1 of 3 rows, 3.3 min left\n  tokenizing rows.jsonl: 2 of 3 rows, 1.7 min left\n"
        "  tokenizing rows.jsonl: 5.0 min\n"
    )
    assert seconds_of([0, 0, 5, 10, 15]) == "  tokenizing rows.jsonl: 15 s\n"  # a line every 15 s at most


TERMINAL = """
import sys, time
from utils import text
text.QUIET_SECONDS = 0.1
with text.ByteProgress("model.safetensors", 0, 8 << 20) as bytes_done:
    for number in range(1, 9):
        time.sleep(0.1)
        bytes_done.show(number << 20)
for unit, seconds in (("quick", 0), ("slow", 0.1)):
    for _ in text.progress("evaluation", unit)(range(8)):
        time.sleep(seconds)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_terminal_gets_a_bar_with_the_time_left():
    import pty

    screen = []

    def read(file):
        screen.append(os.read(file, 65536))
        return screen[-1]

    assert pty.spawn([sys.executable, "-c", TERMINAL], read, lambda file: b"") == 0
    text = b"".join(screen).decode()
    assert re.search(r"model.safetensors: +\d+%\|.*\d\.\d\dM/8\.00M \[00:00<00:\d\d, +[\d.]+MiB/s\]", text)
    assert re.search(r"evaluation: +\d+%\|.*/8 \[00:00<00:\d\d, .*slow/s\]", text)
    assert "quick" not in text and re.search(r"\r  evaluation: 1 s\r?\n$", text)
