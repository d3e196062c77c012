"""Near-duplicates: changed copies of an image are found, and different images of one class are not."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.plant import draw_scene
from luthier.images.duplicates import connected_groups, fingerprint, near_duplicates


def compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image, scale: float) -> Image.Image:
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((left * width, top * height, (1 - right) * width, (1 - bottom) * height))


@pytest.mark.parametrize(
    ("change", "min_found"),
    [
        (lambda image: compressed(image, 60), 20),
        (lambda image: resized(image, 0.5), 19),
        (lambda image: resized(image, 2), 19),
        (lambda image: cropped(image, 0.03, 0.03, 0.03, 0.03), 19),
        (lambda image: cropped(image, 0.05, 0, 0, 0), 18),
        (lambda image: compressed(resized(cropped(image, 0, 0.05, 0.02, 0), 0.7), 75), 15),
    ],
)
def test_changed_copies_are_found(change, min_found):
    images = [draw_scene("disc", seed) for seed in range(20)]
    copies = [change(image) for image in images]
    pairs = near_duplicates([fingerprint(image) for image in images + copies])
    assert set(pairs) <= {(row, row + 20) for row in range(20)}
    assert len(pairs) >= min_found


def test_images_of_one_colour_are_not_near_duplicates():
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white")]
    assert near_duplicates([fingerprint(image) for image in images]) == []


def test_groups_hold_the_images_that_pairs_connect():
    groups = connected_groups(6, [(0, 2), (2, 4), (3, 5)])
    assert groups[0] == groups[2] == groups[4] and groups[3] == groups[5]
    assert len(set(groups)) == 3 and len(set(connected_groups(3, []))) == 3


def test_fewer_than_two_images_have_no_near_duplicates():
    assert near_duplicates([]) == [] and near_duplicates([fingerprint(draw_scene("bar", 1))]) == []
    assert np.array_equal(connected_groups(0, []), [])
