"""What people read: nothing printed controls the terminal, bytes and lines as they are meant."""

import os

import pytest
from conftest import ROOT

from utils.chat.terminal import note
from utils.errors import UserError, complain, run
from utils.files import show_path
from utils.text import format_bytes, say

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e甘草"


def shown_by_an_error(text):
    def main():
        raise UserError(text)

    run(main)


@pytest.mark.parametrize(
    "show",
    [
        lambda text: complain(text, 1),
        shown_by_an_error,
        note,
        say,
        lambda text: print(show_path(f"/tmp/{text}")),
    ],
    ids=["complain", "error", "note", "say", "show_path"],
)
def test_text_from_elsewhere_does_not_control_the_terminal(show, capsys):
    show(HOSTILE)
    shown = "".join(capsys.readouterr())
    assert "甘草" in shown and not set(shown) & set("\x1b\x07\x9b\u202e")


def test_an_error_is_one_line(capsys):
    assert complain("one\ntwo\r\nthree\u2028four", 2) == 2
    assert capsys.readouterr().err == "error: one two three four\n"


def test_commands_name_the_environment_unless_it_is_activated(monkeypatch, capsys):
    said = "make it with: python model_download/download_model.py; python3 and python are other words"
    complain(said, 2)
    monkeypatch.setattr("sys.prefix", str(ROOT / ".venv"))
    monkeypatch.setenv("VIRTUAL_ENV", str(ROOT / ".venv"))
    complain(said, 2)
    monkeypatch.setenv("VIRTUAL_ENV", "/another")
    complain(said, 2)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == second == f"error: {said}"
    python = ".venv\\Scripts\\python.exe" if os.name == "nt" else ".venv/bin/python"
    assert third == f"error: {said}".replace("python model", f"{python} model")


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (1503300328, "1.40 GiB")],
)
def test_bytes_have_one_unit(count, text):
    assert format_bytes(count) == text
