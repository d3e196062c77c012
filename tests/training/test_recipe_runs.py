"""Complete runs of each recipe: what they train, which weights they keep, and that the random seed decides them."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import draw, draw_folder, same
from safetensors.torch import load_file

import train


@pytest.fixture(scope="module")
def recipes(timm_checkpoint, tmp_path_factory):
    """A run of each recipe on the same images: the folder of the runs, and what each run printed."""
    folder = tmp_path_factory.mktemp("recipes")
    draw_folder(folder / "images", per_class=12)
    for seed in range(4):  # a few wrong labels, or the probe would leave nothing to learn
        draw("red", 5000 + seed).save(folder / f"images/blue/{seed}-red.png")
    printed = {}
    for recipe in ("probe", "head", "lp_ft", "full_from_probe", "full"):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            args = ["--data_dir", str(folder / "images"), "--model_name", str(timm_checkpoint)]
            args += ["--recipe", recipe, "--disable_tqdm", "1", "--save_total_limit", "9", "--refit", "none"]
            args += [] if recipe == "head" else ["--num_train_epochs", "9"]
            train.main([*args, "--output_dir", str(folder / recipe)])
        printed[recipe] = stdout.getvalue()
    return folder, printed


@pytest.mark.slow
def test_every_recipe_reports_the_linear_probe_as_its_baseline(recipes):
    folder, printed = recipes
    runs = {name: json.loads((folder / name / "metrics.json").read_text()) for name in printed}
    probes = [metrics["baselines"]["linear_probe"] for metrics in runs.values()]
    assert all(probe == probes[0] for probe in probes)
    assert probes[0]["strength"] > 0 and {"validation", "test"} <= set(probes[0])
    for name, metrics in runs.items():
        assert metrics["validation"]["log_loss"] <= runs["probe"]["validation"]["log_loss"] + 1e-4, name
        assert "probe    validation" in printed[name] and re.search(r"time     \d+ s: start \d", printed[name])
        assert "kept     " in printed[name]
        raced = "race     validation loss, corrected: the probe" in printed[name]
        assert raced == (name != "probe"), "nothing was compared with the probe"
    assert runs["probe"]["test"]["log_loss"] == pytest.approx(probes[0]["test"]["log_loss"], rel=1e-3)
    assert "features" in runs["lp_ft"]["seconds"] and "train" not in runs["probe"]["seconds"]


@pytest.mark.slow
def test_each_recipe_trains_its_layers(recipes, timm_checkpoint):
    folder, _ = recipes
    original = load_file(timm_checkpoint / "model.safetensors")
    for recipe in ("head", "lp_ft", "full"):
        trained = load_file(max((folder / recipe).glob("checkpoint-*/model.safetensors")))
        changed = [name for name, tensor in original.items() if not torch.equal(tensor, trained[name])]
        changed = [name for name in changed if not name.startswith("fc.")]
        assert bool(changed) == (recipe != "head")
        assert ("conv1.0.weight" in changed) == (recipe == "full"), changed[:3]
    assert same(load_backbone(timm_checkpoint), load_file(folder / "head/model.safetensors")), "and is saved so"


def test_model_that_is_worse_than_its_probe_is_replaced_by_it(timm_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=8)
    args = ["--data_dir", "images", "--model_name", str(timm_checkpoint), "--num_train_epochs", "1", "--refit", "none"]
    train.main([*args, "--output_dir", "out", "--recipe", "full", "--learning_rate", "100", "--optim", "sgd"])
    assert "kept     the probe" in capsys.readouterr().out
    metrics = json.loads(Path("out/metrics.json").read_text())
    probe = metrics["baselines"]["linear_probe"]
    assert metrics["recipe"]["kept"].startswith("the probe")
    for split in ("validation", "test"):
        assert metrics[split]["log_loss"] == pytest.approx(probe[split]["log_loss"], rel=1e-3)
    assert same(load_backbone(timm_checkpoint), load_file("out/model.safetensors"))


def load_backbone(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}


@pytest.mark.slow
def test_same_seed_gives_the_same_weights_with_or_without_cached_features(timm_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=5, first=300)
    args = ["--data_dir", "images", "--model_name", str(timm_checkpoint), "--num_train_epochs", "1"]
    args += ["--recipe", "full"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main([*args, "--output_dir", name, "--seed", str(seed)])
    a, b, c = (load_file(next(Path(name).glob("checkpoint-*/model.safetensors"))) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
