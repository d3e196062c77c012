"""Near-duplicates: changed copies of an image are found, and different images of one class are not."""

import io
import sys

import numpy as np
import pytest
from conftest import load
from datasets import Dataset, DatasetDict
from PIL import Image, ImageOps

from benchmarks.plant import draw_scene
from data import load_images
from luthier.images import duplicates, groups, inspection
from luthier.images.duplicates import BITS, BORDERS, SIDE, connected_groups, fingerprint, near_duplicates
from luthier.images.inspection import _crowded
from luthier.images.listed_images import GIVEN_GROUP


def pairs_among(images: list[Image.Image], mirrored: bool = False) -> list[tuple[int, int]]:
    """Return the pairs of near-duplicates, or of those in the mirror."""
    prints = [fingerprint(image) for image in images]
    hashes = np.frombuffer(b"".join(one.hashes for one in prints), np.uint8).reshape(len(images), len(BORDERS), -1)
    thumbnails = np.frombuffer(b"".join(one.thumbnail for one in prints), np.uint8).reshape(-1, SIDE, SIDE)
    return [(i, j) for i, j, kind in near_duplicates(hashes, thumbnails).tolist() if kind == mirrored]


def candidates_among(hashes: np.ndarray) -> list[list[int]]:
    """Return the pairs of candidates for copies that are not mirrored."""
    return [[i, j] for i, j, mirrored in duplicates.find_candidates(hashes).tolist() if not mirrored]


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
    pairs = pairs_among(images + copies)
    assert set(pairs) <= {(row, row + 20) for row in range(20)}
    assert len(pairs) >= min_found


def test_mirrored_copies_are_found():
    images = [draw_scene("disc", seed) for seed in range(20)]
    copies = [compressed(resized(ImageOps.mirror(image), 0.7), 75) for image in images]
    assert pairs_among(images + copies, mirrored=True) == [(row, row + 20) for row in range(20)]
    assert not {(row, row + 20) for row in range(20)} & {*pairs_among(images + copies)}


def test_mirrored_copies_are_in_one_group_within_a_class(tmp_path):
    (tmp_path / "left").mkdir()
    (tmp_path / "right").mkdir()
    for seed in range(6):
        image = draw_scene("disc", seed)
        image.save(tmp_path / f"left/{seed}.png")
        ImageOps.mirror(image).save(tmp_path / ("left" if seed < 3 else "right") / f"mirrored{seed}.png")
        draw_scene("ring", seed).save(tmp_path / f"right/ring{seed}.png")
    images = load_images(data_dir=str(tmp_path))[0]["train"]
    group = dict(zip(images["name"][:], images["duplicates"][:], strict=True))
    assert all(group[f"left/{seed}.png"] == group[f"left/mirrored{seed}.png"] for seed in range(3))
    assert all(group[f"left/{seed}.png"] != group[f"right/mirrored{seed}.png"] for seed in range(3, 6))


