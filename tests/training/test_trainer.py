"""The Trainer of a run: settings and checkpoints that are refused before it trains."""

from pathlib import Path

import pytest
import torch
from conftest import draw_folder

import train
from luthier.errors import UserError
from luthier.machine import LONG_RUN, lay_out
from luthier.training.checkpoints import load_weights
from models import build_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr_scheduler_kwargs", '{"nonsense": 1}'], "--lr_scheduler_type cosine with --lr_scheduler_kwargs"),
        (["--optim_args", "nonsense"], "--optim adamw_torch_fused with --optim_args nonsense cannot be used"),
        (["--report_to", "nonsense"], "nonsense is not supported"),
    ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=4)
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--data_dir", "images", "--model_name", "simple_cnn", *options])
    errors = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in errors and "Traceback" not in errors
    assert not Path("outputs").exists()


def test_checkpoint_of_another_model_is_refused(timm_checkpoint, vit_checkpoint, tmp_path):
    two, three = {0: "a", 1: "b"}, {0: "a", 1: "b", 2: "c"}
    build_model(str(timm_checkpoint), two)[0].save_pretrained(tmp_path / "checkpoint-1")
    load_weights(build_model(str(timm_checkpoint), two)[0], tmp_path / "checkpoint-1")
    for name, labels in ((timm_checkpoint, three), (vit_checkpoint, two)):
        with pytest.raises(UserError, match="of another model, or of other classes"):
            load_weights(build_model(str(name), labels)[0], tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("device", "images", "last"), [("cuda", 100, False), ("cuda", LONG_RUN, True), ("cpu", 100, True)]
)
def test_weights_of_a_short_run_on_a_gpu_are_in_the_default_memory_format(timm_checkpoint, device, images, last):
    model, _ = build_model(str(timm_checkpoint), {0: "a", 1: "b"})
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lay_out(model, torch.device(device), images)
    kernels = [tensor for tensor in model.parameters() if tensor.dim() == 4 and min(tensor.shape[1:]) > 1]
    assert kernels and all(each.is_contiguous(memory_format=torch.channels_last) == last for each in kernels)
    assert all(each.is_contiguous() != last for each in kernels)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
