"""Changes to the default recipe, each scored on one fixed validation split: tables of docs/experiments.md.

    python -m benchmarks.screen path/to/instruments
    python -m benchmarks.screen path/to/instruments --seeds 3 --only default mixup "label smoothing"

It does not use Luthier's test images. It joins the training and validation images and cuts them again, 60 to 40,
because the few images that a run has for validation decide little. The training loop is a short one of its own; data,
transforms, probe, layers and learning rates are Luthier's, the size of the crops and the batch those before the race.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from transformers import PreTrainedModel

from benchmarks._common import build_parser, directory
from data import load_splits, prepare
from luthier.errors import exit_on_user_error
from luthier.images.splits import stratified_cut
from luthier.images.views import EvaluationView, training_transform
from luthier.machine import configure_cpu, configure_logging
from luthier.training.heats import Schedule, heat_ends
from luthier.training.layers import freeze, parameter_groups
from luthier.training.probe import fit_probes, state_with_probe
from luthier.training.recipe import RECIPES, blend
from models import build_model, linear_head

BATCH = 32


class Variant(NamedTuple):
    """One recipe. The defaults are those before the race: crops as large as the view, and 32 images in a step.

    Luthier's crops have three quarters of that side now, and `full` takes 16 images in a step where there are few.
    """

    augmentation: str = "flip_crop"
    crop: float = 0.35  # smallest share of the image that a random crop shows
    mixup: float = 0.0  # alpha of Zhang et al. (2018); 0 is none
    smoothing: float = 0.0
    ema: float = 0.0  # decay of the averaged weights, which replace the trained ones at the end; 0 is none
    epochs: int = 3
    recipe: str = "lp_ft"
    learning_rate: float | None = None  # of the head, if not the recipe's
    frozen: float | None = None  # if not the recipe's
    heats: bool = False  # of 1, 2, 4, ... epochs, instead of one cosine
    sizes: tuple[int, ...] = ()  # of the training view in pixels, one for each epoch; () is the evaluation view's


VARIANTS = {
    "default": Variant(),
    "no augmentation": Variant(augmentation="none"),
    "crops of at least 8%": Variant(crop=0.08),
    "crops of at least 70%": Variant(crop=0.7),
    "trivial": Variant(augmentation="trivial"),
    "augmix": Variant(augmentation="augmix"),
    "mixup": Variant(mixup=0.2),
    "label smoothing": Variant(smoothing=0.1),
    "EMA": Variant(ema=0.97),
    "lr 1e-4": Variant(learning_rate=1e-4),
    "lr 1e-3": Variant(learning_rate=1e-3),
    "1 epoch": Variant(epochs=1),
    "6 epochs": Variant(epochs=6),
    "nothing frozen": Variant(frozen=0.0),
    "trained at 192 px": Variant(sizes=(192, 192, 192)),
    "rising 160, 208, 256 px": Variant(sizes=(160, 208, 256)),
    "full, 15 epochs": Variant(recipe="full", epochs=15, sizes=(192,) * 15),
    "full, 15 epochs in heats": Variant(recipe="full", epochs=15, heats=True, sizes=(192,) * 15),
    "full, 7 epochs in heats": Variant(recipe="full", epochs=7, heats=True, sizes=(192,) * 7),
    "from the probe, 7 epochs in heats": Variant(recipe="full_from_probe", epochs=7, heats=True, sizes=(192,) * 7),
}


class Start(NamedTuple):
    """What every variant starts from."""

    build: Callable[[], PreTrainedModel]
    states: dict[str, dict[str, torch.Tensor]]  # by what training starts from, see `Recipe.start`
    view: EvaluationView
    images: list[Image.Image]
    labels: torch.Tensor
    validation: torch.Tensor  # float32 [N, 3, H, W]
    validation_labels: torch.Tensor


@exit_on_user_error
def main() -> None:
    """Print a row for each variant: loss and accuracy on validation."""
    parser = build_parser(__doc__)
    parser.add_argument("data", type=directory, help="a folder of class folders")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds (default: 1)")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="which of them")
    parser.add_argument("--probes", action="store_true", help="only probes: resolutions, flips, augmented views")
    args = parser.parse_args()
    configure_logging()
    configure_cpu(torch.device("cpu"))  # where the models stay
    splits = cut(args.data)
    if args.probes:
        screen_probes(splits)
        return
    start, row = prepare_start(splits, 256)
    print(
        f"| what | trained | halfway | trained, flips averaged | seconds |\n|---|---|---|---|---|\n{row}", flush=True
    )
    for name in args.only:
        runs = [fine_tune(start, VARIANTS[name], seed) for seed in range(1, args.seeds + 1)]
        scored = zip(*(run[:-1] for run in runs), strict=True)
        cells = [spread(column) for column in scored]
        seconds = statistics.mean(run[-1] for run in runs)
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def cut(data: Path) -> DatasetDict:
    """Return the images that are not test, cut 60 to 40 into train and validation."""
    splits, _ = load_splits(data_dir=data)
    pool = concatenate_datasets([splits["train"], splits["validation"]])
    names = pool.features["label"].names
    labels, groups = (np.array(pool[column][:]) for column in ("label", "group"))
    rows = stratified_cut(labels, names, {"validation": 0.4}, seed=1, groups=groups)
    return DatasetDict({split: pool.select(rows[split]) for split in ("train", "validation")})


def prepare_start(splits: DatasetDict, size: int) -> tuple[Start, str]:
    """Fit the probe at a resolution; return what variants start from, and the probe's row of the table."""
    names = dict(enumerate(splits["train"].features["label"].names))
    model, image_processor = build_model("efficientnet_lite0", names, size)
    view = EvaluationView(image_processor)
    prepared = prepare(splits, view)
    images = list(prepared["train"]["image"])
    labels, validation_labels = (torch.tensor(prepared[split]["label"][:]) for split in ("train", "validation"))
    validation = torch.stack([view.unpack(packed) for packed in prepared["validation"]["view"]])
    begin = time.perf_counter()
    train, head = torch.stack([view(image) for image in images]), linear_head(model)
    train_features, validation_features = (compute_features(model, head, views) for views in (train, validation))
    probe, soft = fit_probes(train_features, labels, validation_features, validation_labels)
    states = {"new": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    states |= {"probe": state_with_probe(model, head, probe), "soft probe": state_with_probe(model, head, soft)}
    row = spread([score(probe.logits(validation_features), validation_labels)])

    def build() -> PreTrainedModel:
        model = build_model("efficientnet_lite0", names, size)[0]
        model.load_state_dict(states["probe"])
        return model

    start = Start(build, states, view, images, labels, validation, validation_labels)
    return start, f"| the probe at {size} px | {row} | | | {time.perf_counter() - begin:.0f} |"


def screen_probes(splits: DatasetDict) -> None:
    """Print a row for each kind of probe."""
    print("| probe | loss, accuracy | flips averaged | | seconds |\n|---|---|---|---|---|")
    for size in (160, 192, 224, 256, 288):
        start, row = prepare_start(splits, size)
        print(row, flush=True)
        if size == 256:
            model = start.build()
            both = (predict(model, views) for views in (start.validation, start.validation.flip(3)))
            print(f"| the same | | {spread([score(sum(both) / 2, start.validation_labels)])} | | |")
            print(screen_augmented_views(start, 3), flush=True)


def screen_augmented_views(start: Start, n: int) -> str:
    """Fit the probe on the evaluation view and on n augmented views of each image; return its row of the table."""
    model, transform = start.build(), training_transform(start.view, "flip_crop")
    head = linear_head(model)
    validation = compute_features(model, head, start.validation)
    begin = time.perf_counter()
    torch.manual_seed(1)
    views = [torch.stack([start.view(image) for image in start.images])]
    views += [start.view.scale(torch.stack([transform(image) for image in start.images])) for _ in range(n)]
    features = torch.cat([compute_features(model, head, batch) for batch in views])
    probe, _ = fit_probes(features, start.labels.repeat(n + 1), validation, start.validation_labels)
    row = spread([score(probe.logits(validation), start.validation_labels)])
    return f"| and {n} augmented views of each | {row} | | | {time.perf_counter() - begin:.0f} |"


def fine_tune(start: Start, variant: Variant, seed: int) -> tuple[tuple[float, float], ...]:
    """Train from the start of the variant's recipe; return three scores and the seconds.

    The scores, each (loss, accuracy), are those of the trained weights, of their mean with those at the start, and of
    the trained weights with the logits of both flips averaged.
    """
    torch.manual_seed(seed)
    model, recipe = start.build(), RECIPES[variant.recipe]
    first_state = start.states[recipe.start]
    model.load_state_dict(first_state)
    freeze(model, recipe.frozen if variant.frozen is None else variant.frozen)
    rate = variant.learning_rate or recipe.learning_rate
    optimizer = torch.optim.AdamW(
        parameter_groups(model, rate, rate * recipe.backbone_rate, recipe.layer_decay, 0.01), fused=True
    )
    per_epoch = math.ceil(len(start.images) / BATCH)
    steps = per_epoch * variant.epochs
    ends = heat_ends(per_epoch, steps) if variant.heats else (steps,)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Schedule(ends, 0.1)(step))
    transform = training_transform(start.view, variant.augmentation)
    if variant.augmentation in ("flip_crop", "trivial"):
        crop = next(part for part in transform.transforms if isinstance(part, v2.RandomResizedCrop))
        crop.scale = (variant.crop, 1.0)
    average, generator = None, np.random.default_rng(seed)
    begin = time.perf_counter()
    for epoch in range(variant.epochs):
        if variant.sizes:
            crop.size = (variant.sizes[epoch],) * 2
        for rows in torch.randperm(len(start.images)).split(BATCH):
            pixel_values = torch.stack([transform(start.images[row]) for row in rows])
            if variant.augmentation != "none":
                pixel_values = start.view.scale(pixel_values)
            targets = nn.functional.one_hot(start.labels[rows], len(start.labels.unique())).float()
            if variant.mixup:
                share = generator.beta(variant.mixup, variant.mixup)
                order = torch.randperm(len(rows))
                pixel_values = pixel_values.lerp(pixel_values[order], share)
                targets = targets.lerp(targets[order], share)
            logits = model.train()(pixel_values=pixel_values).logits
            nn.functional.cross_entropy(logits, targets, label_smoothing=variant.smoothing).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if variant.ema:
                average = blend(average or first_state, model.state_dict(), 1 - variant.ema)
    seconds = time.perf_counter() - begin
    trained = average or {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = []
    for state, validation in (
        (trained, start.validation),
        (blend(first_state, trained, 0.5), start.validation),
        (trained, start.validation.flip(3)),
    ):
        model.load_state_dict(state)
        logits.append(predict(model, validation))
    logits[2] = (logits[0] + logits[2]) / 2
    return (*(score(each, start.validation_labels) for each in logits), seconds)


def compute_features(model: PreTrainedModel, head: str, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return what enters the head of this name, float32 [N, D]."""
    linear = model.get_submodule(head)
    model.set_submodule(head, nn.Identity())
    features = predict(model, pixel_values)
    model.set_submodule(head, linear)
    return features


def predict(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits [N, C]."""
    with torch.no_grad():
        return torch.cat([model.eval()(pixel_values=batch).logits for batch in pixel_values.split(16)])


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return loss and accuracy."""
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(dim=1) == labels).float().mean().item()


def spread(scores: list[tuple[float, float]]) -> str:
    """Return loss and accuracy in words; of several scores the means, with the lowest and the highest."""
    losses, accuracies = zip(*scores, strict=True)
    if len(losses) == 1:
        return f"{losses[0]:.3f}, {accuracies[0]:.1%}"
    return (
        f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}), {statistics.mean(accuracies):.1%} "
        f"({min(accuracies):.1%} to {max(accuracies):.1%})"
    )


if __name__ == "__main__":
    main()
