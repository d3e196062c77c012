"""What a score is compared with, and on which device that is computed."""

import pytest
import torch
from conftest import load
from transformers import Trainer, TrainingArguments

import luthier.scoring.baselines as module
from data import collate, feature_rows, prepare
from luthier.images.views import EvaluationView
from luthier.scoring.baselines import ProbeResults, majority_baseline, measure_probe
from luthier.training.recipe import FROM_SCRATCH, RECIPES
from models import build_model

LABELS = {0: "blue", 1: "green", 2: "red"}


def test_majority_is_learned_on_train_and_scored_on_test():
    train, test = {"per_class": {"a": 7, "b": 3}}, {"per_class": {"a": 1, "b": 9}, "n": 10}
    assert majority_baseline({"splits": {"train": train, "test": test}})["accuracy"] == 0.1
    alone = majority_baseline({"splits": {"test": test}})
    assert (alone["label"], alone["accuracy"], alone["n"]) == ("b", 0.9, 10)


@pytest.fixture
def measured(images, timm_checkpoint, tmp_path):
    """The function that measures the probe of a tiny model on drawn images."""
    splits = load(data_dir=str(images))
    model, image_processor = build_model(str(timm_checkpoint), LABELS)
    view = EvaluationView(image_processor)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", remove_unused_columns=False, use_cpu=True)
    trainer, rows = Trainer(model, args, collate), feature_rows(prepare(splits, view), view)
    return lambda recipe: measure_probe(trainer, recipe, splits, rows, with_learning_curve=False)


def test_probe_has_a_baseline_a_start_and_suspects(measured):
    probe = measured(RECIPES["lp_ft"])
    assert set(probe.baseline) == {"validation", "test", "strength"} and probe.start and probe.learning_curve is None
    assert isinstance(probe.suspect_labels, list)


def test_model_from_scratch_has_no_probe(measured):
    assert measured(FROM_SCRATCH) == ProbeResults()


def test_labels_are_checked_on_the_device_of_the_run(measured, monkeypatch):
    asked = []
    to = torch.Tensor.to

    def watched(self, device, *rest, **options):
        asked.append(device)
        return to(self, device, *rest, **options)

    def checked(splits, features, strength):
        assert torch.device("cpu") in asked[-1:]  # moved just before, to the device of the Trainer
        return []

    monkeypatch.setattr(torch.Tensor, "to", watched)
    monkeypatch.setattr(module, "suspect_labels", checked)
    assert measured(RECIPES["lp_ft"]).suspect_labels == []
