"""How many cores there are to work with."""

import functools
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of this container


def count_cores() -> int:
    """Return how many cores this process may run on, whatever the number of processes beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(CGROUP))))


@functools.cache
def _quota(cgroup: Path) -> float:
    """Return how many cores' time a container gets (`docker run --cpus 4`, Kubernetes): it sees all of its host's."""
    try:
        if (both := cgroup / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:  # version 1
            quota, period = ((cgroup / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no limit ("max"), no container, or another system
        return math.inf
