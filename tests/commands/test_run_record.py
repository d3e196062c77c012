"""What a run records of itself: its settings as they were when it began, and all of its seconds."""

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
    line = ["tiny.yaml", "--data_dir", "images", "--output_dir", "out"]
    settings = parse_arguments(line).run_args.settings
    step = SafeTrainer.training_step

    def changing(self, *arguments, **options):
        config.write_text("model_name: simple_cnn\nnum_train_epochs: 9\n")
        if change == "deleted":
            config.unlink()
        return step(self, *arguments, **options)

    monkeypatch.setattr(SafeTrainer, "training_step", changing)
    train.main(line)
    assert json.loads(Path("out/metrics.json").read_text())["settings"] == settings
    assert Path("out/README.md").exists()


def test_seconds_are_those_of_the_whole_process(tmp_path, launch):
    """But for the interpreter's own start: the imports before the arguments are parsed take two seconds."""
    draw_folder(tmp_path / "images", per_class=5)
    line = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--output_dir", "out"]
    begin = time.perf_counter()
    ran = launch("train.py", *line, cwd=tmp_path)
    whole = time.perf_counter() - begin
    assert ran.returncode == 0, ran.stderr
    seconds = json.loads((tmp_path / "out/metrics.json").read_text())["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.01)
    assert whole * 0.75 < seconds["total"] < whole
