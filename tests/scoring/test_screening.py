"""Which backbone `--model_name auto` takes, with a local stand-in for the Hub and random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, draw_folder
from datasets import Dataset
from hub_server import Hub
from safetensors.torch import save_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from luthier.scoring.screening import (
    HUB_BACKBONES,
    Sample,
    View,
    choose_backbone,
    choose_view,
    cross_fitted_losses,
    draw_sample,
    losses_of_views,
)
from models import EFFICIENTNETS, HubUnreachable, ModelError, build_model

CANDIDATES = (*EFFICIENTNETS, *HUB_BACKBONES)


class FakeSample:
    """A sample whose losses and seconds are given, by the name that `build` has returned as the model."""

    labels = np.zeros(10)

    def __init__(self, losses: dict[str, float], seconds: dict[str, float]):
        self.given, self.seconds = losses, seconds

    def losses(self, model: str, image_processor: None) -> tuple[list[np.ndarray], float]:
        return [np.full(10, self.given.get(model, 1.0))], self.seconds.get(model, 0.1)


def test_model_that_does_not_classify_its_own_images_is_refused(monkeypatch, timm_checkpoint):
    model, image_processor = build_model(str(timm_checkpoint), {0: "a", 1: "b"})
    monkeypatch.setattr("models.explain_refusal", lambda model, height, width: f"no {height}")
    with pytest.raises(ModelError, match=r"does not classify the RGB images .* \(32 x 32 px\): no 32. Use another"):
        choose_view(model, image_processor, None, enabled=True, any_side=True)


def choose(losses: dict[str, float], seconds: dict[str, float] | None = None, missing: dict | None = None) -> str:
    def build(name: str) -> tuple[str, None]:
        if name in (missing or {}):
            raise missing[name]
        return name, None

    return choose_backbone("auto", build, FakeSample(losses, seconds or {}), milliseconds=40)


def test_auto_takes_the_lowest_loss_within_the_budget():
    losses = {CANDIDATES[1]: 0.5, CANDIDATES[3]: 0.4, CANDIDATES[4]: 0.3}
    assert choose(losses) == CANDIDATES[4]
    assert choose(losses, {CANDIDATES[4]: 0.41}) == CANDIDATES[3]
    assert choose({}, dict.fromkeys(CANDIDATES, 9.0)) == CANDIDATES[0], "the first one may exceed the budget"


def test_auto_without_some_or_all_of_the_hub(capsys):
    losses = {CANDIDATES[1]: 0.5, CANDIDATES[4]: 0.3}
    assert choose(losses, missing={CANDIDATES[2]: ModelError("gone")}) == CANDIDATES[4]
    assert f"{CANDIDATES[2]} is left out: gone" in capsys.readouterr().out
    assert choose(losses, missing={CANDIDATES[2]: HubUnreachable("no network")}) == CANDIDATES[1]
    assert "only the built-in ones are compared" in capsys.readouterr().out


def test_choice_is_kept_for_the_next_fold(tmp_path):
    def choose_in(losses: dict[str, float]) -> str:
        return choose_backbone("auto", lambda name: (name, None), FakeSample(losses, {}), 40, tmp_path)

    assert choose_in({CANDIDATES[3]: 0.1}) == choose_in({CANDIDATES[1]: 0.1}) == CANDIDATES[3]


def test_name_that_is_given_is_kept():
    assert choose_backbone("simple_cnn", None, None, 40) == "simple_cnn"


@pytest.mark.parametrize(
    "shorter_side, best, tried",
    [(28, 128, {32, 64, 128, 256}), (28, 256, {32, 64, 128, 256}), (60, 64, {64, 128, 256}), (100, 256, set())],
)
def test_small_images_are_tried_at_their_own_size_and_its_doubles(shorter_side, best, tried):
    class Recorder:
        is_square, groups = True, np.arange(10)

        def __init__(self):
            self.shorter_side, self.sides = shorter_side, []

        def losses(self, model: object, *image_processors: object) -> tuple[list[np.ndarray], float]:
            sides = [each.data_config["input_size"][-1] for each in image_processors]
            self.sides += sides
            return [np.full(10, 1.0 if side == best else 2.0) for side in sides], 0.1

    model, image_processor = build_model("efficientnet_lite0", {0: "a", 1: "b"})
    sample = Recorder()
    view, views = choose_view(model, image_processor, sample, enabled=True, any_side=True)
    assert view.image_processor.data_config["input_size"][-1] == views[0].side == best
    assert model.config.pretrained_cfg["input_size"][-1] == best, "the model keeps the view that was chosen"
    assert set(sample.sides) == tried | {128} and len(sample.sides) == len(tried | {128}) + 1 == len(views) - 1, (
        "the fits at 128 px, and each side once"
    )


def sample_of(labels: list[int]) -> Sample:
    train = Dataset.from_dict(
        dict.fromkeys(("label", "group"), labels)
        | dict.fromkeys(("width", "height"), [64] * len(labels))
        | {"digest": [f"{number:064x}" for number in range(len(labels))]}
    )
    return draw_sample(train, lambda drawn, processor: None, None)


def test_sample_has_two_images_of_a_rare_class():
    for seed in range(10):
        labels = np.zeros(2000, dtype=int)
        labels[np.random.default_rng(seed).choice(2000, 5)] = 1
        assert np.bincount(sample_of(labels.tolist()).labels, minlength=2)[1] >= 2


def test_sample_of_many_classes_has_several_images_of_each():
    sample = sample_of([number % 100 for number in range(3000)])
    assert len(sample.labels) == 192 and set(sample.labels) == set(range(24)) and np.bincount(sample.labels).min() > 1


def test_an_image_of_each_class_tells_nothing():
    losses = cross_fitted_losses(torch.randn(3, 8), torch.arange(3), np.zeros(3, dtype=int))
    assert losses == pytest.approx(np.log(3))


def test_images_of_a_class_that_no_probe_has_learned_choose_no_view():
    generator = torch.Generator().manual_seed(0)
    labels, folds = torch.tensor([0, 1, 2, 3, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 1, 2, 2, 3])
    first, other = (cross_fitted_losses(torch.randn(8, 16, generator=generator), labels, folds) for _ in range(2))
    assert first[2:4] == pytest.approx(np.log(4)) and other[2:4] == pytest.approx(np.log(4))
    assert (first[[0, 1, 4, 5, 6, 7]] != other[[0, 1, 4, 5, 6, 7]]).all(), "the others tell the views apart"
    alone = np.arange(20)  # an image of each class in train, as three images of each class leave it
    own, pad = (
        View(fit, 64, cross_fitted_losses(torch.randn(20, 16, generator=generator), torch.arange(20), alone % 4))
        for fit in ("own", "pad")
    )
    assert not pad.is_better(own, alone) and not own.is_better(pad, alone)


def test_one_surprise_does_not_decide():
    """A feature tells the classes of all images but one, of which the probe is then wrongly sure."""
    labels = torch.arange(60) % 2
    telling = 20 * torch.nn.functional.one_hot(labels, 8).float()
    telling += torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    telling[0] = telling[1]
    losses = cross_fitted_losses(telling, labels, np.arange(60) % 4)
    assert losses.argmax() == 0 and 2 < losses[0] < np.log(2 / 0.05) + 1e-6 and losses[1:].mean() < 0.1


def test_views_are_judged_by_probes_of_the_first_one():
    labels = torch.arange(60) % 2
    telling = 20 * torch.nn.functional.one_hot(labels, 8).float()
    telling += torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    folds = np.arange(60) % 4
    own, turned = losses_of_views((telling, telling[:, [1, 0, *range(2, 8)]]), labels, folds)
    assert own.tolist() == cross_fitted_losses(telling, labels, folds).tolist() and own.mean() < 0.1
    assert turned.mean() > 2


def add_backbone(server: Hub, name: str, architecture: str, folder: Path) -> None:
    """Add a tiny timm model with random weights to the server, in the layout of timm's repositories."""
    cfg = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    cfg |= {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 5, "architecture": architecture}
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=5, pretrained_cfg=dict(cfg))
    folder.mkdir(parents=True)
    weights = TimmWrapperForImageClassification(config).timm_model.state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(settings))
    server.add("models", name, folder)


