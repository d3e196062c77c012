"""The benchmark commands load, print their help and read what runs print; the measurements are not run here."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import save_file

from benchmarks import kill_test, suite
from benchmarks.time_to_accuracy import read_accuracy
from luthier.errors import UserError
from luthier.training.callbacks import EpochTable


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_benchmark_prints_its_help_and_is_documented(path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{path.stem}")
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 0 and f"python -m benchmarks.{path.stem}" in capsys.readouterr().out
    assert f"python -m benchmarks.{path.stem}" in (PROJECT / "CONTRIBUTING.md").read_text()


def test_accuracies_of_a_run_are_read_from_what_it_prints(capsys):
    table = EpochTable("full_from_probe")
    args = SimpleNamespace(device="cpu")
    state = SimpleNamespace(epoch=1.0, log_history=[{}], is_world_process_zero=True)
    table.on_train_begin(args, state, None)
    for accuracy in ({}, {"loss": 0.5}):
        table.on_log(args, state, None, accuracy | {"eval_loss": 0.3, "eval_accuracy": 0.9, "eval_macro_f1": 0.8})
    assert [read_accuracy(line) for line in capsys.readouterr().out.splitlines()] == [0.9, 0.9]
    assert read_accuracy("probe    validation accuracy 71.8% (95% interval 65.3% to 77.4%, n = 209)") == 0.718
    assert read_accuracy(EpochTable.HEADER.splitlines()[1]) is None


def test_killed_run_is_compared_in_every_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, *losses: float) -> None:
        Path(name).mkdir(exist_ok=True)
        save_file({"weight": torch.ones(2)}, f"{name}/model.safetensors")
        history = [{"epoch": epoch, "eval_loss": loss} for epoch, loss in enumerate(losses, 1)]
        metrics = {"validation": {}, "test": {}, "unsure": {}, "history": [{"epoch": 1, "loss": len(name)}, *history]}
        Path(name, "metrics.json").write_text(json.dumps(metrics))

    write("whole", 0.5, 0.6)
    write("killed", 0.5, 0.6)
    assert kill_test.compare()
    write("killed", 0.5, 0.7)
    assert not kill_test.compare()


@pytest.fixture
def quick_runs(monkeypatch):
    """Runs of the suite end at once, with an accuracy of 90%."""
    monkeypatch.setattr(
        suite, "run_luthier", lambda data, folder, name, seed, *rest: suite.Run(data, name, seed, 0.9, 0.9, 1)
    )


def test_kept_run_is_of_its_images_and_checkout(quick_runs, tmp_path):
    run = suite.run_once("a", tmp_path / "a", "probe", 1, tmp_path / "out", PROJECT)
    assert suite.run_once("a", tmp_path / "a", "probe", 1, tmp_path / "out", PROJECT) == run
    for folder, checkout in ((tmp_path / "b", PROJECT), (tmp_path / "a", tmp_path)):
        with pytest.raises(UserError, match=r"a-probe-seed1.json is of .*: give another --out"):
            suite.run_once("a", folder, "probe", 1, tmp_path / "out", checkout)


def test_mistakes_in_the_options_of_the_suite_write_nothing(quick_runs, monkeypatch, tmp_path, capsys):
    (tmp_path / "sets/a/train").mkdir(parents=True)
    line = ["suite", str(tmp_path / "sets"), "--without_openmoji", "--out", str(tmp_path / "out"), "--only", "probe"]
    for options, message in (
        (["--sets", "b"], "there is no data set b: there are a"),
        (["--seeds", "0"], "nothing was"),
    ):
        monkeypatch.setattr("sys.argv", [*line, *options])
        with pytest.raises(SystemExit):
            suite.main()
        assert message in capsys.readouterr().err and not list((tmp_path / "out").glob("suite*"))


def test_regret_is_what_the_mean_lacks_to_the_best():
    def run(data: str, contestant: str, seed: int, accuracy: float) -> suite.Run:
        return suite.Run(data, contestant, seed, accuracy, accuracy, 60)

    runs = [
        run("a", "Luthier", 1, 0.8),
        run("a", "Luthier", 2, 0.9),
        run("a", "fastai", 1, 0.95),
        run("b", "Luthier", 1, 1),
    ]
    assert suite.regrets(runs, "Luthier") == pytest.approx({"a": 0.1, "b": 0})
    assert suite.regrets(runs, "fastai") == {"a": 0}
    unknown = suite.Run("b", "Luthier", 2, 0.9, 0.9, float("nan"))
    assert suite.accuracy_table([*runs, unknown]).splitlines()[2:] == [
        "| a | 85.0% (80.0 to 90.0) | 1.0 | 95.0% | 1.0 |",
        "| b | 95.0% (90.0 to 100.0) | 1.0 |  |  |",
        "| mean | 90.0% | 1.0 | 95.0% | 1.0 |",
    ]
