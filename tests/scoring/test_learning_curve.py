"""The learning curve: it rises on features of known difficulty, and half of the data predicts the accuracy on all."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict

import luthier.scoring.learning_curve as module
from luthier.errors import UserError
from luthier.reporting.console import learning_curve_in_words
from luthier.scoring.learning_curve import FRACTIONS, _ranks_in_class, extrapolate, learning_curve
from luthier.training.features import Pool, pool_of

NAMES = ["a", "b", "c", "d"]


def clusters(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Overlapping clusters of four classes in 200 dimensions."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    centres = np.random.default_rng(0).normal(0, 0.22, (4, 200))
    return torch.tensor(centres[labels] + generator.normal(0, 1, (n, 200)), dtype=torch.float32), labels


@pytest.mark.slow
def test_curve_of_half_the_images_predicts_the_accuracy_of_all():
    within_interval = 0
    for seed in range(2):
        features, labels = clusters(800, seed)
        half = np.concatenate([np.flatnonzero(labels == label)[:100] for label in range(4)])
        groups = np.arange(800)
        predicted = learning_curve(Pool(features[half], labels[half], groups[half], NAMES), 0.1, 300)
        measured = learning_curve(Pool(features, labels, groups, NAMES), 0.1, 600)["points"][-1]
        assert measured["n"] == predicted["twice"]["n"] == 600
        low, high = predicted["twice"]["ci95"]
        within_interval += low <= measured["accuracy"] <= high
    assert within_interval >= 1


def test_accuracy_rises_with_the_images_and_the_sentence_says_so():
    features, labels = clusters(800, 1)
    curve = learning_curve(Pool(features, labels, np.arange(800), NAMES), 0.1, 600)
    accuracies = [point["accuracy"] for point in curve["points"]]
    assert len(accuracies) == len(FRACTIONS) and accuracies[-1] > accuracies[0] + 0.1
    assert all(point["lowest"] <= point["accuracy"] <= point["highest"] for point in curve["points"])
    assert curve["now"]["accuracy"] < curve["twice"]["accuracy"] and curve["gain"] > 0
    assert "(1,200 instead of 600)" in learning_curve_in_words(curve) and "points" in learning_curve_in_words(curve)


def test_smallest_subset_has_every_class():
    features, labels = clusters(40, 1)
    labels = np.where(np.arange(40) < 5, 3, labels % 3)
    assert learning_curve(Pool(features, labels, np.arange(40), NAMES), 0.1, 30)["points"][0]["n"] >= 4


def test_class_with_too_few_images_is_refused():
    features, labels = clusters(40, 1)
    labels = np.where(np.arange(40) < 3, 3, labels % 3)
    with pytest.raises(UserError, match=r"needs 4 images of each class .* 'd' has 3"):
        learning_curve(Pool(features, labels, np.arange(40), NAMES), 0.1, 30)
    labels, groups = np.arange(40) % 4, np.arange(40)
    groups[labels == 2] = 2 + 4 * (np.arange(10) % 2)  # two bursts: a fold would hold all of the class, or half
    with pytest.raises(UserError, match=r"images of one group count as one, but 'c' has 2 images"):
        learning_curve(Pool(features, labels, groups, NAMES), 0.1, 30)


def test_power_law_is_recovered():
    sizes = np.array([100.0, 200, 400, 800])
    errors = 0.05 + 0.3 * (sizes / 100) ** -0.6
    correct = np.zeros((4, 20_000))
    for row, error in enumerate(errors):
        correct[row, : round(20_000 * (1 - error))] = 1
    generator = np.random.default_rng(0)
    estimate = extrapolate(sizes, correct[:, generator.permutation(20_000)], np.arange(20_000), 800)
    expected = 1 - (0.05 + 0.3 * 16**-0.6)
    assert abs(estimate["twice"]["accuracy"] - expected) < 0.005
    assert estimate["twice"]["ci95"][0] < expected < estimate["twice"]["ci95"][1]


def test_accuracy_of_fewer_images_than_were_measured_is_not_below_zero(monkeypatch):
    """As where a validation split of the data's own has many times the images of train."""
    monkeypatch.setattr(module, "RESAMPLES", 20)
    sizes, errors = np.array([232.0, 420, 744, 1302, 2325]), (302, 127, 75, 58, 53)
    correct = np.array([np.arange(1000) >= error for error in errors], dtype=float)
    estimate = extrapolate(sizes, correct, np.arange(1000), 100)
    assert estimate["now"]["accuracy"] == estimate["now"]["ci95"][0] == 0 < estimate["twice"]["accuracy"]


def test_part_of_the_images_is_a_part_of_the_groups():
    labels, groups = np.repeat([0, 1], 40), np.repeat(np.arange(8), 10)
    ranks = _ranks_in_class(labels, groups, seed=0)
    assert [len(set(ranks[groups == group])) for group in range(8)] == [1] * 8
    assert sorted(set(ranks[labels == 0])) == sorted(set(ranks[labels == 1])) == [0, 0.25, 0.5, 0.75]


def test_ranks_are_those_of_each_class_by_itself():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 20, 500), generator.integers(0, 100, 500)
    expected, drawn = np.empty(500), np.random.default_rng(1)
    for label in range(20):
        own, number = np.unique(groups[labels == label], return_inverse=True)
        expected[labels == label] = (drawn.permutation(len(own)) / len(own))[number]
    assert (_ranks_in_class(labels, groups, 1) == expected).all()


def test_interval_of_groups_is_wider_than_that_of_their_images(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 50)
    sizes, groups = np.array([25.0, 50, 100, 200]), np.repeat(np.arange(40), 10)
    correct = np.array([np.repeat(np.arange(40) < 40 * share, 10) for share in (0.6, 0.7, 0.75, 0.8)], dtype=float)
    alone, together = (
        np.diff(extrapolate(sizes, correct, given, 200)["now"]["ci95"]) for given in (np.arange(400), groups)
    )
    assert together > 2 * alone


def test_features_of_train_and_validation_are_those_of_their_labels(monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", 5)
    splits, features = DatasetDict(), {}
    for split, labels in (("train", np.repeat([0, 1], 20)), ("validation", np.tile([0, 1], 10))):
        columns = {"label": labels, "group": np.arange(len(labels)) + 100 * len(splits)}
        splits[split] = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["a", "b"]))
        features[split] = 5 * torch.eye(2)[torch.from_numpy(labels)]
    curve = learning_curve(pool_of(splits, features, torch.device("cpu")), 0.1, 40)
    assert curve["points"][-1]["accuracy"] == 1 and curve["now"]["n"] == 40
    text = learning_curve_in_words(curve)
    assert "nobody can tell" in text and "interval" not in text


def test_few_groups_widen_the_interval():
    correct = np.tile(np.repeat(np.arange(8) % 2, 10), (4, 1)).astype(float)
    low, high = extrapolate(np.array([10.0, 20, 40, 60]), correct, np.repeat(np.arange(8), 10), 60)["now"]["ci95"]
    assert high - low > 0.8, "of 8 groups, and 1.2 times as wide as their bootstrap samples say"


def test_every_part_has_every_class_where_groups_have_several():
    labels, groups = np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    ranks = _ranks_in_class(labels, groups, seed=0)
    assert all((ranks[labels == label] < 0.1).sum() == 1 for label in (0, 1))
