"""Whether training mirrors images: not where the mirror shows something else."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load
from datasets import Dataset
from PIL import Image, ImageDraw
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from data import feature_rows, prepare
from luthier.images.views import EvaluationView
from luthier.scoring.baselines import ProbeResults, measure_probe
from luthier.scoring.mirror import Half, Mirror, choose_augmentation, compare_with_mirror, draw_images
from luthier.training.recipe import RECIPES
from models import build_model


def test_mirror_must_be_clearly_worse():
    generator = torch.Generator().manual_seed(1)
    labels, groups = np.arange(120) % 3 + 1, np.arange(120)  # class 0 has no image in the sample
    features = 3 * torch.nn.functional.one_hot(torch.from_numpy(labels), 8) + torch.randn(120, 8, generator=generator)
    again = features + 0.5 * torch.randn(120, 8, generator=generator)
    assert not compare_with_mirror(features, again, labels, groups).is_worse
    b_and_d = features.clone()
    b_and_d[:, [1, 2]] = features[:, [2, 1]]
    mirror = compare_with_mirror(features, b_and_d, labels, groups)
    assert mirror.is_worse and mirror.loss < 0.6 and mirror.mirrored > 1 and 0 < mirror.error < 0.3
    together = compare_with_mirror(features, b_and_d, labels, labels + 3 * (np.arange(120) // 30))
    assert together.error > 1.5 * mirror.error, "images of one group are no independent evidence"


@pytest.mark.parametrize(
    ("mirrored", "error", "worse"),
    [(1.0, 0.19, True), (0.99, 0.01, False), (1.0, 0.2, False)],  # twice 0.5, and 2.5 standard errors
)
def test_mirror_images_are_worse_at_twice_the_loss_and_not_by_chance(mirrored, error, worse):
    assert Mirror(0.5, mirrored, error).is_worse == worse


@pytest.mark.parametrize(
    ("loss", "mirrored", "worse"),
    [(2.0, 2.65, True), (2.0, 2.55, False), (0.1, 0.3, True), (3.5, 3.9, False)],
)
def test_mirror_images_are_worse_where_most_of_what_the_probes_know_is_lost(loss, mirrored, worse):
    """Of 20 classes, where knowing nothing has a loss of 3.0: twice 2.0 would be more than that."""
    assert Mirror(loss, mirrored, 0.01, math.log(20)).is_worse == worse


@pytest.mark.parametrize(("known", "lost", "worse"), [(0.006, 0.02, False), (0.5, 0.35, True)])
def test_probes_that_may_know_nothing_lose_nothing(monkeypatch, known, lost, worse):
    rows = np.arange(100)
    losses = math.log(20) - known + 0.3 * (-1.0) ** rows
    monkeypatch.setattr("luthier.scoring.mirror.losses_of_views", lambda *_: (losses, losses + lost))
    features = torch.zeros(100, 1)
    assert compare_with_mirror(features, features, rows % 20, rows).is_worse == worse


def draw_arrows(folder: Path, turned: bool) -> Path:
    """Draw arrows of two classes, to the left and to the right; or all of them either way, thin and thick."""
    generator = np.random.default_rng(1)
    for name, number in (("left", 0), ("right", 1)):
        (folder / name).mkdir(parents=True)
        for image in range(40):
            drawing = Image.new("RGB", (32, 32), "white")
            x, y = generator.integers(10, 16), generator.integers(10, 22)
            width = 2 + 4 * number if turned else 4
            ImageDraw.Draw(drawing).line([(x + 8, y - 9), (x - 6, y), (x + 8, y + 9)], "black", int(width))
            if (image % 2 if turned else number) == 1:
                drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            drawing.save(folder / name / f"{image}.png")
    return folder


@pytest.mark.parametrize(("turned", "expected"), [(False, "crop"), (True, "flip_crop")])
def test_arrows_to_the_left_and_right_are_not_mirrored(tmp_path, timm_checkpoint, capsys, turned, expected):
    splits = load(data_dir=str(draw_arrows(tmp_path / "arrows", turned)))
    model, image_processor = build_model(str(timm_checkpoint), {0: "left", 1: "right"})
    view, args = EvaluationView(image_processor), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args.remove_unused_columns = False
    trainer, rows = Trainer(model, args, default_collate), feature_rows(prepare(splits, view), view)
    probe = measure_probe(trainer, splits, rows)

    def choose(name: str, probe: ProbeResults, recipe: str = "full") -> str:
        return choose_augmentation(name, lambda: trainer, splits, rows, probe, [RECIPES[recipe]])

    assert choose("auto", probe) == expected
    assert ("mirror   not in training; loss" in capsys.readouterr().out) == (not turned)
    assert choose("trivial", probe) == "trivial" and choose("auto", ProbeResults()) == "flip_crop"
    assert choose("auto", probe, "probe") == "flip_crop", "nothing is trained"


@pytest.mark.parametrize(
    ("mirrored", "right", "expected"),
    [
        (False, False, [1, 2, 0, 0, 0]),
        (False, True, [0, 0, 3, 4, 5]),
        (True, False, [5, 4, 0, 0, 0]),
        (True, True, [0, 0, 3, 2, 1]),
    ],
)
def test_half_of_an_image_or_of_its_mirror_image(mirrored, right, expected):
    image = torch.arange(1.0, 6.0).expand(3, 4, 5).contiguous()
    rows = Dataset.from_dict({"image": [0]}).with_transform(
        lambda batch: {"pixel_values": [image] * len(batch["image"])}
    )
    half = Half(rows, mirrored, right)
    assert len(half) == 1 and half[0]["pixel_values"][2, 3].tolist() == expected
    assert image[0, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("groups", [2, 3])
def test_few_groups_do_not_show_by_chance_that_the_mirror_is_worse(groups):
    found = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        labels, of = np.arange(60) % 2, np.arange(60) * groups // 60
        base = labels[:, None] + generator.normal(size=(groups, 8))[of]
        own, other = (torch.from_numpy(base + generator.normal(size=(60, 8))).float() for _ in range(2))
        found += compare_with_mirror(own, other, labels, of).is_worse  # both are of one distribution
    assert found <= 1


def test_of_many_classes_some_are_looked_at_with_all_their_images():
    labels = np.arange(4000) % 1000
    drawn = draw_images(labels, np.array([f"image {row}" for row in range(4000)]))
    assert len(drawn) == 100 and set(np.bincount(labels[drawn])) == {0, 4}
    few = draw_images(np.arange(780) % 26, np.array([str(row) for row in range(780)]))
    assert len(few) == 200 and (np.diff(few) > 0).all()
