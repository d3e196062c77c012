"""Familiarity: an image far from all training images, or of which the model is unsure, is not answered."""

import numpy as np
import pytest
import torch
from torch import nn

from luthier.familiarity import Familiarity, log_odds, similarity
from luthier.scoring.familiarity import choose_references

CLASSES, D = 3, 16


def draw_features(n, seed, spread=0.3):
    """Return features around a direction for each class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return 5 * nn.functional.one_hot(labels, D) + 5 * spread * torch.randn(n, D, generator=generator), labels


def test_similarity_is_that_of_the_third_nearest():
    references = torch.eye(4)[:, :4].half()
    features = torch.tensor([[2.0, 1.0, 0.5, 0.0]])
    assert similarity(references, features).item() == pytest.approx(0.5 / features.norm().item(), abs=1e-3)
    assert similarity(references[:2], features).item() == pytest.approx(1 / features.norm().item(), abs=1e-3)


def test_odds_of_a_certain_answer_are_finite():
    odds = log_odds(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert torch.isfinite(odds).all() and odds[1].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("figure", ["far away", "between two classes"])
def test_unknown_images_have_a_lower_familiarity(figure):
    train, _ = draw_features(90, 0)
    known, labels = draw_features(60, 1)
    weight = torch.eye(D)[:CLASSES]
    familiarity = Familiarity(nn.functional.normalize(train).half(), "head", (2.0, 1.0), (0.8, 0.1), 0.0)
    unknown, _ = draw_features(60, 2)
    unknown = unknown.roll(CLASSES, dims=1) if figure == "far away" else (unknown + unknown.roll(1, dims=0)) / 2

    def rate(features):
        return familiarity.rate((features @ weight.T).softmax(dim=1), features)

    assert rate(known).median() > rate(unknown).quantile(0.9)
    assert (known @ weight.T).argmax(dim=1).eq(labels).all(), "nothing else tells them apart"


def test_references_are_the_same_number_of_each_class_and_change_little(monkeypatch):
    monkeypatch.setattr("luthier.scoring.familiarity.REFERENCES", 60)
    labels, digests = [0] * 500 + [1] * 50 + [2] * 4, [f"{row:064x}" for row in range(554)]
    rows = choose_references(labels, digests)
    assert np.bincount(np.array(labels)[rows]).tolist() == [20, 20, 4] and len({*rows}) == 44
    more = choose_references([*labels, 0], [*digests, "f" * 64])
    assert len({*rows} - {*more}) <= 1
    many = choose_references(list(range(100)) * 9, [f"{row:064x}" for row in range(900)])
    assert np.bincount(np.arange(900)[many] % 100).tolist() == [5] * 100
