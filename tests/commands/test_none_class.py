"""A class of images that show none of the others: it teaches the model not to answer, and is not scored."""

import json

import numpy as np
import pytest
from conftest import draw_folder, run
from PIL import Image

import predict
import score
from luthier.familiarity import load_familiarity
from luthier.scoring.comparison import read_correct
from models import load_trained


def draw_nothing(seed: int) -> Image.Image:
    """Draw grey noise, which none of the coloured images look like."""
    grey = np.random.default_rng(seed).normal(128, 40, (40, 48, 1)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(grey, 3, axis=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("none")
    draw_folder(folder / "images", per_class=20)
    (folder / "images/None").mkdir()
    for seed in range(20):
        draw_nothing(seed).save(folder / f"images/None/{seed}.png")
    return folder


def ask(capsys, *words) -> list[dict]:
    predict.main([*map(str, words), "--format", "jsonl"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_class_is_found_by_its_name_and_not_scored(folder, timm_checkpoint, capsys):
    metrics = run(folder, timm_checkpoint, "--recipe", "probe", out="found")
    said = capsys.readouterr().out
    not_scored = "none     'None' is of images of anything else, and not scored"
    assert f'{not_scored}; if not, give --none_class ""\n' in said
    assert "4 images of none of the classes: " in said and "refused or unsure" in said
    test = metrics["test"]
    assert (test["n"], test["none"]["n"]) == (12, 4) and metrics["baselines"]["majority"]["n"] == 12
    assert metrics["baselines"]["linear_probe"]["test"]["n"] == 12
    matrix = np.array(test["confusion_matrix"])
    known = [label != "None" for label in metrics["data"]["labels"]]
    assert matrix.sum() == 16 and test["accuracy"] == matrix.diagonal()[known].sum() / 12
    assert test["none"]["refused"] == test["per_class"]["None"]["recall"]
    assert test["none"]["refused"] + metrics["unsure"]["none_answered"] <= 1
    for page in ("report.html", "README.md"):
        assert "Not counted: 4 images of none of the classes" in (folder / "found" / page).read_text()

    model, _ = load_trained(str(folder / "found"))
    assert model.config.none_class == "None"
    assert len(load_familiarity(model, str(folder / "found")).bank) == 60, "of the other classes alone"
    images = [folder / "new.png", folder / "images/red/000.png"]
    draw_nothing(99).save(images[0])
    nothing, red = ask(capsys, folder / "found", *images)
    assert nothing["top"][0]["label"] == "None" and nothing["answer"] is None and red["answer"] == "red"
    (always,) = ask(capsys, folder / "found", images[0], "--always_answer")
    assert always["answer"] not in (None, "None")
    predict.main([str(folder / "found"), str(images[0])])
    assert "new.png: none of these" in capsys.readouterr().out

    data = ["--data_dir", str(folder / "images"), "--output_dir", str(folder / "scored"), "--disable_tqdm", "1"]
    score.main([str(folder / "found"), *data])
    assert f"{not_scored}\n" in capsys.readouterr().out, "score.py takes no --none_class"
    again = json.loads((folder / "scored/metrics.json").read_text())
    assert (again["test"]["n"], again["test"]["none"]["n"]) == (60, 20)

    with (folder / "scored/predictions.csv").open() as file:
        assert "none" in file.readline()
    assert len(read_correct(folder / "scored/predictions.csv")) == 60
    nothing = folder / "nothing/None"
    nothing.mkdir(parents=True)
    images[0].rename(nothing / "new.png")
    with pytest.raises(SystemExit) as ended:
        score.main([str(folder / "found"), "--data_dir", str(nothing.parent), "--output_dir", str(folder / "no")])
    assert ended.value.code == 2
    assert "all images of the test split are of the class 'None'" in capsys.readouterr().err


@pytest.mark.slow
def test_class_is_given_or_switched_off(folder, timm_checkpoint, capsys):
    probe = ["--recipe", "probe", "--none_class"]
    given = run(folder, timm_checkpoint, *probe, "blue", "--folds", "3", out="given")
    assert (given["test"]["n"], given["test"]["none"]["n"]) == (60, 20)
    off = run(folder, timm_checkpoint, *probe, "", out="off")
    assert off["test"]["n"] == 16 and "none" not in off["test"] and "none_answered" not in off["unsure"]
    with pytest.raises(SystemExit) as ended:
        run(folder, timm_checkpoint, *probe, "nothing", out="wrong")
    message = "there is no class 'nothing' (--none_class): the classes are None, blue, green, red"
    assert ended.value.code == 2 and message in capsys.readouterr().err
