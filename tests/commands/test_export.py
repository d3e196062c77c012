"""export.py: an ONNX file that answers as the model does, the proof of it, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import PROJECT, draw, draw_folder, encode
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
)

import data
import export
import predict
import train
from luthier.errors import UserError, exit_with
from luthier.files import lock_folder
from luthier.images.resizing import ResizeRule
from luthier.scoring.intervals import interval_of_difference
from luthier.serving import export as exporting
from luthier.serving.classifier import open_network
from luthier.serving.export import PixelsToAnswer, export_model
from luthier.serving.network import Rated
from luthier.serving.onnx_network import Facts, OnnxNetwork
from luthier.serving.parity import Images, Parity, compare
from luthier.serving.torch_network import TorchNetwork
from models import build_model, save_model

CLASSES = {0: "red", 1: "green", 2: "blue"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, timm_checkpoint):
    """A refit run of a tiny timm model, with its export and a quantised one."""
    folder = tmp_path_factory.mktemp("export")
    draw_folder(folder / "images", per_class=12)
    args = ["--data_dir", str(folder / "images"), "--model_name", str(timm_checkpoint), "--num_train_epochs", "1"]
    train.main([*args, "--output_dir", str(folder / "out"), "--disable_tqdm", "1", "--export", "1"])
    return folder / "out"


def run_export(capsys, *args: str | Path) -> tuple[int, str]:
    """Run the command; return the exit code, and all that it prints."""
    try:
        export.main([str(word) for word in args])
        code, message = 0, ""
    except SystemExit as error:
        code, message = (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
    captured = capsys.readouterr()
    return code, captured.out + captured.err + message


def build(name: str, request: pytest.FixtureRequest) -> tuple:
    """Return a model of an architecture with random weights, and its image processor."""
    if name == "convnext":
        config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], id2label=CLASSES)
        return ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 64})
    if name == "mobilevit":  # which wants blue, green, red
        # With transformers' initial weights, of 0.02, nothing of an image would reach the output.
        widths = {"hidden_sizes": [16, 16, 24], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]}
        config = MobileViTConfig(**widths, id2label=CLASSES, image_size=64, initializer_range=0.3)
        size = {"height": 64, "width": 64}
        processor = MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=size)
        return MobileViTForImageClassification(config), processor
    own = {"vit": "vit_checkpoint", "resnet": "resnet_checkpoint"}
    model_name = str(request.getfixturevalue(own[name])) if name in own else name
    return build_model(model_name, CLASSES, 96 if name == "efficientnet_lite0" else None)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_lite0", "mobilevit")]


@pytest.mark.parametrize("name", ["simple_cnn", "vit", "resnet", "convnext", *SLOW])
def test_every_kind_of_model_answers_as_before(name, request, tmp_path):
    torch.manual_seed(1)
    model, image_processor = build(name, request)
    save_model(model.eval(), image_processor, tmp_path / "model")
    images = [patches(seed, 50 + 9 * seed, 70) for seed in range(9)]
    network = TorchNetwork(str(tmp_path / "model"))
    expected = network.rate([network.view(image) for image in images])
    export_model(network, tmp_path / "model.onnx")
    exported = OnnxNetwork(tmp_path / "model.onnx")
    views = [exported.view(image) for image in images]
    found = exported.rate(views)
    assert exported.labels == network.labels and exported.unsure_below == network.unsure_below
    # Weights are random, and so the differences between images may be small: they are the measure.
    spread = np.ptp(expected.probabilities, axis=0).max()
    assert spread > 1e-5
    # transformers resizes with torchvision, whose pixels differ from Pillow's by up to two levels.
    tolerance = (1e-4 if name == "efficientnet_lite0" else 0.03) * spread
    assert np.abs(found.probabilities - expected.probabilities).max() < tolerance
    assert np.abs(found.sureness - expected.sureness).max() < tolerance
    for wrong in ([view[::-1] for view in views], [view[..., ::-1] for view in views], [view // 2 for view in views]):
        assert np.abs(exported.rate(wrong).probabilities - expected.probabilities).max() > 2 * tolerance
    single = exported.rate([views[4]])
    assert np.allclose(single.probabilities, found.probabilities[4:5], atol=1e-5)


def patches(seed: int, width: int, height: int) -> Image.Image:
    """Draw an image of a few large patches."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def test_run_is_exported_and_says_how_it_compares(run, capsys, tmp_path):
    """The default: all test images of the run, found again by images.json, and familiarity inside."""
    record = json.loads((run / "export.json").read_text())
    assert record["model.onnx"]["same"] == record["model.onnx"]["n"] == 6 and record["model.onnx"]["labelled"]
    assert record["model.onnx"]["largest_difference"] < 1e-4
    assert "onnx/model.onnx | of test | shipped | 6 of 6" in (run / "README.md").read_text()
    network, exported = open_network(str(run)), open_network(str(run / "onnx/model.onnx"))
    assert network.familiarity and exported.unsure_below == pytest.approx(network.unsure_below)
    images = [draw("green", seed) for seed in range(20)]
    expected, found = (n.rate([n.view(image) for image in images]) for n in (network, exported))
    assert np.allclose(expected.sureness, found.sureness, atol=1e-3)
    facts = {entry.key: entry.value for entry in onnx.load(run / "onnx/model.onnx").metadata_props}
    assert json.loads(facts["labels"]) == ["blue", "green", "red"] and "unsure_below" in facts
    assert str(PROJECT) not in (run / "onnx/model.onnx").read_bytes().decode("latin-1")


