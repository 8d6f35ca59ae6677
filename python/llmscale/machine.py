"""What this process may use of its machine: memory and CPUs, within the limits of the containers that it runs in.

A container's memory limit is smaller than the machine's memory, and who takes more is killed; its CPU quota is smaller
than the number of CPUs, and threads beyond it are stopped in the middle of a step. Reads the control groups of Linux,
version 2 and 1, from this process's own up to the root: a handful of small files. Does not know what memory is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def memory_bytes(root: Path = ROOT) -> int:
    """The machine's memory, or the smallest limit on this process where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (value := _words(group / name)) and value[0].isdecimal():
                limits.append(int(value[0]))
    return min(limits)


def free_bytes(root: Path = ROOT) -> int:
    """What could be taken now without anybody being killed: the machine's available memory, or what is left of the
    smallest limit where that is less. Pages of files count as free, because they are dropped first."""
    available = _figure(root / "proc/meminfo", "MemAvailable:")
    left = [memory_bytes(root) if available is None else available << 10]
    for group in _groups(root, "memory"):
        for limit_name, used_name, files_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _words(group / limit_name), _words(group / used_name)
            if limit and used and limit[0].isdecimal():
                files = _figure(group / "memory.stat", files_name) or 0
                left.append(int(limit[0]) - int(used[0]) + files)
    return max(0, min(left))


def cpus(root: Path = ROOT) -> int:
    """CPUs that this process may run on, or what its quota amounts to where that is less; 1 at least."""
    limits = [float(len(os.sched_getaffinity(0)))]
    for group in _groups(root, "cpu"):
        # "max 100000", or microseconds per period of so many; in version 1 the two have files of their own, and -1.
        quota = _words(group / "cpu.max")
        quota = quota or [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(quota) == 2 and all(word.isdecimal() for word in quota) and int(quota[1]) > 0:
            limits.append(int(quota[0]) / int(quota[1]))
    return max(1, int(min(limits)))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups that may limit something."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        # Without them there is no limit of theirs.
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        yield top
        # Within a namespace the path may begin outside of what is mounted; what is mounted is then the group itself.
        if ".." not in Path(path).parts:
            group = top / path.lstrip("/")
            yield from (above for above in (group, *group.parents) if top in above.parents)


def _figure(path: Path, name: str) -> int | None:
    """Of a file of names and numbers; None where it does not say."""
    words = _words(path)
    return int(words[words.index(name) + 1]) if name in words else None


def _words(path: Path) -> list[str]:
    """Of a file; none where there is no such file."""
    try:
        return path.read_text().split()
    except OSError:
        return []