@pytest.mark.slow
def test_auto_loads_the_backbones_of_the_hub(tmp_path):
    draw_folder(tmp_path / "images", per_class=12)
    there = dict(zip(HUB_BACKBONES[:3], ("test_efficientnet", "test_convnext", "test_resnet"), strict=True))
    with Hub() as server:
        for name, architecture in there.items():
            add_backbone(server, name, architecture, tmp_path / "hub" / architecture)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        line = [sys.executable, str(PROJECT / "train.py"), "--data_dir", "images", "--model_name", "auto"]
        done = subprocess.run(
            [*line, "--recipe", "probe", "--milliseconds", "10000", "--output_dir", "out"],
            cwd=tmp_path, env=inherited | server.environment(tmp_path / "home"), capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if "loss of a probe, time an image" in line)
    assert all(f"{name} 0." in said or f"{name} 1." in said for name in (*EFFICIENTNETS, *there))
    assert all(f"{name} is left out: " in done.stdout for name in HUB_BACKBONES[3:])
    losses = {part.split()[0]: float(part.split()[1][:-1]) for part in said.split("time an image: ")[1].split("; ")}
    assert said.split()[1].rstrip(";") == min(losses, key=losses.get)


def test_view_is_better_only_by_more_than_a_standard_error():
    own, alone = View("own", 64, np.array([0.5, 0.5, 0.5, 0.5])), np.arange(4)
    assert not View("pad", 64, np.array([0.1, 0.8, 0.1, 0.9])).is_better(own, alone)  # by 0.025, with an error of 0.19
    close = View("pad", 64, np.array([0.4, 0.4, 0.52, 0.52]))
    assert close.is_better(own, alone) and not close.is_better(own, alone // 2), "two groups tell less"


def test_side_that_is_given_is_kept_for_tiny_images_too():
    class Tiny:
        is_square, groups, shorter_side = True, np.arange(10), 28

        def losses(self, model: object, *image_processors: object) -> tuple[list[np.ndarray], float]:
            sides = [each.data_config["input_size"][-1] for each in image_processors]
            return [np.full(10, side / 256) for side in sides], 0.1  # the smaller the better

    model, image_processor = build_model("efficientnet_lite0", {0: "a", 1: "b"})
    view, (chosen, *tried) = choose_view(model, image_processor, Tiny(), enabled=True, any_side=False)
    assert view.image_processor.data_config["input_size"][-1] == chosen.side == 256
    assert {each.side for each in tried} == {128} and model.config.pretrained_cfg["input_size"][-1] == 256
    assert choose_view(model, image_processor, None, enabled=False, any_side=True)[1] == []


def test_shape_of_a_sample_is_that_of_most_of_its_images():
    def shown(*sizes: tuple[int, int]) -> Sample:
        return Sample(None, [0, 1] * (len(sizes) // 2), np.arange(len(sizes)), sizes, None)

    uneven = shown((100, 30), (30, 90), (400, 50), (160, 160))
    assert uneven.shorter_side == 40 and not uneven.is_square
    assert shown(*[(104, 100)] * 19, (90, 30)).is_square
    assert not shown(*[(100, 104)] * 18, (90, 30), (30, 90)).is_square, "nine in ten are not enough"
    assert not shown(*[(106, 100)] * 20).is_square
