"""Complete runs on classes of unequal size, with a metric that asks for balance."""

import json

import numpy as np
import pytest
from conftest import draw, run
from transformers import AutoModelForImageClassification

import score
from luthier.familiarity import class_shares_of
from models import build_model, load_trained

COUNTS = {"blue": 24, "green": 12, "red": 4, "violet": 1}
PROBE = ["--metric", "balanced_accuracy", "--recipe", "probe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rare")
    for number, label in enumerate(label for label, count in COUNTS.items() for _ in range(count)):
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        draw({"violet": "red"}.get(label, label), number).save(folder / "images" / label / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("probe", []),
        pytest.param(
            "weighted",
            ["--recipe", "full", "--balance", "weighted", "--num_train_epochs", "2"],
            marks=pytest.mark.slow,
        ),
        pytest.param("folds", ["--folds", "3"], marks=pytest.mark.slow),
    ],
)
def test_shipped_model_answers_as_the_scored_one(folder, timm_checkpoint, name, options, capsys):
    metrics = run(folder, timm_checkpoint, *PROBE, "--refit", "none", *options, out=name)
    shares = metrics["class_shares"]
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1] > shares[2] > 0
    assert "answers as if all classes were equally frequent" in capsys.readouterr().out
    assert metrics["test"]["per_class"]["violet"]["support"] == 0  # it is needed in train
    model = AutoModelForImageClassification.from_pretrained(folder / name)
    assert model.config.class_shares == shares
    if name != "folds":  # in which several models are scored
        data = ["--data_dir", str(folder / "images"), "--output_dir", str(folder / f"{name}-score")]
        score.main([str(folder / name), *data, "--disable_tqdm", "1"])
        rows = {}
        for path in (folder / name, folder / f"{name}-score"):
            lines = (path / "predictions.csv").read_text().splitlines()[1:]
            rows[path.name] = {line.split(",")[1]: line.split(",")[3:] for line in lines}
        for digest, answer in rows[name].items():
            scored = rows[f"{name}-score"][digest]
            assert scored[0] == answer[0] and float(scored[1]) == pytest.approx(float(answer[1]), abs=1e-4)


@pytest.fixture(scope="module")
def scored(folder, timm_checkpoint):
    """The metrics of a run without a refit."""
    return run(folder, timm_checkpoint, *PROBE, "--refit", "none", out="scored")


@pytest.fixture(scope="module")
def refitted(folder, timm_checkpoint):
    """The metrics of a run with a refit."""
    return run(folder, timm_checkpoint, *PROBE, out="refit")


def test_score_of_a_model_knows_its_shares(folder, scored):
    out = folder / "scored-again"
    data = ["--data_dir", str(folder / "images"), "--output_dir", str(out), "--disable_tqdm", "1"]
    score.main([str(folder / "scored"), *data])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["class_shares"] == scored["class_shares"]
    learned = (folder / "scored/learned_from.txt").read_text().split()
    assert 0 < metrics["leaks"]["learned_from"] == len(learned) < metrics["test"]["n"]


@pytest.mark.usefixtures("scored")
def test_run_from_the_model_of_another_names_the_images_that_have_chosen_it(folder, capsys):
    metrics = run(folder, folder / "scored", *PROBE, "--refit", "none", out="anew")
    assert metrics["leaks"]["learned_from"] == metrics["validation"]["n"] > 0, "the splits are the same"
    assert "has learned from, or was chosen by" in capsys.readouterr().out


def test_report_and_card_say_how_answers_make_up_for_rare_classes(folder, refitted):
    metrics = refitted
    assert metrics["refit"]["done"] and metrics["recipe"]["metric"].startswith("balanced accuracy; answers as if")
    for name in ("report.html", "README.md"):
        assert "answers make up for rare classes" in (folder / "refit" / name).read_text()
    assert AutoModelForImageClassification.from_pretrained(folder / "refit").config.class_shares


@pytest.mark.slow
def test_refit_after_folds_learns_from_a_class_that_no_fold_tests(folder, timm_checkpoint):
    metrics = run(folder, timm_checkpoint, *PROBE, "--folds", "3", out="folds-refit")
    assert metrics["test"]["n"] == sum(COUNTS.values()) - 1 and metrics["refit"]["images"] == sum(COUNTS.values())


def test_balance_changes_the_answers_by_the_shares_alone(folder, timm_checkpoint, scored):
    plain = run(folder, timm_checkpoint, *PROBE, "--balance", "none", "--refit", "none", out="plain")
    heads, temperatures = [], [metrics["calibration"]["temperature"] for metrics in (plain, scored)]
    for name, temperature in zip(("plain", "scored"), temperatures, strict=True):  # as before calibration
        head = AutoModelForImageClassification.from_pretrained(folder / name).timm_model.get_classifier()
        heads.append([tensor.detach().numpy() * temperature for tensor in (head.weight, head.bias)])
    (weight, bias), (same, lower) = heads
    assert np.allclose(weight, same, atol=1e-4)
    assert np.allclose(bias - lower, np.log(scored["class_shares"]), atol=1e-3)


@pytest.mark.usefixtures("scored")
def test_model_that_learns_anew_forgets_the_shares_of_before(folder):
    labels = dict(enumerate(sorted(COUNTS)))
    assert build_model(str(folder / "scored"), labels)[0].config.to_dict().get("class_shares") is None
    assert class_shares_of(load_trained(str(folder / "scored"))[0]) is not None


@pytest.mark.usefixtures("refitted")
def test_refit_makes_up_for_the_shares_of_what_it_learns_from(folder):
    scored, shipped = (
        json.loads((folder / name / "config.json").read_text())["class_shares"] for name in ("refit/scored", "refit")
    )
    assert np.allclose(shipped, np.array(list(COUNTS.values())) / sum(COUNTS.values()))
    assert not np.allclose(scored, shipped)
