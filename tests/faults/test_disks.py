"""Permissions, full disks, disks that take no large files, little memory."""

import sys
from pathlib import Path

import pytest
from fault_runs import (
    HEAVY,
    MADE,
    TRAINERS,
    assert_nothing_lost,
    assert_told,
    assert_works_again,
    contents,
    copy_of,
    start,
)
from processes import little_memory, obey_permissions

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MADE)
def test_no_permission_to_write(world, hub, tmp_path, name):
    """The folder with the results of an earlier run is write-protected."""
    output = copy_of(world, name, tmp_path)
    before, more = contents(output), ["--fresh"] if name in (*TRAINERS, "compare") else []
    output.chmod(0o500)
    try:
        script = start(
            world,
            name,
            *more,
            "--output-dir",
            output,
            hub=hub,
            ready=name in HEAVY,
            before=[(obey_permissions,)],
        )
        assert_told(
            script,
            1,
            f"no permission to write or read ({output}",
            "; choose another folder or change its owner",
        )
        assert contents(output) == before
    finally:
        output.chmod(0o700)
    if name not in HEAVY:
        assert_works_again(world, name, output, hub)


@pytest.mark.parametrize(
    "command, kept",
    [
        ("convert --input-files {w}/locked.jsonl", "locked.jsonl"),
        ("pairs --kind facts --terms-file {w}/locked.jsonl", "locked.jsonl"),
        ("sft --train-file {w}/locked.jsonl", "locked.jsonl"),
        ("compare --eval-file {w}/locked.jsonl", "locked.jsonl"),
        ("lora --model {w}/locked", "locked"),
        ("chat --model {w}/locked", "locked"),
    ],
)
def test_no_permission_to_read(world, command, kept):
    (world / "locked.jsonl").touch(0)
    (world / "locked").mkdir(0)
    try:
        assert_told(
            start(world, command, before=[(obey_permissions,)]),
            1,
            f"no permission to write or read ({world / kept}",
        )
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
    "name, n, error",
    [
        ("sample", 2, "EDQUOT"),
        ("data", 1, "ENOSPC"),
        ("convert", 2, "EDQUOT"),
        ("pairs", 1, "ENOSPC"),
        ("model", 2, "ENOSPC"),
    ],
)
def test_disk_full(world, hub, tmp_path, name, n, error):
    output = copy_of(world, name, tmp_path)
    before = contents(output)
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK.format(n=n, error=error), encoding="utf-8")
    script = start(world, name, "--output-dir", output, hub=hub, environment={"PYTHONPATH": str(tmp_path)})
    assert_told(script, 1, "the disk is full", "; free some space and run the same command again")
    assert_nothing_lost(world, name, before, output)
    assert_works_again(world, name, output, hub)


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("convert", 4000, "takes no file so large"),
        ("pairs", 4000, "takes no file so large"),
        ("pretrain", 100_000, "takes no file so large"),
        ("sft", 700_000, "the disk is full"),
        ("lora", 100_000, "takes no file so large"),
        ("dpo", 100_000, "takes no file so large"),
        ("compare", 3000, "takes no file so large"),
    ],
)
def test_disk_that_takes_no_file_of_that_size(world, hub, tmp_path, name, size, words):
    """FAT32 ends at 4 GB, this disk at `size` bytes. Python and safetensors say why they failed, torch does not."""
    output = tmp_path / "new" if name in TRAINERS else copy_of(world, name, tmp_path)
    before, more = (
        contents(output),
        {"compare": ["--generate", "1"], **dict.fromkeys(TRAINERS, ["--max-steps", "2"])}.get(name, []),
    )
    script = start(
        world,
        name,
        *more,
        "--output-dir",
        output,
        ready=name in HEAVY,
        before=[(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))],
    )
    assert_told(script, 1, words)
    assert {path: contents(output).get(path) for path in before} == before
    assert not [path for path in output.glob("*.safetensors") if Path(path.name) not in before]
    assert not list(
        output.glob(".partial-checkpoint/*")
    )  # 7 GB for Qwen3-0.6B, which would keep the disk full
    if name != "dpo":  # its pictures take seconds
        assert_works_again(world, name, output, hub, *more)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS limits memory on Linux only")
@pytest.mark.parametrize("name", ["sft", "compare", "chat"])
def test_memory_too_small(world, tmp_path, name):
    output = [] if name == "chat" else ["--output-dir", tmp_path / "out"]
    assert_told(
        start(world, name, *output, ready=True, before=[(little_memory, 1 << 20)]), 1, "not enough memory"
    )
