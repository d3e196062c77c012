"""How the cost of a run grows with the number of images: seconds, memory and disk space, stage by stage.

    python -m benchmarks.scale
    python -m benchmarks.scale --sizes 1000 10000 --output scale.json

It draws JPEGs of 64 x 64 px, once for the largest size; the smaller ones are links to the first of them. One in a
hundred is a changed copy of another: resized, slightly cropped and compressed again. For each size it runs
`train.py --recipe probe --learning_curve true` at 64 px, and an epoch of `simple_cnn` from scratch, each in a process
of its own and with an empty cache.

Seconds are those of each stage without the stages in it. Memory is what the processes hold beyond files that they have
mapped, which the system can take back at any time: the highest in each stage, above that of the imports. A line
`exponent STAGE VALUE` has the slope of log seconds over log images, among the sizes from a tenth of the largest,
for each stage of a second or more. Memory is the slope of the peak over the images. The exit code is 1 where an
exponent is above 1.15, an image takes more than 2 kB, or fewer than 95% of the planted copies are found.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks._common import PROJECT, build_parser, own_caches, run_command

SIZES = (1000, 10_000, 100_000, 300_000)
CLASSES, SIDE, EVERY = 10, 64, 100  # of EVERY images one is a copy
LARGE = 10  # sizes of at least a tenth of the largest count for exponents
MAX_EXPONENT, MAX_BYTES, MIN_RECALL, LEAST_SECONDS = 1.15, 2000, 0.95, 1.0
INTERVAL = 0.1  # seconds between two looks at the memory
RUNS = {
    "probe": ("--recipe", "probe", "--image_size", str(SIDE), "--learning_curve", "true"),
    "epoch": ("--model_name", "simple_cnn", "--num_train_epochs", "1", "--refit", "none"),
}  # fmt: skip
# What a stage is: a function, by the module that calls it. A stage counts without the stages that it calls.
STAGES = {
    "listing": ("data", "load_directory"),
    "inspection": ("data", "inspect"),
    "grouping": ("data", "add_groups"),
    "split": ("data", "cut_splits"),
    "audit": ("luthier.scoring.audit", "audit_images"),
    "preparation": ("data", "prepare"),
    "features": ("luthier.scoring.baselines", "load_features"),
    "probe": ("luthier.scoring.baselines", "fit_shared_probes"),
    "label check": ("luthier.scoring.baselines", "suspect_labels"),
    "learning curve": ("luthier.scoring.baselines", "learning_curve"),
    "training": ("luthier.scoring.race", "race"),
    "score": ("luthier.scoring.familiarity", "answer"),
    "refit": ("luthier.scoring.refit", "refit"),
    "report": ("luthier.reporting.results", "write_run"),
}


def main() -> None:
    """Draw, run each size, print the tables and the exponents."""
    parser = build_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which runs (default: both)")
    parser.add_argument("--output", type=Path, help="write what was measured to this file, after each run")
    parser.add_argument("--chart", type=Path, help="draw the seconds of the probe's run into this file")
    parser.add_argument("--measure", nargs=2, metavar=("RUN", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    measured: dict[str, dict[int, dict]] = {run: {} for run in args.runs}
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary, "images")
        copies = draw(images, max(args.sizes))
        for size in sorted(args.sizes):
            folder = link(images, size, Path(temporary, str(size)))
            for run in args.runs:
                measured[run][size] = run_in_process(run, folder)
                if run == "probe":
                    own = [pair for number, pair in enumerate(copies) if EVERY * (number + 1) <= size]
                    measured[run][size]["recall"] = recall(folder / "out-probe/audit.json", own)
                if args.output:
                    args.output.write_text(json.dumps(measured, indent=1))
    if args.chart and "probe" in measured:
        draw_chart(measured["probe"], args.chart)
    failed = [line for run, by_size in measured.items() for line in report(run, by_size)]
    print("\n".join(f"too much: {line}" for line in failed))
    sys.exit(bool(failed))


def draw(folder: Path, count: int) -> list[frozenset[str]]:
    """Draw images of all classes; return the names of each image that has a copy, and of the copy."""
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    blocks = [(folder, begin, min(count, begin + EVERY)) for begin in range(0, count, EVERY)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw_block, blocks, chunksize=10))
    names = [(name_of(end - 2), name_of(end - 1)) for _, _, end in blocks if end % EVERY == 0]
    return [frozenset(pair) for pair in names]


def name_of(number: int) -> str:
    """Return the name of an image: an image and the next one are of one class."""
    return f"{number // 2 % CLASSES}/{number:07}.jpg"


def draw_block(block: tuple[Path, int, int]) -> None:
    """Draw some images, the last of them as a copy of the one before it where the block is full."""
    folder, begin, end = block
    for number in range(begin, end):
        generator = np.random.default_rng(number)
        if number % EVERY == EVERY - 1:
            left, top, right, bottom = generator.uniform(0, 0.05, 4) * 2 * SIDE
            box = (left, top, 2 * SIDE - right, 2 * SIDE - bottom)
            image, side = draw_scene(number - 1).crop(box), int(generator.integers(SIDE, 2 * SIDE))
        else:
            image, side = draw_scene(number), SIDE
        image = image.resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / name_of(number), quality=int(generator.integers(75, 95)))


def draw_scene(number: int) -> Image.Image:
    """Draw patches of random colours, large ones and small ones as in a photograph, tinted as the class is."""
    generator, levels = np.random.default_rng(number), np.zeros((2 * SIDE, 2 * SIDE, 3), np.float32)
    for cells, strength in ((2, 50), (4, 40), (8, 25), (16, 15), (64, 8)):
        patches = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), np.uint8))
        patches = patches.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
        levels += (np.asarray(patches, np.float32) / 127.5 - 1) * strength
    tint = np.random.default_rng(number // 2 % CLASSES).integers(-60, 60, 3)
    return Image.fromarray((levels + 128 + tint).clip(0, 255).astype(np.uint8))


def link(images: Path, count: int, folder: Path) -> Path:
    """Link the first images into the folder of a run; return the folder."""
    for label in range(CLASSES):
        (folder / "images" / str(label)).mkdir(parents=True)
    for number in range(count):
        os.link(images / name_of(number), folder / "images" / name_of(number))
    return folder


def run_in_process(run: str, folder: Path) -> dict:
    """Return what `measure` does, in a new process with a cache of its own, and what it leaves on the disk."""
    cache = folder / f"cache-{run}"
    command = [sys.executable, "-m", "benchmarks.scale", "--measure", run, str(folder)]
    begin = time.perf_counter()
    output = run_command(command, PROJECT, own_caches(cache))
    seconds = time.perf_counter() - begin
    by_kind = {path.name: disk_space(path) for path in (cache / "datasets").iterdir() if path.is_dir()}
    return json.loads(output.splitlines()[-1]) | {"total": seconds, "disk": by_kind}


def measure(run: str, folder: str) -> dict:
    """Run train.py; return the seconds of each stage, and the highest memory in it, above that of the imports."""
    import train

    clock = StageClock()
    for stage, (module, function) in STAGES.items():
        owner = importlib.import_module(module)
        setattr(owner, function, clock.wrap(stage, getattr(owner, function)))
    clock.start_watching()
    options = ["--data_dir", f"{folder}/images", "--output_dir", f"{folder}/out-{run}", "--disable_tqdm", "1"]
    with contextlib.redirect_stdout(sys.stderr):  # what this process prints is the result
        train.main([*options, *RUNS[run]])
    return {"seconds": clock.seconds, "memory": clock.memory}


class StageClock:
    """Seconds and memory of functions, each without the functions that it calls.

    Attributes:
        seconds: by stage.
        memory: highest number of bytes by stage, of this process and all that it has started, above that at the start.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self._inner: list[float] = []
        self._running = ["rest"]

    def wrap(self, stage: str, function: Callable) -> Callable:
        """Return a function that does the same, and is timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            self._inner.append(0.0)
            self._running.append(stage)
            try:
                return function(*arguments, **options)
            finally:
                self._running.pop()
                taken = time.perf_counter() - begin
                self.seconds[stage] = self.seconds.get(stage, 0.0) + taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return timed

    def start_watching(self) -> None:
        """Measure the memory from now on."""
        process, before = psutil.Process(), memory_of(psutil.Process())

        def watch() -> None:
            while True:
                stage, family = self._running[-1], [process, *process.children(recursive=True)]
                self.memory[stage] = max(self.memory.get(stage, 0), sum(map(memory_of, family)) - before)
                time.sleep(INTERVAL)

        threading.Thread(target=watch, daemon=True).start()


def memory_of(process: psutil.Process) -> int:
    """Return the bytes that a process holds beyond mapped files; 0 where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        info = process.memory_info()
        return info.rss - info.shared
    return 0


