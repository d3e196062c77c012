"""A run that is killed again and again, compared with one that is not: do both end with the same weights?

    python -m benchmarks.kill_test

It trains simple_cnn on drawn images once without a break. It then trains again, kills the run with SIGKILL at random
moments of the training, saving included, and restarts it each time with --resume_from_checkpoint auto. The last start
may finish. It prints how often the run was killed, how often while it wrote a checkpoint, which steps it resumed from,
and whether weights, scores and the validation losses of all epochs are the same to the last bit.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks._common import PROJECT, build_parser
from luthier.training.checkpoints import PARTIAL

COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (210, 50, 40)}


def main() -> None:
    """Run both, and compare."""
    parser = build_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--epochs", type=int, default=600, help="of the run (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw()
        seconds = train("whole", args.epochs)
        while_saving, steps = 0, []
        for _ in range(args.kills):
            step, was_saving = kill("killed", args.epochs, generator.uniform(0, seconds / args.kills))
            steps.append(step)
            while_saving += was_saving
        train("killed", args.epochs)
        damaged = len(list(Path("killed").glob("damaged-*")))  # where they were set aside
        same = compare()
    print(f"killed {args.kills} times, {while_saving} of them while it wrote a checkpoint")
    print(f"resumed from steps {', '.join(map(str, steps))}")
    print(f"damaged checkpoints: {damaged}")
    print(f"weights, scores and losses of both runs: {'the same to the last bit' if same else 'DIFFERENT'}")
    sys.exit(not same)


def draw() -> None:
    """Draw 60 noisy images of three colours that are not easy to tell apart."""
    for name, colour in COLOURS.items():
        Path("images", name).mkdir(parents=True)
        for seed in range(20):
            noise = np.random.default_rng(seed).normal(0, 120, (40, 40, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(f"images/{name}/{seed}.png")


def start(output_dir: str, epochs: int) -> subprocess.Popen:
    """Start a run, or let it go on."""
    line = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", str(epochs)]
    line += ["--per_device_train_batch_size", "16", "--augmentation", "trivial", "--disable_tqdm", "1"]
    # Without a refit: its weights would be compared instead of those of the training that was killed.
    line += ["--output_dir", output_dir, "--resume_from_checkpoint", "auto", "--refit", "none"]
    command = [sys.executable, str(PROJECT / "train.py"), *line]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def train(output_dir: str, epochs: int) -> float:
    """Train to the end; return the seconds of the training."""
    process = start(output_dir, epochs)
    process.communicate()
    if process.returncode:
        sys.exit(f"the run in {output_dir} failed, with exit code {process.returncode}")
    return json.loads(Path(output_dir, "metrics.json").read_text())["seconds"]["train"]


def kill(output_dir: str, epochs: int, seconds: float) -> tuple[int, bool]:
    """Train, and kill the run this many seconds after its training has begun.

    Returns the step that it resumed from, and whether it was writing a checkpoint.
    """
    process, step = start(output_dir, epochs), 0
    for text in process.stdout:
        if resumed := re.match(r"resume\s+from .*checkpoint-(\d+)", text):
            step = int(resumed[1])
        if text.startswith("epoch"):  # the head of the table: training begins
            time.sleep(seconds)
            process.kill()
            process.wait()
            return step, Path(output_dir, PARTIAL).exists()
    sys.exit(f"the run ended by itself, with exit code {process.wait()}: use more --epochs")


def compare() -> bool:
    """Return whether both runs have the same weights, the same scores and the same validation loss in each epoch."""
    one, other = (load_file(f"{name}/model.safetensors") for name in ("whole", "killed"))
    found = [json.loads(Path(name, "metrics.json").read_text()) for name in ("whole", "killed")]
    for metrics in found:  # the weights are the best ones, perhaps of an epoch before the first kill
        metrics["losses"] = {row["epoch"]: row["eval_loss"] for row in metrics["history"] if "eval_loss" in row}
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items()) and all(
        found[0][key] == found[1][key] for key in ("validation", "test", "unsure", "losses")
    )


if __name__ == "__main__":
    main()
