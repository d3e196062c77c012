"""The baselines of a score: the majority class, and the linear probe."""

import numpy as np
import pytest
import torch
from conftest import load
from datasets import ClassLabel, Dataset, DatasetDict
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

import luthier.scoring.baselines as module
from data import feature_rows, prepare
from luthier.images.views import EvaluationView
from luthier.reporting.console import findings_in_words
from luthier.scoring.audit import KINDS, suspect_labels
from luthier.scoring.baselines import (
    ProbeResults,
    build_yardstick,
    majority_baseline,
    measure_probe,
    with_yardstick,
)
from luthier.scoring.criterion import LOG_LOSS, Criterion, Judge
from luthier.scoring.intervals import interval_of_share
from luthier.scoring.metrics import TestPredictions
from luthier.training.balance import Balance
from luthier.training.features import Pool, join, pool_of
from luthier.training.recipe import RECIPES
from models import build_model

LABELS = {0: "blue", 1: "green", 2: "red"}


def test_majority_class_is_taken_from_train_and_scored_on_test():
    train, test = {"per_class": {"a": 7, "b": 3, "c": 20}}, {"per_class": {"a": 1, "b": 9, "c": 2}}
    references = np.repeat([0, 1, 2], [1, 9, 2])
    columns = {"label": references, "group": np.arange(12) // 2}
    split = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["a", "b", "c"]))
    tested = TestPredictions(DatasetDict(test=split), np.zeros((12, 3)), references, none=2)  # "c" is no class
    found = majority_baseline({"splits": {"train": train, "test": test}}, tested)
    assert (found["label"], found["accuracy"], found["n"]) == ("a", 0.1, 10)
    without_train = majority_baseline({"splits": {"test": test}}, tested)
    assert (without_train["label"], without_train["accuracy"]) == ("b", 0.9)
    assert without_train["accuracy_ci95"] == interval_of_share(np.arange(10) > 0, np.arange(10) // 2)


@pytest.fixture
def splits(images):
    return load(data_dir=str(images))


@pytest.fixture
def measure(splits, timm_checkpoint, tmp_path):
    """A function that measures the probe of a tiny model on drawn images."""
    model, image_processor = build_model(str(timm_checkpoint), LABELS)
    view = EvaluationView(image_processor)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", remove_unused_columns=False, use_cpu=True)
    trainer, rows = Trainer(model, args, default_collate), feature_rows(prepare(splits, view), view)
    return lambda **options: measure_probe(trainer, splits, rows, **options)


def test_probe_gives_a_baseline_starting_weights_and_suspect_labels(measure):
    probe = measure()
    assert set(probe.scores) == {"validation", "test", "strength"}
    assert set(probe.starts) == {"probe", "soft probe"} and probe.learning_curve is None
    assert isinstance(probe.suspect_labels, list)


def test_losses_are_corrected_where_there_are_some_to_compare(measure, splits):
    probe, judge, device = measure(), Judge(list(LABELS.values())), torch.device("cpu")
    assert with_yardstick(judge, probe, splits, [RECIPES["probe"]], device) is judge
    assert with_yardstick(judge, ProbeResults(), splits, [RECIPES["full"]], device) is judge
    yardstick = with_yardstick(judge, probe, splits, [RECIPES["probe"], RECIPES["full"]], device).yardstick
    assert len(yardstick.losses) == probe.scores["validation"]["n"] and 0 < yardstick.mean < 10


def test_classes_that_no_probe_has_learned_do_not_move_the_yardstick():
    """Those of one image or one group, whose losses would be huge; validation may have none of them."""
    labels = np.r_[np.tile(np.arange(4), 20), 4, 5, 6]
    columns = {"label": labels, "group": np.arange(83)}
    features = torch.tensor(np.eye(7)[labels] * 20 + np.random.default_rng(0).normal(size=(83, 7))).float()
    both = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=list("abcdefg")))
    rows = {"train": [*range(40), 80, 81], "validation": [*range(40, 80), 82]}
    splits = DatasetDict({split: both.select(chosen) for split, chosen in rows.items()})
    parts = {split: features[chosen] for split, chosen in rows.items()}
    yardstick = build_yardstick(pool_of(splits, parts, torch.device("cpu")), 42, 0.001, LOG_LOSS)
    assert yardstick.mean < 0.1 and yardstick.losses.max() < 0.5
    assert yardstick.losses[-1] == pytest.approx(yardstick.mean)


def test_probe_of_many_images_is_cross_fitted_on_a_sample_and_says_so(measure, splits, monkeypatch):
    assert measure().checked_by is None
    monkeypatch.setattr("luthier.training.probe.MAX_CELLS", 30)  # ten images of three classes
    probe = measure()
    assert probe.checked_by == 10
    pool = pool_of(splits, probe.features, torch.device("cpu"))
    yardstick = build_yardstick(pool, len(splits["train"]), probe.strength, LOG_LOSS)
    assert 0 < yardstick.mean < 10
    findings = {kind: [] for kind in KINDS} | probe.findings | {"suspect_labels": [{}]}
    assert findings_in_words(findings) == "labels to check: 1 (by probes that have learned from about 10 images each)"


def test_classes_that_a_sample_lacks_are_not_suspect(monkeypatch):
    labels = np.repeat(np.arange(60), 10)
    columns = {"label": labels, "group": np.arange(600), "name": [f"{row}.jpg" for row in range(600)]}
    label = ClassLabel(names=[f"{index:02}" for index in range(60)])
    train = Dataset.from_dict(columns).cast_column("label", label)
    features = torch.nn.functional.one_hot(torch.tensor(labels)).float() + 0.01 * torch.randn(600, 60)
    pool = Pool(features, labels, np.arange(600), label.names)
    for most in (600, 40):
        monkeypatch.setattr("luthier.training.probe.MAX_LEARNED", most)
        assert suspect_labels(DatasetDict(train=train), pool, 0.001) == ([], None if most == 600 else 40)


