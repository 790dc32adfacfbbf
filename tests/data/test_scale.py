"""Many rows: the memory is forecast and refused before it is used up, and packed files are measured unpacked."""

import gzip
import io
import zipfile

import pytest
from data_rows import write_lines

from utils.data import convert as conversion
from utils.data.inputs import InputFile
from utils.errors import UserError


def test_rows_that_would_not_fit_into_memory_are_refused(tmp_path, convert, monkeypatch):
    rows = [{"query": f"第{n}个问题？", "response": f"答{n}"} for n in range(9000)]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    monkeypatch.setattr(conversion, "FORECAST_ROWS", 2000)
    monkeypatch.setattr(conversion, "memory_for_process", lambda: 5_000_000)
    with pytest.raises(UserError) as caught:
        convert(path)
    words = str(caught.value)
    assert "about 9," in words and "1000 bytes a row" in words and "convert the files in parts" in words
    assert [file.name for file in (tmp_path / "out").iterdir()] == []  # neither results nor temporary files
    monkeypatch.setattr(conversion, "memory_for_process", lambda: 50_000_000)
    assert convert(path)["report"]["rows_in"] == 9000


def test_sizes_are_those_of_the_unpacked_files(tmp_path):
    content = b'{"query": "q", "response": "r"}\n' * 1000
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in.jsonl", content)
    for name, data, member in (
        ("a.jsonl", content, ""),
        ("a.jsonl.gz", gzip.compress(content), ""),
        ("a.zip", packed.getvalue(), "in.jsonl"),
    ):
        (tmp_path / name).write_bytes(data)
        assert InputFile(tmp_path / name, name, member=member).size == len(content)
