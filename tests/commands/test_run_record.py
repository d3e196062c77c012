"""The record of a run: its settings as they were at the start, and its duration."""

import json
import time
from pathlib import Path

import pytest
from conftest import draw_folder

import train
from luthier.arguments import parse_arguments
from luthier.training.trainer import SafeTrainer


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_config_that_changes_during_the_run_does_not_change_its_record(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=5)
    config = Path("tiny.yaml")
    config.write_text("model_name: simple_cnn\nnum_train_epochs: 1\n")
    args = ["tiny.yaml", "--data_dir", "images", "--output_dir", "out"]
    settings = parse_arguments(args).run_args.settings
    training_step = SafeTrainer.training_step

    def step_with_change(self, *arguments, **options):
        config.write_text("model_name: simple_cnn\nnum_train_epochs: 9\n")
        if change == "deleted":
            config.unlink()
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(SafeTrainer, "training_step", step_with_change)
    train.main(args)
    assert json.loads(Path("out/metrics.json").read_text())["settings"] == settings
    assert Path("out/README.md").exists()


def test_seconds_cover_the_whole_process(tmp_path, launch):
    """Only the start of the interpreter is left out. The imports before the arguments are parsed take two seconds."""
    draw_folder(tmp_path / "images", per_class=5)
    args = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--output_dir", "out"]
    start = time.perf_counter()
    result = launch("train.py", *args, cwd=tmp_path)
    duration = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    seconds = json.loads((tmp_path / "out/metrics.json").read_text())["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.01)
    assert duration * 0.75 < seconds["total"] < duration
