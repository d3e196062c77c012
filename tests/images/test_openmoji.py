"""The built-in OpenMoji dataset: its classes, its size, its rendering and its attribution."""

import numpy as np
import pytest
import resvg_py

from data import load_splits, prepare
from luthier.images.openmoji import ATTRIBUTION, load_openmoji


def test_nine_balanced_classes():
    images = load_openmoji()
    names = images.features["label"].names
    counts = np.bincount(images["label"][:])
    assert names == sorted(names) and len(names) == 9 and "Component" not in names
    assert len(images) == 1045 and counts.max() == 120 and counts.min() == 85


def test_images_are_drawn_on_white():
    image = load_openmoji()[0]["image"]
    assert image.size == (160, 160)
    pixels = np.asarray(image.convert("RGB"))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels.std() > 10


@pytest.mark.slow
def test_images_are_rendered_once(monkeypatch, view):
    load_openmoji()
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **options: pytest.fail("rendered again"))
    splits = prepare(load_splits(dataset_name="openmoji")[0], view)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 688, "validation": 148, "test": 209}


def test_attribution_names_author_and_licence():
    assert "OpenMoji" in ATTRIBUTION and "CC BY-SA 4.0" in ATTRIBUTION
