"""What a command prints: its few lines, numbers in words, progress where there is no terminal, seconds by stage."""

import os
import sys
import time
from collections.abc import Mapping


def say(topic: str, text: str) -> None:
    """Print one line of a run, once, whatever the number of processes.

    Args:
        topic: the first word, at most 8 characters; empty continues the line before.
        text: the rest.
    """
    if os.environ.get("RANK", "0") == "0":  # accelerate and torchrun number the processes so
        print(f"{topic:<9}{text}", flush=True)


def plural(n: int, noun: str, nouns: str | None = None) -> str:
    """Return a number with its noun: `1 image`, `1,200 images`, `2 classes`."""
    return f"{n:,} {noun if n == 1 else nouns or f'{noun}s'}"


def percent(share: float, places: int = 1) -> str:
    """Return a share in percent, `71.8%`, in which only all are 100%."""
    return f"{min(share, 1 - 10.0 ** -(places + 2)) if share < 1 else share:.{places}%}"


def percent_with_interval(scored: Mapping) -> str:
    """Return an accuracy with its interval and n: `71.8% (95% interval 65.3% to 77.4%, n = 209)`."""
    low, high = scored["accuracy_ci95"]
    groups = f" in {plural(scored['groups'], 'group')}" if "groups" in scored else ""
    return f"{percent(scored['accuracy'])} (95% interval {percent(low)} to {percent(high)}, n = {scored['n']}{groups})"


def balance_with_intervals(scored: Mapping) -> str:
    """Return balanced accuracy and macro F1: `balanced accuracy 70.9% (64.2% to 76.8%), macro F1 0.702 (...)`."""
    if "balanced_accuracy" not in scored:  # in metrics.json of an earlier version
        return f"macro F1 {scored['macro_f1']:.3f}"
    (low, high), (lowest, highest) = scored["balanced_accuracy_ci95"], scored["macro_f1_ci95"]
    return (
        f"balanced accuracy {percent(scored['balanced_accuracy'])} ({percent(low)} to {percent(high)}), "
        f"macro F1 {scored['macro_f1']:.3f} ({lowest:.3f} to {highest:.3f})"
    )


def has_terminal() -> bool:
    """Tell whether a person watches the progress: where not, bars would fill a log file."""
    return sys.stderr is not None and sys.stderr.isatty()


class Tenths:
    """Says on stderr how far a long piece of work is, a line at each tenth, where there is no terminal for a bar.

    Args:
        topic: the first word of the lines.
        total: amount of work.
        unit: what is counted.
        quiet_seconds: no line before this many seconds have passed.
    """

    def __init__(self, topic: str, total: int, unit: str, quiet_seconds: float = 0):
        self.topic, self.total, self.unit, self.quiet_seconds = topic, total, unit, quiet_seconds
        self.start, self.said = time.monotonic(), 0

    def reach(self, done: int) -> None:
        """Say that this much of the work is done, if that completes a tenth."""
        tenth = 10 * done // max(1, self.total)
        if tenth > self.said and not has_terminal() and os.environ.get("RANK", "0") == "0":
            self.said = tenth
            seconds = time.monotonic() - self.start
            if seconds >= self.quiet_seconds:
                line = f"{self.topic:<9}{done:,} of {self.total:,} {self.unit}, {seconds:.0f} s"
                print(line, file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds by stage, each counted from the end of the one before.

    Attributes:
        seconds: by name of the stage.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._begin = self._last = time.perf_counter()

    def total(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._begin

    def stop(self, stage: str) -> None:
        """End a stage, or one more part of it."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0) + now - self._last, 3)
        self._last = now