def disk_space(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def recall(path: Path, copies: list[frozenset[str]]) -> float:
    """Return which share of the planted copies an audit has found, each in a group of its own."""
    groups = json.loads(path.read_text(encoding="utf-8"))["near_duplicates"]
    found = {frozenset(image["name"] for image in group) for group in groups}
    return float(np.mean([pair in found for pair in copies])) if copies else 1.0


def report(run: str, by_size: Mapping[int, dict]) -> Iterator[str]:
    """Print the tables of a run and its exponents; yield what is too much."""
    sizes = sorted(by_size)
    stages = list(dict.fromkeys(stage for size in sizes for stage in by_size[size]["seconds"]))
    print(f"\n{run}: `train.py {' '.join(RUNS[run])}`\n")
    print(f"| | {' | '.join(f'{size:,}' for size in sizes)} |\n|---|{'---|' * len(sizes)}")

    def row(name: str, values: list[str]) -> None:
        print(f"| {name} | {' | '.join(values)} |")

    for stage in stages:
        row(f"{stage}, s", [f"{by_size[size]['seconds'].get(stage, 0):.1f}" for size in sizes])
    row("whole process, s", [f"{by_size[size]['total']:.0f}" for size in sizes])
    for stage in (*stages, "rest"):
        row(f"{stage}, MB", [f"{by_size[size]['memory'].get(stage, 0) / 1e6:.0f}" for size in sizes])
    for kind in sorted({kind for size in sizes for kind in by_size[size]["disk"]}):
        row(f"{kind} on disk, bytes an image", [f"{by_size[size]['disk'].get(kind, 0) / size:,.0f}" for size in sizes])
    if run == "probe":
        row("planted copies found", [f"{by_size[size]['recall']:.0%}" for size in sizes])
        yield from (f"recall at {size:,} images" for size in sizes if by_size[size]["recall"] < MIN_RECALL)
    large = [size for size in sizes if LARGE * size >= sizes[-1]]
    print()
    if len(large) < 2:
        return
    for stage in (*stages, "total"):
        seconds = [
            by_size[size]["total"] if stage == "total" else by_size[size]["seconds"].get(stage, 0) for size in large
        ]
        if seconds[-1] >= LEAST_SECONDS:
            exponent = float(np.polyfit(np.log(large), np.log(np.maximum(seconds, 1e-3)), 1)[0])
            print(f"exponent {stage} {exponent:.2f}")
            if exponent > MAX_EXPONENT:
                yield f"exponent of {stage}, {run}: {exponent:.2f}"
    slope = float(np.polyfit(large, [max(by_size[size]["memory"].values()) for size in large], 1)[0])
    print(f"memory {slope:.0f} bytes an image")
    if slope > MAX_BYTES:
        yield f"memory of {run}: {slope:.0f} bytes an image"


def draw_chart(by_size: Mapping[int, dict], path: Path) -> None:
    """Draw the seconds of the longest stages over the number of images."""
    import matplotlib.pyplot as plt

    sizes = sorted(by_size)
    longest = sorted(by_size[sizes[-1]]["seconds"].items(), key=lambda item: -item[1])[:8]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for stage, _ in longest:
        axes.loglog(sizes, [by_size[size]["seconds"].get(stage, 0) for size in sizes], marker="o", label=stage)
    axes.loglog(sizes, [by_size[size]["total"] for size in sizes], color="black", marker="o", label="whole process")
    axes.set(xlabel="images", ylabel="seconds", ylim=(0.1, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
