"""Figures, model card and pages: they show the score, escape names and need no network."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import COLOURS, PROJECT, draw_folder, encode
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image

from data import load_splits
from luthier.reporting import console, figures
from luthier.reporting.card import write_model_card
from luthier.reporting.console import (
    balance_with_intervals,
    inflation_in_words,
    learning_curve_in_words,
    none_in_words,
    percent_with_interval,
    refit_in_words,
    say_results,
)
from luthier.reporting.figures import (
    plot_confusion_matrix,
    plot_coverage,
    plot_curves,
    plot_learning_curve,
    plot_reliability,
)
from luthier.reporting.page import _thumbnails, most_telling, write_audit_page, write_report
from luthier.reporting.results import TestPredictions, write_audit, write_metrics, write_predictions
from luthier.scoring.audit import audit_images, leaks_in_words
from luthier.scoring.criterion import Criterion
from luthier.scoring.metrics import confidence_and_correct, reliability, score, selective
from luthier.training.balance import Balance

HOSTILE = ["<script>alert(1)</script>", "a|b `c` $x^2$ \\frac", "çok uzun 乐器 " * 8]
REFERENCES = np.array([0, 0, 1, 1, 2, 2])
LOGITS = np.eye(3)[[0, 0, 1, 0, 2, 2]] * np.linspace(1, 4, 6)[:, None]
CURVE = {
    "points": [{"n": n, "accuracy": 1 - 1 / n, "lowest": 0.5, "highest": 1.0} for n in (10, 20, 40)],
    "now": {"n": 40, "accuracy": 0.97, "ci95": [0.9, 0.99]},
    "twice": {"n": 80, "accuracy": 0.98, "ci95": [0.92, 0.995]},
    "gain": 0.01, "gain_ci95": [-0.001, 0.02],
    "curve": {"n": [10, 80], "accuracy": [0.9, 0.98], "low": [0.8, 0.92], "high": [0.95, 0.995]},
}  # fmt: skip


@pytest.fixture
def metrics():
    scores = score(LOGITS, REFERENCES, HOSTILE)
    return {
        "test": scores,
        "validation": scores,
        "calibration": {
            "temperature": 1.5,
            "before": {"test": {"ece": 0.2, "log_loss": 0.7}},
            "reliability": reliability(LOGITS, REFERENCES),
        },
        "unsure": {"by": "confidence", **selective(*confidence_and_correct(LOGITS, REFERENCES), 0.7)},
        "baselines": {
            "majority": {"label": HOSTILE[0], "accuracy": 1 / 3, "accuracy_ci95": [0.1, 0.7]},
            "linear_probe": {"test": scores},
        },
        "learning_curve": CURVE,
        "data": {
            "name": "[my](javascript:photos)",
            "attribution": "Drawn by [someone](https://example.org).",
            "labels": HOSTILE,
            "splits": {split: {"n": 6} for split in ("train", "validation", "test")},
            "fingerprint": "0" * 64,
        },
        "recipe": {"model": "some_model", "recipe": "5 epochs"},
        "seconds": {"load": 1.2, "total": 3.4},
        "seeds": {"seed": 42, "split_seed": 1, "fold": None},
        "history": [{"epoch": 1.0, "loss": 1.0}, {"epoch": 1.0, "eval_loss": 0.8, "eval_accuracy": 0.6}],
        "versions": {"torch": "2"},
        "command": "accelerate launch train.py --data_dir 'a|b' '<b>'",
    }


def read_pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def page_of(metrics: dict, images: Path, folder: Path, logits: np.ndarray = LOGITS) -> str:
    splits, unreadable = load_splits(data_dir=str(images))
    test = TestPredictions(splits | {"test": splits["test"].select(range(6))}, logits, REFERENCES)
    write_report(folder, metrics, audit_images(splits, unreadable) | {"learned_from": 0}, test)
    return (folder / "report.html").read_text(encoding="utf-8")


def card_of(metrics: dict, folder: Path, repo_id: str | None = None) -> str:
    write_model_card(folder, metrics, repo_id)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_run_names_its_classes_if_they_are_few(capsys):
    for names, said in ((["fox", "test"], "2 classes (fox, test); images"), ([*"abcdefghijk"], "11 classes; images")):
        rows = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=names)}))
        console.say_setup({"train": rows}, "photos", {})
        assert f"photos: {said}: train 2" in capsys.readouterr().out


def test_metric_is_named_if_it_is_not_the_default(monkeypatch):
    args = SimpleNamespace(device=torch.device("cpu"), dataloader_num_workers=0, world_size=1)
    trainer = SimpleNamespace(args=args, accelerator=SimpleNamespace(mixed_precision="no"))
    monkeypatch.setattr(console, "model_of", lambda _: SimpleNamespace(parameters=list, config=None))
    for criterion, named in (
        (Criterion(), None),
        (Criterion(none=2, uncertainty=0.5), None),  # nine of ten images are of one class
        (Criterion("macro_f1"), "macro F1; answers do not make up for rare classes"),
        (Criterion(balance=Balance(np.array([0.9, 0.1]), True)), "log loss; answers as if"),
    ):
        found = console.describe_setup(trainer, "a/cnn", (32, 32), (), criterion).get("metric")
        assert found is None if named is None else found.startswith(named)


def test_accuracy_in_words(metrics):
    assert percent_with_interval(metrics["test"]) == "83.3% (95% interval 43.6% to 97.0%, n = 6)"
    assert percent_with_interval(metrics["test"] | {"n": 12345}).endswith("n = 12,345)")


def test_confusion_matrix_depends_on_the_numbers(metrics, tmp_path):
    plot_confusion_matrix(metrics["test"], HOSTILE, tmp_path / "a.png")
    other = score(np.eye(3)[[1, 0, 1, 0, 2, 2]], REFERENCES, HOSTILE)
    plot_confusion_matrix(other, HOSTILE, tmp_path / "b.png")
    plot_confusion_matrix(other, HOSTILE, tmp_path / "c.png", shares=True)
    first, second, third = (read_pixels(tmp_path / f"{name}.png") for name in "abc")
    assert first.shape[0] > 300 and first.std() > 10
    for one, two in ((first, second), (second, third)):
        assert one.shape != two.shape or (one != two).any()


def test_confusion_matrix_of_a_hundred_classes(tmp_path):
    labels = [f"class {index}" for index in range(100)]
    references = np.arange(100).repeat(2)
    plot_confusion_matrix(score(np.eye(100)[references], references, labels), labels, tmp_path / "a.png")
    assert 1000 < max(read_pixels(tmp_path / "a.png").shape) < 4000


@pytest.mark.parametrize(("classes", "named"), [(200, True), (300, False)])
def test_names_that_nobody_could_read_are_not_in_the_confusion_matrix(monkeypatch, classes, named):
    drawn, labels = [], [f"class {index}" for index in range(classes)]
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    scored = {"confusion_matrix": np.eye(classes), "accuracy": 1.0, "accuracy_ci95": [0.9, 1.0], "n": classes}
    plot_confusion_matrix(scored, labels, Path("a.png"))
    (axes,) = drawn
    for ticks, name in ((axes.get_xticklabels(), axes.get_xlabel()), (axes.get_yticklabels(), axes.get_ylabel())):
        assert [tick.get_text() for tick in ticks] == (labels if named else [])
        assert ("in the order of the table" in name) != named


def test_figures_have_no_zero_percent_that_is_not_zero(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    scored = {"confusion_matrix": [[997, 3], [0, 500]], "accuracy": 0.998, "accuracy_ci95": [0.99, 0.999], "n": 1500}
    plot_confusion_matrix(scored, ["a", "b"], Path("a.png"), shares=True)
    plot_coverage({"curve": [{"coverage": 1, "accuracy": 1}], "answered": 0.997, "accuracy": 1}, Path("b.png"))
    matrix, coverage = drawn
    assert {text.get_text() for text in matrix.texts} == {"99%", "<1%", "100%"}
    assert coverage.lines[1].get_label() == "unsure of 0.3% of the images"


def test_title_of_the_confusion_matrix_counts_images_of_none(tmp_path, monkeypatch):
    titles, labels = [], ["a", "b", "none"]
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: titles.append(figure.get_suptitle()))
    plot_confusion_matrix(score(np.eye(3), np.arange(3), labels, none=2), labels, tmp_path / "a.png")
    assert "n = 2)" in titles[0] and titles[0].endswith("and 1 image of none of the classes")


def test_card_says_what_is_fitted_on_what_folds_score_and_that_the_curve_is_of_one(metrics, tmp_path):
    for expected in (False, True):
        card = card_of(metrics, tmp_path)
        assert ("Temperature and threshold were fitted on these predictions." in card) == expected
        assert ("In the fold whose" in card) == ("In the fold whose model is kept: With twice" in card) == expected
        metrics["data"]["splits"].pop("train", None)


def test_names_in_any_script_are_drawn_without_a_warning(metrics, tmp_path, recwarn):
    labels = ["\U0001f3bb violin", "two\nlines", "\x1b[31mred"]
    plot_confusion_matrix(score(np.eye(3)[REFERENCES], REFERENCES, labels), labels, tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png").std() > 10 and not len(recwarn)


def test_metrics_have_a_row_of_the_confusion_matrix_on_a_line(metrics, tmp_path):
    metrics["data"] = metrics["data"] | {"labels": ["[1,  2]", "b", "c"]}
    write_metrics(tmp_path / "metrics.json", metrics)
    text = (tmp_path / "metrics.json").read_text()
    first = metrics["test"]["confusion_matrix"][0]
    assert f"\n      {json.dumps(first)},\n" in text and json.loads(text) == json.loads(json.dumps(metrics))


@pytest.mark.parametrize("most", [2, 3])
def test_report_of_very_many_classes_has_no_confusion_matrix(metrics, images, tmp_path, monkeypatch, most):
    splits, unreadable = load_splits(data_dir=str(images))
    findings = audit_images(splits, unreadable)
    monkeypatch.setattr(figures, "MAX_CELLS", most)
    metrics["test"] = metrics["test"] | {"confusion_matrix": None if most == 3 else [[1, 0, 0]] * 3}
    test = TestPredictions(splits | {"test": splits["test"].select(range(6))}, LOGITS, REFERENCES)
    write_report(tmp_path, metrics, findings, test)
    assert [path.name for path in tmp_path.glob("confusion*")] == ["confusion_matrix.png"] * (most == 2)
    assert (tmp_path / "report.html").read_text().count('alt="Confusion matrix') == (most == 2)


def test_curves_are_drawn(tmp_path):
    history = [
        {"epoch": 1.0, "loss": 1.0, "train_accuracy": 0.5},
        {"epoch": 1.0, "eval_loss": 0.8, "eval_accuracy": 0.6},
        {"epoch": 2.0, "loss": 0.5},  # with label smoothing there is no training accuracy
        {"epoch": 2.0, "eval_loss": 0.7, "eval_accuracy": 0.7},
        {"epoch": 2.0, "train_runtime": 1.0},
    ]
    plot_curves(history, tmp_path / "curves.png", augmented=True)
    pixels = read_pixels(tmp_path / "curves.png").reshape(-1, 3)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 3).sum() > 20


@pytest.mark.parametrize(("augmentation", "label"), [("none", "train"), ("crop", "train (augmented)")])
def test_curve_of_training_is_called_augmented_where_it_is(
    metrics, images, tmp_path, monkeypatch, augmentation, label
):
    drawn, savefig = [], figures.Figure.savefig

    def save(figure, path, **options):
        drawn.extend(line.get_label() for axes in figure.axes for line in axes.lines if path.name == "curves.png")
        savefig(figure, path, **options)

    monkeypatch.setattr(figures.Figure, "savefig", save)
    page_of(metrics | {"augmentation": augmentation}, images, tmp_path)
    assert drawn == [label, "validation"] * 2


def test_model_card_shows_the_score_and_escapes_names(metrics, tmp_path):
    path = tmp_path / "README.md"
    (tmp_path / "models.py").touch()
    write_model_card(tmp_path, metrics)
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    scores = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert scores["accuracy"] == pytest.approx(5 / 6)
    assert yaml.safe_load(path.read_text().split("---")[1])["model-index"][0]["results"]
    for expected in ("83.3% (95% interval", "trust_remote_code=True", "[someone](https://example.org)", "5 epochs"):
        assert expected in card.text
    assert "was 20.0% before calibration" in card.text and "twice the training images" in card.text
    assert "<script>" not in card.text and "[my](" not in card.text and "a|b `c`" not in card.text
    assert r"\$x^2\$" in card.text, "no formula"


def test_reliability_and_learning_curve_are_drawn(metrics, tmp_path):
    plot_reliability(metrics["calibration"]["reliability"], tmp_path / "reliability.png")
    plot_learning_curve(CURVE, tmp_path / "learning_curve.png")
    for name in ("reliability", "learning_curve"):
        pixels = read_pixels(tmp_path / f"{name}.png").reshape(-1, 3).astype(int)
        assert (np.abs(pixels - (0, 0x72, 0xB2)).max(axis=1) < 3).sum() > 50


@pytest.fixture
def page(metrics, tmp_path) -> Path:
    """A report on drawn images with hostile class names; one image is broken, and one is a duplicate."""
    folder = draw_folder(tmp_path / "images", 40)
    shutil.copy(folder / "red/000.png", folder / "red/<img src=x onerror=alert(2)>.png")
    (folder / "red/broken.png").write_bytes(b"no image")
    images, unreadable = load_splits(data_dir=str(folder), label_names=HOSTILE)
    findings = audit_images(images, unreadable) | {"learned_from": 1234}
    images["test"] = images["test"].select(np.argsort(images["test"]["label"][:])[[0, 1, 8, 9, 16, 17]])
    (tmp_path / "run").mkdir()
    test = TestPredictions(images, LOGITS, REFERENCES)
    write_report(tmp_path / "run", metrics, findings, test)
    write_predictions(tmp_path / "run/predictions.csv", HOSTILE, test)
    write_audit_page(tmp_path / "run/audit.html", HOSTILE[0], findings, images)
    return tmp_path / "run/report.html"


def test_page_shows_the_score_and_escapes_names(page):
    text = page.read_text(encoding="utf-8")
    assert "Test accuracy <strong>83.3%</strong> on 6 images (95% interval 43.6% to 97.0%)" in text
    assert "it was not trained on" not in text, "it had learned from some of them"
    assert (
        "had learned before from 1,234 of the images that judge it, or was chosen by them: this score means little"
        in text
    )
    assert "a perfectly calibrated model would be about" in text and "of them correctly (95% interval" in text
    assert "An image classifier of 3 classes, trained on" in text and "figure but the log loss is its 95%" in text
    assert "from 20.0% to" in text and "across classes" not in text and "Exact duplicates: 1" in text
    assert "<script>" not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    # Without <bdi>, a name in Hebrew or Arabic would have the number that follows on its other side.
    assert "predicted <bdi>&lt;script&gt;" in text and "</bdi>, 89% sure" in text
    assert "no image" not in text.split("unreadable")[0]
    for name in ("confusion_matrix", "confusion_matrix_rows", "reliability", "curves", "learning_curve"):
        assert (page.parent / f"{name}.png").exists()
    rows = (page.parent / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert (
        not any(row.startswith(("=", "@")) for row in rows)
        and len(rows) == 7
        and rows[0] == "name,digest,label,predicted,confidence,probability_of_label"
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("report.html", 1200, "light"), ("report.html", 390, "dark"), ("audit.html", 390, "dark")],
)
def test_page_in_a_browser(page, name, width, scheme):
    from playwright.sync_api import sync_playwright

    requests, problems = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        tab.goto(page.with_name(name).as_uri())
        widths = tab.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        heading = tab.inner_text("h1")
        tab.screenshot(path=page.with_suffix(".png"))
        browser.close()
    assert not problems
    assert all(url.startswith(("file://", "data:")) for url in requests)
    assert len(widths) >= (12 if name == "report.html" else 2) and all(widths)
    assert overflow <= 0
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert heading == ("run" if name == "report.html" else f"Audit of {HOSTILE[0]}")
    assert read_pixels(page.with_suffix(".png")).std() > 10


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_readme_image_has_the_shape_of_the_default_runs_report(tmp_path, launch):
    from benchmarks.screenshot import take

    options = ["--output_dir", "efficientnet_lite0_openmoji", "--learning_curve", "--time_limit", "1"]
    result = launch("train.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = tmp_path / "efficientnet_lite0_openmoji/report.html"
    assert "All emojis designed by OpenMoji" in report.read_text(encoding="utf-8")
    take(report, tmp_path / "report.png")
    assert read_pixels(tmp_path / "report.png").shape == read_pixels(PROJECT / "docs/report.png").shape


def test_sentences_of_the_card_are_apart(metrics, tmp_path):
    text = card_of(metrics, tmp_path)
    assert "by chance.\n" in text and "by chance.Luthier" not in text
    prose = text.partition("## Score")[2].partition("| class |")[0].replace(HOSTILE[0], "")
    assert not re.search(r"[a-z]{3}\.[A-Z]", prose)


def test_report_shows_the_most_confident_errors_and_the_least_confident_correct_answers():
    rows = Dataset.from_dict({"name": [f"{number}.png" for number in range(6)]})
    logits = np.array([[1.0, 0], [3, 0], [2, 0], [1, 0], [3, 0], [2, 0]])
    test = TestPredictions(DatasetDict(test=rows), logits, np.array([1, 1, 1, 0, 0, 0]))
    wrong, correct, confusions = most_telling(test, ["a", "b"])
    assert [image["name"] for image in wrong] == ["1.png", "2.png", "0.png"]
    assert [image["name"] for image in correct] == ["3.png", "5.png", "4.png"]
    known = {"split": "test", "row": 1, "name": "1.png", "label": "b"}
    assert wrong[0] == known | {"predicted": "a", "why": "95% sure"}
    assert [correct[-1][key] for key in ("label", "predicted", "why")] == ["a", None, "95% sure"]
    assert confusions == [{"label": "b", "predicted": "a", "count": 3, "of": 3, "images": wrong}]


def test_report_shows_what_is_confused_most_often(metrics, images, tmp_path):
    """Of three classes: c twice taken for a, and twice for b; a once for c, which may be chance."""
    rows = Dataset.from_dict({"name": [f"{number}.png" for number in range(6)]})
    logits = np.eye(3)[[0, 0, 1, 1, 2, 1]] * np.linspace(1, 4, 6)[:, None]
    test = TestPredictions(DatasetDict(test=rows), logits, np.array([2, 2, 2, 2, 0, 1]))
    found = [
        (pair["label"], pair["predicted"], pair["count"], pair["of"], [image["name"] for image in pair["images"]])
        for pair in most_telling(test, ["a", "b", "c"])[2]
    ]
    assert found == [("c", "a", 2, 4, ["1.png", "0.png"]), ("c", "b", 2, 4, ["3.png", "2.png"])]
    assert "Most frequent confusions" not in page_of(metrics, images, tmp_path), "one image is no pattern"
    wrong = np.roll(LOGITS, 2, axis=0)  # both images of each class are taken for the one before
    page = page_of(metrics, images, tmp_path, wrong)
    assert "Most frequent confusions" in page and "</bdi></strong>: 2 of 2 test images" in page


def test_thumbnail_is_that_of_its_image():
    colours = {"train": ("red", "blue"), "test": ("green", "red")}
    features = Features({"image": ImageFeature(decode=False)})
    files = {split: [{"bytes": encode(name, 1), "path": None} for name in names] for split, names in colours.items()}
    splits = DatasetDict({split: Dataset.from_dict({"image": rows}, features) for split, rows in files.items()})
    thumbnail = _thumbnails(splits)
    for split, names in colours.items():
        for row, name in enumerate(names):
            data = thumbnail({"split": split, "row": row}).removeprefix("data:image/jpeg;base64,")
            mean = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean(axis=(0, 1))
            assert np.abs(mean - COLOURS[name]).max() < 30, (split, row)
    assert thumbnail({"split": "train", "row": None}) is None, "it was left out"


def test_figures_have_their_values_on_the_right_axes(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    scored = {"confusion_matrix": [[3, 1], [0, 4]], "accuracy": 0.875, "accuracy_ci95": [0.5, 1.0], "n": 8}
    trained = {"epoch": 1.0, "loss": 0.9, "train_accuracy": 0.5}
    curve = [{"coverage": 0.5, "accuracy": 0.9}, {"coverage": 1.0, "accuracy": 0.7}]
    plot_confusion_matrix(scored, ["a", "b"], Path("a.png"))
    plot_curves([trained, {"epoch": 1.0, "eval_loss": 0.8, "eval_accuracy": 0.6}], Path("b.png"), augmented=True)
    plot_reliability([{"confidence": 0.6, "accuracy": 0.5, "n": 4}], Path("c.png"))
    plot_coverage({"curve": curve, "answered": 0.8, "accuracy": 0.75}, Path("d.png"))
    matrix, curves, reliable, coverage = drawn
    cells = {(*map(int, text.get_position()), text.get_text()) for text in matrix.axes[0].texts}
    assert cells == {(0, 0, "3"), (1, 0, "1"), (1, 1, "4")}, "columns are predicted classes"
    assert matrix.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]

    def values(axes) -> list[tuple[float, float]]:
        return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines]

    assert [values(axes) for axes in curves.axes] == [[(1, 0.9), (1, 0.8)], [(1, 0.5), (1, 0.6)]]
    assert [line.get_label() for line in curves.axes[0].lines] == ["train (augmented)", "validation"]
    assert values(reliable.axes[0])[1] == (0.6, 0.5) and reliable.axes[1].patches[0].get_height() == 4
    assert values(coverage.axes[0]) == [(0.5, 0.9), (0.8, 0.75)]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, "1 epoch"), (1.0008, "1 epoch"), (0.9975, "0.998 epochs"), (15, "15 epochs"), (1200, "1,200 epochs")],
)
def test_epochs_in_words(epochs, expected):
    assert console._epochs(epochs) == expected


def test_many_epochs_of_a_heat_are_a_plain_number(metrics, images, tmp_path):
    heat = {"arm": "full", "epochs": 1000.0, "loss": 0.5, "accuracy": 0.9, "seconds": 3.0}
    metrics["race"] = {"probe": None, "heats": [heat], "ended": "", "loss": "validation loss"}
    page = page_of(metrics, images, tmp_path)
    assert '<td class="number">1,000</td>' in page and ">1e+03<" not in page


def test_sentences_have_each_figure_in_its_place():
    none = {"n": 20, "refused": 0.6, "refused_ci95": [0.4, 0.8], "known_refused": 0.05}
    assert none_in_words(none, {"none_answered": 0.3, "answered": 0.9}) == (
        "20 images of none of the classes: 60.0% refused (95% interval 40.0% to 80.0%), 70.0% refused or unsure",
        "of the others: 5.0% refused, which is wrong, 10.0% refused or unsure",
    )
    inflation = {"images": 1200, "groups": 40, "accuracy": 0.7, "ignoring": 0.85, "inflation": 0.15}
    text = inflation_in_words(inflation | {"ci95": [0.1, 0.2]})
    assert text.startswith("1,200 images of train and validation in 40 groups.")
    assert "scores 70.0% on groups that it has not seen" in text
    assert text.endswith("seem to score 85.0%: +15.0 points (95% interval +10.0 to +20.0)")
    assert "about 98.0% instead of 97.0%: +1.0 points" in learning_curve_in_words(CURVE)
    refit = {"done": True, "scored_on": 100, "images": 150}
    assert refit_in_words(refit).startswith("Scored as trained on 100 images; ")
    assert refit_in_words(refit).endswith("the shipped weights were then refit on all 150")
    averaged = refit_in_words(refit | {"averaged": True})
    assert averaged.endswith("weights are the mean of the scored ones and those of a refit on all 150")
    assert refit_in_words(refit | {"done": False}).endswith("are the scored ones; they have learned from 100 images")
    assert "are those of one of the folds" in refit_in_words(refit | {"done": False, "of_fold": True})
    balance = {"balanced_accuracy": 0.7, "balanced_accuracy_ci95": [0.6, 0.8]}
    balance |= {"macro_f1": 0.65, "macro_f1_ci95": [0.55, 0.75]}
    expected = "balanced accuracy 70.0% (60.0% to 80.0%), macro F1 0.650 (0.550 to 0.750)"
    assert balance_with_intervals(balance) == expected


def test_predictions_have_each_figure_in_its_column(tmp_path):
    columns = {"name": ["=1.png", "b.png", "c.png"], "digest": ["x", "y", "z"], "group": [4, 4, 7]}
    logits = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    splits = DatasetDict(test=Dataset.from_dict(columns))
    test = TestPredictions(splits, logits, np.array([0, 1, 2]), none=2)
    write_predictions(tmp_path / "predictions.csv", ["a", "b", "@none"], test)
    assert (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines() == [
        "name,digest,label,predicted,confidence,probability_of_label,group,none",
        "'=1.png,x,a,a,0.700000,0.700000,4,0",
        "b.png,y,b,a,0.500000,0.300000,4,0",
        "c.png,z,'@none,'@none,0.800000,0.800000,7,1",
    ]


def test_what_is_no_number_is_null_in_the_metrics(tmp_path):
    write_metrics(tmp_path / "metrics.json", {"loss": float("nan"), "row": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": None, "row": [None, 1.5]}


def test_score_of_images_that_were_learned_from_is_said_to_be_too_high(metrics, tmp_path):
    folder = tmp_path / "images"
    draw_folder(folder / "train", 8)
    shutil.copytree(folder / "train", folder / "test")
    splits, _ = load_splits(data_dir=str(folder))
    found = audit_images(splits, [])["leaks"]
    assert found == {"duplicates": len(splits["test"]), "groups": 0} and len(splits["test"])
    assert leaks_in_words(metrics) == leaks_in_words(metrics | {"leaks": {**found, "duplicates": 0}}) == ""
    text = card_of(metrics | {"leaks": {"duplicates": 5, "groups": 2, "learned_from": 0}}, tmp_path)
    assert "**The score may be too high: 5 of 6 test images are also in train or validation, exactly or nearly" in text
    assert "2 groups have images in test and also in train or validation.**" in text
    one = leaks_in_words(metrics | {"leaks": {"duplicates": 1, "groups": 1}})
    assert "1 of 6 test images is also in" in one and "1 group has images in test" in one


def test_card_says_what_loads_the_model(metrics, tmp_path):
    text = card_of(metrics, tmp_path, "me/instruments")
    (line,) = (line for line in text.splitlines() if line.startswith("pip install"))
    floor = re.search(r"^transformers(>=[\d.]+)", (PROJECT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert f'"transformers{floor}"' in line and " timm" in line and text.index(line) < text.index("from transformers")


@pytest.mark.parametrize(("own", "split"), [([], None), (["test", "train"], "test")])
def test_card_names_a_test_split_only_where_the_data_has_one(metrics, tmp_path, own, split):
    metrics["data"] |= {"name": "someone/set", "own_splits": own}
    results = ModelCard(card_of(metrics, tmp_path)).data.eval_results
    assert {row.dataset_split for row in results} == {split}


@pytest.mark.parametrize(("name", "dataset"), [("food101", "imagefolder"), ("me/set", "me/set")])
def test_folder_is_not_taken_for_a_dataset_of_the_hub(metrics, tmp_path, name, dataset):
    metrics["data"]["name"] = name
    results = ModelCard(card_of(metrics, tmp_path)).data.eval_results
    assert {(row.dataset_type, row.dataset_name) for row in results} == {(dataset, name)}


@pytest.mark.parametrize("name", ["report.html", "audit.html"])
def test_what_scrolls_is_reached_by_the_keyboard(page, name):
    regions = re.findall(r'<div [^>]*class="wide[^>]*>', page.with_name(name).read_text(encoding="utf-8"))
    assert regions and all('tabindex="0"' in region and "aria-label=" in region for region in regions)


def test_class_without_test_images_has_no_recall(metrics, tmp_path):
    empty = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    metrics["test"] = metrics["test"] | {"per_class": metrics["test"]["per_class"] | {HOSTILE[2]: empty}}
    assert "| - | - | - | 0 |" in card_of(metrics, tmp_path)


def test_folds_are_said_to_be_of_several_models(metrics, images, tmp_path):
    """Validation is the user's own, and the time limit has ended the race of any fold."""
    page = page_of(metrics, images, tmp_path)
    assert "Test accuracy <strong>83.3%</strong> on 6 images it was not trained on" in page
    assert "Nothing was chosen by test." in page and "Nothing was chosen by test." in card_of(metrics, tmp_path)
    del metrics["data"]["splits"]["train"]
    heat = {"arm": "full", "epochs": 1.0, "loss": 0.5, "accuracy": 0.9, "seconds": 3.0}
    metrics["race"] = {"probe": None, "heats": [heat], "ended": "the time limit", "loss": "validation loss"}
    page = page_of(metrics, images, tmp_path)
    assert "on 6 images, each scored by a model that was not trained on it" in page
    assert "Validation chose in every fold, and was not scored." in page
    assert "ended with the time limit in at least one fold." in page
    card = card_of(metrics, tmp_path)
    assert re.search(r"\(but the \d+ of validation, which chose in every fold\) was scored once", card)


