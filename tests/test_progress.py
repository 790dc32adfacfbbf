"""How far something is: plain lines off a terminal, tqdm's bar on one, nothing of what is soon over."""

import os
import re
import sys
import time

import pytest
from conftest import ROOT

from utils import text
from utils.text import bar, progress


def test_off_a_terminal_there_is_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(text, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(text, "PLAIN_SECONDS", 0.3)
    watch = progress("tokenizing 行.jsonl", "rows")
    assert [time.sleep(0.2) or step for step in watch(iter("abcd"), 4)] == [*"abcd"]
    first, *_, last = lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  tokenizing 行\.jsonl: [12] of 4 rows \(\d+%\), 00:00 so far, 00:00 left", first)
    assert last.startswith("  tokenizing 行.jsonl: 4 of 4 rows (100%)") and 2 <= len(lines) <= 4


def test_what_is_soon_over_is_not_mentioned(capsys):
    assert list(progress("evaluation")([1, 2, 3])) == [1, 2, 3] and capsys.readouterr().out == ""


def test_bytes_are_told_in_units(capsys):
    options = {"total": 3 << 20, "initial": 1 << 20, "unit": "B", "unit_scale": True, "delay": 0}
    with bar(desc="model\x1b.safetensors", **options) as meter:
        meter.update(2 << 20)
    assert "  model\ufffd.safetensors: 3.00M of 3.00MB (100%)" in capsys.readouterr().out


TERMINAL = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from utils import text
text.QUIET_SECONDS = 0.1
for unit, seconds in (("quick", 0), ("slow", 0.1)):
    for _ in text.progress("evaluation", unit)(range(8)):
        time.sleep(seconds)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_terminal_gets_a_bar_with_the_time_left():
    import pty

    shown = b""

    def keep(descriptor):
        nonlocal shown
        found = os.read(descriptor, 4096)
        shown += found
        return found

    assert pty.spawn([sys.executable, "-c", TERMINAL], keep) == 0
    shown = shown.decode()
    assert re.search(r"evaluation: +[1-9]\d%.*\d/8 \[.*<.* slow/s\]", shown) and "quick" not in shown
