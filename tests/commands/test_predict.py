"""predict.py: the predictions of evaluation and of `pipeline`, every kind of input and output, and bad inputs."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, draw, draw_folder
from PIL import Image
from transformers import pipeline

import predict
import train
from data import load_splits
from luthier.escape import escape_cell
from luthier.images.decode import EXTENSIONS
from luthier.serving.classifier import Classifier, Prediction, open_network
from luthier.serving.network import Rated
from luthier.serving.torch_network import TorchNetwork
from luthier.terminal import width_of


def train_model(model_name: str, folder: Path) -> Path:
    """Train for one epoch on drawn images in `folder`; return the output directory."""
    if not (folder / "images").exists():
        draw_folder(folder / "images", per_class=8)
    args = ["--data_dir", str(folder / "images"), "--model_name", model_name, "--num_train_epochs", "1"]
    args += ["--refit", "none"]
    train.main([*args, "--output_dir", str(folder / "out"), "--disable_tqdm", "1"])
    return folder / "out"


@pytest.fixture(scope="module", params=["timm", "vit", "simple_cnn"])
def run(request, tmp_path_factory, timm_checkpoint, vit_checkpoint):
    """A run of each kind of model."""
    if request.param == "simple_cnn":
        return request.getfixturevalue("model")
    name = {"timm": str(timm_checkpoint), "vit": str(vit_checkpoint)}[request.param]
    return train_model(name, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run of simple_cnn."""
    return train_model("simple_cnn", tmp_path_factory.mktemp("model"))


def run_predict(capsys, *args: str | Path) -> tuple[int, str, str]:
    """Run the command; return exit code, output, errors."""
    try:
        predict.main([str(word) for word in args])
        code = 0
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("encoding", "block"), [("cp1252", "#"), ("ascii", "#"), ("utf-8", "█")])
def test_bars_are_readable_in_any_encoding(encoding, block):
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding, errors="backslashreplace")
    predict.WRITERS["table"](file, 1)(Prediction("a.png", [("red", 1.0)]))
    assert content.getvalue().decode(encoding).split()[-1] == block * predict.BAR_WIDTH


def test_bars_of_wide_letters_line_up():
    file = io.StringIO()
    predict.WRITERS["table"](file, 3)(Prediction("a.png", [("\u732b" * 20, 0.6), ("e\u0301", 0.3), ("dog", 0.1)]))
    lines = zip(file.getvalue().splitlines()[1:], ("60.0%", "30.0%", "10.0%"), strict=True)
    assert len({width_of(line[: line.index(share)]) for line, share in lines}) == 1


def parse_json_lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_predictions_are_those_of_evaluation_and_of_pipeline(run, capsys):
    images = run.parent / "images"
    test = load_splits(data_dir=str(images))[0]["test"]
    paths = [row["image"]["path"] for row in test]
    code, out, _ = run_predict(capsys, run, *paths, "--format", "jsonl", "--top_k", 9)
    answers = parse_json_lines(out)
    assert code == 0 and [answer["input"] for answer in answers] == paths
    unsure = json.loads((run / "metrics.json").read_text())["unsure"]
    assert sum(answer["answer"] is not None for answer in answers) == pytest.approx(unsure["answered"] * len(paths))
    with (run / "predictions.csv").open(newline="") as file:
        evaluated = {row["name"]: row for row in csv.DictReader(file)}
    classify = pipeline("image-classification", model=str(run), trust_remote_code=True, top_k=3)
    for path, answer in zip(paths, answers, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer["top"]}
        row = evaluated[str(Path(path).relative_to(images))]
        assert scores[row["label"]] == pytest.approx(float(row["probability_of_label"]), abs=1e-5)
        assert scores == pytest.approx({entry["label"]: entry["score"] for entry in classify(path)}, abs=1e-5)


def test_prediction_does_not_depend_on_the_other_images(model, capsys):
    images = sorted((model.parent / "images").rglob("*.png"))
    _, alone, _ = run_predict(capsys, model, images[0], "--format", "jsonl")
    _, with_others, _ = run_predict(capsys, model, images[0], *images, "--format", "jsonl")
    first, second = parse_json_lines(with_others)[:2]
    assert first["top"] == second["top"]
    assert [entry["label"] for entry in first["top"]] == [
        entry["label"] for entry in parse_json_lines(alone)[0]["top"]
    ]
    for mixed, single in zip(first["top"], parse_json_lines(alone)[0]["top"], strict=True):
        assert mixed["score"] == pytest.approx(single["score"], abs=2e-6)