@pytest.mark.parametrize("own", [False, True])
def test_why_folds_have_not_scored_some_images_is_said(metrics, images, tmp_path, own):
    splits = metrics["data"]["splits"]
    splits["untested"] = splits.pop("train") | {"n": 1234}
    if not own:
        del splits["validation"]
    page, card = page_of(metrics, images, tmp_path), card_of(metrics, tmp_path)
    reason = ", or validation has others of their groups" if own else ""
    assert f"Training needs the untested images{reason}: they were not scored." in page
    reason = " or which are in a group with validation images" if own else ""
    assert f"every image (but 1,234, which training needs{reason})" in card


@pytest.mark.parametrize("kept", ["the probe", "the trained weights"])
def test_kept_probe_is_not_called_fine_tuned(metrics, images, tmp_path, kept):
    metrics["recipe"] = metrics["recipe"] | {"kept": kept}
    metrics["baselines"] = metrics["baselines"] | {"linear_probe": {"test": metrics["test"]}}
    card = card_of(metrics, tmp_path)
    assert ("; the shipped model is one, on a backbone" in card) == (kept == "the probe") != ("fine-tuned on" in card)
    assert (", which this model is" in page_of(metrics, images, tmp_path)) == (kept == "the probe")


@pytest.mark.parametrize(
    ("splits", "says"), [(["train", "validation", "test"], True), (["train", "validation"], False)]
)
def test_refit_on_the_test_images_is_said(metrics, images, tmp_path, splits, says):
    metrics["refit"] = {"done": True, "scored_on": 100, "images": 150, "splits": splits}
    assert refit_in_words(metrics["refit"]).endswith("on all 150, those of test too") == says
    assert refit_in_words(metrics["refit"]) in page_of(metrics, images, tmp_path)


