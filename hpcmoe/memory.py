"""Memory of this machine and this process, in bytes."""

from __future__ import annotations

import os
import resource
from pathlib import Path


def available() -> int:
    """Bytes that processes here can still take: of the machine, and of this process's cgroups (v2 or v1)."""
    free = _meminfo("MemAvailable")
    for limit, used in _cgroup_limits():
        free = min(free, max(0, limit - used))
    return free


def total() -> int:
    """Bytes of the machine, or of the tightest cgroup around this process."""
    return min([_meminfo("MemTotal")] + [limit for limit, _ in _cgroup_limits()])


def peak_rss() -> int:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, value = line.split(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise KeyError(name)


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, in use) of each memory cgroup from this process's own up to the root."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = base / path.lstrip("/")
        for folder in [here, *here.parents]:
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                found.append((limit, used))
            if folder == base:
                break
    return found


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
