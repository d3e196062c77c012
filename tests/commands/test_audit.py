"""The audit: planted faults are found, leaks between splits are reported, and the command works."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT, draw, draw_folder
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

import audit
from benchmarks.plant import draw_scene, draw_set, find, plant
from data import load_splits
from luthier.images.groups import propose_grouping
from luthier.reporting.console import findings_in_words, list_findings
from luthier.scoring.audit import audit_images, suspect_labels
from luthier.training.features import Pool, pool_of
from luthier.training.probe import HeldOut


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = draw_set(tmp_path_factory.mktemp("planted") / "images", per_class=100)
    faults = plant(root)
    return faults, find(root, "--image_size", "128"), root


@pytest.mark.parametrize(
    ("kind", "recall", "precision"),
    [("exact duplicates", 1, 1), ("near-duplicates", 0.9, 1), ("wrong labels", 0.8, 0.5), ("broken files", 1, 1)],
)
def test_planted_faults_are_found(planted, kind, recall, precision):
    faults, findings, _ = planted
    correct = faults[kind] & findings[kind]
    assert len(correct) >= recall * len(faults[kind])
    assert len(correct) >= precision * len(findings[kind])


def test_command_writes_a_page(planted):
    _, _, root = planted
    page = (root.parent / "audit/audit.html").read_text()
    assert "data:image/jpeg;base64," in page and "near-" in page and "http" not in page.replace("http-equiv", "")


def test_copies_are_never_in_two_splits(planted):
    faults, findings, root = planted
    splits, _ = load_splits(data_dir=str(root))
    split_of = {name: split for split, dataset in splits.items() for name in dataset["name"][:]}
    near = faults["near-duplicates"] & findings["near-duplicates"]  # one in ten may be missed
    assert near
    for first, second in faults["exact duplicates"] | near:
        assert split_of[first] == split_of[second]


def test_leaks_between_splits_and_between_classes_are_reported(tmp_path):
    draw_folder(tmp_path / "p/train", 5)
    draw_folder(tmp_path / "p/val", 3, first=50)
    draw_folder(tmp_path / "p/test", 4, first=4)  # the first image of each class is also the last one in train
    draw("red", 2050).save(tmp_path / "p/train/blue/red-too.png")  # the first red image of val
    findings = audit_images(*load_splits(data_dir=str(tmp_path / "p")))
    assert len(findings["between_splits"]) == 4 and len(findings["between_classes"]) == 1
    assert {image["split"] for image in findings["between_classes"][0]} == {"train", "validation"}
    assert "duplicates across splits: 4" in findings_in_words(findings)


def test_wrong_extensions_and_tiny_images_are_reported(tmp_path):
    images = draw_folder(tmp_path / "p", 20)
    draw("red", 777).save(images / "red/photo.jpg", "PNG")
    draw("red", 778, width=40, height=20).save(images / "red/small.png")
    for name in ("IMG_1.HEIC", "other.jpeg"):
        shutil.copy(PROJECT / "tests/images/phone.heic", images / "red" / name)
    findings = audit_images(*load_splits(data_dir=str(images)))
    found = {entry["name"]: entry["why"] for entry in findings["wrong_extension"]}
    assert found == {"red/photo.jpg": "it is PNG", "red/other.jpeg": "it is HEIF"}
    assert [(entry["name"], entry["why"]) for entry in findings["tiny"]] == [("red/small.png", "40 x 20 px")]
    assert findings["classes"] == {"blue": 20, "green": 20, "red": 24} and findings["images"] == 64
    assert "from 20 (green) to 24 (red)" in list_findings(findings)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("IMG_{group:03}_{number}.png", r"^(.+)[_-][0-9]+\."),
        ("patient{group}_{side}.png", r"^([A-Za-z]+[_-]?[0-9]+)[_-]"),
        ("healthy\\patient{group}_{side}.png", r"^([A-Za-z]+[_-]?[0-9]+)[_-]"),
        ("IMG_{group}_jpg.rf.{index:08x}.jpg", r"^(.+)\.rf\.[0-9A-Za-z]+\."),
        ("IMG_{index:04}.png", None),
        ("{label}_{index}.png", None),
        ("{index}.png", None),
    ],
)
def test_names_that_look_like_groups_are_noticed(name, pattern):
    names = [
        name.format(group=index // 4, number=index % 4, side="abcd"[index % 4], index=index, label="xyz"[index // 40])
        for index in range(120)
    ]
    assert propose_grouping(names, classes=3) == pattern


@pytest.mark.parametrize(
    ("name", "proposed"),
    [
        ("{label}/patient{group}/{index}.png", "folder"),
        ("train\\{label}\\patient{group}\\left\\{index}.png", "folder"),
        ("{label}/patient{group}_{number}.png", r"^(.+)[_-][0-9]+\."),
        ("{label}/view{number}/{index}.png", None),
        ("{label}/{index}/image.png", None),
        ("images/patient{group}/{index}.png", None),
    ],
)
def test_folders_of_class_folders_that_look_like_groups_are_noticed(name, proposed):
    labels = ["xyz"[index // 40] for index in range(120)]
    names = [
        name.format(group=index // 4, number=index % 4, index=index, label=label) for index, label in enumerate(labels)
    ]
    assert propose_grouping(names, classes=3, labels=labels) == proposed


def test_audit_proposes_folders_of_class_folders_as_groups(tmp_path):
    for number in range(20):
        label = ("blue", "red")[number % 2]
        folder = tmp_path / "p" / label / f"{label} {number // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        draw(label, 100 + number).save(folder / f"{number}.png")
    findings = audit_images(*load_splits(data_dir=str(tmp_path / "p")))
    assert findings["grouping"] == "folder" and "use --group_by folder, or" in list_findings(findings)
    assert audit_images(*load_splits(data_dir=str(tmp_path / "p"), group_by="folder"))["grouping"] is None


def test_audit_proposes_groups_and_names_those_on_two_sides(tmp_path):
    for split, first in (("train", 0), ("test", 10)):
        for number in range(first, first + 12):  # the two last bursts of train are the first ones of test
            for label in ("blue", "red"):
                folder = tmp_path / "p" / split / label
                folder.mkdir(parents=True, exist_ok=True)
                draw(label, 100 * first + number).save(folder / f"s{number // 2}_{number % 2}.png")
    findings = audit_images(*load_splits(data_dir=str(tmp_path / "p")))
    assert findings["grouping"] and "--group_by '^(.+)" in list_findings(findings)
    findings = audit_images(*load_splits(data_dir=str(tmp_path / "p"), group_by="^(s[0-9]+)_"))
    assert findings["grouping"] is None and "groups across splits: 1" in findings_in_words(findings)
    (shared,) = findings["groups_between_splits"]
    assert {image["split"] for image in shared} in ({"train", "test"}, {"validation", "test"})


def test_audit_without_findings_says_so(tmp_path):
    findings = audit_images(*load_splits(data_dir=str(draw_folder(tmp_path / "p", 20))))
    assert findings_in_words(findings) == "labels not checked"
    assert findings_in_words(findings | {"suspect_labels": []}) == "nothing found"
    assert list_findings(findings | {"suspect_labels": []}).endswith("\n\nnothing found")
    assert "nothing found" not in list_findings(findings | {"suspect_labels": None})


def test_labels_of_a_class_with_one_image_are_not_judged(tmp_path):
    images = draw_folder(tmp_path / "p/train", 6)
    for split in ("val", "test"):
        draw_folder(tmp_path / "p" / split, 3, classes=("blue", "red"), first=50)
    for path in list((images / "green").iterdir())[1:]:
        path.unlink()
    splits, _ = load_splits(data_dir=str(tmp_path / "p"))
    labels = torch.tensor([label for dataset in splits.values() for label in dataset["label"][:]])
    features = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(len(labels), 3)
    features[0] = features[-1]  # a blue image with the features of a red one
    parts = dict(zip(splits, features.split([len(dataset) for dataset in splits.values()]), strict=True))
    (suspect,), _ = suspect_labels(splits, pool_of(splits, parts, torch.device("cpu"), splits), 0.01)
    assert (suspect["label"], suspect["likelier"]) == ("blue", "red")


def test_data_that_cannot_be_trained_on_is_still_audited(tmp_path, capsys):
    images = draw_folder(tmp_path / "p", 2)
    for name in ("a", "b", "c"):
        (images / f"red/{name}.png").write_bytes(b"no image")
    (images / "violet").mkdir()
    (images / "violet/d.png").write_bytes(b"no image")
    for _ in range(2):  # the second time after some mending
        audit.main([str(images), "--disable_tqdm", "True", "--output_dir", str(tmp_path / "found")])
        output = capsys.readouterr().out
        assert (
            "careful  the images of the class 'violet' are too few" in output and "unreadable, left out: 4" in output
        )
        assert "labels: not checked" in output
        assert "Labels were not checked" in (tmp_path / "found/audit.html").read_text(encoding="utf-8")


def test_audit_without_output_dir_writes_nothing(tmp_path, monkeypatch, timm_checkpoint, capsys):
    """An empty folder below outputs/ would give the next run another name."""
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "p", 12)
    audit.main(["p", "--model_name", str(timm_checkpoint), "--disable_tqdm", "True"])
    assert "36 images of 3 classes" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists() and [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.slow
def test_command_prints_findings_and_writes_json(tmp_path, launch):
    root = draw_set(tmp_path / "images", per_class=8)
    Image.open(root / "disc/000.png").save(root / "disc/again.png", compress_level=0)
    draw_scene("ring", 1).save(root / "ring/wrong.jpg", "PNG")
    result = launch("audit.py", "images", "--output_dir", "found", "--image_size", "64", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "exact duplicates: 1" in result.stdout and "ring/wrong.jpg (ring): it is PNG" in result.stdout
    assert len(json.loads((tmp_path / "found/audit.json").read_text())["exact_duplicates"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name the data"),
        (["nowhere/at-all"], "nowhere/at-all"),
        (["images", "--image_siz", "64"], "did you mean 'image_size'? Options: python audit.py --help"),
        (["images", "--epochs", "3"], "unknown option --epochs. Options: python audit.py --help"),
        (["images", "--folds", "5"], "audit.py does not take --folds, which is for train.py"),
        (["images", "--data_dir", "others"], "audit.py does not take --data_dir"),
    ],
)
def test_mistake_on_the_command_line_gives_one_message(args, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        audit.main(args)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_page_is_not_written_among_the_images(tmp_path, capsys):
    """Its folder would be a class without images."""
    draw_folder(tmp_path / "p", 1)
    with pytest.raises(SystemExit) as exit_info:
        audit.main([str(tmp_path / "p"), "--output_dir", str(tmp_path / "p/found")])
    assert exit_info.value.code == 2 and "found, among the images of" in capsys.readouterr().err
    assert not (tmp_path / "p/found").exists()


def test_data_with_a_validation_split_that_cannot_be_cut_further(tmp_path, timm_checkpoint, capsys):
    """Two images a class are too few for a test split, but labels are checked with what is there."""
    draw_folder(tmp_path / "p/train", 1)
    draw_folder(tmp_path / "p/val", 4, first=50)
    audit.main([str(tmp_path / "p"), "--model_name", str(timm_checkpoint), "--disable_tqdm", "True"])
    output = capsys.readouterr().out
    assert "careful  the class 'blue' has 1 image, too few" in output and "labels: not checked" not in output


@pytest.mark.parametrize(("unread", "checked"), [("red", False), ("blue", True)])  # the last class, and the first
def test_labels_are_checked_unless_no_training_image_of_the_last_class_can_be_read(
    tmp_path, timm_checkpoint, capsys, unread, checked
):
    """A probe has the classes up to the highest label that it learns from."""
    draw_folder(tmp_path / "p/train", 6)
    draw_folder(tmp_path / "p/val", 3, first=50)
    for path in (tmp_path / "p/train" / unread).iterdir():
        path.write_bytes(b"no image")
    audit.main([str(tmp_path / "p"), "--model_name", str(timm_checkpoint), "--disable_tqdm", "True"])
    output = capsys.readouterr().out
    assert "unreadable, left out: 6" in output and ("labels: not checked" not in output) == checked


def test_label_is_suspect_where_another_is_as_likely_as_for_that_ones_own_images(monkeypatch):
    likely_b = [0.1, 0.8, 0.6, 0.7, 0.75, 0.95]  # on average 0.725 for the two images of b
    logits = torch.tensor([[1 - b, b] for b in likely_b]).log()
    held_out = HeldOut(np.arange(6), logits, None, np.array([True, True]))
    monkeypatch.setattr("luthier.scoring.audit.cross_fit", lambda *_: [held_out])
    names = [f"{row}.png" for row in range(6)]
    labels, features = [0, 0, 0, 1, 1, 0], Features({"name": Value("string"), "label": ClassLabel(names=["a", "b"])})
    both = Dataset.from_dict({"name": names, "label": labels}, features=features)
    splits = DatasetDict(train=both.select(range(3)), test=both.select(range(3, 6)))
    pool = Pool(torch.zeros(6, 1), np.array(labels), np.arange(6), ["a", "b"])
    found, sample = suspect_labels(splits, pool, 0.1)
    assert sample is None and [(each["split"], each["row"], each["name"], each["likelier"]) for each in found] == [
        ("test", 2, "5.png", "b"),
        ("train", 1, "1.png", "b"),
    ]
    assert [each["probability"] for each in found] == pytest.approx([0.05, 0.2], abs=1e-6)
    assert [each["label"] for each in found] == ["a", "a"]


def test_reader_that_leaves_does_not_cost_the_files(tmp_path, monkeypatch, timm_checkpoint):
    class Left(io.StringIO):
        def write(self, text):
            if " images of " in text:
                raise BrokenPipeError
            return super().write(text)

    draw_folder(tmp_path / "p", 12)
    monkeypatch.setattr(sys, "stdout", Left())
    audit.main([str(tmp_path / "p"), "--model_name", str(timm_checkpoint), "--output_dir", str(tmp_path / "found")])
    assert (tmp_path / "found/audit.json").exists() and (tmp_path / "found/audit.html").exists()
