"""What the Trainer costs: its loop, as train.py sets it up, compared with a bare PyTorch loop on the same rows.

    python -m benchmarks.throughput

Both train the same model with the same optimizer on the same device, precision and data workers, in one process and in
turns, so that both suffer alike from other work on the machine. The ratio is the Trainer's images per second to the
bare loop's.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks._common import build_parser
from luthier.arguments import parse_arguments
from luthier.images.views import EvaluationView
from luthier.machine import set_up_process
from luthier.scoring.criterion import Judge
from luthier.training.arms import Arm, Workshop, build_trainer
from luthier.training.callbacks import EpochTable
from luthier.training.layers import parameter_groups
from luthier.training.recipe import RECIPES
from models import build_model, keep_in_eval_mode

LABELS = {index: f"class {index}" for index in range(10)}
MODELS = ("efficientnet_lite0", "resnet18")
DRAWN = 64  # different rows


class Rows(Dataset):
    """Rows as training has them: 8-bit levels [3, H, W] and a label, which cost nothing to make."""

    def __init__(self, size: int, number: int):
        self.levels = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(DRAWN)]
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.levels[row % DRAWN], "labels": row % len(LABELS)}


class Speed(NamedTuple):
    """Images per second of each turn: of the Trainer's loop and of the bare one."""

    ours: list[float]
    bare: list[float]

    @property
    def ratios(self) -> list[float]:
        """The Trainer's images per second to the bare loop's, from the lowest up."""
        return sorted(a / b for a, b in zip(self.ours, self.bare, strict=True))


class Clock(TrainerCallback):
    """Measures the seconds from the end of the first step, which warms up, to the end of the last."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(state.global_step)

    def tick(self, step: int) -> None:
        """Note the end of a step, counted from 1."""
        if step not in (1, self.steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 1:
            self.begin = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self.begin


def main() -> None:
    """Print a row for each model and resolution."""
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in a turn (default: 5)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step (default: 32)")
    args = parser.parse_args()
    print("| model | px | Trainer, images/s | bare loop, images/s | ratio, median of turns | lowest to highest |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        for size in (160, 224):
            speed = compare(name, size, args.rounds, args.steps, args.batch)
            ours, bare, ratios = statistics.median(speed.ours), statistics.median(speed.bare), speed.ratios
            print(
                f"| {name} | {size} | {ours:.1f} | {bare:.1f} | {statistics.median(ratios):.3f} "
                f"| {ratios[0]:.3f} to {ratios[-1]:.3f} |",
                flush=True,
            )


def build(name: str, size: int) -> PreTrainedModel:
    """Return a model; those of timm have random weights, which take as much time as trained ones."""
    if name == "efficientnet_lite0":
        return build_model(name, LABELS, size)[0]
    config = TimmWrapperConfig(
        architecture=name, num_labels=len(LABELS), pretrained_cfg={"input_size": [3, size, size]}
    )
    model = TimmWrapperForImageClassification(config).to(memory_format=torch.channels_last)
    # As in the models of train.py, or the loops would not do the same.
    keep_in_eval_mode(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    return model


def compare(name: str, size: int, rounds: int, steps: int, batch: int, options: Sequence[str] = ()) -> Speed:
    """Return the speed of both loops.

    Args:
        name: of the model.
        size: side of the images in pixels.
        rounds: turns of each loop.
        steps: timed steps in a turn.
        batch: images in a step.
        options: of train.py, in addition.
    """
    rows, speed = Rows(size, batch * (steps + 1)), Speed([], [])
    with tempfile.TemporaryDirectory() as folder:
        line = ["--output_dir", folder, "--max_steps", str(steps + 1), "--per_device_train_batch_size", str(batch)]
        line += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "1", "--logging_strategy", "no"]
        line += ["--learning_rate", "1e-4", "--num_train_epochs", "1", *options]
        training_args = parse_arguments(line).training_args
        set_up_process(training_args)
        clock, judge = Clock(steps + 1), Judge(list(LABELS.values()))
        data, measure = {"train": rows, "validation": rows}, judge.compute_metrics
        scale = EvaluationView(build_model("efficientnet_lite0", LABELS, size)[1]).scale
        model = build(name, size)
        shop = Workshop(model, training_args, measure, [clock], scale=scale)
        trainer = build_trainer(model, Arm(RECIPES["full"], shop, training_args, data, (steps + 1,), None, None))
        trainer.remove_callback(EpochTable)  # its table would stand inside this one
        bare = BareLoop(build(name, size), rows, training_args, scale)
        for _ in range(rounds):
            for run, turn in ((trainer.train, speed.ours), (lambda: bare.run(clock), speed.bare)):
                run()
                turn.append(batch * steps / clock.seconds)
        trainer.accelerator.free_memory()
    return speed


class BareLoop:
    """The training loop that anyone would write."""

    def __init__(self, model: PreTrainedModel, rows: Dataset, args: TrainingArguments, scale: Callable):
        self.model, self.args, self.scale = model.to(args.device), args, scale
        self.loader = DataLoader(
            rows, args.train_batch_size, shuffle=True, collate_fn=default_collate,
            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-4, 1.0, 0.01), fused=True)

    def run(self, clock: Clock) -> None:
        """Train for one epoch."""
        device = self.args.device
        self.model.train()
        for step, batch in enumerate(self.loader, start=1):
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
                loss = self.model(pixel_values=self.scale(inputs["pixel_values"]), labels=inputs["labels"]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.tick(step)


if __name__ == "__main__":
    main()
