"""Kept results: the same identity gives them back, anything damaged or foreign is told in one line and made again."""

import json

import pytest

from utils import kept
from utils.kept import damage, digest, is_kept, read_kept, seal, write_kept

IDENTITY = {"model": "sha256 12", "settings": {"ROWS": 3}, "shape": [1, 2]}


def test_a_value_comes_back_for_its_identity_alone(tmp_path, capsys):
    path, value = tmp_path / "scores.json", {"名": [0.1, None, "\ud800"], "z": {"b": 1, "a": float("inf")}}
    assert read_kept(path, IDENTITY) is None and capsys.readouterr().out == ""  # nothing is there
    write_kept(path, {**IDENTITY, "shape": (1, 2)}, value)
    assert read_kept(path, IDENTITY) == value and capsys.readouterr().out == ""
    assert read_kept(path, {**IDENTITY, "model": "sha256 13", "new": 1}) is None
    assert capsys.readouterr().out.endswith("scores.json is of other model, new; making it again\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: text.replace("0.25", "0.26"),
        lambda text: json.dumps({**json.loads(text), "identity": "none"}),
        lambda text: json.dumps({"identity": IDENTITY}),
    ],
)
def test_a_damaged_value_is_told_in_one_line(tmp_path, capsys, change):
    path = tmp_path / "scores.json"
    write_kept(path, IDENTITY, [0.25])
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert read_kept(path, IDENTITY) is None
    assert capsys.readouterr().out.endswith("scores.json is damaged; making it again\n")


def folder_of(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * 100)
    (folder / "optimizer").write_bytes(b"o" * 100)
    seal(folder, IDENTITY)
    return folder


def test_a_sealed_folder_moves_with_its_record_and_a_file_has_it_beside_it(tmp_path, capsys):
    folder = folder_of(tmp_path).rename(tmp_path / "other")
    assert is_kept(folder, IDENTITY) and not damage(folder, IDENTITY)
    file = tmp_path / "rows.jsonl-1.arrow"
    file.write_bytes(b"tokens")
    assert not is_kept(tmp_path / "nothing", IDENTITY) and not is_kept(file, IDENTITY)  # never finished
    seal(file, IDENTITY)
    assert kept.record_path(file).name == "rows.jsonl-1.arrow.json" and is_kept(file, IDENTITY)
    assert capsys.readouterr().out == ""
    assert damage(folder, {}) == "of other model, settings, shape"
    file.write_bytes(b"tokenz")
    assert damage(file, IDENTITY) == "damaged (rows.jsonl-1.arrow)"


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda folder: (folder / "optimizer").write_bytes(b"o" * 99 + b"x"), "damaged (optimizer)"),
        (lambda folder: (folder / "weights").write_bytes(b"w" * 99), "damaged (weights)"),
        (lambda folder: (folder / "weights").unlink(), "damaged (weights)"),
        (lambda folder: kept.record_path(folder).write_text("{", encoding="utf-8"), "damaged"),
    ],
)
def test_a_spoilt_folder_is_told_in_one_line(tmp_path, capsys, spoil, said):
    folder = folder_of(tmp_path)
    spoil(folder)
    assert damage(folder, IDENTITY).startswith(said)
    assert not is_kept(folder, IDENTITY)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and said in told and told.endswith("; making it again\n")


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": ["药"]}) == digest({"b": ["药"], "a": 1}) != digest({"a": 1, "b": []})