def test_table_that_counts_images_of_none_says_so(metrics, images, tmp_path):
    none = {"n": 2, "refused": 0.5, "refused_ci95": [0.1, 0.9], "known_refused": 0.0, "known_refused_ci95": [0, 0.4]}
    sentences = [("page", "the table count the images of none"), ("card", "The table counts the images of none")]
    texts = {"page": page_of(metrics, images, tmp_path), "card": card_of(metrics, tmp_path)}
    assert not any(sentence in texts[where] for where, sentence in sentences)
    metrics["test"] = metrics["test"] | {"none": none}
    metrics["unsure"]["none_answered"] = 0.5
    texts = {"page": page_of(metrics, images, tmp_path), "card": card_of(metrics, tmp_path)}
    assert all(sentence in texts[where] for where, sentence in sentences)


def test_doubted_labels_are_not_said_to_be_wrong(images, tmp_path):
    splits, _ = load_splits(data_dir=str(images))
    doubted = [{"split": "test", "row": 0, "name": "a.png", "label": "a", "why": "looks like b"}]
    write_audit_page(tmp_path / "audit.html", "a", audit_images(splits, []) | {"suspect_labels": doubted}, splits)
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    count = sum(map(len, splits.values()))
    assert re.search(rf"\d\.\d% of {count} images\. .*look at an image before you change its label", page)


