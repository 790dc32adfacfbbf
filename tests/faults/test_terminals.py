"""Places, locales, homes, terminals, and streams that are closed."""

import json
import os
from pathlib import Path

import pytest
from fault_runs import MADE, assert_same, assert_told, assert_works_again, start
from processes import nobody_reads

pytestmark = pytest.mark.slow
PLAIN_C = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": None}


def test_started_from_the_repository_through_a_link(world, tmp_path):
    """`python data_prepare/...` in a folder that is a link to the repository."""
    link, output = tmp_path / "链接 link", tmp_path / "new"
    link.symlink_to(world / "tcm")
    script = start(world, "pairs", "--output-dir", output, repository=Path("."), cwd=link, ready=False)
    assert script.end() == 0, script.err
    assert_same(world, "pairs", output)


@pytest.mark.parametrize("name", ["convert", "model"])
def test_locale_without_utf8(world, hub, tmp_path, name):
    """Chinese in the path, in the data and on the way to the terminal."""
    output, asked = tmp_path / "中药", hub if name == "model" else None
    script = start(world, name, "--output-dir", output, hub=asked, environment=PLAIN_C, ready=False)
    assert (script.end(), script.err) == (0, "") and f"{output}" in script.out
    assert_same(world, name, output)


def test_a_fault_in_a_locale_without_utf8(world):
    script = start(world, "convert --input-files {w}/没有", environment=PLAIN_C, ready=False)
    assert_told(script, 2, "没有 does not exist")


def test_no_home(world, tmp_path):
    """The folders for caches and settings cannot exist; and the locale has no UTF-8."""
    places = ("HOME", "HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    environment = dict.fromkeys(places, str(world / "photo.png/home")) | PLAIN_C
    script = start(world, "sft", "--output-dir", tmp_path / "new", environment=environment, ready=False)
    assert (script.end(), script.err) == (0, "")


@pytest.mark.parametrize("name", ["convert", "sft", "chat"])
def test_reader_of_stdout_has_left(world, tmp_path, name):
    """`script | head -1`, in the middle of its work."""
    output = ["--output-dir", tmp_path / "new"] if name in MADE else []
    script = start(world, name, *output, environment={"PYTHONUNBUFFERED": "1"}, before=[(nobody_reads,)])
    assert_told(script, 1, "what read this output has ended; the same command without it does the rest")
    if output:
        assert_works_again(world, name, tmp_path / "new", None)


@pytest.mark.parametrize("command", ["convert", "sft --help"])
def test_reader_of_stdout_has_left_after_the_work(world, tmp_path, command):
    """All was done, and only the last lines were not read: that is no fault."""
    script = start(world, command, "--output-dir", tmp_path / "new", before=[(nobody_reads,)])
    assert (script.end(), script.err) == (0, "")
    assert "--help" in command or list((tmp_path / "new").glob("*.jsonl"))


@pytest.mark.parametrize("number", [1, 2], ids=["stdout", "stderr"])
def test_closed_by_who_started_it(world, tmp_path, number):
    """cron and `>&-` close a stream. The next file opened must not get its number, and with it the terminal's text."""
    closed = [(os.close, number)]
    script = start(world, "convert", "--output-dir", tmp_path / "new", before=closed, ready=False)
    assert (script.end(), script.err) == (0, "")
    assert_same(world, "convert", tmp_path / "new")


def test_stderr_closed_and_a_fault(world):
    script = start(world, "convert --input-files {w}/nowhere", before=[(os.close, 2)], ready=False)
    assert script.end() == 2 and "error" not in script.out


@pytest.mark.parametrize("before", [[], [(os.close, 0)]], ids=["/dev/null", "closed"])
def test_chat_without_a_terminal_and_without_a_question(world, before):
    script = start(world, "chat", "--prompt=", before=before)
    assert_told(script, 2, "--prompt: wanted a question, got an empty text")
    script = start(world, "talk", before=before)
    assert_told(script, 2, "no question on stdin, wanted one a line; or ask with --prompt")


def test_chat_reads_questions_where_there_is_no_terminal(world, tmp_path):
    (tmp_path / "questions.txt").write_text("甘草\n\n麻黄\n", encoding="utf-8")
    script = start(world, "talk --json --max-new-tokens 3", stdin=tmp_path / "questions.txt")
    assert script.end() == 0, script.err
    assert [json.loads(line)["question"] for line in script.out.splitlines()] == ["甘草", "麻黄"]
