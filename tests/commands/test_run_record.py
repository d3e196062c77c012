"""The record of a run: its settings as they were at the start, and its duration."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT, draw_folder
from datasets import Dataset

import train
from luthier.arguments import parse_arguments
from luthier.reporting import results
from luthier.reporting.results import _name_on_hub, warn_if_learned
from luthier.scoring.refit import Refitted
from luthier.training.safe_trainer import SafeTrainer


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_config_that_changes_during_the_run_does_not_change_its_record(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=5)
    config = Path("tiny.yaml")
    config.write_text("model_name: simple_cnn\nnum_train_epochs: 1\n")
    args = ["tiny.yaml", "--data_dir", "images", "--output_dir", "out", "--max_steps", "1", "--refit", "none"]
    settings = parse_arguments(args).run_args.settings
    training_step = SafeTrainer.training_step

    def step_with_change(self, *arguments, **options):
        config.write_text("model_name: simple_cnn\nnum_train_epochs: 9\n")
        if change == "deleted":
            config.unlink()
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(SafeTrainer, "training_step", step_with_change)
    train.main(args)
    record = json.loads(Path("out/metrics.json").read_text())
    assert record["settings"] == settings and record["augmentation"] == "flip_crop"
    assert Path("out/README.md").exists()


@pytest.mark.slow
def test_seconds_cover_the_imports_before_the_arguments_are_parsed(tmp_path):
    draw_folder(tmp_path / "images", per_class=5)
    code = f"""
        import importlib.abc, sys, time
        sys.path.insert(0, {str(PROJECT)!r})

        class SlowImport(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "luthier.arguments":
                    time.sleep(3)

        sys.meta_path.insert(0, SlowImport())
        import train
        options = ["--model_name", "simple_cnn", "--num_train_epochs", "1", "--output_dir", "out"]
        train.main(["--data_dir", "images", *options])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seconds = json.loads((tmp_path / "out/metrics.json").read_text())["seconds"]
    assert seconds["start"] >= 3
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet18.tv_in1k", "timm/resnet18.tv_in1k"),
        ("clients/alice", None),  # a folder, whose name would be published
        ("/srv/clients/alice", None),
        ("efficientnet_lite0", None),
        ("", None),
    ],
)
def test_base_model_of_a_card_is_never_a_folder_of_this_machine(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    Path("clients/alice").mkdir(parents=True)
    assert _name_on_hub(SimpleNamespace(config=SimpleNamespace(name_or_path=name))) == expected


def test_model_that_has_learned_from_the_images_that_judge_it_is_named(tmp_path, capsys):
    splits = {split: Dataset.from_dict({"digest": [letter * 64]}) for split, letter in (("train", "a"), ("test", "b"))}
    (tmp_path / "learned_from.txt").write_text(f"{'a' * 16}\n")
    nothing = {"learned_from": 0, "learned_in_test": 0}
    assert warn_if_learned(str(tmp_path), splits) == warn_if_learned("me/model", splits) == nothing
    assert capsys.readouterr().out == ""
    (tmp_path / "learned_from.txt").write_text(f"{'a' * 16}\n{'b' * 16}\n")
    assert warn_if_learned(str(tmp_path), splits) == {"learned_from": 1, "learned_in_test": 1}
    assert "has learned from, or was chosen by, 1 of 1 test or validation image: its score" in capsys.readouterr().out
    splits["validation"] = splits["train"]
    assert warn_if_learned(str(tmp_path), splits) == {"learned_from": 2, "learned_in_test": 1}


@pytest.mark.parametrize(("refit", "of_fold"), [(False, False), (True, False), (False, True)])
def test_each_model_is_saved_with_its_own_bank_and_what_it_has_learned_from(tmp_path, monkeypatch, refit, of_fold):
    told: list[tuple] = []
    replaced = {
        "describe_in_config": lambda model, familiarity: told.append((model, familiarity)),
        "save_model": lambda model, processor, folder: told.append((model, folder.name)),
        "save_bank": lambda folder, familiarity: told.append((folder.name, familiarity)),
        "copy_permissions_to_weights": lambda path: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(results, name, value)
    digests = {"train": ["t" * 64], "validation": ["v" * 64], "test": ["x" * 64]}
    experiment = SimpleNamespace(
        splits={split: Dataset.from_dict({"digest": each}) for split, each in digests.items()},
        view=SimpleNamespace(image_processor=None),
    )
    if of_fold:  # the validation split that was cut for it is among the images that the other folds test
        experiment.splits = {"test": Dataset.from_dict({"digest": [each[0] for each in digests.values()]})}
    answers = SimpleNamespace(familiarity="its bank")
    known = {"learned_from": digests["train"], "chosen_by": digests["validation"]}
    result = SimpleNamespace(model="scored", answers=answers, **known)
    refitted = Refitted("refit", "another bank", ("train", "validation", "test")) if refit else None
    (tmp_path / "out").mkdir()
    results.save_models(tmp_path / "out", experiment, result, refitted)
    expected = {"scored": ("scored", "its bank"), "out": ("refit", "another bank")}
    for folder, (model, bank) in (expected if refit else {"out": expected["scored"]}).items():
        assert [told.pop(0) for _ in range(3)] == [(model, bank), (model, folder), (folder, bank)]
    learned = [path.read_text().split() for path in sorted(tmp_path.rglob("learned_from.txt"))]
    both, everything = (sorted(letter * 16 for letter in letters) for letters in ("tv", "tvx"))
    assert not told and learned == ([everything, both] if refit else [both])