@pytest.mark.parametrize(("temperature", "says"), [(1.5, True), (1.0, False)])
def test_model_that_is_not_calibrated_is_not_said_to_be(metrics, tmp_path, capsys, temperature, says):
    metrics["calibration"]["temperature"] = temperature
    say_results(tmp_path, metrics)
    assert ("before calibration" in capsys.readouterr().out) == says


def test_card_has_each_figure_in_its_place(metrics, tmp_path):
    card = ModelCard(card_of(metrics, tmp_path))
    scores = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    names = {entry.metric_type: entry.metric_name for entry in card.data.eval_results}
    assert names == {"accuracy": "Accuracy", "f1": "Macro F1"}
    assert scores["f1"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert "| 66.7% | 100.0% (34.2% to 100.0%) | 0.800 | 2 |" in card.text, "precision, recall, F1, images"
    assert "| 100.0% | 50.0% (9.5% to 90.5%) | 0.667 | 2 |" in card.text


def test_audit_is_written_in_pieces(tmp_path, monkeypatch):
    findings = {"tiny": [{"name": "\u00e4.png", "row": 0}], "suspect_labels": None}
    expected = json.dumps(findings, indent=2, ensure_ascii=False) + "\n"
    monkeypatch.setattr("luthier.reporting.results.json.dumps", lambda *_, **__: pytest.fail("all at once"))
    write_audit(tmp_path / "audit.json", findings)
    assert (tmp_path / "audit.json").read_text(encoding="utf-8") == expected
