"""The memory that this process may use: of the machine, of its container, and of `ulimit -v`."""

import contextlib
import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def memory_for_process() -> int:
    """Bytes of main memory that this process has or could still get.

    The limits of its control groups (containers) and of `ulimit -v` hold. Processes that train together on one machine
    (LOCAL_WORLD_SIZE) share what is free.
    """
    used = psutil.Process().memory_info()
    limits = [psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + used.rss]
    for file in _limit_files():
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            limits.append(int(file.read_text(encoding="ascii")))
    if os.name == "posix":
        import resource

        address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
        if address_space != resource.RLIM_INFINITY:
            limits.append(max(0, address_space - used.vms + used.rss))
    return min(limits)


def _limit_files() -> list[Path]:
    """The files that limit the memory of this process's control group, and of the groups above it: any of them holds."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    files = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        own = Path(path.lstrip("/"))
        if not controllers:  # version 2
            files += [CGROUPS / place / "memory.max" for place in (own, *own.parents)]
        elif "memory" in controllers.split(","):  # version 1
            files += [CGROUPS / "memory" / place / "memory.limit_in_bytes" for place in (own, *own.parents)]
    return files
