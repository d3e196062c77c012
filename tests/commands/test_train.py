"""Complete runs of train.py: what they write and print, and bad input that is refused."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, draw_folder, same
from torch.utils.data import default_collate
from transformers import AutoModelForImageClassification, Trainer, pipeline

import train
from data import evaluation_rows, load_splits, prepare
from luthier.arguments import parse_arguments
from luthier.images.views import EvaluationView
from luthier.machine import configure_cpu
from luthier.parsing import describe_command
from luthier.processes import available_cores
from luthier.reporting.console import learning_curve_in_words
from luthier.terminal import quote
from luthier.training.trainer import concatenate_batches
from models import build_model

ACCELERATE = ("accelerate", "launch", "--config_file", str(PROJECT / "accelerate_config.yaml"))
FILES = {
    "README.md", "audit.json", "config.json", "confusion_matrix.png", "confusion_matrix_rows.png", "coverage.png",
    "curves.png", "familiarity.safetensors", "images.json", "learned_from.txt", "metrics.json", "model.safetensors",
    "models.py", "predictions.csv",
    "preprocessor_config.json", "race.json", "refit", "reliability.png", "report.html", "scored",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, launch):
    """One run of three epochs on drawn images; the folder it ran in and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    draw_folder(folder / "my images", per_class=20)
    settings = (
        "model_name: simple_cnn",
        "num_train_epochs: 9",
        "per_device_train_batch_size: 4",
        "learning_rate: 5e-3",
    )
    (folder / "tiny.yaml").write_text("\n".join(settings))
    arguments = ["tiny.yaml", "--data_dir", "my images", "--num_train_epochs", "3"]
    result = launch("train.py", *arguments, cwd=folder, launcher=ACCELERATE)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_run_leaves_the_images_as_they_were(run, tmp_path):
    folder, _ = run
    after, before = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (folder / "my images", draw_folder(tmp_path / "again", per_class=20))
    )
    assert after == before


def test_outputs_are_complete(run):
    folder, _ = run
    output = folder / "outputs/tiny"
    assert {path.name for path in output.iterdir() if not path.name.startswith("checkpoint-")} == FILES
    metrics = json.loads((output / "metrics.json").read_text())
    for split, n in (("validation", 15), ("test", 12)):
        scores = metrics[split]
        assert scores["n"] == n and 0 <= scores["accuracy_ci95"][0] <= scores["accuracy"] <= scores["accuracy_ci95"][1]
        assert set(scores["per_class"]) == {"blue", "green", "red"} and 0 <= scores["macro_f1"] <= 1
    assert metrics["test"]["accuracy"] > 0.6  # three colours are easy
    assert metrics["baselines"]["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert set(metrics["seconds"]) == {
        "start",
        "load",
        "prepare",
        "features",
        "data",
        "train",
        "evaluate",
        "save",
        "refit",
        "total",
    }
    assert metrics["data"]["splits"]["train"] == {"n": 33, "per_class": {"blue": 11, "green": 11, "red": 11}}
    assert re.fullmatch(r"[0-9a-f]{64}", metrics["data"]["fingerprint"])
    assert metrics["seeds"] == {"seed": 42, "split_seed": 1, "fold": None} and "torch" in metrics["versions"]
    assert metrics["command"] == "accelerate launch train.py tiny.yaml --data_dir 'my images' --num_train_epochs 3"
    epochs = [entry for entry in metrics["history"] if "eval_accuracy" in entry]
    assert len(epochs) == 3 and any("train_accuracy" in entry for entry in metrics["history"])
    best = min(epochs, key=lambda entry: entry["eval_calibrated_loss"])
    assert metrics["validation"]["accuracy"] == pytest.approx(best["eval_accuracy"])
    assert metrics["audit"] == dict.fromkeys(metrics["audit"], 0) | {"suspect_labels": None}


def test_weights_can_be_read_by_whoever_can_read_the_rest(run):
    folder, _ = run
    output = folder / "outputs/tiny"
    weights = [*output.glob("*.safetensors"), *output.glob("scored/*.safetensors")]
    assert len(weights) > 1 and {path.stat().st_mode for path in weights} == {(output / "config.json").stat().st_mode}