def test_features_in_a_file_and_in_parts_tell_the_same(measure, monkeypatch):
    """As those of so many images do that memory would not hold them."""
    expected = measure(with_learning_curve=True)
    for name, value in (
        ("luthier.training.features.MAX_IN_MEMORY", 0),
        ("luthier.training.features.AT_ONCE", 5),
        ("luthier.cache.AT_ONCE", 5),
    ):
        monkeypatch.setattr(name, value)
    found = measure(with_learning_curve=True)
    everything = join(list(found.features.values()))
    assert everything.data_ptr() == found.features["train"].data_ptr()  # not copied
    assert torch.equal(everything, torch.cat(list(expected.features.values())))
    assert found.strength == expected.strength and np.allclose(found.logits, expected.logits, atol=0.02)
    assert [image["name"] for image in found.suspect_labels] == [image["name"] for image in expected.suspect_labels]
    points = [[point["accuracy"] for point in probe.learning_curve["points"]] for probe in (found, expected)]
    assert np.allclose(*points, atol=0.05)


def test_labels_are_checked_on_the_device_of_the_run(measure, monkeypatch):
    devices, state_with_probe = [], module.state_with_probe

    def leave_the_cpu(*arguments):  # the features are there by now
        monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device("meta")))
        return state_with_probe(*arguments)

    monkeypatch.setattr(module, "state_with_probe", leave_the_cpu)
    monkeypatch.setattr(module, "pool_of", lambda splits, features, device, *rest: devices.append(device))
    monkeypatch.setattr(module, "suspect_labels", lambda *_: ([], None))
    assert measure().suspect_labels == [] and devices == [torch.device("meta")]


def test_yardstick_does_not_depend_on_how_many_rows_are_at_a_time(monkeypatch):
    generator, labels = np.random.default_rng(0), np.repeat([0, 1], (200, 20))  # in the order of the classes
    both = Dataset.from_dict({"label": labels, "group": np.arange(220)})
    both = both.cast_column("label", ClassLabel(names=["a", "b"]))
    features = torch.tensor(np.eye(2)[labels] + generator.normal(size=(220, 2))).float()
    splits = DatasetDict(train=both, validation=both.select(range(150, 220)))
    parts = {"train": features, "validation": features[150:]}

    def yardstick():
        return build_yardstick(pool_of(splits, parts, torch.device("cpu")), 220, 0.1, Criterion("balanced_accuracy"))

    whole = yardstick()
    monkeypatch.setattr("luthier.training.probe.rows_at_once", lambda device: 16)
    assert yardstick().mean == pytest.approx(whole.mean) and np.allclose(yardstick().losses, whole.losses)


def test_yardstick_of_the_log_loss_does_not_depend_on_how_answers_make_up_for_rare_classes():
    generator, labels = np.random.default_rng(0), np.tile([0, 0, 0, 1], 40)
    features = torch.tensor(np.eye(2)[labels] + generator.normal(size=(160, 2))).float()
    pool, balance = Pool(features, labels, np.arange(160), ["a", "b"]), Balance(np.array([0.75, 0.25]))
    plain, balanced = (build_yardstick(pool, 100, 0.1, Criterion("log_loss", each)) for each in (None, balance))
    assert len(plain.losses) == 60 and balanced.mean == pytest.approx(plain.mean)
    assert np.allclose(balanced.losses, plain.losses)


def test_features_that_do_not_follow_each_other_are_copied():
    first, second, third = torch.arange(12.0).view(6, 2).split([1, 2, 3])
    for parts in ([third, first], [first, third], [first.clone(), second]):
        assert torch.equal(join(parts), torch.cat(parts))
    assert join([second, third]).data_ptr() == second.data_ptr()


@pytest.mark.parametrize(("harder", "corrects"), [(0.0, True), (6.0, False)])
def test_losses_on_images_that_are_harder_by_nature_are_not_corrected(harder, corrects):
    """A validation split of the user's own may be of another camera; one of ours is drawn at random."""
    generator, labels = np.random.default_rng(0), np.arange(120) % 3
    noise = generator.normal(size=(120, 3)) * np.r_[np.ones(80), np.full(40, 1 + harder)][:, None]
    features = torch.tensor(4 * np.eye(3)[labels] + noise).float()
    columns = {"label": labels, "group": np.arange(120)}
    both = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=[*"abc"]))
    splits = DatasetDict(train=both.select(range(80)), validation=both.select(range(80, 120)))
    probe = ProbeResults(strength=0.01, features={"train": features[:80], "validation": features[80:]})
    judge, cpu, recipes = Judge([*"abc"]), torch.device("cpu"), [RECIPES["full"]]
    assert with_yardstick(judge, probe, splits, recipes, cpu, ["train"]).yardstick
    own = with_yardstick(judge, probe, splits, recipes, cpu, ["train", "validation"])
    assert bool(own.yardstick) == corrects


class OnApple(torch.Tensor):
    """A tensor of a device that has no float64."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_labels_are_checked_on_devices_without_float64(measure, monkeypatch):
    from luthier.scoring import audit

    cross_fit = audit.cross_fit

    def on_apple(*arguments):
        for part in cross_fit(*arguments):
            yield part._replace(logits=part.logits.as_subclass(OnApple))

    monkeypatch.setattr(audit, "cross_fit", on_apple)
    assert isinstance(measure().suspect_labels, list)
