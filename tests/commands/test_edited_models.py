"""A model's folder that was edited by hand, or put together from two: one message, and no wrong answers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import draw_folder
from safetensors.torch import save_file

import predict
import score
from luthier.familiarity import Familiarity, class_shares_of, describe_in_config, save_bank
from luthier.serving.torch_network import TorchNetwork
from models import ModelError, build_model, linear_head, load_trained, save_model

NAMES = ["blue", "green", "red"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with a bank, as a run leaves it."""
    model, image_processor = build_model("simple_cnn", dict(enumerate(NAMES)))
    head = linear_head(model)
    bank = torch.eye(4, model.get_submodule(head).in_features).half()
    familiarity = Familiarity(bank, head, (0.0, 1.0), (0.5, 0.1), -2.0)
    describe_in_config(model, familiarity)
    save_model(model, image_processor, tmp_path / "model")
    save_bank(tmp_path / "model", familiarity)
    return tmp_path / "model"


def edit(folder: Path, file: str, change: Callable[[dict], object]) -> None:
    settings = json.loads((folder / file).read_text())
    change(settings)
    (folder / file).write_text(json.dumps(settings))


def test_folder_as_it_was_is_a_model(folder):
    network = TorchNetwork(str(folder))
    assert network.labels == NAMES and network.none is None and network.unsure_below == -2.0


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        (None, "is damaged"),
        (torch.ones(4, 7), "have 7 features"),
        (torch.ones(7), "is damaged"),
    ],
)
def test_bank_that_is_damaged_is_an_error_with_its_remedy(folder, bank, message):
    path = folder / "familiarity.safetensors"
    if bank is None:
        path.write_bytes(b"no")
    else:
        save_file({"references": bank.half()}, path)
    with pytest.raises(ModelError, match=rf"{message}.*copy it again, or delete it"):
        TorchNetwork(str(folder))


@pytest.mark.parametrize("changes", [{"log_odds": None}, {"head": "nothing"}])
def test_figures_of_familiarity_that_are_damaged_are_an_error_with_its_remedy(folder, capsys, changes):
    edit(folder, "config.json", lambda config: config["familiarity"].update(changes))
    with pytest.raises(SystemExit) as exit_info:
        predict.main([str(folder), "a.png"])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "is damaged" in said and "copy it again, or delete it" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"none_class": "nothing"}, "`none_class` in the model's config.json is 'nothing', which is none of its cl"),
        ({"familiarity": None, "unsure_below": "0.6"}, "`unsure_below` .* is '0.6': write a number, without quotes"),
        ({"familiarity": None, "unsure_below": float("nan")}, "`unsure_below` .*: write a number"),
        ({"id2label": {"0": "red", "1": "blue"}}, "or its config.json, which names 2 classes, was changed"),
    ],
)
def test_config_that_was_edited_gives_one_message(folder, changes, message):
    edit(folder, "config.json", lambda config: config.update(changes))
    with pytest.raises(ModelError, match=message):
        TorchNetwork(str(folder))


@pytest.mark.parametrize("shares", [["a", 0.5, 0.5], [0.5, 0.5], [0, 0.5, 0.5], {"red": 1}])
def test_shares_of_classes_are_numbers(folder, shares):
    edit(folder, "config.json", lambda config: config.update(class_shares=shares))
    with pytest.raises(ModelError, match=r"`class_shares` in the model's config.json must be 3 numbers above 0"):
        class_shares_of(load_trained(str(folder))[0])


def test_image_processor_of_another_size_is_an_error(folder):
    edit(
        folder,
        "preprocessor_config.json",
        lambda settings: settings.update(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    )
    with pytest.raises(ModelError, match=r"does not classify the RGB images .* \(64 x 64 px\): .*Copy its preproc"):
        TorchNetwork(str(folder))


def test_view_is_checked_before_the_model_moves_to_the_device(folder, monkeypatch):
    model, image_processor = load_trained(str(folder))
    image_processor.size, image_processor.crop_size = {"shortest_edge": 64}, {"height": 64, "width": 64}
    monkeypatch.setattr(model, "to", lambda *_: pytest.fail("it was moved first"))
    monkeypatch.setattr("luthier.serving.torch_network.load_trained", lambda name: (model, image_processor))
    with pytest.raises(ModelError, match="64 x 64 px"):
        TorchNetwork(str(folder))


def test_score_refuses_an_edited_model_before_it_reads_an_image(folder, tmp_path, capsys):
    draw_folder(tmp_path / "images", per_class=2)
    edit(folder, "config.json", lambda config: config.update(class_shares=[1]))
    with pytest.raises(SystemExit) as exit_info:
        score.main([str(folder), "--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert exit_info.value.code == 2 and "`class_shares`" in captured.err and "images" not in captured.out
    assert not (tmp_path / "out").exists()