def test_outputs_do_not_reveal_the_paths_of_the_machine(run, monkeypatch):
    folder, _ = run
    for path in (folder / "outputs/tiny").glob("*.*"):
        assert str(folder).encode() not in path.read_bytes(), path.name
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    args = ["--data_dir", "/home/me/my images", "--output_dir=/mnt/x/run", "--model_name", "timm/resnet18.tv_in1k"]
    expected = "python train.py --data_dir 'my images' --output_dir=run --model_name timm/resnet18.tv_in1k"
    assert describe_command("train.py", args) == expected
    assert describe_command("train.py", ["--group_by", r"/(\d+)_\w+"]) == r"python train.py --group_by '/(\d+)_\w+'"
    command = describe_command("train.py", [r"--model_name=C:\me\secret\model", "--group_by", r"([12])\d_"])
    assert command == r"python train.py --model_name=model --group_by '([12])\d_'"
    command = describe_command(
        "train.py",
        ["--data_dir", "clients/alice/scans", "--data_dir=./home/bob", "--model_name=simple_cnn", "--seed", "3"],
    )
    assert command == "python train.py --data_dir scans --data_dir=bob --model_name=simple_cnn --seed 3"
    command = describe_command("train.py", ["--data_dir", ".", "--output_dir", "../x"])
    assert command == "python train.py --data_dir . --output_dir x"
    assert "alice" not in describe_command("train.py", ["--data_dir", r"\\nas\alice_scans"])


def test_command_keeps_long_patterns_and_every_class_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox/cub").mkdir(parents=True)
    pattern = f"({'|'.join(f'patient{number}' for number in range(50))})/"  # longer than the name of a file may be
    for option, values in (("--group_by", [pattern]), ("--run_name", [pattern]), ("--label_names", ["a", "fox/cub"])):
        assert describe_command("train.py", [option, *values]).endswith(quote(option, *values))


