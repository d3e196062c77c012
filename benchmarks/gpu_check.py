"""What a machine with one NVIDIA GPU has to prove, in ten minutes and without a network.

    benchmarks/gpu_check.sh [--data_dir FOLDER] [--cpu]

That is `python -m benchmarks.gpu_check` with empty caches. It trains as a user would: the quick start; one recipe on
the GPU, on the CPU, and killed and resumed, on the photographs in FOLDER or else on the built-in images; and a ViT-S.
Then it measures, with random weights: the Trainer's loop beside a bare one, training and predictions beside the bare
network on ready batches, what `--torch_compile` and BatchNorm in the convolutions change, and whether random crops are
faster on the GPU than in data workers. `--cpu` tries its logic on a machine without a GPU, on less.

It prints one table, and exits with 1 where something falls short. On a slow host the last checks may be missing.
"""

import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import disable_progress_bars
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from transformers import PreTrainedModel

from benchmarks._common import LAUNCH, PROJECT, build_parser, directory
from benchmarks._networks import save_network
from benchmarks.throughput import LABELS, build, compare
from benchmarks.training_view import draw
from data import batch_transform, load_splits, prepare, training_rows
from luthier.fusion import fuse_for_training
from luthier.images.views import EvaluationView
from luthier.processes import available_cores
from luthier.serving.torch_network import TorchNetwork
from luthier.training.checkpoints import newest
from luthier.training.workers import StartWorker
from models import build_model

SIDE = 224
# Images a second that timm publishes for 224 px, in half precision and channels_last (its results/*.csv): training on
# an RTX 3090 (torch 1.12), inference on an RTX 4090 (torch 2.4). It has no figures of data-centre GPUs.
TIMM = {"resnet18": (3482, 18247), "efficientnet_lite0": (2079, 11510), "convnext_tiny": (819, None)}
LEAST = 0.95  # of a bare loop
LIMIT = 550  # seconds of the ten minutes; the imports and the table take the rest


class Row(NamedTuple):
    """A row of the table; `passed` is None where nothing is wanted."""

    what: str
    found: str
    wanted: str = ""
    passed: bool | None = None


class Run(NamedTuple):
    """What a run of train.py ended with."""

    seconds: float
    output: str
    accuracy: float
    interval: tuple[float, float]
    use: str  # of the GPU


def main() -> None:
    """Run all checks, and print the table."""
    parser = build_parser(__doc__)
    parser.add_argument("--data_dir", type=directory, metavar="FOLDER", help="photographs in class folders")
    parser.add_argument("--cpu", action="store_true", help="try the logic without a GPU, on less")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("there is no NVIDIA GPU that torch can use here: try --cpu, which checks the logic alone")
    begin = time.perf_counter()
    images = ["--data_dir", str(args.data_dir.resolve())] if args.data_dir else []
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = run_checks(images, args.cpu, Path(folder))
    device = "CPU" if args.cpu else torch.cuda.get_device_name()
    print(f"\n{device}, {os.cpu_count()} cores, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s\n")
    print("| check | found | wanted | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.found} | {row.wanted} | {'' if row.passed is None else row.passed} |")
    sys.exit(any(row.passed is False for row in rows))


def run_checks(images: Sequence[str], cpu: bool, scratch: Path) -> list[Row]:
    """Run all checks, and print what each finds; return the rows of the table."""
    rows: list[Row] = []
    checks = {
        "runs": check_runs(images, cpu, scratch),  # first: on a slow host the ten minutes may not do for all
        "loop": check_loop(cpu),
        "augmentation": check_augmentation(cpu, scratch),
        "networks": check_networks(cpu, scratch),
    }
    signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(LIMIT)
    begin = time.perf_counter()
    for name, found in checks.items():
        try:
            for row in found:
                print(f"{time.perf_counter() - begin:4.0f} s", *row[:2], sep=": ", flush=True)
                rows.append(row)
        except Exception as error:  # the other checks may still tell something
            rows.append(Row(name, f"{type(error).__name__}: {error}", "no error", False))
            print(*rows[-1][:2], sep=": ", flush=True)
            if isinstance(error, TimeoutError):
                break
    signal.alarm(0)
    return rows


def raise_timeout(*_: object) -> None:
    """End the check that runs, and the table has what was found before."""
    raise TimeoutError(f"not done after {LIMIT} s")


@contextmanager
def watch(found: list[str]) -> Iterator[None]:
    """Add to `found` in words how busy the GPU was, on average, and how much of its memory was in use, at most."""
    if not torch.cuda.is_available():
        yield
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as sampler:
        try:
            yield
        finally:
            sampler.terminate()
            assert sampler.stdout is not None
            samples = re.findall(r"^(\d+), (\d+)$", sampler.stdout.read(), re.MULTILINE)
    busy, memory = ([int(sample[column]) for sample in samples] for column in (0, 1))
    found.append(f"GPU {statistics.mean(busy):.0f}% busy, {max(memory):,} MiB" if samples else "")


