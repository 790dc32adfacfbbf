"""Writing that never leaves half a file, and clears up after processes that were killed."""

import hashlib
import os
import subprocess
import sys

import jinja2
import pytest
from conftest import ROOT

from utils import files
from utils.errors import UserError
from utils.files import missing, read_json, read_jsonl, render, sample_by_id, write_json

KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from utils.files import atomic_write
with atomic_write(sys.argv[2]) as file:
    file.write("half")
    file.flush()
    os._exit(9)
"""


def test_what_killed_processes_left_of_a_file_is_gone_after_its_next_writing(tmp_path):
    for name in ("run.json", "another.json"):
        subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(tmp_path / name)], check=False)
    [left], [other] = tmp_path.glob(".run.json.*"), tmp_path.glob(".another.json.*")
    for name in (f".run.json.{os.getppid()}.part", "run.json.0123456789ab.part", "notes.1.part"):
        (tmp_path / name).touch()
    before = set(tmp_path.iterdir())
    write_json(tmp_path / "run.json", {"a": 1})
    assert read_json(tmp_path / "run.json") == {"a": 1}
    assert set(tmp_path.iterdir()) == before - {left} | {tmp_path / "run.json"} and other in before


@pytest.mark.parametrize(
    "fields",
    ['"content": "\\ud800"', '"content": null', '"content": "x", "reasoning_content": 5', '"content": ""'],
)
def test_messages_that_are_no_text_are_told_by_line(tmp_path, fields):
    question = '{"role": "user", "content": "q"}'
    (tmp_path / "rows.jsonl").write_text(
        f'{{"messages": [{question}, {{"role": "assistant", {fields}}}]}}\n', encoding="utf-8"
    )
    with pytest.raises(UserError, match="line 1: messages is not as a script here writes it"):
        list(read_jsonl(tmp_path / "rows.jsonl", ["messages"]))


def test_rows_are_drawn_by_their_ids_alone():
    """The same ones whatever their order and number, in the order in which they came."""
    rows = [{"id": f"行{number}"} for number in range(200)]
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    for count in (1, 50, 199, 200, 300):
        drawn = sample_by_id(iter(rows), count)
        assert drawn == [row for row in rows if row in by_hash[:count]]
        assert sample_by_id(rows[::-1], count) == drawn[::-1]
    assert sample_by_id(iter(rows), 0) == rows


def test_a_template_shows_values_as_text(tmp_path):
    page, text = tmp_path / "page.html.jinja", tmp_path / "text.md.jinja"
    for path in (page, text):
        path.write_text("{% for row in rows %}\n{{ row }}\n{% endfor %}\n", encoding="utf-8")
    assert render(page, rows=["<b>&\x1b", 3]) == "&lt;b&gt;&amp;\ufffd\n3\n"
    assert render(text, rows=["麻黄 <b>"]) == "麻黄 <b>\n"
    with pytest.raises(jinja2.UndefinedError):
        render(text)


def test_a_missing_path_is_told_with_where_it_is_or_what_was_meant(tmp_path, monkeypatch):
    """It may lie in the other of two folders: that of the project, and the one that the user stands in."""
    project, here = tmp_path / "project", tmp_path / "here"
    (project / "runs/sft_finetuned").mkdir(parents=True)
    here.mkdir()
    (project / "rows.jsonl").touch()
    (here / "own.jsonl").touch()
    monkeypatch.setattr(files, "ROOT", project)
    monkeypatch.chdir(here)
    elsewhere = f"looked in {here} for rows.jsonl; it is in {project}: {project / 'rows.jsonl'}"
    assert str(missing("rows.jsonl", "make it")) == elsewhere
    assert f"it is in {here}" in str(missing(project / "own.jsonl", "make it"))
    for wrong in ("sft_finetune", "stf_finetuned"):
        assert str(missing(project / "runs" / wrong)).endswith("; did you mean runs/sft_finetuned?")
    assert (
        str(missing(project / "runs/dpo_finetuned", "make it"))
        == "runs/dpo_finetuned does not exist; make it"
    )
