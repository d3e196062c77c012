"""score.py: classes matched by name, the metrics and report of a run, and the accuracy that `evaluate` computes."""

import csv
import json
import re
import shutil
from pathlib import Path

import evaluate
import pytest
from conftest import draw, draw_folder
from datasets import ClassLabel, Dataset, Features, Image, Value
from evaluate.evaluator.image_classification import ImageClassificationEvaluator
from safetensors.torch import load_file, save_file
from transformers import pipeline

import score
import train
from data import load_labelled
from luthier.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory, timm_checkpoint):
    """A run of a tiny timm model, which learns to tell three colours apart to some extent."""
    folder = tmp_path_factory.mktemp("model")
    draw_folder(folder / "images", per_class=10)
    args = ["--data_dir", str(folder / "images"), "--model_name", str(timm_checkpoint), "--recipe", "probe"]
    train.main([*args, "--output_dir", str(folder / "out"), "--disable_tqdm", "1"])
    return folder / "out"


@pytest.fixture
def new_images(tmp_path, monkeypatch):
    """New images, some with a wrong label, so that the accuracy is below 1; the test runs in their parent folder."""
    monkeypatch.chdir(tmp_path)
    folder = draw_folder(tmp_path / "others", per_class=9, first=500)
    for seed in range(3):
        draw("red", 800 + seed).save(folder / f"blue/wrong{seed}.png")
    return folder


def run_score(*args: str | Path) -> dict:
    """Score a model; return metrics.json."""
    score.main([*map(str, args), "--output_dir", "scored", "--disable_tqdm", "1"])
    return json.loads(Path("scored/metrics.json").read_text())


