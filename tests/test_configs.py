"""The configs: each parses and begins with a comment that holds its command; the original experiments are included."""

from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from transformers import Trainer

from luthier.arguments import parse_arguments
from luthier.images.views import AUGMENTATIONS

pytestmark = pytest.mark.usefixtures("empty_folder")
CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_is_documented(path):
    data_args, _, training_args, _ = parse_arguments([str(path)])
    assert training_args.output_dir == str(Path("outputs", path.stem))
    assert data_args.augmentation in ("auto", *AUGMENTATIONS)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# ") and f"accelerate launch train.py configs/{path.name}" in path.read_text()


def test_configs_include_the_original_experiments():
    names = {path.stem for path in CONFIGS}
    assert {"simple_cnn_instruments", "resnet18_instruments", "resnet18_instruments_augmix"} <= names
    for name in ("simple_cnn_instruments", "resnet18_instruments", "resnet18_instruments_augmix"):
        data_args, model_args, *_ = parse_arguments([str(PROJECT / f"configs/{name}.yaml")])
        assert data_args.dataset_name == "YakupAkdin/instrument-images" and data_args.split_seed == 1
        assert data_args.label_names[0] == "harp" and data_args.label_names[-1] == "yayli tambur"
        assert len(data_args.label_names) == 10
        assert model_args.recipe == (None if name == "simple_cnn_instruments" else "head")


def test_simple_cnn_trains_as_in_the_original_experiment():
    training_args = parse_arguments([str(PROJECT / "configs/simple_cnn_instruments.yaml")]).training_args
    assert (training_args.per_device_train_batch_size, training_args.num_train_epochs) == (4, 25)
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(training_args)
    assert optimizer is torch.optim.SGD and settings == {"lr": 1e-3, "momentum": 0.9}


def test_accelerate_config_is_valid():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(PROJECT / "accelerate_config.yaml"))
    assert config.num_processes == 1 and config.use_cpu is False and config.mixed_precision == "no"
