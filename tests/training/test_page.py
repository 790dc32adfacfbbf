"""report.html: what it holds, that it is whole HTML, that nothing in it can run or load anything."""

import base64
from html.parser import HTMLParser

import pytest

from utils.files import read_json, write_json
from utils.training.log import write_page

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x.png>&\x1b[31m"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img"}  # elements without an end


class Page(HTMLParser):
    """The elements, attributes and cells of a page; fails where an end does not fit its beginning."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture
def folder(tmp_path):
    """A finished run whose settings are hostile, with the report of its data."""
    folder = tmp_path / "sft_finetuned"
    folder.mkdir()
    write_json(tmp_path / "report.json", {"rows_in": 1234, "set_aside": {HOSTILE: 7}})
    record = {
        "status": "finished",
        "identity": {},
        "settings": {"MODEL": "药/中医模型", "TRAIN_FILE": str(tmp_path / "sft.jsonl"), "NOTE": HOSTILE},
        "started": "2026-11-25T10:00:00+00:00",
        "finished": "2026-11-25T12:00:00+00:00",
        "memory_forecast_bytes": 1 << 30,
        "time_forecast_seconds": 5400.0,
        "results": {"eval_loss": 0.5, "steps": 20, "seconds": 7200.0, "peak_memory_bytes": 3 << 29},
    }
    write_json(folder / "run.json", record)
    (folder / "loss_curve.png").write_bytes(PNG)
    return folder


@pytest.fixture
def compared(folder, tmp_path):
    """A comparison that the run is part of, and the folder with its pictures."""
    place = tmp_path / "compared"
    place.mkdir()
    answers = {"reference": "发汗解表", "base": HOSTILE, "sft": "宣肺平喘", "other": "不相干"}
    (place / "comparison.png").write_bytes(PNG)
    cells = {"base": "3.000 (2.900 to 3.100)", "other": "2.000", "sft": "0.500"}
    comparison = {
        "models": {"base": {}, "other": {}, "sft": {}},
        "table": [{"label": "held-out loss", "n": "9", "on_card": True, "cells": cells}],
        "samples": [{"question": "麻黄汤的功效？", "answers": answers}],
    }
    return comparison, place


def test_a_run_on_one_page(folder):
    page = Page(write_page(folder).read_text(encoding="utf-8"))
    cells = page.cells
    for name, value in (
        ("rows read", "1,234"),
        ("loss of the finished model", "0.5000"),
        ("steps", "20"),
        ("time", "2.0 h"),
        ("time, as forecast", "1.5 h"),
        ("peak memory", "1.50 GiB"),
        ("peak memory, as forecast", "1.00 GiB"),
    ):
        assert cells[cells.index(name) + 1] == value
    assert cells[cells.index("MODEL") + 1] == "药/中医模型"
    pictures = [value for name, value in page.attributes if name == "src"]
    assert [base64.b64decode(source.partition(",")[2]) for source in pictures] == [PNG]


def test_nothing_on_the_page_can_run_or_load(folder, compared):
    comparison, place = compared
    text = write_page(folder, comparison, "sft", place).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "a", "base"} & set(page.tags)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "href"]
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)
    assert "url(" not in text and "@import" not in text and "\x1b" not in text
    hostile = HOSTILE.replace("\x1b", "\ufffd")
    assert page.cells.count(hostile) == 2  # shown as it is: the setting, the answer of the base
    assert f"set aside: {hostile}" in page.cells


def test_a_comparison_comes_with_answers_before_and_after(folder, compared):
    comparison, place = compared
    cells = Page(write_page(folder, comparison, "sft", place).read_text(encoding="utf-8")).cells
    row = cells.index("麻黄汤的功效？")
    assert cells[row + 1 : row + 4] == ["发汗解表", HOSTILE.replace("\x1b", "\ufffd"), "宣肺平喘"]
    row = cells.index("held-out loss")
    assert cells[row + 1 : row + 4] == ["3.000 (2.900 to 3.100)", "2.000", "0.500"]


def test_a_damaged_report_of_the_data_is_left_out_of_the_page_of_a_finished_run(folder, tmp_path, capsys):
    (tmp_path / "report.json").write_text("{broken", encoding="utf-8")
    assert "rows read" not in write_page(folder).read_text(encoding="utf-8")
    assert "left out of report.html: " in capsys.readouterr().out


def test_the_page_of_dpo_has_its_pairs_and_its_warnings(folder, tmp_path):
    record = read_json(folder / "run.json")
    record["settings"]["BETA"], record["told"] = 0.1, ["kept: step 9", "warning: no better than chance"]
    record["results"] |= {"eval_reward_accuracy": 0.736, "measured_on": "dpo_eval.jsonl"}
    write_json(folder / "run.json", record)
    lengths = {"chosen": 11.3, "rejected": 11.2}
    split = {"rows": 60, "pairs": 56, "not_paired": {"too short": 4}, "mean_characters": lengths}
    write_json(tmp_path / "dpo_report.json", {"train": {**split, "told_apart": 0.44}})
    text = write_page(folder).read_text(encoding="utf-8")
    cells = Page(text).cells
    for name, value in (
        ("train: pairs", "56"),
        ("train, not paired: too short", "4"),
        ("measured on", "dpo_eval.jsonl"),
    ):
        assert cells[cells.index(name) + 1] == value
    assert "73.6%" in cells and "rows read" not in cells and "<p>warning: no better than chance</p>" in text
