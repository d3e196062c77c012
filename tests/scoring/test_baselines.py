"""The baselines of a score: the majority class, and the linear probe."""

import pytest
import torch
from conftest import load
from transformers import Trainer, TrainingArguments

import luthier.scoring.baselines as module
from data import collate, feature_rows, prepare
from luthier.images.views import EvaluationView
from luthier.scoring.baselines import majority_baseline, measure_probe
from models import build_model

LABELS = {0: "blue", 1: "green", 2: "red"}


def test_majority_class_is_taken_from_train_and_scored_on_test():
    train, test = {"per_class": {"a": 7, "b": 3}}, {"per_class": {"a": 1, "b": 9}, "n": 10}
    assert majority_baseline({"splits": {"train": train, "test": test}})["accuracy"] == 0.1
    without_train = majority_baseline({"splits": {"test": test}})
    assert (without_train["label"], without_train["accuracy"], without_train["n"]) == ("b", 0.9, 10)


@pytest.fixture
def measure(images, timm_checkpoint, tmp_path):
    """A function that measures the probe of a tiny model on drawn images."""
    splits = load(data_dir=str(images))
    model, image_processor = build_model(str(timm_checkpoint), LABELS)
    view = EvaluationView(image_processor)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", remove_unused_columns=False, use_cpu=True)
    trainer, rows = Trainer(model, args, collate), feature_rows(prepare(splits, view), view)
    return lambda **options: measure_probe(trainer, splits, rows, **options)


def test_probe_gives_a_baseline_starting_weights_and_suspect_labels(measure):
    probe = measure()
    assert set(probe.baseline) == {"validation", "test", "strength"}
    assert set(probe.starts) == {"probe", "soft probe"} and probe.learning_curve is None
    assert isinstance(probe.suspect_labels, list)
    assert len(probe.yardstick.losses) == probe.baseline["validation"]["n"] and 0 < probe.yardstick.mean < 10


def test_yardstick_is_left_out_where_it_would_take_minutes(measure, monkeypatch):
    monkeypatch.setattr(module, "MAX_CELLS", 10)
    assert measure().yardstick is None


def test_labels_are_checked_on_the_device_of_the_run(measure, monkeypatch):
    devices = []
    to = torch.Tensor.to

    def recorded_to(self, device, *rest, **options):
        devices.append(device)
        return to(self, device, *rest, **options)

    def check_device(splits, features, strength):
        assert torch.device("cpu") in devices[-1:]  # moved just before, to the device of the Trainer
        return []

    monkeypatch.setattr(torch.Tensor, "to", recorded_to)
    monkeypatch.setattr(module, "suspect_labels", check_device)
    assert measure().suspect_labels == []
