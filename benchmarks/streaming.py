"""Train from a stream with two processes, interrupt them, go on, and count how often each image was trained on.

    python -m benchmarks.streaming --images 300000
    python -m benchmarks.streaming --images 20000 --hosts --archives

It draws JPEGs of 64 x 64 px (see `benchmarks.scale`), writes shards with prepare.py, and trains `simple_cnn` from
scratch for an epoch by `train.py --streaming`. Each process writes the digest of every image that it trains on. At two
fifths of the epoch both are stopped with SIGTERM, and then resumed. With `--hosts` the processes are in network
namespaces of their own, joined by a virtual cable, as two machines with a common disk (Linux, as root). With
`--archives` the shards are turned into WebDataset archives first.

The exit code is 1 unless every training image of the shards was trained on once.
"""

import argparse
import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import yaml

from benchmarks._common import LAUNCH, PROJECT, build_parser, own_caches
from benchmarks.scale import draw, memory_of

STOP_AT = 0.4  # of the epoch
PORT = 29_517
LINE = 65  # bytes of a digest and the end of its line
NAMES, CABLE, ADDRESSES = ("luthier0", "luthier1"), ("cable0", "cable1"), ("10.77.0.1", "10.77.0.2")
CONFIG = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2,
    "mixed_precision": "no",
}  # fmt: skip


def main() -> None:
    """Draw, prepare, train, interrupt, go on, count."""
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=300_000, help="how many are drawn")
    parser.add_argument("--hosts", action="store_true", help="each process in a network namespace")
    parser.add_argument("--archives", action="store_true", help="train from WebDataset archives")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch of a process")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train_and_log(args.train)
        return
    with tempfile.TemporaryDirectory() as temporary, joined_hosts(args.hosts):
        folder = Path(temporary)
        draw(folder / "images", args.images)
        begin = time.perf_counter()
        prepare = [sys.executable, "prepare.py", folder / "images", folder / "shards"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL, **in_project(folder))
        print(f"prepare.py: {time.perf_counter() - begin:.0f} s for {args.images:,} images", flush=True)
        files = sorted((folder / "shards").glob("train-*.parquet"))
        digests = Counter(digest for file in files for digest in digests_of(file))
        if args.archives:
            for file in (folder / "shards").glob("*.parquet"):
                turn_into_archive(file)
        options = ["--data_dir", folder / "shards", "--streaming", "--model_name", "simple_cnn"]
        options += ["--num_train_epochs", 1, "--per_device_train_batch_size", args.batch]
        options += ["--output_dir", folder / "out"]
        line = [*map(str, options), "--disable_tqdm", "1", "--resume_from_checkpoint", "auto"]
        run(line, folder, args.hosts, STOP_AT * digests.total())
        stopped = Counter(read_logs(folder))
        if (folder / "out/metrics.json").exists():
            sys.exit("the training had ended before it was stopped: give more --images")
        run(line, folder, args.hosts, None)
        seen = Counter(read_logs(folder))
    wrong = sum(seen[digest] != digests[digest] for digest in digests | seen)
    print(f"stopped after {stopped.total():,} of {digests.total():,} training images, and gone on with")
    print(f"trained on in the epoch: {seen.total():,}; images that were left out or came twice: {wrong}")
    sys.exit(seen != digests)


def in_project(folder: Path) -> dict:
    """Return how a command is run: from the checkout, with a cache of its own."""
    home = own_caches(folder / "home") | {"PYTHONPATH": str(PROJECT)}
    return {"cwd": PROJECT, "env": os.environ | home}


def digests_of(file: Path) -> list[str]:
    """Return the digests of the images in a Parquet file."""
    images = pq.read_table(file, columns=["image"]).column(0).to_pylist()
    return [hashlib.sha256(image["bytes"]).hexdigest() for image in images]


def turn_into_archive(file: Path) -> None:
    """Replace a Parquet file with a WebDataset archive of the same images and class numbers."""
    with tarfile.open(file.with_suffix(".tar"), "w") as archive:
        for number, row in enumerate(pq.read_table(file, columns=["image", "label"]).to_pylist()):
            for ending, content in (("jpg", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                member = tarfile.TarInfo(f"{number:06}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    file.unlink()


@contextlib.contextmanager
def joined_hosts(wanted: bool) -> Iterator[None]:
    """Make two network namespaces that are joined by a cable, and remove them at the end."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        if wanted:
            ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
            for name, cable, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
                ip("netns", "add", name)
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES if wanted else ():
            subprocess.run(["ip", "netns", "del", name], check=False)


def run(line: list[str], folder: Path, hosts: bool, stop_after: float | None) -> None:
    """Train with two processes to the end, or until they have logged so many images together."""
    common, launches = in_project(folder), []
    for rank in range(2 if hosts else 1):
        config = folder / f"accelerate{rank}.yaml"
        of_host = {
            "num_machines": 2, "machine_rank": rank, "main_process_ip": ADDRESSES[0], "main_process_port": PORT,
            "rdzv_backend": "static", "same_network": True,
        }  # fmt: skip
        config.write_text(yaml.safe_dump(CONFIG | (of_host if hosts else {"num_machines": 1})))
        inside = ["ip", "netns", "exec", NAMES[rank]] if hosts else []
        command = [*inside, *LAUNCH, "--config_file", str(config), "-m", "benchmarks.streaming"]
        command += ["--train", str(folder), *line]
        environment = common["env"] | ({"GLOO_SOCKET_IFNAME": CABLE[rank]} if hosts else {})
        launches.append(subprocess.Popen(command, **(common | {"env": environment})))
    begin, peak = time.perf_counter(), 0
    while any(launch.poll() is None for launch in launches):
        time.sleep(0.1)
        trained_on = sum(log.stat().st_size for log in folder.glob("trained-*.txt")) / LINE
        if stop_after is not None and trained_on >= stop_after:
            for launch in launches:
                launch.send_signal(signal.SIGTERM)
            stop_after = None
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process().children(recursive=True)
            peak = max([peak, *(memory_of(process) for process in children)])
    codes = [launch.wait() for launch in launches]
    print(
        f"train.py: {time.perf_counter() - begin:.0f} s, exit codes {codes}, {peak / 1e6:.0f} MB a process", flush=True
    )


def read_logs(folder: Path) -> list[str]:
    """Return the digests of the images that were trained on so far."""
    return [line for log in folder.glob("trained-*.txt") for line in log.read_text().split()]


def train_and_log(arguments: list[str]) -> None:
    """Run train.py as a user would, and write the digest of every image that this process trains on."""
    from luthier.training.workers import SeededAugmentation
    from train import main as train

    folder, *options = arguments
    log, fetch = Path(folder, f"trained-{os.environ['RANK']}.txt"), SeededAugmentation.__getitem__

    def logged(self: SeededAugmentation, row: int) -> dict:
        rows = self.rows
        ends = np.cumsum(rows.sizes)
        number = int(np.searchsorted(ends, row, side="right"))
        image = rows.images_of(number)[row - int(ends[number]) + rows.sizes[number]].as_py()
        print(hashlib.sha256(image["bytes"]).hexdigest(), file=file)
        return fetch(self, row)

    SeededAugmentation.__getitem__ = logged  # type: ignore[method-assign]
    with log.open("a", buffering=1) as file:  # line by line
        train(options)


if __name__ == "__main__":
    main()
