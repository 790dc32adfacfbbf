"""How a script ends: what is told of each kind of failure, and the streams it is told on."""

import errno
import io
import os
import sys

import pytest

from utils import errors
from utils.errors import FULL, MORE_MEMORY, READER_LEFT, STOPPED, RunError, UserError, explain, run


@pytest.mark.parametrize(
    "error, told",
    [
        (UserError("wrong"), ("wrong", 2)),
        (RunError("failed"), ("failed", 1)),
        (KeyboardInterrupt(), (STOPPED, 130)),
        (KeyboardInterrupt("checkpoint written"), ("checkpoint written", 130)),
        (BrokenPipeError(), (READER_LEFT, 1)),
        (MemoryError(), (MORE_MEMORY, 1)),
        (RuntimeError("CUDA out of memory. Tried to allocate"), (MORE_MEMORY, 1)),
        (OSError(errno.ENOMEM, "x"), (MORE_MEMORY, 1)),
        (OSError(errno.ENOSPC, "x", "a.txt"), (FULL.format(where=" (a.txt)"), 1)),
        # safetensors' words on a full tmpfs
        (RuntimeError("I/O error: No space left on device (os error 28)"), (FULL.format(where=""), 1)),
        (OSError("32768 requested and 5200 written"), (FULL.format(where=""), 1)),  # numpy's
        (ModuleNotFoundError("x", name="utils.none"), None),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), ("No such file (a.txt)", 1)),
        (ValueError("a bug"), None),
    ],
    ids=repr,
)
def test_what_is_foreseen_is_one_line_and_a_code(error, told):
    assert explain(error) == told


def test_every_end_has_its_code(capsys):
    def stop():
        raise KeyboardInterrupt

    assert (run(lambda: None), run(lambda: 3), run(stop)) == (0, 3, 130)
    assert capsys.readouterr().err == f"error: {STOPPED}\n"
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        run(lambda: 1 / 0)


@pytest.mark.parametrize("rank, told", [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_speaks(capsys, monkeypatch, rank, told):
    monkeypatch.setenv("RANK", rank)

    def main():
        print("working")
        raise UserError("wrong data")

    assert run(main) == 2
    output = capsys.readouterr()
    assert (output.out.count("working"), output.err.count("wrong data")) == (told, told)


def test_streams_that_are_closed_or_cannot_hold_chinese(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stdin", None)
    errors.prepare_streams()
    print("麻黄", flush=True)
    assert raw.getvalue() == "麻黄\n".encode() and sys.stdin.read() == ""
    assert sys.stdin.name == os.devnull
    sys.stdin.close()


def test_threads_wait_briefly_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    for given, wanted in (
        ({}, "20000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ):
        os.environ.clear()
        os.environ.update(given)
        assert run(lambda: None) == 0 and os.environ.get("GOMP_SPINCOUNT") == wanted
