"""What ignoring groups would add to a score."""

import numpy as np
import torch

from luthier.scoring.grouping import measure_inflation
from luthier.training.features import Pool


def measure(shared: float) -> dict:
    """Measure 200 images in bursts of five, whose features have a part in common that says nothing of the class."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    labels = np.repeat(generator.integers(0, 2, 40), 5)
    burst = np.repeat(generator.normal(size=(40, 30)), 5, axis=0)
    features = generator.normal(size=(200, 30)) + shared * burst
    features[:, 0] += labels
    return measure_inflation(Pool(torch.tensor(features).float(), labels, groups, ["a", "b"]), np.arange(200), 0.01)


def test_bursts_inflate_a_score_that_ignores_them():
    found = measure(shared=5.0)
    assert found["groups"] == 40 and found["images"] == 200
    assert found["ignoring"] > 0.9 > found["accuracy"] + 0.1
    assert abs(found["inflation"] - (found["ignoring"] - found["accuracy"])) < 1e-9
    assert 0 < found["ci95"][0] < found["inflation"] < found["ci95"][1]


def test_groups_that_share_nothing_inflate_nothing():
    found = measure(shared=0.0)
    assert found["ci95"][0] < 0.06 and abs(found["inflation"]) < 0.08


def test_classes_in_one_group_do_not_count():
    generator, labels = np.random.default_rng(0), np.repeat(np.arange(4), 20)
    groups = labels * 10 + np.arange(80) % 4 * (labels > 0)  # the first class has one group
    features = torch.tensor(np.eye(4)[labels] * 10 + generator.normal(size=(80, 4))).float()
    found = measure_inflation(Pool(features, labels, groups, [*"abcd"]), np.arange(80), 0.01)
    assert (found["images"], found["groups"]) == (60, 12)
    assert found["accuracy"] == found["ignoring"] == 1 and found["inflation"] == 0
    assert found["ci95"][0] < -0.01 and found["ci95"][1] > 0.01, "no difference among a few images"
    assert measure_inflation(Pool(features, labels, labels, [*"abcd"]), np.arange(80), 0.01) is None


def test_sample_is_of_whole_groups(monkeypatch):
    monkeypatch.setattr("luthier.training.probe.MAX_LEARNED", 160)
    generator, groups = np.random.default_rng(0), np.repeat(np.arange(400), 5)
    labels, burst = np.repeat(generator.integers(0, 2, 400), 5), generator.normal(size=(400, 30)).repeat(5, axis=0)
    features = torch.tensor(generator.normal(size=(2000, 30)) + 5 * burst).float()
    found = measure_inflation(Pool(features, labels, groups, ["a", "b"]), np.arange(2000), 0.01)
    assert found["images"] == 200 == 5 * found["groups"]
    assert found["ignoring"] > 0.9 > found["accuracy"] + 0.1


def test_duplicates_are_kept_together_in_both_scores():
    generator = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(40), 5), np.repeat(generator.integers(0, 2, 40), 5)
    features = torch.tensor(np.repeat(generator.normal(size=(40, 30)), 5, axis=0)).float()
    found = measure_inflation(Pool(features, labels, groups, [*"ab"]), groups, 0.01)
    assert found["inflation"] == 0 and found["ignoring"] < 0.8