def test_metrics_and_report_are_those_of_a_run(model, new_images, capsys):
    metrics = run_score(model, "--data_dir", new_images)
    assert metrics["test"]["n"] == 30 and 0.3 < metrics["test"]["accuracy"] < 1
    files = {path.name for path in Path("scored").iterdir()}
    assert {"report.html", "metrics.json", "predictions.csv", "audit.json", "confusion_matrix.png"} <= files
    assert not {"model.safetensors", "README.md"} & files and not any("checkpoint" in name for name in files)
    page = Path("scored/report.html").read_text()
    assert "Nothing was trained" in page and "it was not trained on" not in page
    output = capsys.readouterr().out
    assert f"test     accuracy {metrics['test']['accuracy']:.1%}" in output and "epoch" not in output
    threshold = json.loads((model / "config.json").read_text())["familiarity"]["unsure_below"]
    assert metrics["unsure"]["threshold"] == threshold and metrics["unsure"]["by"] == "familiarity"
    with Path("scored/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["label"] == row["predicted"] for row in rows) / 30 == pytest.approx(metrics["test"]["accuracy"])


def test_evaluator_of_evaluate_gives_exactly_the_same_accuracy(model, new_images):
    """`evaluate.evaluator` cannot be called: it needs TensorFlow classes that transformers 5 no longer has."""

    class Evaluator(ImageClassificationEvaluator):
        def prepare_pipeline(self, model_or_pipeline, *rest, **options):
            return model_or_pipeline

    class Accuracy(evaluate.Metric):
        def _info(self):
            features = Features({"predictions": Value("int64"), "references": Value("int64")})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions, references):
            return {"accuracy": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)}

    names = ["blue", "green", "red"]
    files = [path for name in names for path in sorted((new_images / name).iterdir())]
    data = Dataset.from_dict(
        {"image": list(map(str, files)), "label": [names.index(path.parent.name) for path in files]},
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )
    classify = pipeline("image-classification", model=str(model))
    expected = Evaluator().compute(
        model_or_pipeline=classify, data=data, metric=Accuracy(keep_in_memory=True),
        label_mapping={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    assert run_score(model, "--data_dir", new_images)["test"]["accuracy"] == expected["accuracy"]


def test_classes_are_matched_by_name(model, tmp_path, monkeypatch):
    """The data has only two of the classes, in another order."""
    monkeypatch.chdir(tmp_path)
    rows = [(name, seed) for name in ("red", "blue") for seed in range(600, 606)]
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    dataset = Dataset.from_dict(
        {"image": [draw(name, seed) for name, seed in rows], "label": [int(name == "blue") for name, _ in rows]},
        features=features,
    )
    Path("mine/data").mkdir(parents=True)
    dataset.to_parquet("mine/data/test-00000-of-00001.parquet")
    metrics = run_score(model, "--dataset_name", "mine")
    assert metrics["test"]["n"] == 12 and metrics["test"]["accuracy"] > 0.8
    assert metrics["data"]["labels"] == ["blue", "green", "red"]
    assert metrics["test"]["per_class"]["green"]["support"] == 0


def test_only_the_test_split_is_scored_if_there_is_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("split/train"), per_class=4, first=900)
    draw_folder(Path("split/test"), per_class=3, first=950)
    assert run_score(model, "--data_dir", "split")["test"]["n"] == 9


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_damaged_are_not_scored(model, new_images, tmp_path, capsys, value):
    shutil.copytree(model, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged/model.safetensors")
    head = next(name for name in weights if name.endswith("fc.bias"))
    weights[head][1] = float(value)
    save_file(weights, tmp_path / "damaged/model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as exit_info:
        run_score(tmp_path / "damaged", "--data_dir", new_images)
    assert exit_info.value.code == 2 and "has weights that are no numbers, in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--data_dir", "unknown_classes"],
            r"does not know 1 class of the images, such as 'violet'.*blue, green, red",
        ),
        (["--data_dir", "nowhere"], "nowhere is not a folder"),
        ([], "name the images to score on: --data_dir FOLDER"),
        (
            ["twice", "--data_dir", "good"],
            r"has several classes with the name 'red'.*in `label_names`, or in `id2l",
        ),
        (["empty/", "--data_dir", "good"], "holds no model"),
        (["unfinished", "--data_dir", "good"], "lacks .* of its weights"),
        (["--data_dir", "good", "--push_to_hub"], "does not take --push_to_hub, which is for train.py"),
        (["--data_dir", "good", "--test_view", "random_crop"], "does not take --test_view, which is for train.py"),
        (["--data_dir", "good", "--seed", "2"], "does not take --seed"),
        (["--data_dir", "good", "--model-name", "other"], "scores the model that is named first"),
        (["--data_dir", "good", "--epochs", "2"], r"unknown option --epochs\. Options: python score\.py --help\n"),
    ],
)
def test_bad_input_gives_one_message(model, timm_checkpoint, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("good"), per_class=2)
    draw_folder(Path("unknown_classes"), per_class=2)
    Path("unknown_classes/red").rename("unknown_classes/violet")
    Path("empty").mkdir()
    Path("unfinished").mkdir()
    config = json.loads((model / "config.json").read_text())
    Path("unfinished/config.json").write_text(json.dumps(config | {"architecture": "test_resnet.r160_in1k"}))
    for name in ("preprocessor_config.json", "model.safetensors"):
        Path("unfinished", name).write_bytes((model / name).read_bytes())
    weights = load_file("unfinished/model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, "unfinished/model.safetensors", {"format": "pt"})
    shutil.copytree(model, "twice")
    Path("twice/config.json").write_text(json.dumps(config | {"label_names": ["red", "green", "red"]}))
    with pytest.raises(SystemExit) as exit_info:
        score.main(args if args and args[0] != "--data_dir" else [str(model), *args])
    errors = capsys.readouterr().err
    assert exit_info.value.code == 2 and "Traceback" not in errors
    assert re.search(message, errors), errors
    assert not Path("outputs").exists()


def test_default_folder_is_not_among_the_images(model, new_images, monkeypatch, capsys):
    monkeypatch.chdir(new_images)
    with pytest.raises(SystemExit) as exit_info:
        score.main([str(model), "--data_dir", "."])
    assert exit_info.value.code == 2 and "among the images of .: give --output_dir" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_class_in_other_letters_and_many_classes_are_named_briefly(tmp_path):
    images = draw_folder(tmp_path / "p", 2, classes=("red", "blue"))
    (images / "red").rename(images / "Red")
    with pytest.raises(UserError, match="writes 'Red' as 'red': rename it") as raised:
        load_labelled(["red", "blue", *(f"class{n}" for n in range(998))], data_dir=str(images))
    assert "and 980 more" in str(raised.value) and len(str(raised.value)) < 600
