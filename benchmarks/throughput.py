"""What the Trainer costs: its loop, as train.py sets it up, compared with a bare PyTorch loop on the same tensors.

    python -m benchmarks.throughput

Both train the same model on the same batches with the same optimizer, in one process and in turns, so that both suffer
alike from other work on the machine. The ratio is the Trainer's images per second to the bare loop's.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification, TrainerCallback

from data import collate
from luthier.arguments import parse_arguments
from luthier.machine import set_up_process
from luthier.scoring.criterion import Judge
from luthier.training.callbacks import EpochTable
from luthier.training.layers import parameter_groups
from luthier.training.recipe import RECIPES
from luthier.training.trainer import build_trainer
from models import build_model

LABELS = {index: f"class {index}" for index in range(10)}
MODELS = ("efficientnet_lite0", "resnet18")


class StepEnds(TrainerCallback):
    """Records when each step ends."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def main() -> None:
    """Print a row for each model and resolution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in a turn (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step (default: 32)")
    args = parser.parse_args()
    print("| model | px | Trainer, images/s | bare loop, images/s | ratio, median of turns | lowest to highest |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        for size in (160, 224):
            ours, bare = compare(name, size, args.rounds, args.steps, args.batch)
            ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
            print(
                f"| {name} | {size} | {statistics.median(ours):.1f} | {statistics.median(bare):.1f} "
                f"| {statistics.median(ratios):.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |",
                flush=True,
            )


def build(name: str, size: int) -> PreTrainedModel:
    """Return a model; ResNet-18 has random weights, which take as much time as trained ones."""
    if name == "efficientnet_lite0":
        return build_model(name, LABELS, size)[0]
    config = TimmWrapperConfig(
        architecture=name, num_labels=len(LABELS), pretrained_cfg={"input_size": [3, size, size]}
    )
    return TimmWrapperForImageClassification(config).to(memory_format=torch.channels_last)


def compare(name: str, size: int, rounds: int, steps: int, batch: int) -> tuple[list[float], list[float]]:
    """Return images per second of each turn: of the Trainer's loop, and of the bare one."""
    rows = [
        {"pixel_values": torch.randn(3, size, size), "labels": index % len(LABELS)}
        for index in range(batch * (steps + 1))
    ]
    with tempfile.TemporaryDirectory() as folder:
        line = ["--output_dir", folder, "--max_steps", str(steps + 1), "--per_device_train_batch_size", str(batch)]
        line += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "1", "--logging_strategy", "no"]
        line += ["--learning_rate", "1e-4", "--num_train_epochs", "1"]
        training_args = parse_arguments(line).training_args
        set_up_process(training_args)
        model, step_ends = build(name, size), StepEnds()
        data = {"train": rows, "validation": rows[:1]}
        compute_metrics = Judge(list(LABELS.values())).compute_metrics
        trainer = build_trainer(model, RECIPES["full"], training_args, data, collate, compute_metrics, [step_ends])
        trainer.remove_callback(EpochTable)  # its table would stand inside this one
        bare = BareLoop(build(name, size), rows, batch, training_args.device)
        speeds = ([], [])
        for _ in range(rounds):
            trainer.train()
            for ends, turn in ((step_ends.ends, speeds[0]), (bare.run(), speeds[1])):
                turn.append(batch * steps / (ends[-1] - ends[0]))  # the first step warms up
    return speeds


class BareLoop:
    """The training loop that anyone would write."""

    def __init__(self, model: PreTrainedModel, rows: list[dict], batch: int, device: torch.device):
        self.model = model.to(device)
        self.batches = [
            (
                torch.stack([row["pixel_values"] for row in rows[first : first + batch]]).to(device),
                torch.tensor([row["labels"] for row in rows[first : first + batch]], device=device),
            )
            for first in range(0, len(rows), batch)
        ]
        groups = parameter_groups(model, 1e-4, 1e-4, 1.0, 0.01)
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def run(self) -> list[float]:
        """Train for one epoch; return when each step ended."""
        self.model.train()
        ends = []
        for pixel_values, labels in self.batches:
            loss = self.model(pixel_values=pixel_values, labels=labels).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            ends.append(time.perf_counter())
        return ends


if __name__ == "__main__":
    main()
