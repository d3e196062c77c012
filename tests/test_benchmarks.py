"""The benchmark commands load and print their help; the measurements are not run here."""

import importlib

import pytest
from conftest import PROJECT


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_benchmark_prints_its_help_and_is_documented(path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{path.stem}")
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 0 and f"python -m benchmarks.{path.stem}" in capsys.readouterr().out
    assert f"python -m benchmarks.{path.stem}" in (PROJECT / "CONTRIBUTING.md").read_text()