def test_every_kind_of_input_keeps_its_order(model, capsys, monkeypatch, tmp_path):
    folder = draw_folder(tmp_path / "in", per_class=2)
    (folder / "red/notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    draw("red", 9).save(tmp_path / "single.PNG")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path}/single.PNG\n\n{folder}/blue\n"))
    code, out, _ = run_predict(capsys, model, folder, f"{folder}/gr*/*.png", "-", "--format", "jsonl")
    names = [str(Path(answer["input"]).relative_to(tmp_path)) for answer in parse_json_lines(out)]
    expected = [f"in/{colour}/{number:03}.png" for colour in ("blue", "green", "red") for number in (0, 1)]
    assert code == 0 and names == [*expected, *expected[2:4], "single.PNG", *expected[:2]]


def test_every_line_of_the_standard_input_is_an_input(tmp_path):
    assert list(predict.expand(["-"], ["-\n", " \n", "missing.jpg\n"])) == [
        ("-", "there is no such file"), ("missing.jpg", "there is no such file"),
    ]  # fmt: skip
    assert list(predict.expand([""])) == [("", "there is no such file")]
    (tmp_path / "a.png\r").touch()
    assert list(predict.expand([f"{tmp_path}/a.png\r"])) == [(f"{tmp_path}/a.png\r", None)]
    for mark in ("\ufeff", "\u00ef\u00bb\u00bf"):  # as Windows begins a list, and may read it
        assert list(predict.expand(["-"], [f"{mark}missing.jpg\r\n"])) == [("missing.jpg", "there is no such file")]
    with_nulls = ["a.jpg\0./b[1].jpg", "folder\0/*", "a\0*"]  # as of `find -print0`
    assert [error for _, error in predict.expand(["-"], with_nulls)] == ["there is no such file"] * 3


