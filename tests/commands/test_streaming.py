"""train.py --streaming: the outputs of other runs, exact resumption, every image once in an epoch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, draw_folder
from safetensors.torch import load_file

import prepare
from export import images_of_run
from train import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, capsys):
    """Shards of drawn images, 66 of them for training."""
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=40)
    prepare.main(["images", "shards", "--images", "30"])
    capsys.readouterr()
    return tmp_path


def flags(model: Path | str, *more: str) -> list[str]:
    fixed = ["--data_dir", "shards", "--streaming", "--model_name", str(model), "--disable_tqdm", "1"]
    return [*fixed, "--per_device_train_batch_size", "4", "--num_train_epochs", "2", *more]


@pytest.mark.slow
def test_run_that_streams_writes_what_others_do(timm_checkpoint, capsys):
    main([*flags(timm_checkpoint), "--recipe", "full_from_probe", "--output_dir", "out", "--learning_curve"])
    told = capsys.readouterr().out
    assert "66 training images, read in blocks" in told and "not done: the images are streamed" in told
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["data"]["splits"]["train"] == {"n": 66, "per_class": {"blue": 22, "green": 22, "red": 22}}
    assert metrics["data"]["sample"] == 66 and metrics["test"]["n"] == 24
    assert [heat["step"] for heat in metrics["race"]["heats"]][-1] == 34 and metrics["baselines"]["linear_probe"]
    assert metrics["refit"]["scored_on"] == 66 and metrics["refit"]["done"] is False
    assert "Findings in a sample of 66 training images" in Path("out/report.html").read_text(encoding="utf-8")
    test, others = images_of_run(Path("out"), metrics["data"]["labels"])  # as `export.py` asks for them
    assert (
        len(test.names) == 24
        and others.names
        and "stream" in json.loads(Path("out/images.json").read_text())["options"]
    )
    assert {"report.html", "README.md", "predictions.csv", "audit.json", "model.safetensors", "images.json"} <= {
        path.name for path in Path("out").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumes_exactly_within_an_epoch(timm_checkpoint, capsys, workers):
    options = flags(timm_checkpoint, "--recipe", "full", "--keep", "trained", "--dataloader_num_workers", workers)
    options += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "99"]
    main([*options, "--output_dir", "whole"])
    for step in (8, 30):  # of 34
        shutil.copytree(f"whole/checkpoint-{step}", f"cut{step}/checkpoint-{step}")
        main([*options, "--output_dir", f"cut{step}", "--resume_from_checkpoint", "auto"])
        assert f"resume   from cut{step}/checkpoint-{step}\n" in capsys.readouterr().out
        whole, resumed = (load_file(f"{name}/model.safetensors") for name in ("whole", f"cut{step}"))
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_run_is_not_resumed_with_files_in_another_order(timm_checkpoint, capsys):
    options = flags(timm_checkpoint, "--recipe", "full", "--keep", "trained", "--max_steps", "2", "--refit", "none")
    options += ["--save_strategy", "steps", "--save_steps", "1"]
    main([*options, "--output_dir", "whole"])
    shutil.copytree("whole/checkpoint-1", "cut/checkpoint-1")
    first, *_, last = sorted(Path("shards").glob("train-*.parquet"))
    first.rename("first")
    last.rename(first)
    Path("first").rename(last)
    with pytest.raises(SystemExit) as exit_info:
        main([*options, "--output_dir", "cut", "--resume_from_checkpoint", "auto"])
    message = capsys.readouterr().err
    assert exit_info.value.code == 2 and "cut/checkpoint-1 is of other images or files" in message


@pytest.mark.slow
def test_two_processes_train_on_every_image_once_though_they_are_interrupted(folder):
    command = [sys.executable, "-m", "benchmarks.streaming", "--images", "2000", "--batch", "4"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "images that were left out or came twice: 0" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data_dir", "images"],
            "--streaming reads Parquet files and WebDataset archives (.tar), and images has others",
        ),
        ([], "--streaming reads Parquet files and WebDataset archives: name them with --data_dir or --dataset_name"),
        (["--data_dir", "shards", "--folds", "3"], "--folds needs all images before the training"),
        (["--data_dir", "shards", "--fold", "1/3"], "--fold needs all images before the training"),
        (["--data_dir", "shards", "--on_bad_image", "error"], "--on_bad_image error needs all images"),
        (["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_streamed_gives_one_message(capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["--streaming", "--model_name", "simple_cnn", *options])
    told = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in told and "Traceback" not in told