@pytest.mark.parametrize("form", ["table", "jsonl", "csv"])
def test_predict_answers_through_onnx_runtime_as_through_torch(run, capsys, tmp_path, form):
    draw_folder(tmp_path / "new", per_class=6, first=100)
    (tmp_path / "new/red/broken.png").write_bytes(b"no image")
    printed, scores = [], []
    for model in (run, run / "onnx/model.onnx"):
        with pytest.raises(SystemExit) as exit_code:
            predict.main([str(model), str(tmp_path / "new"), "--format", form, "--top_k", "2"])
        assert exit_code.value.code == 1
        output = capsys.readouterr().out
        printed.append(re.split(r"[\s,]+", output))
        scores.append([float(score) for score in re.findall(r"[ ,]([01]\.\d{3,})", output)])
    words = [[word for word in output if not re.match(r"[\d.]|█", word)] for output in printed]
    assert words[0] == words[1] and {"red", "green"} & {word.strip('"') for word in words[0]}
    assert scores[0] == pytest.approx(scores[1], abs=1e-4) and bool(scores[0]) == (form != "table")


def test_predict_with_onnx_imports_neither_torch_nor_transformers(run, tmp_path):
    draw("red", 3).save(tmp_path / "a.png")
    code = (
        f"import sys, predict; predict.main([{str(run / 'onnx/model.onnx')!r}, {str(tmp_path / 'a.png')!r}]); "
        "assert not {'torch', 'transformers', 'datasets', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True)


@pytest.mark.slow
def test_other_precisions_are_measured_with_the_scored_weights(run, capsys, monkeypatch):
    named = []
    monkeypatch.setattr(
        "luthier.serving.torch_network.TorchNetwork",
        lambda name, original=TorchNetwork: named.append(Path(name).name) or original(name),
    )
    code, printed = run_export(capsys, run, "--int8", "--fp16", "--allow_worse")
    assert code == 0, printed
    assert named == ["out", "scored"]
    assert printed.count("6 images cannot show whether it is as good") == 2
    record = json.loads((run / "export.json").read_text())
    assert set(record) == {"model.onnx", "model_fp16.onnx", "model_int8.onnx"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert record["model_int8.onnx"]["weights"] == "scored" and record["model.onnx"]["weights"] == "shipped"
    assert record["model_int8.onnx"]["accuracy"][0] == pytest.approx(metrics["test"]["accuracy"])
    sizes = {path.name: path.stat().st_size for path in (run / "onnx").iterdir()}
    assert set(sizes) == set(record) and sizes["model_int8.onnx"] < sizes["model_fp16.onnx"] < sizes["model.onnx"]
    assert {OnnxNetwork(run / "onnx" / name).facts.precision for name in sizes} == {"fp32", "fp16", "int8"}
    card = (run / "README.md").read_text()
    assert "| onnx/model_int8.onnx | of test | scored |" in card and "| onnx/model.onnx | of test | shipped |" in card


@pytest.mark.slow
def test_images_may_be_given_in_class_folders_or_not(run, capsys, tmp_path):
    draw_folder(tmp_path / "new", per_class=5, first=200)
    code, printed = run_export(capsys, run, "--output_dir", tmp_path / "out", "--check", tmp_path / "new", "--int8",
                               "--allow_worse")  # fmt: skip
    assert code == 0 and "on 8 images\n" in printed  # 7 of them calibrate
    assert json.loads((tmp_path / "out/export.json").read_text())["model_int8.onnx"]["labelled"]
    (tmp_path / "new/red/later").mkdir()  # training takes images at any depth of a class folder
    for path in (tmp_path / "new/red").glob("*.png"):
        path.rename(path.parent / "later" / path.name)
    code, printed = run_export(capsys, run, "--output_dir", tmp_path / "deep", "--check", tmp_path / "new")
    assert code == 0 and "on 15 images\n" in printed
    for number, path in enumerate(sorted((tmp_path / "new").rglob("*.png"))):
        path.rename(tmp_path / f"new/{number}.png")
    code, printed = run_export(capsys, run, "--output_dir", tmp_path / "other", "--check", tmp_path / "new")
    assert code == 0 and "on 15 images, without labels" in printed
    assert {path.name for path in (tmp_path / "other").rglob("*")} == {"onnx", "model.onnx", "export.json"}


def shuffle_weights(path: Path) -> None:
    """Change the weights of an ONNX file so that it answers otherwise."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim > 1 and values.dtype in (np.float32, np.int8):
            tensor.CopyFrom(onnx.numpy_helper.from_array(-values[::-1].copy(), tensor.name))
    onnx.save_model(model, path)


@pytest.mark.slow
def test_export_that_answers_otherwise_is_refused(run, capsys, monkeypatch, tmp_path):
    def export_wrongly(network, path, original=exporting.export_model):
        facts = original(network, path)
        shuffle_weights(path)
        return facts

    monkeypatch.setattr(exporting, "export_model", export_wrongly)
    args = [run, "--output_dir", tmp_path / "out"]
    code, printed = run_export(capsys, *args)
    assert code == 1 and "another class than by the trained model" in printed and "--allow_worse" in printed
    assert not (tmp_path / "out").exists()
    code, printed = run_export(capsys, *args, "--allow_worse")
    assert code == 0 and (tmp_path / "out/onnx/model.onnx").is_file()


def test_failed_export_leaves_a_finished_run(run, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_images", lambda *_: (_ for _ in ()).throw(export.UserError("they are gone")))
    failure = export.export_run(run)
    assert "not exported: they are gone" in failure and f"python export.py {run}" in failure
    with pytest.raises(SystemExit) as both:
        exit_with(["", failure, "not pushed: no network"])
    assert both.value.code == f"error: {failure}\nerror: not pushed: no network"
    exit_with([""])


def test_refusal_depends_on_the_interval():
    def parity(lost: int, n: int) -> Parity:
        low, high = interval_of_difference(-np.repeat([1, 0], [lost, n - lost]))
        return Parity("int8", n, n - lost, 0, 0, 0.1, True, (1.0, 1 - lost / n), (low, high))

    assert parity(0, 20).refusal is None and parity(3, 100).refusal is None
    assert parity(100, 2000).refusal and parity(10, 50).refusal
    assert parity(0, 20).difference_ci95[0] < -0.05  # twenty equal answers prove little
    together = interval_of_difference(-np.repeat([1, 0], [10, 90]), np.repeat(np.arange(10), 10))
    alone = interval_of_difference(-np.repeat([1, 0], [10, 90]))
    assert together[0] < alone[0] and together[1] > alone[1]
    # Five groups that lose the same share tell no less than their images, and no more than five groups can.
    same = interval_of_difference(-np.tile(np.repeat([1, 0], [5, 95]), 5), np.repeat(np.arange(5), 100))
    assert same == interval_of_difference(-np.tile(np.repeat([1, 0], [5, 95]), 5))
    assert interval_of_difference(np.zeros(9), np.zeros(9)) == (-1.0, 1.0)  # one group tells nothing


@pytest.mark.slow
def test_shipped_file_is_judged_too(run, capsys, monkeypatch, tmp_path):
    """What 8 bits cost is measured with other weights, but the file that people get must not be broken."""

    def quantize_wrongly(source, path, facts, views, original=exporting.quantize):
        original(source, path, facts, views)
        if calls.append(path) or len(calls) == 1:
            shuffle_weights(path)

    calls = []
    monkeypatch.setattr(exporting, "quantize", quantize_wrongly)
    monkeypatch.setattr(Parity, "refusal", property(lambda self: "broken" if self.same < self.n / 2 else None))
    code, printed = run_export(capsys, run, "--output_dir", tmp_path / "out", "--int8")
    assert code == 1 and "model_int8.onnx was not written: broken" in printed
    assert {path.name for path in (tmp_path / "out/onnx").iterdir()} == {"model.onnx"}


def test_model_that_is_too_large_for_an_onnx_file_is_refused(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "MAX_BYTES", 1000)
    code, printed = run_export(capsys, run, "--output_dir", tmp_path)
    assert code == 2 and "GB of weights, and an ONNX file holds 2: choose another one" in printed


class Answers:
    """A network that gives one image after the other such a probability of the first of two classes."""

    labels, unsure_below, none, batch_size = ("a", "b"), 0.6, None, 2

    def __init__(self, shares):
        left = iter(shares)
        self.view = lambda image: next(left)

    def rate(self, views):
        shares = np.array(views, np.float32)
        return Rated(np.stack([shares, 1 - shares], axis=1), np.maximum(shares, 1 - shares))


def test_comparison_counts_what_differs():
    images = Images(list("012"), lambda number: encode("red", number), np.array([0, 0, 1]))
    rated = images.rate(Answers([0.9, 0.7, 0.2]), "model")
    found = compare(Answers([0.9, 0.45, 0.3]), rated, images, "int8")
    assert (found.same, found.n, found.other_answers) == (2, 3, 1)
    assert found.largest_difference == pytest.approx(0.25) and found.accuracy == (1.0, pytest.approx(2 / 3))


def test_comparison_counts_images_that_belong_together_as_few():
    wrong = [0.0] * 8 + [1.0] * 32
    images = Images(list(map(str, range(40))), lambda number: encode("red", 1), np.zeros(40, int))
    expected = images.rate(Answers([1.0] * 40), "model")
    alone = compare(Answers(wrong), expected, images, "int8").difference_ci95
    together = compare(Answers(wrong), expected, images._replace(groups=np.arange(40) // 8), "int8").difference_ci95
    assert together[0] < alone[0] and alone[1] < 0 < together[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: model"),
        (["nomodel"], "there is no folder 'nomodel'"),
        (["owner/nomodel"], "give --output_dir too"),
        (["{run}/onnx/model.onnx"], "model.onnx is a file: give the folder of the trained model"),
        (["{run}", "--int"], "unknown option --int; did you mean 'int8'?"),
        (["owner/nomodel", "--output_dir", "{tmp}/o"], "the Hub cannot be reached"),
        (["{tmp}"], "holds no model"),
        (["{run}", "--check", "{tmp}"], "is not a folder with images"),
        (["{run}", "--check", "{tmp}/none"], "is not a folder with images"),
        (["{run}", "--check", ""], "--check: it is empty: give a value, or leave the option out"),
        (["{run}", "--output_dir", ""], "--output_dir: it is empty"),
        (["{run}", "--web="], "--web: it is empty"),
        (["{run}", "--output_dir", "{run}/config.json"], "is not a folder that you may write to"),
        (["{run}", "--output_dir", "{run}/config.json/below"], "is not a folder that you may write to"),
        (["{run}", "--web", "{run}/config.json/below"], "is not a folder that you may write to"),
        (["{run}", "--web", "{run}"], "already holds something else"),
        (["{run}", "--push_to_space", "page"], "is not a name for a Space"),
        (["{run}", "--push_to_space", "me/a b"], "'me/a b' is not a name for a repository"),
        (["{run}", "--push_to_space", "me/a/b"], "'me/a/b' is not a name for a repository"),
        (["{run}", "--vendor"], "--vendor is for the page"),
        (["{run}", "--private"], "--private hides a page on the Hub: give --push_to_space"),
        (["{run}/scored"], "does not say which images its model was scored on: give images to compare"),
    ],
)
def test_mistake_gets_one_message(run, capsys, tmp_path, args, message):
    code, printed = run_export(capsys, *[word.format(tmp=tmp_path, run=run) for word in args])
    assert code == 2 and message in printed and "Traceback" not in printed
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "content",
    ["no json", "[]", "3", '{"test": [], "options": {"data_dir": "/gone"}}', '{"test": [], "options": {"a": 1}}'],
)
def test_images_that_are_gone_get_one_message(run, capsys, tmp_path, content):
    for path in run.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images.json").write_text(content)
    code, printed = run_export(capsys, tmp_path)
    assert code == 2 and "--check FOLDER" in printed and not (tmp_path / "onnx").exists()


def test_images_of_a_moved_run_are_named_where_they_were_looked_for(run, capsys, tmp_path):
    for path in run.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images.json").write_text('{"test": [], "options": {"data_dir": "../gone"}}')
    code, printed = run_export(capsys, tmp_path)
    assert code == 2 and f"not there any more ({tmp_path.resolve().parent / 'gone'})" in printed


def test_damaged_image_to_check_on_is_named(run, capsys, tmp_path):
    draw_folder(tmp_path / "new", per_class=2)
    (tmp_path / "new/red/broken.png").write_bytes(b"no image")
    code, printed = run_export(capsys, run, "--output_dir", tmp_path / "out", "--check", tmp_path / "new")
    assert code == 2 and "broken.png" in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a model that ONNX Runtime can load"),
        (lambda data: b"", "is not a model that ONNX Runtime can load"),
        (lambda data: data.replace(b"unsure_below", b"unsure_aboye"), "does not say how it is used"),
        (lambda data: data.replace(b'"bilinear"', b'"cubical!"'), "does not say how it is used"),
    ],
)
def test_damaged_file_gets_one_message(run, capsys, tmp_path, damage, message):
    draw("red", 1).save(tmp_path / "a.png")
    (tmp_path / "m.onnx").write_bytes(damage((run / "onnx/model.onnx").read_bytes()))
    with pytest.raises(SystemExit) as failure:
        predict.main([str(tmp_path / "m.onnx"), str(tmp_path / "a.png")])
    printed = capsys.readouterr()
    assert failure.value.code == 2 and message in printed.err and "Traceback" not in printed.err


def test_missing_package_and_file_get_one_message(run, capsys, monkeypatch):
    with pytest.raises(SystemExit) as failure:
        predict.main([str(run / "onnx/none.onnx"), "a.png"])
    assert failure.value.code == 2 and "there is no file" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name, original=None: None)
    for command, args in ((export.main, [str(run)]), (predict.main, [str(run / "onnx/model.onnx"), "a.png"])):
        with pytest.raises(SystemExit) as failure:
            command(args)
        assert failure.value.code == 2 and "pip install -r requirements-export.txt" in capsys.readouterr().err


def test_architecture_that_cannot_be_exported_gets_one_message(run, capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        try:
            raise RuntimeError("no such operator\nand much more")
        except RuntimeError as error:
            raise ValueError("\x1b[96mThis is step 1/3\x1b[0m") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    code, printed = run_export(capsys, run, "--output_dir", tmp_path / "out")
    assert code == 2 and "timm_wrapper cannot be exported to ONNX: no such operator" in printed
    assert not (tmp_path / "out").exists()


def test_example_in_the_docs_answers_as_predict_does(run, capsys, tmp_path):
    text = (PROJECT / "docs/export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line]) <= 25
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) == {"json", "sys", "numpy", "onnxruntime", "PIL"}
    (tmp_path / "classify.py").write_text(code)
    for seed, (width, height) in enumerate([(61, 40), (40, 75), (33, 33)]):
        path = tmp_path / f"{seed}.png"
        draw("green", seed, width, height).save(path)
        predict.main([str(run / "onnx/model.onnx"), str(path), "--format", "csv", "--top_k", "1"])
        _, answer, _, score, _ = capsys.readouterr().out.splitlines()[1].split(",")
        command = [sys.executable, str(tmp_path / "classify.py"), str(run / "onnx/model.onnx"), str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert printed.split() == [answer or "unsure", f"{float(score):.4f}"]


def test_openvino_answers_as_onnx_runtime_does(run, capsys, caplog, tmp_path):
    images = [draw("green", seed, 50 + seed, 40) for seed in range(20)]
    networks = [OnnxNetwork(run / "onnx/model.onnx", backend) for backend in ("onnxruntime", "openvino")]
    one, other = (network.rate([network.view(image) for image in images]) for network in networks)
    assert np.allclose(one.probabilities, other.probabilities, atol=1e-4)
    assert np.allclose(one.sureness, other.sureness, atol=1e-2)
    images[0].save(tmp_path / "a.png")
    predict.main([str(run / "onnx/model.onnx"), str(tmp_path / "a.png"), "--backend", "openvino"])
    assert "a.png" in capsys.readouterr().out
    model = onnx.load(run / "onnx/model.onnx")
    next(entry for entry in model.metadata_props if entry.key == "precision").value = '"int8"'
    onnx.save(model, tmp_path / "bits.onnx")
    for backend, warnings in (("onnxruntime", 0), ("openvino", 1)):
        caplog.clear()
        OnnxNetwork(tmp_path / "bits.onnx", backend)
        assert caplog.text.count("compared bits.onnx in ONNX Runtime; OpenVINO may answer otherwise") == warnings
    with pytest.raises(SystemExit) as failure:
        predict.main([str(run), str(tmp_path / "a.png"), "--backend", "openvino"])
    assert failure.value.code == 2 and "--backend openvino is for a .onnx file" in capsys.readouterr().err


def test_images_to_check_on_may_be_in_linked_folders(tmp_path):
    draw_folder(tmp_path / "photos", 2)
    (tmp_path / "check").mkdir()
    for name in ("blue", "red"):
        (tmp_path / "check" / name).symlink_to(tmp_path / "photos" / name)
    images, _ = export.find_images("", tmp_path / "check", ["blue", "red"], calibrate=False)
    assert sorted(images.labels) == [0, 0, 1, 1]


def test_two_cannot_export_into_one_folder(tmp_path, capsys):
    with lock_folder(tmp_path, ".export.lock", ""):
        code, printed = run_export(capsys, tmp_path)
    assert code == 2 and f"another export is writing into {tmp_path}: wait for it" in printed


def pixels_to_odds(path: Path, factor: float = 1.0) -> None:
    """Write a model whose logits are the three channels of one pixel, by way of `factor` times them."""
    make, kind = onnx.helper.make_node, onnx.TensorProto
    nodes = [
        make("Cast", ["pixel_values"], ["levels"], "cast", to=kind.FLOAT),
        make("Reshape", ["levels", "shape"], ["flat"], "reshape"),
        make("Mul", ["flat", "factor"], ["large"], "mul"),
        make("Div", ["large", "factor"], ["features"], "small"),
        make("MatMul", ["features", "eye"], ["logits"], "head"),
        make("Softmax", ["logits"], ["probabilities"], "softmax", axis=-1),
        make("ReduceMax", ["probabilities", "axes"], ["top"], "top", keepdims=0),
        make("Sub", ["one", "top"], ["rest"], "rest"),
        make("Div", ["top", "rest"], ["odds"], "odds"),
        make("Log", ["odds"], ["sureness"], "log"),
    ]
    constants = {"shape": np.array([-1, 3]), "factor": np.float32(factor), "eye": np.eye(3, dtype=np.float32),
                 "axes": np.array([1]), "one": np.float32(1)}  # fmt: skip
    value, stored = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    graph = onnx.helper.make_graph(
        nodes, "odds", [value("pixel_values", kind.UINT8, ["n", 1, 1, 3])],
        [value("logits", kind.FLOAT, ["n", 3]), value("probabilities", kind.FLOAT, ["n", 3]),
         value("sureness", kind.FLOAT, ["n"])],
        [stored(np.asarray(each), name) for name, each in constants.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", exporting.OPSET)]
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_what_follows_the_logits_stays_in_float32_in_fp16(tmp_path):
    pixels_to_odds(tmp_path / "whole.onnx")
    facts = Facts(["a", "b", "c"], ResizeRule("stretch", (1, 1), (1, 1), "bilinear"), 0.0, None)
    exporting.halve(tmp_path / "whole.onnx", tmp_path / "half.onnx", facts)
    rated = OnnxNetwork(tmp_path / "half.onnx").rate([np.array([[[12, 0, 0]]], np.uint8)])
    assert rated.sureness == pytest.approx(12 - np.log(2), abs=0.05)  # infinite, where 0.99999 is rounded to 1
    assert rated.probabilities.max() < 1


def test_values_beyond_float16_are_counted(tmp_path):
    """A CPU computes float16 in float32, and does not show them."""
    views = [np.array([[[level, 0, 0]]], np.uint8) for level in (1, 5, 12)]
    for factor, images in ((1.0, 0), (10_000.0, 1)):  # 12 becomes 120,000
        pixels_to_odds(tmp_path / "m.onnx", factor)
        assert exporting.count_overflows(tmp_path / "m.onnx", views) == images


def test_numbers_that_stand_for_infinity_hide_no_values_beyond_float16(tmp_path):
    pixels_to_odds(tmp_path / "m.onnx", [10_000.0, 1.0, 1e38])  # the third as in a mask
    views = [np.array([[[level, 0, 1]]], np.uint8) for level in (1, 12)]  # 12 becomes 120,000, beside it
    assert exporting.count_overflows(tmp_path / "m.onnx", views) == 1


def test_overflows_are_looked_for_in_a_part_of_memory(tmp_path, monkeypatch):
    pixels_to_odds(tmp_path / "m.onnx")
    outputs, session = [], exporting.onnxruntime.InferenceSession
    run = session.run
    monkeypatch.setattr(session, "run", lambda *given: outputs.append(run(*given)) or outputs[-1])
    exporting.count_overflows(tmp_path / "m.onnx", [np.zeros((1, 1, 3), np.uint8)])
    assert outputs[0] and all(np.size(value) == 1 for value in outputs[0]), "numbers, not the values"


def test_channels_that_the_model_wants_reversed_are_reversed_in_the_export():
    class Mean(torch.nn.Module):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values.mean(dim=(2, 3)))

    network = SimpleNamespace(model=Mean(), familiarity=None, head=torch.nn.Identity())
    pixels = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 4, 4, 3)  # red
    for is_reversed, answer in ((False, 0), (True, 2)):
        view = SimpleNamespace(reversed=is_reversed, contrast=torch.ones(3), black=torch.zeros(3))
        assert PixelsToAnswer(network, view)(pixels)[0].argmax() == answer


def test_images_of_a_run_are_told_apart_by_their_digests(tmp_path, monkeypatch, capsys):
    files, digests = [encode("red", seed) for seed in range(4)], [letter * 64 for letter in "abcd"]
    columns = {"image": [{"bytes": file, "path": None} for file in files], "name": [*"0123"]}
    columns |= {"label": [0, 1, 0, 1], "digest": digests}
    text, label = Value("string"), ClassLabel(names=["x", "y"])
    features = Features({"image": ImageFeature(decode=False), "name": text, "label": label, "digest": text})
    rows = Dataset.from_dict(columns, features=features)
    splits = DatasetDict(train=rows.select([0, 1]), test=rows.select([2, 3]))
    monkeypatch.setattr(data, "load_images", lambda **options: (splits, []))

    def found(of_test: str, labels: tuple[str, str] = ("x", "y")) -> tuple[Images, Images]:
        record = {"options": {"data_dir": "gone"}, "test": [letter * 16 for letter in of_test]}
        (tmp_path / "images.json").write_text(json.dumps(record))
        return export.images_of_run(tmp_path, list(labels))

    tested, others = found("bce")
    assert (list(tested.names), tested.labels.tolist(), sorted(others.names)) == (["1", "2"], [1, 0], ["0", "3"])
    assert [tested.read(number) for number in (0, 1)] == files[1:3]
    assert "not there any more, or changed: 1 test image of the run" in capsys.readouterr().out
    with pytest.raises(UserError, match="have other classes than its model by now"):
        found("bc", ("y", "x"))
    for of_test, gone in (("e", "test"), ("abcd", "other")):
        with pytest.raises(UserError, match=f"the {gone} images of the run are no longer there"):
            found(of_test)


def test_image_to_check_on_has_the_class_of_its_outermost_folder(tmp_path):
    for number, folder in enumerate(("red/blue", "red", "blue")):
        (tmp_path / "check" / folder).mkdir(parents=True, exist_ok=True)
        draw("red", number).save(tmp_path / "check" / folder / f"{number}.png")
    labels = ["blue", "red"]
    images, calibration = export.find_images("", tmp_path / "check", labels, calibrate=False)
    found = dict(zip([Path(name).stem for name in images.names], images.labels.tolist(), strict=True))
    assert found == {"0": 1, "1": 1, "2": 0} and not calibration.names
    alone, _ = export.find_images("", tmp_path / "check/red/blue", labels, calibrate=False)
    assert alone.labels.tolist() == [0]
    images, calibration = export.find_images("", tmp_path / "check", labels, calibrate=True)
    assert (len(images.names), len(calibration.names)) == (2, 1)
    assert not {*images.names} & {*calibration.names}
    assert images.read(0) == Path(images.names[0]).read_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="needs Linux and two cores")
def test_onnx_runtime_stays_on_the_cores_that_it_may_use(run):
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from pathlib import Path; "
        "from luthier.serving.onnx_network import OnnxNetwork; "
        f"network = OnnxNetwork(Path({str(run / 'onnx/model.onnx')!r})); "
        "print(len({core for task in os.listdir('/proc/self/task') for core in os.sched_getaffinity(int(task))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_paths_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = export.build_parser().parse_args(["x", "--output_dir=~/a", "--web=~/b", "--check=~/c"])
    assert [args.output_dir, args.web, args.check] == [tmp_path / name for name in "abc"]


def test_exported_file_knows_which_class_is_of_anything_else(view, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto="whole"))
    monkeypatch.setattr(exporting, "write_model", lambda *given: written.append(given))
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="linear")
    network = SimpleNamespace(
        model=model, view=view, labels=["a", "none"], unsure_below=0.25, none=1, familiarity=None,
        head=torch.nn.Identity(),
    )  # fmt: skip
    facts = export_model(network, tmp_path / "model.onnx")
    assert written == [("whole", facts, tmp_path / "model.onnx")]
    assert (facts.labels, facts.unsure_below, facts.none, facts.precision) == (["a", "none"], 0.25, 1, "fp32")
    assert Facts.read({name: json.dumps(value) for name, value in facts.describe().items()}) == facts