def test_saved_model_is_calibrated(run):
    """The temperature is in the weights: the probabilities of `pipeline` are those of the run."""
    folder, _ = run
    output = folder / "outputs/tiny"
    metrics = json.loads((output / "metrics.json").read_text())
    temperature = metrics["calibration"]["temperature"]
    assert temperature != 1
    classify = pipeline("image-classification", model=str(output / "scored"), trust_remote_code=True, top_k=3)
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    answers = [{a["label"]: a["score"] for a in classify(str(folder / "my images" / row["name"]))} for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        assert answer[row["label"]] == pytest.approx(float(row["probability_of_label"]), abs=1e-5)
    log_loss = -sum(math.log(answer[row["label"]]) for row, answer in zip(rows, answers, strict=True)) / len(rows)
    assert log_loss == pytest.approx(metrics["test"]["log_loss"], abs=1e-4)
    assert metrics["calibration"]["before"]["test"]["log_loss"] != pytest.approx(log_loss, abs=1e-3)


@pytest.mark.slow
def test_run_with_tensorboard_fold_learning_curve_and_trained_weights(timm_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=20)
    args = [
        "--data_dir",
        "images",
        "--model_name",
        str(timm_checkpoint),
        "--num_train_epochs",
        "1",
        "--keep",
        "trained",
    ]
    args += [
        "--recipe",
        "full",
        "--learning_rate",
        "1",
        "--fold",
        "2/5",
        "--learning_curve",
        "--report_to",
        "tensorboard",
    ]
    train.main([*args, "--output_dir", "out"])
    output = capsys.readouterr().out
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert f"curve    {learning_curve_in_words(metrics['learning_curve'])}\n" in output
    assert "kept     full, the trained weights" in output
    assert metrics["recipe"]["kept"] == "the trained weights" and metrics["seeds"]["fold"] == "2/5"
    assert (
        metrics["test"]["n"] == 12 and metrics["learning_curve"]["now"]["n"] == metrics["data"]["splits"]["train"]["n"]
    )
    assert list(Path().rglob("events.out.tfevents.*"))
    assert "learning_curve.png" in Path("out/README.md").read_text()


def test_terminal_output_is_short(run):
    _, result = run
    # Other tests may have prepared the same images before.
    lines = [line for line in result.stdout.splitlines() if not line.startswith("reuse ")]
    assert [line.split()[0] for line in lines if line[:1].strip() and line[0].isalpha()] == [
        "data", "model", "device", "audit", "epoch", "trained", "kept", "refit", "test", "time", "saved", "next",
    ]  # fmt: skip
    assert len(lines) <= 22 and max(map(len, lines)) <= 120
    assert "interval" in result.stdout and "trained" in result.stdout
    assert "Warning" not in result.stderr and "[transformers]" not in result.stderr, result.stderr


def test_scored_model_gives_the_scores_of_the_run(run):
    folder, _ = run
    output = folder / "outputs/tiny"
    metrics = json.loads((output / "metrics.json").read_text())
    classify = pipeline("image-classification", model=str(output / "scored"), trust_remote_code=True)
    correct = 0
    dataset = load_splits(data_dir=str(folder / "my images"))[0]["test"]
    for row in dataset:
        answer = classify(row["image"]["path"], top_k=1)[0]["label"]
        correct += answer == dataset.features["label"].int2str(row["label"])
    assert correct / metrics["test"]["n"] == metrics["test"]["accuracy"]


@pytest.mark.slow
def test_plain_command_makes_no_network_call(tmp_path):
    code = f"""
        import runpy, socket, sys

        def refuse(*arguments, **options):
            print("NETWORK", arguments, file=sys.stderr)
            raise OSError("no network here")

        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        sys.argv = ["train.py", "--max_steps", "1", "--image_size", "32"]
        sys.path.insert(0, {str(PROJECT)!r})
        runpy.run_path({str(PROJECT / "train.py")!r}, run_name="__main__")
    """
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and "NETWORK" not in result.stderr, result.stderr
    assert "OpenMoji" in Path(tmp_path, "outputs/efficientnet_lite0_openmoji/README.md").read_text()


@pytest.mark.slow
def test_second_run_takes_the_next_name_and_leaves_the_first_unchanged(run, launch):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "outputs/tiny").rglob("*")}
    args = ["tiny.yaml", "--data_dir", "my images", "--num_train_epochs", "1"]
    assert launch("train.py", *args, cwd=folder).returncode == 0
    assert {path.name for path in (folder / "outputs/tiny-2").iterdir()} >= FILES
    refused = launch("train.py", *args, "--output_dir", "outputs/tiny", cwd=folder)
    assert refused.returncode == 2 and "already holds something" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "outputs/tiny").rglob("*")} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data_dir", "nowhere"], "nowhere is not a folder"),
        (["--data_dir", "empty"], "no images in class folders"),
        (["--data_dir", "single"], "the one class 'red'"),
        (["--data_dir", "few"], "too few"),
        (["--data_dir", "broken"], "that cannot be read: 1"),
        (["--data_dir", "good", "--model_name", "simple_cnn", "--recipe", "lp_ft"], "needs a pretrained backbone"),
        (["--recipe", "lpft"], "'lpft'"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["typo.yaml"], "unknown key 'model_nam'; did you mean 'model_name'"),
        (["--data_dir", "good", "--model_name", "efficientnet"], "unknown model 'efficientnet'"),
        (["--data_dir", "good", "--model_name", "nobody/nothing"], "the Hub cannot be reached for a model"),
        (["--dataset_name", "nobody/nothing"], "the Hub cannot be reached for a dataset"),
        (["--data_dir", "good", "--model_name", "simple_cnn", "--image_size", "64"], "does not take images of 64 px"),
    ],
)
def test_bad_input_gives_one_message(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    draw_folder(Path("single"), classes=("red",))
    draw_folder(Path("few"), per_class=2)
    draw_folder(Path("good"), per_class=4)
    draw_folder(Path("broken"), per_class=4)
    Path("broken/red/broken.jpg").write_bytes(b"\xff\xd8\xff")
    Path("typo.yaml").write_text("model_nam: simple_cnn\n")
    with pytest.raises(SystemExit) as exit_info:
        train.main(args)
    errors = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message in errors and "Traceback" not in errors
    assert sum(text.startswith("error: ") for text in errors.splitlines()) == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize("argument", ["--help", "--learning_rat=1", "typo.yaml"])
def test_arguments_are_checked_before_large_libraries_are_imported(tmp_path, argument):
    (tmp_path / "typo.yaml").write_text("model_nam: simple_cnn\n")
    command = [sys.executable, "-X", "importtime", str(PROJECT / "train.py"), argument]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    imported = {text.split("|")[2].strip() for text in result.stderr.splitlines() if text.startswith("import time:")}
    assert result.returncode == (0 if argument == "--help" else 2) and "luthier.arguments" in imported
    assert not {"data", "models", "datasets", "timm", "torchvision", "evaluate", "matplotlib", "sklearn"} & imported


@pytest.fixture(scope="module")
def vit_run(vit_checkpoint, tmp_path_factory):
    """A run of four epochs in which the last is not the best; it keeps two checkpoints: its folder and arguments."""
    folder = tmp_path_factory.mktemp("vit")
    draw_folder(folder / "images", per_class=10)
    args = ["--data_dir", "images", "--model_name", str(vit_checkpoint), "--optim", "sgd", "--learning_rate", "12"]
    args += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--num_train_epochs", "4"]
    args += ["--save_total_limit", "1", "--augmentation", "none", "--recipe", "full", "--seed", "1"]
    args += ["--per_device_train_batch_size", "32", "--keep", "trained", "--refit", "none"]
    args += ["--metric_for_best_model", "loss"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*args, "--output_dir", "out"])
    return folder, args


