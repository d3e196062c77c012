"""The output directory of a run: locked against a second run, created for the run, removed if it stays empty."""

import errno
import json
import logging
import subprocess
import sys

import pytest
from conftest import PROJECT

import luthier.output_dir as module
from luthier.errors import UserError
from luthier.output_dir import (
    check_folds,
    claim_output_dir,
    describe_if_ended,
    free_output_dir,
    has_ended,
    is_of_run,
)


def test_second_run_is_refused_until_the_first_is_killed(tmp_path):
    output_dir = tmp_path / "outputs/run"
    code = f"""
import sys; sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
from luthier.output_dir import claim_output_dir
with claim_output_dir(Path({str(output_dir)!r}), continues=False):
    print("locked", flush=True); sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first_run:
        assert first_run.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another run is writing into"), claim_output_dir(output_dir, False):
            pass
        first_run.kill()
        first_run.wait()
    assert free_output_dir(str(output_dir), "run", None) == output_dir  # the lock of the killed run does not count
    with claim_output_dir(output_dir, continues=False):
        (output_dir / "something").touch()
    with pytest.raises(UserError, match="has just written"), claim_output_dir(output_dir, continues=False):
        pass
    assert free_output_dir(str(output_dir), "run", "auto") == output_dir  # such as a log
    (output_dir / "banjo").mkdir()
    with pytest.raises(UserError, match="holds folders, but no run that could go on"):
        free_output_dir(str(output_dir), "run", "auto")
    (output_dir / "checkpoint-5").mkdir()
    assert free_output_dir(str(output_dir), "run", "auto") == output_dir
    with claim_output_dir(output_dir, continues=True):
        pass
    assert {path.name for path in output_dir.iterdir()} == {"something", "banjo", "checkpoint-5"}


def test_new_directory_is_removed_if_the_run_fails(tmp_path):
    with pytest.raises(KeyError), claim_output_dir(tmp_path / "outputs/run", continues=False):
        (tmp_path / "outputs/run/fold-1").mkdir()
        raise KeyError
    assert not (tmp_path / "outputs").exists() and tmp_path.exists()


def test_empty_directory_from_before_the_run_is_kept(tmp_path):
    (tmp_path / "outputs/run").mkdir(parents=True)
    with pytest.raises(KeyError), claim_output_dir(tmp_path / "outputs/run", continues=False):
        raise KeyError
    assert list((tmp_path / "outputs/run").iterdir()) == []


def test_directory_that_cannot_be_removed_does_not_hide_the_error(tmp_path, monkeypatch):
    """A mount point cannot be removed."""

    def busy(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(module.Path, "rmdir", busy)
    with pytest.raises(SystemExit) as exit_info, claim_output_dir(tmp_path / "outputs/run", continues=False):
        sys.exit(143)
    assert exit_info.value.code == 143


def test_directory_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot create --output_dir"),
        claim_output_dir(tmp_path / "file/run", continues=False),
    ):
        pass


def test_directory_that_cannot_be_written_is_refused_unless_its_run_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "access", lambda *_: False)  # as on a disk that is mounted to be read
    with pytest.raises(UserError, match="cannot be written"), claim_output_dir(tmp_path, continues=True):
        pass
    for name in ("metrics.json", "README.md", "model.safetensors"):
        (tmp_path / name).touch()
    with claim_output_dir(tmp_path, continues=True):
        pass


def test_disk_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    with caplog.at_level(logging.WARNING), claim_output_dir(tmp_path / "run", continues=False):
        pass
    assert "cannot be locked against a second run" in caplog.text


def test_run_has_ended_when_model_card_metrics_and_weights_exist(tmp_path):
    (tmp_path / "README.md").touch()
    assert not has_ended(tmp_path)
    (tmp_path / "metrics.json").touch()
    (tmp_path / "familiarity.safetensors").touch()
    assert not has_ended(tmp_path)  # a mounted bucket may upload the weights last
    (tmp_path / "model.safetensors").touch()
    assert has_ended(tmp_path)
    (tmp_path / "metrics.json").write_text('{"settings": "a"}')
    said = describe_if_ended(tmp_path, "a", None)  # of an earlier version
    assert said.endswith("If the images have changed, give another --output_dir")
    assert "to train again, give another --output_dir" in describe_if_ended(tmp_path, "b", None)
    for damaged in ("", '{"settings": ', "null"):
        (tmp_path / "metrics.json").write_text(damaged)
        with pytest.raises(UserError, match=r"metrics.json is damaged \(.+ --resume_from_checkpoint auto"):
            describe_if_ended(tmp_path, "a", None)


def test_run_goes_on_with_folds_or_without_as_it_was_begun(tmp_path):
    check_folds(tmp_path / "nowhere", 3)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/race.json").touch()
    (tmp_path / "folds/fold-1").mkdir(parents=True)
    check_folds(tmp_path / "folds", None)  # nothing was begun
    (tmp_path / "folds/fold-1/race.json").touch()
    for name, right, wrong, how in (("alone", None, 3, "without"), ("folds", 3, None, "with")):
        check_folds(tmp_path / name, right)
        with pytest.raises(UserError, match=f"{name} was begun {how} --folds: go on with it as it was"):
            check_folds(tmp_path / name, wrong)


def test_run_that_the_time_limit_cut_short_goes_on_with_more_time(tmp_path):
    for name in ("README.md", "model.safetensors", "race.json"):
        (tmp_path / name).touch()
    ended, cut = {"race": {"ended": "its last heat"}}, {"race": {"ended": "the time limit", "heats": [{}]}}
    unlimited, no_refit = {**cut, "time_limit": None}, {**ended, "refit": {"refusal": "the time limit"}}

    def left(metrics, settings, limit):
        (tmp_path / "metrics.json").write_text(json.dumps({"time_limit": 5, "settings": "a", **metrics}))
        return not describe_if_ended(tmp_path, settings, limit)

    assert left(cut, "a", 6)
    assert "With a larger --time_limit it goes on" in describe_if_ended(tmp_path, "a", 5)
    assert left(cut, "a", None) and left(no_refit, "a", 6)
    assert not left(cut, "a", 5) and not left(unlimited, "a", None) and not left(ended, "a", 6)
    assert not left(cut, "b", 6)  # other options would lose its results
    (tmp_path / "race.json").unlink()
    assert not left(cut, "a", 6)
    assert left(no_refit, "a", 6), "where nothing was trained, nothing is needed to go on"


def test_files_of_a_run_are_known_and_others_are_not(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").touch()
    own = ["metrics.json", "model.safetensors", "model.safetensors.index.json", "onnx/model.onnx", "curves.png"]
    own += ["README.md", "audit.html", "audit.json", "backbone.txt", "export.json", "images.json", "learned_from.txt"]
    own += ["models.py", "predictions.csv", "preprocessor_config.json", "race.json", "report.html"]
    own += ["training_args.bin"]
    for name in (*own, "answers.csv", "onnx/notes.txt"):
        assert not is_of_run(tmp_path / name), "it is not there"
        (tmp_path / name).touch()
        assert is_of_run(tmp_path / name) == (name in own)
    (tmp_path / "onnx/config.json").touch()
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.json").unlink()
    assert is_of_run(tmp_path / "onnx/config.json"), "a model's folder of this name"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/report.html").touch()
    assert not is_of_run(tmp_path / "elsewhere/report.html"), "there is no model beside it"


def test_output_dir_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "used").mkdir()
    (tmp_path / "used/x.txt").touch()
    with pytest.raises(UserError, match="already holds something"):
        free_output_dir("~/used", "x", None)


@pytest.mark.parametrize("left", ["race/lp_ft/", "scored/learned_from.txt"])
def test_run_that_ended_before_its_first_record_goes_on(tmp_path, left):
    path = tmp_path / "run" / left
    path.parent.mkdir(parents=True)
    path.mkdir() if left.endswith("/") else path.touch()
    assert free_output_dir(str(tmp_path / "run"), "run", "auto") == tmp_path / "run"