def train(folder: Path, *options: str, kill: bool = False, launch: bool = False) -> Run | None:
    """Run train.py to the end, or kill it when it has written a checkpoint; `launch` does it by accelerate.

    Returns None where it was killed.

    Raises:
        RuntimeError: it fails, or ends before it can be killed.
    """
    command = [*(LAUNCH if launch else [sys.executable]), str(PROJECT / "train.py")]
    command += ["--output_dir", str(folder), "--disable_tqdm", "1", *options]
    begin, use, log = time.perf_counter(), [""], folder.with_suffix(".log")
    with watch(use), log.open("a") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while kill and process.poll() is None and newest(folder) is None:
                time.sleep(0.05)
            code = process.poll() if kill else process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if kill and code is None:
        return None
    output = log.read_text()
    if code or kill:
        raise RuntimeError(f"train.py {' '.join(options)} ended with {code}: {output[-2000:]}")
    scores = json.loads((folder / "metrics.json").read_text())["test"]
    interval = tuple(scores["accuracy_ci95"])
    return Run(time.perf_counter() - begin, output, scores["accuracy"], interval, use[-1])


def check_runs(images: Sequence[str], cpu: bool, scratch: Path) -> Iterator[Row]:
    """Train as a user would."""
    here, expected = ["--use_cpu", "1"] if cpu else [], "data workers, bf16"
    quick = train(scratch / "quick", *(["--recipe", "probe"] if cpu else []), *here, launch=True)
    device = re.search(r"device +(.*)", quick.output)[1]
    yield Row("quick start", f"{quick.accuracy:.1%} in {quick.seconds:.0f} s; {quick.use}")
    yield Row("its device", device, "cpu" if cpu else expected, cpu or expected in device)
    options = [*images, "--recipe", "full", "--num_train_epochs", "2", "--refit", "none", "--keep", "trained"]
    options += ["--image_size", "128"]
    ours = train(scratch / "whole", *options, *here)
    yield Row("full, two epochs at 128 px", f"{ours.accuracy:.1%} in {ours.seconds:.0f} s; {ours.use}")
    same = train(scratch / "cpu", *options, "--use_cpu", "1")
    low, high = same.interval
    yield Row(
        "the same on the CPU", f"{same.accuracy:.1%} ({low:.1%} to {high:.1%}) in {same.seconds:.0f} s",
        "an interval that has the GPU's accuracy", low <= ours.accuracy <= high,
    )  # fmt: skip
    killed, resume = scratch / "killed", ["--resume_from_checkpoint", "auto"]
    saved = ["--save_strategy", "steps", "--save_steps", "5"]
    train(killed, *options, *here, *saved, kill=True)
    again = train(killed, *options, *here, *saved, *resume)
    step = re.search(r"resume +from .*checkpoint-(\d+)", again.output)
    yield Row(
        "killed with SIGKILL, and resumed", f"{again.accuracy:.1%}, from step {step[1] if step else 'none'}",
        "a step, and the same accuracy within the interval", bool(step) and low <= again.accuracy <= high,
    )  # fmt: skip
    vit = save_network("vit_small_patch16_224", scratch / "vit")
    limits = ["--recipe", "full", "--num_train_epochs", "1", "--refit", "none", *(["--max_steps", "2"] if cpu else [])]
    run = train(scratch / "vit-run", *images, "--model_name", str(vit), *limits, *here)
    yield Row("ViT-S with random weights, an epoch", f"trained in {run.seconds:.0f} s; {run.use}")


def check_loop(cpu: bool) -> Iterator[Row]:
    """Compare the Trainer's loop with a bare one, and with itself when it is compiled."""
    rounds, plain = 1 if cpu else 3, {}
    for name in ("resnet18",) if cpu else ("efficientnet_lite0", "resnet18"):
        # Small batches of the default network alone, and no third network, because ten minutes are short.
        small = ((32, 100),) if name == "efficientnet_lite0" else ()
        for batch, steps in ((4, 1),) if cpu else (*small, (256, 40)):
            use: list[str] = [""]
            with watch(use):
                speed = compare(name, SIDE, rounds, steps, batch, ["--use_cpu", "1"] if cpu else [])
            ratio = statistics.median(speed.ratios)
            plain[name, batch] = statistics.median(speed.ours)
            yield Row(
                f"Trainer's loop, {name}, batch {batch}",
                f"{plain[name, batch]:,.0f} images/s, {ratio:.2f} ({speed.ratios[0]:.2f} to {speed.ratios[-1]:.2f}) "
                f"of a bare loop; {use[-1]}",
                f"{LEAST} of a bare loop", ratio >= LEAST or cpu,
            )  # fmt: skip
    if not cpu:
        speed = compare("resnet18", SIDE, rounds - 1, steps, 256, ["--torch_compile", "1"])
        compiled = statistics.median(speed.ours)
        gain = compiled / plain["resnet18", 256]
        yield Row("--torch_compile, resnet18, batch 256", f"{compiled:,.0f} images/s, {gain:.2f} of without")


