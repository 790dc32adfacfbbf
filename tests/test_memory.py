"""The memory that a process may use: its container's limits and those of ulimit hold."""

import resource
from types import SimpleNamespace

import pytest

from utils import memory


def test_memory_that_a_control_group_may_use(tmp_path, monkeypatch):
    free, files = memory.memory_for_process(), [tmp_path / name for name in ("own", "above", "top")]
    monkeypatch.setattr(memory, "_limit_files", lambda: files)
    for file, text in zip(files, ("max\n", "12345678\n", "9223372036854771712\n")):
        file.write_text(text, encoding="ascii")
    assert memory.memory_for_process() == 12345678
    files[1].unlink()
    assert abs(memory.memory_for_process() - free) < 2**30  # other programs come and go


@pytest.mark.parametrize(
    "lines, files",
    [
        ("0::/a/b\n", ["a/b/memory.max", "a/memory.max", "memory.max"]),
        ("3:cpu,memory:/a\n2:cpuset:/\n", ["memory/a/memory.limit_in_bytes", "memory/memory.limit_in_bytes"]),
    ],
    ids=["version 2", "version 1"],
)
def test_limits_of_this_process_and_of_the_groups_above_it(monkeypatch, lines, files):
    monkeypatch.setattr(memory.Path, "read_text", lambda path, **how: lines)
    assert memory._limit_files() == [memory.CGROUPS / file for file in files]


def test_address_space_limited_by_ulimit(monkeypatch):
    used = SimpleNamespace(rss=2**30, vms=5 * 2**30)
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))
    monkeypatch.setattr(memory, "_limit_files", lambda: [])
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 * 2**30, 8 * 2**30))
    assert memory.memory_for_process() == 4 * 2**30


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = memory.memory_for_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.memory_for_process() < 0.5 * whole
