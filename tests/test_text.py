"""What people read: nothing printed controls the terminal, commands and bytes as they are meant, and how far something is."""

import os
import re
import sys

import pytest
from conftest import ROOT

from utils.chat.terminal import note
from utils.errors import UserError, complain, run
from utils.files import show_path
from utils.text import bar, format_bytes, progress, say

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e甘草"


def test_text_from_elsewhere_does_not_control_the_terminal(capsys):
    def fail():
        raise UserError(HOSTILE)

    shows = [lambda: complain(HOSTILE, 1), lambda: run(fail), lambda: note(HOSTILE), lambda: say(HOSTILE)]
    for show in shows:
        show()
        print(show_path(f"/tmp/{HOSTILE}"))
        shown = "".join(capsys.readouterr())
        assert shown.count("甘草") == 2 and not set(shown) & set("\x1b\x07\x9b\u202e")


def test_an_error_is_one_line(capsys):
    assert complain("one\ntwo\r\nthree\u2028four", 2) == 2
    assert capsys.readouterr().err == "error: one two three four\n"


def test_commands_name_the_environment_unless_it_is_activated(monkeypatch, capsys):
    said = "make it with: python model_download/download_model.py; python3 and python are other words"
    complain(said, 2)
    monkeypatch.setattr("sys.prefix", str(ROOT / ".venv"))
    for activated in (str(ROOT / ".venv"), "/another"):
        monkeypatch.setenv("VIRTUAL_ENV", activated)
        complain(said, 2)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == second == f"error: {said}"
    python = ".venv\\Scripts\\python.exe" if os.name == "nt" else ".venv/bin/python"
    assert third == f"error: {said}".replace("python model", f"{python} model")


def test_bytes_have_one_unit():
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 5 << 20: "5.0 MiB", 1503300328: "1.40 GiB"}
    assert {size: format_bytes(size) for size in sizes} == sizes


# ---- Progress


def test_off_a_terminal_there_is_a_plain_line_now_and_then(capsys, monkeypatch):
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def steps():
        for letter in "abcd":
            yield letter
            now[0] += 20

    assert [*progress("tokenizing 行.jsonl", "rows")(steps(), 4)] == [*"abcd"]
    first, *_, last = lines = capsys.readouterr().out.splitlines()
    told = r"  tokenizing 行\.jsonl: [12] of 4 rows \(\d+%\), 00:[24]0 so far, 0[01]:\d\d left"
    assert re.fullmatch(told, first)
    assert last.startswith("  tokenizing 行.jsonl: 4 of 4 rows (100%)") and 2 <= len(lines) <= 4


def test_what_is_soon_over_is_not_mentioned_and_bytes_have_units(capsys):
    assert list(progress("evaluation")([1, 2, 3])) == [1, 2, 3] and capsys.readouterr().out == ""
    options = {"total": 3 << 20, "initial": 1 << 20, "unit": "B", "unit_scale": True, "delay": 0}
    with bar(desc="model\x1b.safetensors", **options) as meter:
        meter.update(2 << 20)
    assert "  model\ufffd.safetensors: 3.00M of 3.00MB (100%)" in capsys.readouterr().out


TERMINAL = f"""
import sys, tqdm.std
sys.path.insert(0, {str(ROOT)!r})
from utils import text
now = 0
tqdm.std.time = lambda: now
for _ in text.progress("evaluation", "slow")(range(8)):
    now += 1
"""


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_the_time_left():
    pty = pytest.importorskip("pty")
    shown = []

    def keep(descriptor):
        shown.append(os.read(descriptor, 4096))
        return shown[-1]

    assert pty.spawn([sys.executable, "-c", TERMINAL], keep) == 0
    told = b"".join(shown).decode()
    assert re.search(r"evaluation: +[1-9]\d%.*\d/8 \[.*<.* slow/s\]", told)