def test_file_of_a_pattern_that_may_not_be_looked_at_is_an_input(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).endswith("a.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    assert list(predict.expand([f"{tmp_path}/*"])) == [(f"{tmp_path}/a.png", None)]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_standard_streams_stop_nothing_that_goes_into_a_file(model, monkeypatch, capsys, tmp_path, closed):
    draw("red", 9).save(tmp_path / "a.png")
    monkeypatch.setattr(f"sys.{closed}", None)
    if closed == "stdout":
        code, _, errors = run_predict(capsys, model, tmp_path / "a.png")
        assert code == 2 and errors == "error: the standard output is closed: give --output FILE\n"
    predict.main([str(model), str(tmp_path / "a.png"), "--format", "csv", "--output", str(tmp_path / "out.csv")])
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("pattern", ["**", "**/", "**/*", "**/*.png", "*", "./**", "**/[dsr]*"])
def test_pattern_gives_every_image_once(tmp_path, pattern):
    draw_folder(tmp_path / "in/deep", per_class=2)
    draw("red", 9).save(tmp_path / "in/single.png")
    found = [name for name, error in predict.expand([f"{tmp_path}/in/{pattern}"]) if error is None]
    assert sorted(found) == sorted(map(str, (tmp_path / "in").rglob("*.png")))


def test_pattern_follows_no_link_in_a_circle(tmp_path, monkeypatch):
    draw_folder(tmp_path / "in/deep", per_class=1)
    elsewhere = draw_folder(tmp_path / "elsewhere", per_class=1)
    for name, target in (("self", "in"), ("deep/above", "in"), ("deep/[a-b] link", "elsewhere")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    linked = [tmp_path / "in/deep/[a-b] link" / path.relative_to(elsewhere) for path in elsewhere.rglob("*.png")]
    expected = sorted(map(str, [*(tmp_path / "in").rglob("*.png"), *linked]))
    assert sorted(dict(predict.expand([f"{tmp_path}/in/**/*.png"]))) == sorted(set(expected)) and linked
    monkeypatch.chdir(tmp_path / "in")
    assert sorted(dict(predict.expand(["**/red/*.png"]))) == ["deep/[a-b] link/red/000.png", "deep/red/000.png"]
    assert list(predict.expand(["**/*.gif"])) == [("**/*.gif", "no file matches")]


@pytest.mark.parametrize(("encoding", "readable"), [("cp1252", False), ("ascii", False), ("utf-8", True)])
def test_lines_are_json_in_any_encoding(encoding, readable):
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding, errors="backslashreplace")
    predict.WRITERS["jsonl"](file, 1)(Prediction("caf\u00e9\udcff.png", [("\U0001f3bb", 0.9)]))
    line = content.getvalue().decode(encoding)
    assert json.loads(line)["top"] == [{"label": "\U0001f3bb", "score": 0.9}]
    assert ("\U0001f3bb" in line) == readable


def test_each_bad_input_gets_its_own_message(model, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.jpg").write_text("<html></html>")
    draw("red", 1).save(tmp_path / "good.png")
    valid = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(valid[: len(valid) // 2])
    (tmp_path / "nothing.png").write_bytes(b"")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    frames = [draw("red", seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "locked.eps").write_text("%!PS-Adobe")
    (tmp_path / "list.txt").write_text("good.png")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/IMG_1.DNG").write_bytes(b"raw")
    (tmp_path / "camera").mkdir()
    (tmp_path / "camera/1.NEF").write_bytes(b"raw")
    draw("red", 2).save(tmp_path / "camera/1.jpg")
    expected = {
        "missing.png": "there is no such file",
        "empty": "no images in this folder",
        "page.jpg": "not an image in an allowed format",
        "truncated.png": "truncated",
        "nothing.png": "the file is empty",
        "huge.png": "more than 178 megapixels: make it smaller",
        "locked.eps": "not an image in an allowed format",
        "phone": "its format is not read: convert it to JPEG or PNG",
        "*.none": "no file matches",
        "a\0b": "there is no such file",
        "x" * 5000: "there is no such file",
        "list.txt": "it is a list, and no image: give - for a list of files",
        "file:///my%20photos/a.png": "give its path, without file://: /my photos/a.png",
        "file:///C:/my%20photos/a.png": "give its path, without file://: C:/my photos/a.png",
        "ftp://example.org/a.png": "only http and https",
        "http://127.0.0.1:9/a.png": "is not public",
    }
    inputs = [name if "://" in name else str(tmp_path / name) for name in expected]
    args = [model, tmp_path / "camera", *inputs, tmp_path / "moving.gif"]
    code, out, err = run_predict(capsys, *args, "--format", "jsonl")
    first, *bad, last = parse_json_lines(out)
    assert code == 1 and f"no prediction for {len(expected)} inputs" in err
    assert first["top"] and last["top"] and "error" not in last
    for answer, (name, message) in zip(bad, expected.items(), strict=True):
        assert answer["answer"] is None and message in answer["error"], (name, answer)
    code, out, _ = run_predict(capsys, *args)
    assert code == 1 and out.count("no prediction: ") == len(expected) and "\0" not in out


def test_file_that_a_list_names_is_tried_whatever_it_is_called(tmp_path):
    """The advice to give - for a list would be no help there."""
    name = str(tmp_path / "a.txt")
    draw("red", 1).save(name, "PNG")
    assert list(predict.expand(["-"], [f"{name}\n"])) == [(name, None)]
    assert list(predict.expand([name])) == [(name, predict.NO_IMAGE)]


def test_table_is_readable(model, capsys, tmp_path):
    draw("red", 1).save(tmp_path / "a\tb.png")
    code, out, _ = run_predict(capsys, model, tmp_path / "a\tb.png", "--top_k", "2", "--always_answer")
    name, *rows = out.splitlines()
    assert code == 0 and name.endswith("a?b.png") and len(rows) == 2 and max(map(len, rows)) <= 80
    assert all("%" in row for row in rows) and "█" in rows[0]


def test_csv_is_written_to_a_file(model, capsys, tmp_path):
    draw("red", 1).save(tmp_path / "a.png")
    args = [model, tmp_path / "a.png", "=missing", "--format", "csv", "--output", tmp_path / "answers.csv"]
    code, out, _ = run_predict(capsys, *args)
    assert code == 1 and out == ""
    with (tmp_path / "answers.csv").open(newline="") as file:
        good, bad = csv.DictReader(file)
    assert good["label_1"] and float(good["score_1"]) >= float(good["score_2"]) and not good["error"]
    assert bad["input"] == "'=missing" and bad["error"] == "there is no such file" and not bad["label_1"]


def copy_with(model, folder, config, without=()):
    """Copy a model with another config, and without some of its files."""
    folder.mkdir()
    for path in model.glob("*.*"):
        if path.name not in without:
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("by", ["familiarity", "confidence"])
def test_prediction_below_the_threshold_is_unsure(model, capsys, tmp_path, by):
    draw("red", 1).save(tmp_path / "a.png")
    config = json.loads((model / "config.json").read_text())
    unsure = json.loads((model / "metrics.json").read_text())["unsure"]
    assert 0 < config["unsure_below"] < 1 and unsure["by"] == "familiarity"
    assert unsure["threshold"] == config["familiarity"]["unsure_below"]
    if by == "familiarity":
        config["familiarity"]["unsure_below"], without = 100.0, ()
    else:
        config["unsure_below"], without = 1.0, ("familiarity.safetensors",)
    other = copy_with(model, tmp_path / "stricter", config, without)
    _, out, _ = run_predict(capsys, other, tmp_path / "a.png", "--format", "jsonl")
    assert parse_json_lines(out)[0]["answer"] is None and parse_json_lines(out)[0]["top"]
    _, out, _ = run_predict(capsys, other, tmp_path / "a.png", "--format", "jsonl", "--always_answer")
    assert parse_json_lines(out)[0]["answer"] == parse_json_lines(out)[0]["top"][0]["label"]
    _, out, _ = run_predict(capsys, other, tmp_path / "a.png")
    assert "a.png: unsure" in out


def test_several_people_are_answered_at_once(model):
    """The app's requests come in threads, and share a classifier."""
    network = TorchNetwork(str(model))
    views = [network.view(draw(colour, seed)) for seed, colour in enumerate(("red", "green", "blue") * 10)]
    alone = [network.rate([view])[1].item() for view in views]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda view: network.rate([view])[1].item(), views))
    assert together == pytest.approx(alone, abs=1e-4)


def test_images_from_urls(model, capsys, tmp_path):
    draw("red", 1).save(tmp_path / "a.png")
    Image.new("1", (9000, 6000)).save(tmp_path / "large.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    args = [model, f"{url}/a.png", f"{url}/large.png", tmp_path / "a.png", "--format", "jsonl"]
    code, out, _ = run_predict(capsys, *args, "--allow_private_urls")
    server.shutdown()
    fetched, too_large, local = parse_json_lines(out)
    assert code == 1 and fetched["top"] == local["top"] and "are more than" in too_large["error"]


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_memory_does_not_grow_with_the_number_of_inputs(model):
    """Inputs are read at most two batches ahead of the predictions."""
    taken = 0
    path = str(next((model.parent / "images").rglob("*.png")))

    def inputs():
        nonlocal taken
        for _ in range(500):
            taken += 1
            yield path, None

    classifier = Classifier(open_network(str(model)))
    for number, _ in enumerate(classifier.predict_files(inputs(), 1), 1):
        assert taken <= number + 2 * classifier.batch_size
    assert number == 500


def test_odd_configs_from_the_hub(model, capsys, tmp_path):
    draw("red", 1).save(tmp_path / "a.png")
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {"0": 7, "1": "\x1b]0;title\x07"}, "unsure_below": None, "num_labels": 3}
    other = copy_with(model, tmp_path / "odd", config)
    code, out, err = run_predict(capsys, other, tmp_path / "a.png", "http://127.0.0.1/\x1b[0m", "--top_k", "3")
    assert code == 1 and "\x1b" not in out and "Traceback" not in err
    settings = json.loads((model / "preprocessor_config.json").read_text())
    odd = {
        "do_center_crop": (False, "gives every image another size"),
        "resample": (99, "cannot process an image (99"),
    }
    for name, (value, message) in odd.items():
        (other / "preprocessor_config.json").write_text(json.dumps(settings | {name: value}))
        code, _, err = run_predict(capsys, other, tmp_path / "a.png")
        assert code == 2 and message in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: model, input"),
        (["model"], "required: input"),
        (["nomodel", "a.png"], "there is no folder 'nomodel'"),
        (["owner/nomodel", "a.png"], "the Hub cannot be reached"),
        (["{tmp}", "a.png"], "holds no model"),
        (["{model}", "a.png", "--top_k", "0"], "0 is not a number above 0"),
        (["{model}", "a.png", "--format", "xml"], "invalid choice: 'xml'"),
        (["{model}", "a.png", "--topk", "3"], "unknown option --topk; did you mean 'top_k'?"),
        (["{model}", "--output", "a.jpg", "b.jpg"], "--output a.jpg would replace an image"),
        (["{model}", "a.png", "--output", "{model}/model.safetensors"], "would replace a file of the run"),
        (["{model}", "a.png", "--output", "{model}/config.json"], "would replace a file of the run"),
        (["{model}", "a.png", "--output", "{tmp}/no/such/folder"], "there is no folder "),
        (["nomodel", "a.png", "--output", "{tmp}/no/such/folder"], "there is no folder {tmp}/no/such. Create it"),
        (["{model}", "a.png", "--output", "{tmp}/raw.DNG"], "raw.DNG would replace an image"),
        (["{model}", "a.png", "--output", "{tmp}/.hidden.png"], ".hidden.png would replace an image"),
        (
            ["{tmp}/exported", "a.png"],
            "of exported models: give one of its files, such as {tmp}/exported/",
        ),
    ],
)
def test_mistake_on_the_command_line_ends_with_exit_code_2(model, capsys, tmp_path, args, message):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/model.onnx").touch()
    code, _, err = run_predict(capsys, *[word.format(tmp=tmp_path, model=model) for word in args])
    message = message.format(tmp=tmp_path)
    assert code == 2 and message in err and "Traceback" not in err and "usage:" not in err


def test_output_never_replaces_an_input(model, capsys, monkeypatch, tmp_path):
    (tmp_path / "list").write_text("missing.png\n")
    for given in ("list", "li*"):
        code, _, errors = run_predict(capsys, model, tmp_path / given, "--output", tmp_path / "list")
        assert code == 2 and "would replace one of the inputs" in errors
    with (tmp_path / "list").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, _, errors = run_predict(capsys, model, "-", "--output", tmp_path / "list")
    assert code == 2 and "would replace one of the inputs" in errors
    assert (tmp_path / "list").read_text() == "missing.png\n"


def test_dash_as_output_is_the_standard_output(model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw("red", 9).save("a.png")
    code, out, _ = run_predict(capsys, model, "a.png", "--output", "-", "--format", "csv")
    assert code == 0 and out.startswith("input,answer,") and [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_pipe_as_output_may_be_closed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(SystemExit) as exit_info, predict.open_output(tmp_path / "pipe") as file:
        os.close(reader)
        file.write("a\n")
        file.flush()
    assert exit_info.value.code == 1


def test_onnx_runtime_leaves_no_number_of_the_machine(tmp_path):
    code = "import luthier, onnxruntime; onnxruntime.SessionOptions(); onnxruntime.InferenceSession(b'')"
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "HOME")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert "onnxruntime" in result.stderr and "InferenceSession" in result.stderr  # it came so far
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_no_file_is_not_called_missing(tmp_path, monkeypatch):
    assert list(predict.expand([os.devnull])) == [(os.devnull, "it is no regular file")]
    (tmp_path / "a.png").touch()

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    name = str(tmp_path / "a.png")
    assert list(predict.expand([name])) == [(name, "cannot be opened: Permission denied")]


def test_folder_input_takes_every_extension_of_training(tmp_path):
    for extension in EXTENSIONS:
        (tmp_path / f"a{extension.upper()}").write_bytes(b"")
    assert len(list(predict.expand([str(tmp_path)]))) == len(EXTENSIONS)


def test_scores_are_probabilities(model):
    classifier = Classifier(open_network(str(model)))
    prediction = classifier.predict(draw("red", 1), top_k=3)
    assert sum(score for _, score in prediction.top) == pytest.approx(1) and np.isfinite(prediction.top[0][1])


def test_prediction_that_is_stopped_does_not_wait_for_what_is_being_read(model, tmp_path, monkeypatch):
    classifier, release, read = Classifier(open_network(str(model))), threading.Event(), []
    load_view = classifier.load_view

    def load(name: str):
        if name != "0.png":
            release.wait(60)
        read.append(name)
        return load_view(str(tmp_path / "0.png"))

    draw("red", 0).save(tmp_path / "0.png")
    monkeypatch.setattr(classifier, "load_view", load)
    classifier.batch_size = 1
    predictions = classifier.predict_files([(f"{number}.png", None) for number in range(9)], 1)
    assert next(predictions).name == "0.png"
    predictions.close()
    assert read == ["0.png"]
    release.set()


class Fixed:
    """A network that is as sure of everything, and gives both classes the same probability."""

    labels, unsure_below, none, batch_size = ("a", "b"), 0.5, None, 2

    def __init__(self, sureness, probability=0.5):
        self.sureness, self.probability = sureness, probability

    def view(self, image):
        return image

    def rate(self, views):
        n = len(views)
        return Rated(np.full((n, 2), self.probability, np.float32), np.full(n, self.sureness, np.float32))


@pytest.mark.parametrize("format", ["table", "jsonl", "csv"])
def test_answer_that_is_no_number_is_no_prediction(format):
    prediction, file = Classifier(Fixed(np.nan, np.nan)).predict(draw("red", 1), 2), io.StringIO()
    predict.WRITERS[format](file, 2)(prediction)
    assert prediction.error and prediction.error in file.getvalue() and "nan" not in file.getvalue().lower()


def test_sureness_that_is_no_number_is_unsure():
    assert Classifier(Fixed(np.nan)).predict(draw("red", 1), 1).unsure
    assert not Classifier(Fixed(0.5)).predict(draw("red", 1), 1).unsure  # the threshold itself is sure


def test_csv_has_no_answer_where_the_model_is_unsure():
    file = io.StringIO()
    write = predict.WRITERS["csv"](file, 3)
    write(Prediction("a.png", [("red", 0.6), ("=x", 0.4)]))
    write(Prediction("b.png", [("red", 0.5), ("blue", 0.5)], unsure=True))
    write(Prediction("c.png", [], error="the file is empty"))
    sure, unsure, failed = csv.DictReader(file.getvalue().splitlines())
    assert sure["answer"] == sure["label_1"] == "red" and sure["label_3"] == sure["error"] == ""
    assert (sure["label_2"], sure["score_2"]) == ("'=x", "0.400000")
    assert unsure["answer"] == "" and unsure["label_1"] == "red"
    assert failed["answer"] == failed["label_1"] == "" and failed["error"] == "the file is empty"


def test_names_with_line_breaks_stay_in_their_cells_of_csv():
    file = io.StringIO(newline="")
    write = predict.WRITERS["csv"](file, 1)
    for name in ("a\rb.png", "c\nd.png", "e.png"):
        write(Prediction(name, [("re\rd", 0.9)]))
    rows = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert [row["input"] for row in rows] == ["a\rb.png", "c\nd.png", "e.png"] and rows[0]["label_1"] == "re\rd"
    assert "\r\n" not in file.getvalue(), "Windows' standard output would make three characters of it"


def fixed_classifier(monkeypatch) -> Classifier:
    monkeypatch.setattr(Fixed, "start_worker", lambda self: None, raising=False)
    return Classifier(Fixed(0.9))


def test_list_that_is_still_being_written_is_answered(monkeypatch):
    classifier, answered, names = fixed_classifier(monkeypatch), threading.Event(), []
    monkeypatch.setattr(classifier, "load_file", lambda name: draw("red", 1))

    def inputs():
        yield "a.png", None
        assert answered.wait(10), "the next input comes when the first is answered"
        yield "b.png", None

    for prediction in classifier.predict_files(inputs(), 1):
        names.append(prediction.name)
        answered.set()
    assert names == ["a.png", "b.png"]


def test_addresses_are_fetched_together(monkeypatch):
    monkeypatch.setattr("luthier.serving.classifier.count_cores", lambda: 1)
    classifier, together = fixed_classifier(monkeypatch), threading.Barrier(8)
    classifier.batch_size = 16

    def load(url):
        together.wait(10)  # breaks where fewer than eight wait
        return draw("red", 1)

    monkeypatch.setattr(classifier, "load_url", load)
    addresses = [(f"https://example.org/{number}.png", None) for number in range(8)]
    assert [each.error for each in classifier.predict_files(addresses, 1)] == [None] * 8


@pytest.mark.parametrize("text", ["-1", "+1", "-0.5", "-1,5"])
def test_number_is_no_formula(text):
    assert escape_cell(text) == text


@pytest.mark.parametrize("text", ["-1+cmd|' /C calc'!A0", "-1-1", "-", "+a", "=1", "@a", "-1\n"])
def test_formula_is_escaped(text):
    assert escape_cell(text) == f"'{text}"


def test_failure_does_not_wait_for_the_next_input():
    code = (
        "import sys\nfrom luthier.serving.classifier import _with_pauses\n"
        "for entry in _with_pauses(((line, None) for line in sys.stdin), 0.1):\n    if entry is None: sys.exit(3)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdin=subprocess.PIPE) as process:
        try:
            assert process.wait(30) == 3, "its standard input is still open"
        finally:
            process.kill()


def test_error_of_the_inputs_is_raised(monkeypatch):
    def inputs():
        yield "a.png", "there is no such file"
        raise OSError("the list cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        list(fixed_classifier(monkeypatch).predict_files(inputs(), 1))


def test_gpu_that_is_too_old_for_torch_does_not_predict(run, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("luthier.serving.torch_network.lacking_capability", lambda: "compute capability 7.5 or higher")
    assert TorchNetwork(str(run)).device.type == "cpu"


def test_answers_to_many_inputs_are_counted(model, capsys):
    photos = [draw(("red", "blue")[number % 2], number) for number in range(24)]
    folder = model.parent / "many"
    folder.mkdir()
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.png")
    code, output, errors = run_predict(capsys, model, folder, folder / "missing.png", "--format", "jsonl")
    found = [json.loads(line) for line in output.splitlines()]
    answers = [line.get("answer") or ("no prediction" if "error" in line else "unsure") for line in found]
    last = [line for line in errors.splitlines() if line.startswith("answers: ")]
    assert code == 1 and len(found) == 25 and len(last) == 1
    counts = [part.rpartition(" ") for part in last[0].removeprefix("answers: ").split(", ")]
    assert {name: int(count) for name, _, count in counts} == dict(Counter(answers))
    assert [int(count) for *_, count in counts] == sorted((int(count) for *_, count in counts), reverse=True)
    _, _, errors = run_predict(capsys, model, folder / "0.png")
    assert "answers:" not in errors, "a few are read one by one"


def test_answers_of_many_classes_are_summed_up():
    counted = predict.count_in_words(Counter({f"class {number}": 100 - number for number in range(30)}))
    assert counted.startswith("class 0 100, class 1 99, ") and counted.endswith(f"others {sum(range(71, 81))}")


def test_count_of_the_answers_is_never_among_the_predictions(model, monkeypatch, capsys, tmp_path):
    for number in range(20):
        draw("red", number).save(tmp_path / f"{number}.png")
    monkeypatch.setattr("sys.stderr", None)
    predict.main([str(model), str(tmp_path), "--format", "jsonl"])
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 20


def test_class_of_the_name_of_a_refusal_is_counted_by_itself():
    assert predict.answer_of(Prediction("a.png", [("unsure", 0.9)])) == "unsure (the class)"
    assert predict.answer_of(Prediction("a.png", [("heron", 0.4)], True)) == "unsure"


@pytest.mark.parametrize(
    ("name", "start"), [("a.csv", "input,answer,label_1"), ("a.jsonl", '{"input": '), ("a.txt", "/")]
)
def test_ending_of_the_output_decides_the_format(model, capsys, tmp_path, name, start):
    draw("red", 1).save(tmp_path / "a.png")
    assert run_predict(capsys, model, tmp_path / "a.png", "--output", tmp_path / name)[0] == 0
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_options_may_be_written_with_hyphens():
    args = predict.build_parser().parse_args(["m", "a", "--top-k", "3", "--always-answer", "--allow-private-urls"])
    assert (args.top_k, args.always_answer, args.allow_private_urls) == (3, True, True)


def test_class_of_images_of_anything_else_is_no_answer():
    class Refusing(Fixed):
        none = 1

        def rate(self, views):
            return Rated(np.tile(np.float32([0.3, 0.7]), (len(views), 1)), super().rate(views).sureness)

    refused = Classifier(Refusing(0.9)).predict(draw("red", 1), 2)
    assert refused.unsure and refused.none and refused.top[0][0] == "b"
    always = Classifier(Refusing(0.9), always_answer=True).predict(draw("red", 1), 2)
    assert not always.unsure and not always.none and always.top == [("a", pytest.approx(0.3)), ("b", 0.0)]
    sure = Classifier(Fixed(0.9)).predict(draw("red", 1), 2)
    assert not sure.unsure and not sure.none
