"""What a person looks at: the figures are drawn, the card says the score, and names are shown as they are."""

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from metrics import score
from report import percent_with_interval, plot_confusion_matrix, plot_curves, write_model_card

HOSTILE = ["<script>alert(1)</script>", "a|b `c` $x^2$ \\frac", "çok uzun " * 8]


@pytest.fixture
def metrics():
    references = np.array([0, 0, 1, 1, 2, 2])
    scored = score(np.eye(3)[[0, 0, 1, 0, 2, 2]], references, HOSTILE)
    return {
        "test": scored,
        "validation": scored,
        "baselines": {"majority": {"label": HOSTILE[0], "accuracy": 1 / 3}, "linear_probe": {"test": scored}},
        "data": {
            "name": "[my](javascript:photos)",
            "attribution": "Drawn by [someone](https://example.org).",
            "labels": HOSTILE,
            "splits": {split: {"n": 6} for split in ("train", "validation", "test")},
            "fingerprint": "0" * 64,
        },
        "recipe": {"model": "some_model", "recipe": "5 epochs"},
        "versions": {"torch": "2"},
        "command": "accelerate launch train.py --data_dir 'a|b'",
    }


def drawn(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_accuracy_in_words(metrics):
    assert percent_with_interval(metrics["test"]) == "83.3% (95% interval 43.6% to 97.0%, n = 6)"


def test_confusion_matrix_shows_the_numbers(metrics, tmp_path):
    plot_confusion_matrix(metrics["test"], HOSTILE, tmp_path / "a.png")
    other = score(np.eye(3)[[1, 0, 1, 0, 2, 2]], np.array([0, 0, 1, 1, 2, 2]), HOSTILE)
    plot_confusion_matrix(other, HOSTILE, tmp_path / "b.png")
    first, second = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    assert first.shape[0] > 300 and first.std() > 10
    assert first.shape != second.shape or (first != second).any()


def test_confusion_matrix_of_a_hundred_classes(tmp_path):
    labels = [f"class {index}" for index in range(100)]
    references = np.arange(100).repeat(2)
    plot_confusion_matrix(score(np.eye(100)[references], references, labels), labels, tmp_path / "a.png")
    assert 1000 < max(drawn(tmp_path / "a.png").shape) < 4000


def test_curves(tmp_path):
    history = [
        {"epoch": 1.0, "loss": 1.0, "train_accuracy": 0.5},
        {"epoch": 1.0, "eval_loss": 0.8, "eval_accuracy": 0.6},
        {"epoch": 2.0, "loss": 0.5},  # with label smoothing there is no training accuracy
        {"epoch": 2.0, "eval_loss": 0.7, "eval_accuracy": 0.7},
        {"epoch": 2.0, "train_runtime": 1.0},
    ]
    plot_curves(history, tmp_path / "curves.png")
    pixels = drawn(tmp_path / "curves.png").reshape(-1, 3)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 3).sum() > 20


def test_model_card(metrics, tmp_path):
    path = tmp_path / "README.md"
    write_model_card(path, metrics, custom_code=True)
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == pytest.approx(5 / 6)
    assert yaml.safe_load(path.read_text().split("---")[1])["model-index"][0]["results"]
    for expected in ("83.3% (95% interval", "trust_remote_code=True", "[someone](https://example.org)", "5 epochs"):
        assert expected in card.text
    assert "<script>" not in card.text and "[my](" not in card.text and "a|b `c`" not in card.text
