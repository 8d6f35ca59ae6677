"""Limits of containers, on made-up trees of control groups."""

from __future__ import annotations

import os
from pathlib import Path

from llmscale import machine

MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 1 << 30
"""Less than any machine that runs these tests has."""


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_without_limits_all_of_the_machine_is_there(tmp_path: Path) -> None:
    assert machine.memory_bytes(tmp_path) == MACHINE_BYTES
    assert machine.cpus(tmp_path) == len(os.sched_getaffinity(0))
    files = {
        "sys/fs/cgroup/pod/memory.max": "max",
        "sys/fs/cgroup/pod/cpu.max": "max 100000",
        "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, "0::/pod\n4:memory:/pod\n3:cpu,cpuacct:/pod", files)
    assert machine.memory_bytes(root) == MACHINE_BYTES
    assert machine.cpus(root) == len(os.sched_getaffinity(0))


def test_the_smallest_limit_on_the_way_up_holds(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/pod/memory.max": str(GIB),
        "sys/fs/cgroup/pod/container/memory.max": str(2 * GIB),
        "sys/fs/cgroup/pod/cpu.max": "100000 100000",
        "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
        "sys/fs/cgroup/other/memory.max": "1",
    }
    root = tree(tmp_path, "0::/pod/container", files)
    assert machine.memory_bytes(root) == GIB
    assert machine.cpus(root) == 1


def test_within_a_namespace_the_mounted_group_is_ones_own(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": str(GIB), "sys/fs/cgroup/cpu.max": "50000 100000"}
    root = tree(tmp_path, "0::/../../kubepods/burstable", files)
    assert machine.memory_bytes(root) == GIB
    assert machine.cpus(root) == 1, "half a CPU is one thread"


def test_groups_of_the_first_version_are_read_by_their_controller(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/docker/one/memory.limit_in_bytes": str(GIB),
        "sys/fs/cgroup/cpu/docker/one/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu/docker/one/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, "4:memory:/docker/one\n3:cpu,cpuacct:/docker/one\n9:name=systemd:/", files)
    assert machine.memory_bytes(root) == GIB
    assert machine.cpus(root) == 1


def test_what_is_free_is_what_the_smallest_limit_leaves_and_pages_of_files_are_free(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 3145728 kB"}
    assert machine.free_bytes(tree(tmp_path / "none", "0::/", meminfo)) == 3 * GIB
    files = {
        **meminfo,
        "sys/fs/cgroup/pod/memory.max": str(2 * GIB),
        "sys/fs/cgroup/pod/memory.current": str(GIB + 5),
        "sys/fs/cgroup/pod/memory.stat": f"anon 7\ninactive_file {GIB // 2}\nactive_file 3",
        "sys/fs/cgroup/pod/container/memory.max": "max",
        "sys/fs/cgroup/pod/container/memory.current": "7",
    }
    assert machine.free_bytes(tree(tmp_path / "new", "0::/pod/container", files)) == GIB + GIB // 2 - 5
    files = {
        **meminfo,
        "sys/fs/cgroup/memory/one/memory.limit_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/one/memory.usage_in_bytes": str(GIB + 4_096),
        "sys/fs/cgroup/memory/one/memory.stat": "cache 5\ntotal_inactive_file 0",
    }
    assert machine.free_bytes(tree(tmp_path / "old", "5:memory:/one", files)) == 0


def test_without_figures_all_of_the_machine_is_free(tmp_path: Path) -> None:
    assert machine.free_bytes(tmp_path) == MACHINE_BYTES
