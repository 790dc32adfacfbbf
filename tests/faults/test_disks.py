"""Permissions, full disks, disks that take no large files, little memory."""

import sys

import pytest
from fault_runs import assert_nothing_lost, assert_told, assert_works_again, contents, copy_of, start
from processes import little_memory, obey_permissions

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["convert", "model", "pretrain", "sft", "compare"])
def test_no_permission_to_write(world, hub, tmp_path, name):
    """The folder with the results of an earlier run is write-protected."""
    output = copy_of(world, name, tmp_path)
    before, more = contents(output), ["--fresh"] if name in ("sft", "compare") else []
    output.chmod(0o500)
    try:
        script = start(world, name, *more, "--output-dir", output, hub=hub, before=[(obey_permissions,)])
        assert_told(script, 1, f"no permission to write or read ({output}", "; choose another folder or")
        assert contents(output) == before
    finally:
        output.chmod(0o700)
    if name in ("convert", "model"):
        assert_works_again(world, name, output, hub)


@pytest.mark.parametrize(
    "command",
    [
        "convert --input-files {w}/locked.jsonl",
        "pairs --kind facts --terms-file {w}/locked.jsonl",
        "sft --train-file {w}/locked.jsonl",
        "lora --model {w}/locked",
    ],
)
def test_no_permission_to_read(world, command):
    (world / "locked.jsonl").touch(0)
    (world / "locked").mkdir(0)
    try:
        script = start(world, command, before=[(obey_permissions,)])
        assert_told(script, 1, f"no permission to write or read ({world}/locked")
    finally:
        (world / "locked").rmdir()
        (world / "locked.jsonl").unlink()


# Network disks and quotas report that they are full only at fsync: here at the {n}-th one.
FULL_DISK = """import errno, os
def keep(file, times=iter(range({n} - 1))):
    if next(times, None) is None:
        raise OSError(errno.{error}, os.strerror(errno.{error}))
os.fsync = keep
"""


@pytest.mark.parametrize(
    "name, n, error", [("convert", 2, "EDQUOT"), ("pairs", 1, "ENOSPC"), ("model", 2, "ENOSPC")]
)
def test_disk_full(world, hub, tmp_path, name, n, error):
    output = copy_of(world, name, tmp_path)
    before, environment = contents(output), {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK.format(n=n, error=error), encoding="utf-8")
    script = start(world, name, "--output-dir", output, hub=hub, environment=environment, ready=False)
    assert_told(script, 1, "the disk is full", "; free some space and run the same command again")
    assert_nothing_lost(world, name, before, output)
    assert_works_again(world, name, output, hub)


@pytest.mark.parametrize(
    "name, size", [("convert", 4000), ("pretrain", 100_000), ("sft", 700_000), ("compare", 3000)]
)
def test_disk_that_takes_no_file_of_that_size(world, tmp_path, name, size):
    """FAT32 ends at 4 GB, this disk at `size` bytes. Python and safetensors say why they failed, torch does not."""
    output = tmp_path / "new" if name == "sft" else copy_of(world, name, tmp_path)
    before, more = contents(output), ["--generate", "1"] if name == "compare" else []
    limit = (resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    script = start(world, name, *more, "--output-dir", output, before=[limit])
    assert_told(script, 1, "takes no file so large")
    assert {path: contents(output).get(path) for path in before} == before
    assert {path.relative_to(output) for path in output.glob("*.safetensors")} <= before.keys()
    assert not list(output.glob(".partial-checkpoint/*"))  # 7 GB for Qwen3-0.6B: the disk would stay full
    assert_works_again(world, name, output, None, *more)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS limits memory on Linux only")
@pytest.mark.parametrize("name", ["sft", "chat"])
def test_memory_too_small(world, tmp_path, name):
    output = [] if name == "chat" else ["--output-dir", tmp_path / "out"]
    script = start(world, name, *output, before=[(little_memory, 1 << 20)])
    assert_told(script, 1, "not enough memory")
