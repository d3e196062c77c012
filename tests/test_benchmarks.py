"""The commands behind the figures still load with the project as it is; what they measure is not run here."""

import importlib

import pytest
from conftest import PROJECT


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_command_loads_and_tells_itself(path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{path.stem}")
    monkeypatch.setattr("sys.argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0 and f"python -m benchmarks.{path.stem}" in capsys.readouterr().out
    assert f"python -m benchmarks.{path.stem}" in (PROJECT / "CONTRIBUTING.md").read_text()
