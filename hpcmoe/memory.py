"""Memory of this machine and this process, in bytes."""

from __future__ import annotations

import ctypes
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


KEPT_BYTES, MAPPED_BYTES = 128 << 20, 32 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed() -> bool:
    """Has the C library keep memory that is freed, for the next array, instead of giving it back to the system at once; whether it does.

    Arrays of a step are as large in the next one, and to get their pages anew costs more than the arithmetic on them: attention's
    scores and copies of some 100 KiB each doubled its time. glibc alone; larger arrays than MAPPED_BYTES are given back as before. Where
    the environment sets these (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) it is left alone.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))
