"""How many cores there are to work with."""

import os


def count_cores() -> int:
    """Return how many cores this process may run on, whatever the number of processes beside it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
