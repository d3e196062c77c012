"""A run that is killed again and again, beside one that is not: do they end alike?

    python benchmarks/kill_test.py

Trains simple_cnn on drawn pictures once in peace. Then again, killed with SIGKILL at random moments of its training,
saving included, and each time started anew with --resume_from_checkpoint auto; at last it is left to end. Prints how
often it was killed, how often while a checkpoint was being written, what it went on from, and whether weights and
scores are the same to the last bit.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

PROJECT = Path(__file__).parent.parent
COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (210, 50, 40)}


def main() -> None:
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--epochs", type=int, default=600, help="of the run (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        draw()
        seconds = train("whole", args.epochs)
        saving, went_on, damaged = 0, [], 0
        for _ in range(args.kills):
            step, was_saving = train("killed", args.epochs, kill_after=chance.uniform(0, seconds / args.kills))
            went_on.append(step)
            saving += was_saving
            damaged += len(list(Path("killed").glob("damaged-*")))
        train("killed", args.epochs)
        same = compare()
    print(f"killed {args.kills} times, {saving} of them while a checkpoint was being written")
    print(f"went on from steps {', '.join(map(str, went_on))}")
    print(f"checkpoints that were damaged: {damaged}")
    print(f"weights and scores as of the run that was not killed: {'the same to the last bit' if same else 'OTHERS'}")
    sys.exit(not same)


def draw() -> None:
    """Draw 60 pictures of three colours that are not easily told apart."""
    for name, colour in COLOURS.items():
        Path("pictures", name).mkdir(parents=True)
        for seed in range(20):
            noise = np.random.default_rng(seed).normal(0, 120, (40, 40, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(f"pictures/{name}/{seed}.png")


def train(output_dir: str, epochs: int, kill_after: float | None = None) -> float | tuple[int, bool]:
    """Train to the end and return the seconds of the training; or kill it so many seconds after that has begun.

    Then return the step that it had gone on from, and whether it was writing a checkpoint.
    """
    line = ["--data_dir", "pictures", "--model_name", "simple_cnn", "--num_train_epochs", str(epochs)]
    line += ["--per_device_train_batch_size", "16", "--augmentation", "trivial", "--disable_tqdm", "1"]
    line += ["--output_dir", output_dir, "--resume_from_checkpoint", "auto"]
    command = [sys.executable, str(PROJECT / "train.py"), *line]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    step, begun = 0, None
    for text in process.stdout:
        if found := re.match(r"resume\s+from .*checkpoint-(\d+)", text):
            step = int(found[1])
        if begun is None and text.startswith("epoch"):
            begun = time.perf_counter()
            if kill_after is not None:
                time.sleep(kill_after)
                process.send_signal(signal.SIGKILL)
                process.wait()
                return step, Path(output_dir, ".partial").exists()
    if process.wait() or kill_after is not None:
        raise SystemExit(f"the run ended by itself, with exit code {process.returncode}: take more --epochs")
    return json.loads(Path(output_dir, "metrics.json").read_text())["seconds"]["train"]


def compare() -> bool:
    """Tell whether both runs ended with the same weights and the same scores."""
    one, other = (load_file(f"{name}/model.safetensors") for name in ("whole", "killed"))
    scores = [json.loads(Path(name, "metrics.json").read_text()) for name in ("whole", "killed")]
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items()) and all(
        scores[0][key] == scores[1][key] for key in ("validation", "test", "unsure")
    )


if __name__ == "__main__":
    main()
