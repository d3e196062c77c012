"""Seconds from the command to the probe's score, or to the end, beside those of another version of Luthier.

    git worktree add ../before REVISION
    python -m benchmarks.first_score path/to/instruments ../before [--rounds 5] [--whole]

Both take turns, each time with empty caches, and a round counts as the ratio of its two times. Another one begins in
every round, because the first run of all also reads files that the later ones find in memory. A run is ended once it
has said the score, unless the whole run counts.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks._common import LAUNCH, PROJECT, build_parser, directory, own_caches


def main() -> None:
    """Print the seconds of both in every round, and the median ratio with its lowest and highest."""
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=directory, help="of class folders")
    parser.add_argument("before", type=directory, help="a checkout of the other version")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="measure whole runs")
    args = parser.parse_args()
    ratios = []
    for number in range(args.rounds):
        turns = (args.before, PROJECT) if number % 2 else (PROJECT, args.before)
        seconds = {checkout: measure(checkout, args.folder.resolve(), args.whole) for checkout in turns}
        before, now = seconds[args.before], seconds[PROJECT]
        ratios.append(now / before)
        print(f"before {before:.1f} s, now {now:.1f} s", flush=True)
    print(f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def measure(checkout: Path, folder: Path, whole: bool) -> float:
    """Return the seconds to a run's line that begins with `probe`; of a `whole` run with `saved`. End it there."""
    end = "saved" if whole else "probe"
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--data_dir", str(folder), "--output_dir", f"{temporary}/run"]
        environment = os.environ | own_caches(Path(temporary, "cache")) | {"PYTHONUNBUFFERED": "1"}
        begin = time.perf_counter()
        with subprocess.Popen(
            [*LAUNCH, "--quiet", "train.py", *options],
            cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            found = any(line.startswith(end) for line in process.stdout)
            seconds = time.perf_counter() - begin
            os.killpg(process.pid, signal.SIGKILL)
    if not found:
        sys.exit(f"the run in {checkout} ended without its line {end!r}")
    return seconds


if __name__ == "__main__":
    main()
