"""The cache of what was inspected and prepared: what is reused, what is made again, and what does not last."""

import hashlib
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from conftest import draw, draw_folder, load, save_dataset
from datasets import Features, Value
from PIL import Image as PILImage

import data
import luthier.cache as cache
import luthier.images.inspection as inspection
from data import evaluation_rows, load_splits, prepare, with_transforms
from luthier.errors import UserError
from luthier.images.decode import decode_rgb
from luthier.images.description import describe


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The cache is empty at the beginning of the test; otherwise it has the images of other tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_read_error_is_not_cached(images, monkeypatch, view, empty_cache):
    def fail(*arguments):
        raise OSError(5, "the disk is away")

    for module, message in (
        (inspection, "cannot be opened: the disk is away"),
        (data, "read before are not there now"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(module, "decode_rgb", fail)
            prepare(load(data_dir=str(images)), view)
    assert len(prepare(load(data_dir=str(images)), view)["train"]) == 15


def test_inspection_that_is_interrupted_goes_on_where_it_was(tmp_path, monkeypatch, empty_cache):
    """The rows of a dataset have no names but their numbers, which must stay what they are."""
    path = save_dataset(tmp_path / "set", Value("string"), {"train": ["a", "b"] * 10})
    inspected, decode = [], inspection.decode_rgb

    def decode_some(content, *rest):
        if len(inspected) == limit:
            raise KeyboardInterrupt
        inspected.append(content)
        return decode(content, *rest)

    monkeypatch.setattr(cache, "PART_ROWS", 8)
    monkeypatch.setattr(inspection, "decode_rgb", decode_some)
    limit = 12
    with pytest.raises(KeyboardInterrupt):
        load(dataset_name=path)
    inspected.clear()
    limit = 100
    splits = load(dataset_name=path)
    names = sorted((name for split in splits.values() for name in split["name"][:]), key=lambda name: int(name[10:]))
    assert names == [f"train row {row}" for row in range(20)] and 12 <= len(inspected) < 20
    assert load(dataset_name=path)["train"]["name"][:] == splits["train"]["name"][:]


def test_file_that_changes_with_its_size_and_time_is_not_kept_as_another(images, view, empty_cache):
    path = images / "red/000.png"
    splits, content, status = load(data_dir=str(images)), path.read_bytes(), path.stat()
    changed = bytearray(content)
    changed[-20] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"red/000.png: it has changed since it was read. If starting again"):
        prepare(splits, view)
    path.write_bytes(content)
    assert len(prepare(splits, view)["train"]) == len(splits["train"])


def test_image_that_memory_did_not_suffice_for_is_read_again(images, monkeypatch, empty_cache):
    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(UserError, match="there is not enough memory"):
        patch.setattr(inspection, "decode_rgb", fail)
        load(data_dir=str(images))
    assert sum(map(len, load(data_dir=str(images)).values())) == 24


def test_files_of_killed_processes_are_removed(images, view, empty_cache, tmp_path):
    prepare(load(data_dir=str(images)), view)
    folder = next((tmp_path / "cache").glob("luthier_inspected/*"))
    cache._remove_stale_files.cache_clear()
    for name, age in (("tmpold", 2 * cache.STALE_SECONDS), ("tmpnew", 60), ("tmpfolder", 2 * cache.STALE_SECONDS)):
        (folder / name).touch() if name != "tmpfolder" else (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    of_all = tmp_path / "cache/luthier_near_duplicates/tmpkilled"
    of_all.mkdir()
    os.utime(of_all, (time.time() - 2 * cache.STALE_SECONDS,) * 2)
    draw("red", 7000).save(images / "red/more.png")
    load(data_dir=str(images))
    assert [path.name for path in folder.glob("tmp*")] == ["tmpnew"] and not of_all.exists()


def test_folder_that_is_read_again_warns_of_nothing(images, view, empty_cache, caplog):
    for seed in range(3):
        draw("red", 7000 + seed).save(images / f"red/more{seed}.png")
        prepare(load(data_dir=str(images)), view)
    assert "damaged" not in caplog.text


def test_damaged_file_of_the_cache_is_left_out(images, view, empty_cache, tmp_path, caplog):
    prepare(load(data_dir=str(images)), view)
    for part in (tmp_path / "cache").rglob("rows-*.arrow"):
        part.write_bytes(part.read_bytes()[:100])
    assert len(prepare(load(data_dir=str(images)), view)["train"]) == 15 and "it is damaged" in caplog.text


def test_images_of_an_earlier_run_are_reused(images, monkeypatch, view, empty_cache, capsys):
    """Adding images, a class and copies, and renaming a file, prepares only what is new."""
    made = Counter()

    def watch(kind, function):
        return lambda *arguments, **rest: made.update([kind]) or function(*arguments, **rest)

    def counts():
        numbers = dict(made)
        made.clear()
        return numbers

    def both():
        splits = load(data_dir=str(images), test_fraction=0.2, validation_fraction=0.2)
        return splits, prepare(splits, view)

    monkeypatch.setattr(inspection, "decode_rgb", watch("inspect", inspection.decode_rgb))
    monkeypatch.setattr(data, "store_training_image", watch("train", data.store_training_image))
    packer = data.view_packer
    monkeypatch.setattr(data, "view_packer", lambda view: watch("other", packer(view)))
    before, _ = both()
    total = sum(map(len, before.values()))
    assert counts() == {"inspect": total, "train": len(before["train"]), "other": total - len(before["train"])}
    both()
    assert counts() == {}
    assert f"reuse    {total} of {total} images as they were stored before" in capsys.readouterr().out

    (images / "violet").mkdir()
    for seed in range(6):
        draw("red", 5000 + seed).save(images / f"violet/{seed}.png")
    first = next((images / "red").iterdir())
    shutil.copy(first, images / "red/copy.png")
    first.rename(images / "red/renamed.png")
    after, prepared = both()
    numbers = counts()
    moved = sum(
        (image in before["train"]["digest"][:]) != (split == "train")
        for split in after for image in after[split]["digest"][:]
    )  # fmt: skip
    assert numbers["inspect"] == 6 + 2 and numbers["train"] + numbers["other"] <= 6 + 1 + moved
    for split, dataset in after.items():
        assert (
            prepared[split]["digest"][:] == dataset["digest"][:] and prepared[split]["label"][:] == dataset["label"][:]
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", images.parent / "another")
    fresh = prepare(after, view)
    for split, rows in with_transforms(prepared, view, "none", "evaluation").items():
        others = with_transforms(fresh, view, "none", "evaluation")[split]
        assert all(torch.equal(rows[i]["pixel_values"], others[i]["pixel_values"]) for i in range(len(rows)))


def test_changed_file_is_prepared_again(images, view):
    before = describe(prepare(load(data_dir=str(images)), view), "drawn")["fingerprint"]
    assert describe(prepare(load(data_dir=str(images)), view), "drawn")["fingerprint"] == before
    draw("red", 999).save(images / "red/000.png")
    content, prepared = (images / "red/000.png").read_bytes(), prepare(load(data_dir=str(images)), view)
    assert describe(prepared, "drawn")["fingerprint"] != before
    digest = hashlib.sha256(content).hexdigest()
    (seen,) = (
        evaluation_rows(rows, view)[rows["digest"][:].index(digest)]["pixel_values"]
        for rows in prepared.values()
        if digest in rows["digest"][:]
    )
    assert torch.equal(seen, view(decode_rgb(content).image))


def test_second_run_decodes_nothing(images, monkeypatch, view):
    prepare(load(data_dir=str(images)), view)
    for module in (data, inspection):
        monkeypatch.setattr(module, "decode_rgb", lambda *arguments: pytest.fail("decoded again"))
    assert len(prepare(load(data_dir=str(images)), view)["train"]) == 15


def test_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw_folder(tmp_path / "images", per_class=6)
    load_splits(data_dir=str(tmp_path / "images"))
    for path in (tmp_path / "cache/generator").rglob("dataset_info.json"):
        path.write_text("")
    with pytest.raises(UserError, match=r"the cache in .*generator is damaged .*: remove this folder"):
        load_splits(data_dir=str(tmp_path / "images"))
    shutil.rmtree(tmp_path / "cache/generator")
    assert sum(map(len, load_splits(data_dir=str(tmp_path / "images"))[0].values())) == 18


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell when the entry of a file has changed")
def test_images_that_change_places_are_read_again(tmp_path, empty_cache):
    root = draw_folder(tmp_path / "images", 8, ("blue", "red"))
    for path in [*root.glob("*/*.png")]:
        PILImage.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
        os.utime(path.with_suffix(".bmp"), (10**9, 10**9))  # as archives have it

    def digests():
        rows = data.load_images(data_dir=str(root))[0]["train"]
        return dict(zip(rows["name"][:], rows["digest"][:], strict=True))

    before, (one, other) = digests(), (root / "blue/000.bmp", root / "red/000.bmp")
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)
    after = digests()
    assert after["blue/000.bmp"] == before["red/000.bmp"] and after["red/000.bmp"] == before["blue/000.bmp"]


def test_one_image_that_cannot_be_opened_does_not_cost_the_inspection_of_the_others(
    images, monkeypatch, empty_cache, tmp_path
):
    (images / "red/gone.png").symlink_to("nowhere.png")
    read = []
    monkeypatch.setattr(
        inspection, "read_bytes", lambda source: read.append(source["path"]) or data.read_bytes(source)
    )
    for expected in (25, 1, 1):
        read.clear()
        data.load_images(data_dir=str(images), max_unreadable=0.5)
        assert len(read) == expected
    assert len([*(tmp_path / "cache").glob("luthier_inspected/*/rows-*.arrow")]) == 1, (
        "what may not be kept is removed"
    )


def test_a_file_more_does_not_write_the_inspections_of_others_again(images, empty_cache, tmp_path):
    for number in range(3):
        draw("red", 100 + number).save(images / f"blue/{9 - number}.png")  # sorts before the other new ones
        load(data_dir=str(images))
    found = {path.name.split("-")[0] for path in (tmp_path / "cache").glob("luthier_inspected/*/*.arrow")}
    assert found == {"rows"}


def test_rows_are_kept_where_no_open_file_can_be_renamed(images, monkeypatch, view, empty_cache):
    """As on Windows, where a copy gets the name."""
    replace = Path.replace

    def refuse(self, target):
        if self.name.startswith("tmp"):
            raise PermissionError(13, "open in this process")
        return replace(self, target)

    def fail(*args, **options):
        pytest.fail("made again")

    monkeypatch.setattr(Path, "replace", refuse)
    first = prepare(load_splits(data_dir=str(images))[0], view)
    monkeypatch.setattr(data, "prepare_batch", fail)
    second = prepare(load_splits(data_dir=str(images))[0], view)
    assert first["test"]["view"][:] == second["test"]["view"][:]


def test_arguments_of_a_generator_are_not_pickled(empty_cache, monkeypatch):
    hashed, own = [], cache.Hasher.hash
    monkeypatch.setattr(cache.Hasher, "hash", classmethod(lambda cls, value: hashed.append(value) or own(value)))
    features = Features({"a": Value("string")})
    for names in (("x",), ("x", "y"), ("x",)):
        assert cache.dataset_of(_rows, features, {"names": names})["a"][:] == list(names)
    assert not any(isinstance(value, dict) and "gen_kwargs" in value for value in hashed)


def _rows(names):
    yield from ({"a": name} for name in names)