def weights(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


def test_best_epoch_of_a_vit_is_restored_completely(vit_run, monkeypatch):
    """The Trainer's own restore leaves two thirds of a ViT's weights as they were in the last epoch."""
    monkeypatch.chdir(vit_run[0])
    losses = {
        e["step"]: e["eval_loss"]
        for e in json.loads(Path("out/metrics.json").read_text())["history"]
        if "eval_loss" in e
    }
    best, last = min(losses, key=losses.get), max(losses)
    assert best != last
    # The head is left out, because it is calibrated at the end.
    backbone = {name: tensor for name, tensor in weights("out").items() if not name.startswith("classifier")}
    assert same(backbone, weights(f"out/checkpoint-{best}"))
    assert not same(backbone, weights(f"out/checkpoint-{last}"))


def test_vit_resumed_after_an_epoch_ends_like_an_uninterrupted_run(vit_run, monkeypatch, capsys):
    folder, args = vit_run
    monkeypatch.chdir(folder)
    steps = sorted(int(path.name.split("-")[1]) for path in Path("out").glob("checkpoint-*"))
    best, last = steps  # all others are removed
    train.main([*args, "--output_dir", "again", "--resume_from_checkpoint", f"out/checkpoint-{best}"])
    assert f"resume   from out/checkpoint-{best}\n" in capsys.readouterr().out
    assert same(weights(f"again/checkpoint-{last}"), weights(f"out/checkpoint-{last}"))
    assert same(weights("again"), weights("out")), "the best weights are from before the interruption"


def test_progress_bars_can_be_turned_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=5)
    train.main(
        ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--disable_tqdm", "1"]
    )
    captured = capsys.readouterr()
    assert "macro F1" in captured.out and "train_runtime" not in captured.out and "it/s" not in captured.err


def test_cpu_threads_are_restored(monkeypatch, tmp_path):
    """`accelerate launch` sets OMP_NUM_THREADS=1 if its config does not say that the machine has no GPU."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    training_args = parse_arguments([]).training_args
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    try:
        torch.set_num_threads(1)
        configure_cpu(training_args.device)
        assert torch.get_num_threads() == available_cores()
        assert training_args.dataloader_pin_memory is False
    finally:
        torch.set_num_threads(threads)


def test_cpu_threads_are_no_more_than_the_cores_of_a_process(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("luthier.machine.available_cores", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # as accelerate sets it, by the cores of the whole machine
    try:
        torch.set_num_threads(2)
        configure_cpu(torch.device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_trainer_gives_the_logits_of_the_model_on_single_images(timm_checkpoint, images, tmp_path):
    """The Trainer evaluates in batches; the model sees the evaluation view of one image at a time."""
    model, image_processor = build_model(str(timm_checkpoint), {0: "blue", 1: "green", 2: "red"})
    view = EvaluationView(image_processor)
    dataset = evaluation_rows(prepare(load_splits(data_dir=str(images))[0], view)["test"], view)
    training_args = parse_arguments(["--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1"]).training_args
    trainer = Trainer(model=model, args=training_args, data_collator=default_collate, eval_dataset=dataset)
    batched = torch.from_numpy(concatenate_batches(trainer.predict(dataset).predictions))
    with torch.no_grad():
        single = torch.cat([model.eval()(row["pixel_values"][None]).logits for row in dataset])
    torch.testing.assert_close(batched, single, atol=1e-5, rtol=1e-5)
