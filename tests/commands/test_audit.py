"""The audit: what was planted is found, leaks between splits are named, the command answers."""

import json

import pytest
import torch
from conftest import draw, draw_folder
from PIL import Image

import audit
from benchmarks.plant import draw_scene, draw_set, find, plant
from data import load_splits
from luthier.reporting.console import findings_in_words, list_findings
from luthier.scoring.audit import audit_images, suspect_labels


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
    faults, found, _ = planted
    hits = faults[kind] & found[kind]
    assert len(hits) >= recall * len(faults[kind])
    assert len(hits) >= precision * len(found[kind])


def test_command_writes_a_page(planted):
    _, _, root = planted
    page = (root.parent / "audit/audit.html").read_text()
    assert "data:image/jpeg;base64," in page and "near-" in page and "http" not in page.replace("http-equiv", "")


def test_copies_never_stand_on_two_sides(planted):
    faults, _, root = planted
    splits, _ = load_splits(data_dir=str(root))
    side = {name: split for split, dataset in splits.items() for name in dataset["name"][:]}
    for first, second in faults["exact duplicates"]:
        assert side[first] == side[second]


def test_leaks_between_given_splits_and_classes_are_named(tmp_path):
    draw_folder(tmp_path / "p/train", 5)
    draw_folder(tmp_path / "p/val", 3, first=50)
    draw_folder(tmp_path / "p/test", 4, first=4)  # its first image of each class is train's last
    draw("red", 2050).save(tmp_path / "p/train/blue/red-too.png")  # val's first red one
    found = audit_images(*load_splits(data_dir=str(tmp_path / "p")))
    assert len(found["between_splits"]) == 4 and len(found["between_classes"]) == 1
    assert {image["split"] for image in found["between_classes"][0]} == {"train", "validation"}
    assert "duplicates across splits: 4" in findings_in_words(found)


def test_names_formats_and_sizes(tmp_path):
    images = draw_folder(tmp_path / "p", 20)
    draw("red", 777).save(images / "red/photo.jpg", "PNG")
    draw("red", 778, width=40, height=20).save(images / "red/small.png")
    found = audit_images(*load_splits(data_dir=str(images)))
    assert [(entry["name"], entry["why"]) for entry in found["wrong_extension"]] == [("red/photo.jpg", "it is PNG")]
    assert [(entry["name"], entry["why"]) for entry in found["tiny"]] == [("red/small.png", "40 x 20 px")]
    assert found["classes"] == {"blue": 20, "green": 20, "red": 22} and found["images"] == 62
    assert "from 20 (green) to 22 (red)" in list_findings(found)


def test_nothing_found_is_said(tmp_path):
    found = audit_images(*load_splits(data_dir=str(draw_folder(tmp_path / "p", 20))))
    assert findings_in_words(found) == "labels not checked"
    assert findings_in_words(found | {"suspect_labels": []}) == "nothing found"


def test_labels_of_a_class_that_stands_alone_are_not_judged(tmp_path):
    images = draw_folder(tmp_path / "p/train", 6)
    for split in ("val", "test"):
        draw_folder(tmp_path / "p" / split, 3, classes=("blue", "red"), first=50)
    for path in list((images / "green").iterdir())[1:]:
        path.unlink()
    splits, _ = load_splits(data_dir=str(tmp_path / "p"))
    labels = torch.tensor([label for dataset in splits.values() for label in dataset["label"][:]])
    features = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(len(labels), 3)
    features[0] = features[-1]  # a blue one that looks red
    (suspect,) = suspect_labels(splits, features, 0.01)
    assert (suspect["label"], suspect["likelier"]) == ("blue", "red")


def test_data_that_cannot_be_trained_on_is_audited_all_the_same(tmp_path, capsys):
    images = draw_folder(tmp_path / "p", 2)
    for name in ("a", "b", "c"):
        (images / f"red/{name}.png").write_bytes(b"no image")
    audit.main([str(images), "--disable_tqdm", "True"])
    printed = capsys.readouterr().out
    assert "careful: the class 'blue' has 2 images, too few" in printed and "unreadable, left out: 3" in printed
    assert "labels to check: not checked" in printed


def test_audit_without_output_dir_leaves_nothing_behind(tmp_path, monkeypatch, timm_checkpoint, capsys):
    """An empty folder under outputs/ would move the next run to another name."""
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "p", 12)
    audit.main(["p", "--model_name", str(timm_checkpoint), "--disable_tqdm", "True"])
    assert "36 images of 3 classes" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists() and [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.slow
def test_command_line(tmp_path, launch):
    root = draw_set(tmp_path / "images", per_class=8)
    Image.open(root / "disc/000.png").save(root / "disc/again.png", compress_level=0)
    draw_scene("ring", 1).save(root / "ring/wrong.jpg", "PNG")
    ran = launch("audit.py", "images", "--output_dir", "found", "--image_size", "64", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "exact duplicates: 1" in ran.stdout and "ring/wrong.jpg (ring): it is PNG" in ran.stdout
    assert len(json.loads((tmp_path / "found/audit.json").read_text())["exact_duplicates"]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "name the data"),
        (["nowhere/at-all"], "nowhere/at-all"),
        (["images", "--image_siz", "64"], "did you mean 'image_size'"),
    ],
)
def test_slips(line, message, capsys):
    with pytest.raises(SystemExit) as ended:
        audit.main(line)
    assert ended.value.code == 2 and message in capsys.readouterr().err