def check_networks(cpu: bool, scratch: Path) -> Iterator[Row]:
    """Measure training steps and predictions, beside the bare network on batches that are ready on the device."""
    device, batch = torch.device("cpu" if cpu else "cuda"), 4 if cpu else 256
    for name in ("resnet18",) if cpu else TIMM:
        pixel_values = torch.randn(batch, 3, SIDE, SIDE, device=device).to(memory_format=torch.channels_last)
        labels = torch.arange(batch, device=device) % len(LABELS)
        model = build(name, SIDE).to(device)
        fused = fuse_for_training(model, (SIDE, SIDE))
        speeds = [images_a_second(functools.partial(step, each.train(), pixel_values, labels), batch, cpu)
                  for each in (model, fused)]  # fmt: skip
        published, inference = TIMM[name]
        yield Row(f"training step, {name}, ready batches of {batch}",
                  f"{speeds[0]:,.0f} images/s; BatchNorm in the convolutions {speeds[1]:,.0f}; timm's on an RTX 3090 "
                  f"{published:,}")  # fmt: skip
        bare = images_a_second(functools.partial(forward, model.eval(), pixel_values), batch, cpu)
        network = TorchNetwork(str(save_network(name, scratch / name)))
        views = list(pixel_values[:64].cpu())
        ours = images_a_second(lambda network=network, views=views: network.rate(views), len(views), cpu)
        yield Row(f"predictions, {name}",
                  f"predict.py's network {ours:,.0f} images/s from the host; bare network in bfloat16 {bare:,.0f}; "
                  f"timm's on an RTX 4090 {inference or 'unknown'}")  # fmt: skip


def step(model: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """Do a training step, but for the optimizer's."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16):
        loss = model(pixel_values=pixel_values, labels=labels).loss
    loss.backward()
    model.zero_grad()


@torch.inference_mode()
def forward(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Predict a batch."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16):
        model(pixel_values=pixel_values)


def images_a_second(run: Callable, images: int, cpu: bool, repeats: int = 30) -> float:
    """Return the speed of a function, in the median of three turns."""
    repeats, speeds = 1 if cpu else repeats, []
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        if not cpu:
            torch.cuda.synchronize()
        speeds.append(images * repeats / (time.perf_counter() - begin))
    return statistics.median(speeds[1:])


def check_augmentation(cpu: bool, scratch: Path) -> Iterator[Row]:
    """Compare random crops that data workers make with those that the device makes of whole images."""
    device, workers = torch.device("cpu" if cpu else "cuda"), min(8, available_cores())
    draw(scratch / "drawn")
    splits, _ = load_splits(data_dir=str(scratch / "drawn"))
    view = EvaluationView(build_model("efficientnet_lite0", {0: "a", 1: "b"})[1])
    stored = prepare(splits, view, quiet=True)["train"]
    stored = stored.select([row % len(stored) for row in range(64 if cpu else 4096)])
    crop = v2.RandomResizedCrop(view.size, scale=(0.35, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    flip = v2.RandomHorizontalFlip()

    def on_device(levels: torch.Tensor) -> torch.Tensor:
        return torch.stack([flip(crop(image)) for image in levels])

    whole = stored.with_transform(batch_transform("image", v2.functional.pil_to_tensor))
    ways = {"data workers": (training_rows(stored, view, "flip_crop"), None), "the device": (whole, on_device)}
    speeds = {}
    for name, (rows, augment) in ways.items():
        loader = DataLoader(
            rows, 64, collate_fn=default_collate, num_workers=workers, pin_memory=not cpu, persistent_workers=True,
            worker_init_fn=StartWorker(None),
        )  # fmt: skip
        for _ in range(2):  # the first starts the workers
            begin, images = time.perf_counter(), 0
            for batch in loader:
                levels = batch["pixel_values"].to(device, non_blocking=True)
                view.scale(augment(levels) if augment else levels)
                images += len(levels)
            if not cpu:
                torch.cuda.synchronize()
            speeds[name] = images / (time.perf_counter() - begin)
    found = ", ".join(f"by {name} {speed:,.0f} images/s" for name, speed in speeds.items())
    yield Row(f"random crops of 512 px, {workers} workers", found)


if __name__ == "__main__":
    main()