def test_copies_of_symmetric_images_are_found():
    """Many of their frequencies are zero, and rounding errors must not decide the bits of these."""
    halves = [np.asarray(draw_scene("ring", seed).resize((128, 128))) for seed in range(12)]
    drawn = [Image.fromarray(half // 2 + half[::-1] // 2) for half in halves]
    images = [Image.fromarray(np.asarray(image) // 2 + np.asarray(image)[:, ::-1] // 2) for image in drawn]
    pairs = pairs_among(images + [compressed(image, 90) for image in images])
    assert pairs == [(number, number + 12) for number in range(12)]


def test_images_of_one_colour_are_not_near_duplicates():
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white")]
    assert pairs_among(images) == []


def test_groups_hold_the_images_that_pairs_connect():
    groups = connected_groups(6, np.array([(0, 2), (2, 4), (3, 5)]))
    assert groups[0] == groups[2] == groups[4] and groups[3] == groups[5]
    assert len(set(groups)) == 3 and len(set(connected_groups(3, np.empty((0, 2), int)))) == 3


def test_fewer_than_two_images_have_no_near_duplicates():
    assert pairs_among([draw_scene("bar", 1)]) == []
    none = np.empty((0, len(BORDERS), BITS // 8), np.uint8)
    assert near_duplicates(none, np.empty((0, SIDE, SIDE), np.uint8)).shape == (0, 3)
    assert np.array_equal(connected_groups(0, np.empty((0, 2), int)), [])


def hashes_with_copies(n: int, copies: int, bits: int) -> np.ndarray:
    """Return random hashes, of which the last are the first with some bits of each changed."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (n, len(BORDERS), BITS // 8), np.uint8)
    for number in range(copies):
        changed = np.zeros(BITS, np.uint8)
        changed[generator.choice(BITS, bits, replace=False)] = 1
        hashes[n - copies + number] = hashes[number] ^ np.packbits(changed)
    return hashes


def test_candidates_are_all_pairs_within_the_distance():
    hashes = hashes_with_copies(300, copies=40, bits=duplicates.MAX_DISTANCE)
    assert candidates_among(hashes) == [[number, 260 + number] for number in range(40)]
    assert candidates_among(hashes_with_copies(300, 40, duplicates.MAX_DISTANCE + 1)) == []
    # The inside of an image is like the whole of another.
    hashes[7, 2] = hashes[200, 0]
    assert [7, 200] in candidates_among(hashes)


def test_each_image_is_compared_with_its_nearest_alone(monkeypatch, caplog):
    """In a set whose images all look alike the number of pairs must not grow with the square of the images."""
    monkeypatch.setattr(duplicates, "CANDIDATES", 0)
    hashes = np.zeros((200, len(BORDERS), BITS // 8), np.uint8)
    hashes[:, :, 0] = np.arange(200)[:, None]
    with caplog.at_level("WARNING"):
        candidates_among(hashes)
    assert "200 images look like 8 or more others" in caplog.text
    assert 200 <= len(candidates_among(hashes)) <= 200 * (duplicates.MIN_NEAREST + 1)


def test_cells_of_the_index_leave_out_little(monkeypatch):
    hashes = hashes_with_copies(4000, copies=200, bits=20)
    everything = candidates_among(hashes)
    monkeypatch.setattr(duplicates, "CELL", 20)  # 200 cells, of which a fifth are searched
    monkeypatch.setattr(duplicates, "CELLS", 40)
    assert len(everything) == 200 and len(candidates_among(hashes)) >= 190


def test_candidates_can_be_found_in_a_process_without_torch(monkeypatch):
    images = [draw_scene("disc", seed) for seed in range(3)]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pairs_among([*images, compressed(images[1], 60)]) == [(1, 3)]


def test_candidates_do_not_depend_on_how_many_images_are_searched_for_at_a_time(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 256, (300, 3, 32), np.uint8)
    hashes[260:] = hashes[:40]
    expected = [[number, 260 + number] for number in range(40)]
    assert candidates_among(hashes) == expected
    monkeypatch.setattr(duplicates, "QUERIES", 64)
    assert candidates_among(hashes) == expected


def test_given_groups_are_joined_by_duplicates_and_are_none_themselves(monkeypatch):
    monkeypatch.setattr(groups, "duplicate_pairs", lambda splits: np.array([[0, 3]]))
    names = {"train": ["p", "p", ""], "test": ["q", ""]}
    splits = DatasetDict({split: Dataset.from_dict({GIVEN_GROUP: each}) for split, each in names.items()})
    found = groups.add_groups(splits)
    copies, together = ([*found["train"][name], *found["test"][name]] for name in ("duplicates", "group"))
    assert copies[0] == copies[3] and len(set(copies)) == 4
    assert together[0] == together[1] == together[3] and len(set(together)) == 3


def test_group_that_is_most_of_a_class_is_none():
    labels = np.repeat([0, 1], 60)
    assert _crowded(np.zeros(120, int), labels).all()
    assert not _crowded(np.arange(120) // 2, labels).any()
    assert _crowded(np.tile([0, 1], 100), np.repeat([0, 1], 100)).all(), "two cameras, half of each class from each"
    half = np.where(np.arange(200) < 50, 0, np.arange(200))
    assert not _crowded(half, np.repeat([0, 1], 100)).any(), "the other half of the class can be cut"
    assert not _crowded(np.where(np.arange(120) < 20, 0, np.arange(120)), labels).any()
    assert _crowded(np.zeros(80, int), np.repeat([0, 1], 40)).all(), "most of two classes"
    assert _crowded(np.zeros(20, int), np.repeat([0, 1], 10)).all()
    assert not _crowded(np.zeros(18, int), np.repeat([0, 1], 9)).any(), "ten in each are needed"
    assert not _crowded(np.zeros(40, int), np.zeros(40, int)).any(), "most of one class: they may be copies"
    assert not _crowded(np.zeros(8, int), np.repeat([0, 1], 4)).any(), "few images, such as one with two labels"


def test_images_of_a_fixed_camera_can_be_cut(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(inspection, "MIN_CROWD", 10)
    scene = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    for label, colour in (("free", 90), ("taken", 200)):
        (tmp_path / label).mkdir()
        for seed in range(12):
            pixels = scene.astype(int) + np.random.default_rng(seed).integers(-9, 9, scene.shape)
            pixels[20:34, 30:44] = colour + seed % 7
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / label / f"{seed}.png")
    splits = load(data_dir=str(tmp_path))
    assert all(set(dataset["label"][:]) == {0, 1} for dataset in splits.values())
    assert "24 images look alike, and are half of their class or more" in caplog.text


def test_pairs_do_not_depend_on_how_many_wait(monkeypatch):
    images = [draw_scene("disc", seed) for seed in range(6)]
    images += [compressed(image, 60) for image in images]
    expected = pairs_among(images)
    monkeypatch.setattr(duplicates, "PAIRS", 1)
    monkeypatch.setattr(duplicates, "WAITING", 2)
    assert expected and pairs_among(images) == expected


def test_pairs_do_not_depend_on_whether_the_crop_or_the_whole_comes_first():
    images = [draw_scene("disc", seed) for seed in range(8)]
    copies = [cropped(image, 0.05, 0.03, 0.0, 0.03) for image in images]
    pairs = pairs_among(images + copies)
    assert len(pairs) >= 4 and pairs_among(copies + images) == pairs
