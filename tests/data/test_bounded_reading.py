"""Files that are small and ask for much: time and memory stay those of what is in them."""

import gzip
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from utils.data import readers
from utils.data.inputs import InputFile, find_input_files
from utils.data.messages import Reject
from utils.data.readers import parse_row, read_rows
from utils.errors import UserError


def test_many_duplicate_keys_take_no_longer_than_their_text():
    text = "{" + ", ".join(f'"k{number % 40_000}": 1' for number in range(80_000)) + "}"
    start = time.monotonic()
    with pytest.raises(Reject, match="duplicate keys"):
        parse_row(text, "utf-8")
    assert time.monotonic() - start < 2  # 51 s when every name was counted through the whole list


def parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return list(read_rows(InputFile(path, path.name)))


def test_parquet_cells_that_raise_set_aside_their_row(tmp_path):
    dates = pyarrow.array([0, 9_000_000, 1], pyarrow.int32()).cast(pyarrow.date32())
    rows = [raw for _, raw in parquet(tmp_path / "dates.parquet", {"q": ["a", "b", "c"], "day": dates})]
    assert [type(row) for row in rows] == [dict, Reject, dict] and rows[1].reason == "not a table row"
    twice = pyarrow.StructArray.from_arrays([pyarrow.array([1, 2]), pyarrow.array([3, 4])], ["x", "x"])
    rows = [raw for _, raw in parquet(tmp_path / "struct.parquet", {"q": ["a", "b"], "s": twice})]
    assert [type(row) for row in rows] == [Reject, Reject]


def shared_text(path, rows, size):
    """A Parquet file of a few kB in which `rows` rows hold the same text of `size` characters."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["a" * size])
    pyarrow.parquet.write_table(
        pyarrow.table({"output": texts}), path, compression="zstd", store_schema=False
    )
    return path


@pytest.mark.slow
def test_a_small_parquet_file_takes_bounded_memory(tmp_path):
    path = shared_text(tmp_path / "shared.parquet", 400, 16 << 20)  # 6.4 GB unpacked
    assert path.stat().st_size < 20_000
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from utils.data.readers import read_rows; from utils.data.inputs import InputFile\n"
        f"rows = sum(1 for _ in read_rows(InputFile(Path({str(path)!r}), 'x')))\n"
        "import pyarrow; print(rows, pyarrow.default_memory_pool().max_memory() >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    rows, megabytes = map(int, done.stdout.split())
    assert rows == 400 and megabytes < 1000, done.stderr


def test_parquet_row_groups_that_no_memory_holds_are_refused(tmp_path, monkeypatch):
    path = shared_text(tmp_path / "shared.parquet", 10, 1 << 20)
    monkeypatch.setattr(readers, "LARGEST_GROUP", 1 << 19)
    with pytest.raises(UserError, match="shared.parquet has a row group of 1 MB"):
        list(read_rows(InputFile(path, path.name)))
    monkeypatch.setattr(readers, "LARGEST_GROUP", 1 << 30)
    assert len(list(read_rows(InputFile(path, path.name)))) == 10


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.tsv.gz"])
def test_a_line_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch, name):
    """1.2 GB of zeros in 1.2 MB: handed to a worker process it hung for ever."""
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    first = b'{"query": "q?", "response": "x"}\n' if "json" in name else b"query\n"
    (tmp_path / name).write_bytes(gzip.compress(first + b"\0" * (2 << 20)))
    [source] = find_input_files([tmp_path / name], "", True)[0]
    with pytest.raises(UserError, match=rf"{name}, line 2 is longer than 1 MiB"):
        list(read_rows(source))
