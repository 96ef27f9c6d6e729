"""The processor's cores, as far as this process may use them."""

import math
import os
import pathlib


def core_count() -> int:
    """Cores that this process may use; all of the machine's without an affinity mask."""
    return len(affinity()) or os.cpu_count() or 1


def affinity() -> list[int]:
    """The cores that this process is bound to; none where the system has no such mask."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_limit(folder: str = "/sys/fs/cgroup") -> int:
    """The CPUs that the container's quota allows, rounded up; 0 for no limit.

    XLA's thread pool knows of the affinity mask (taskset), but not of this.
    """
    root = pathlib.Path(folder)
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return max(0, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return 0
