"""The layers of a model by depth: which are frozen, how fast each learns, how its head is scaled."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from models import head_parameters, keep_in_eval_mode, linear_head, takes_size

TRAINING_SHARE = 0.75  # side of a random crop of training, in sides of the evaluation view
STEM = re.compile(r"[^.]+\.(stem|patch_embed|conv1)\.\d")  # one layer, though its parts have numbers


def layer_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Number the layers from the input (0) to the head (the highest), by parameter name.

    The names tell, in timm's models as in transformers': parameters form a layer if they share their name up to its
    first number (`blocks.3`, `encoder.layer.11`), or if they stand together without one (the stem). Where no name has
    a number by itself, one in a word does as well (`s1`, `denseblock1`, `Mixed_7c`). Lists of one length beside each
    other hold a part of each layer, as in PoolFormer.
    """
    head = head_parameters(model)
    names = [name for name, _ in model.named_parameters() if name not in head]
    for pattern in (r"(.*?\.\d+)\.", r"(.*?\d+\w*)\."):
        matches = [re.match(pattern, name) for name in names]
        layers = [match[1] if match and not STEM.match(match[0]) else "" for match in matches]
        if len(set(layers)) > 1:
            break
    numbers: dict[str, int] = {}
    last, number = None, -1
    for name, layer in _merge_lists(model, zip(names, layers, strict=True)):
        if layer != last:
            last, number = layer, number + 1
        numbers[name] = number
    return {name: numbers[name] for name in names} | dict.fromkeys(head, number + 1)


def _merge_lists(model: PreTrainedModel, layers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield names of parameters and their layers; those of lists of one length beside each other by their numbers."""
    first: dict[tuple[str, int], str] = {}
    first_of = {
        # Lists that differ in a number follow each other, as in CoaT.
        name: name if name[-1:].isdigit() else first.setdefault((name.rpartition(".")[0], len(module)), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }

    def list_of(item: tuple[str, str]) -> str:
        return first_of.get(item[1].rpartition(".")[0], "")

    for merged, run in itertools.groupby(layers, key=list_of):
        if merged:
            numbered = [(name, int(layer.rpartition(".")[2])) for name, layer in run]
            yield from ((name, f"{merged}.{index}") for name, index in sorted(numbered, key=lambda item: item[1]))
        else:
            yield from run


def freeze(model: PreTrainedModel, share: float) -> None:
    """Freeze the first layers, this share of all below the head; 1 freezes all of them.

    Frozen layers need no backward pass. Their dropout and normalisation stay in evaluation mode.
    """
    numbers = layer_numbers(model)
    first = math.floor(share * max(numbers.values()))
    frozen = {name for name, number in numbers.items() if number < first}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    whole = set[nn.Module]()  # modules all of whose parameters are frozen, with their parts
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        if own and own <= frozen:
            whole.update(module.modules())
    keep_in_eval_mode(whole)


def freeze_unused(model: PreTrainedModel, shape: Sequence[int]) -> None:
    """Freeze what has no part in the answers, such as the mask token of DINOv2.

    Processes that train together would wait for its gradient, which never comes.

    Args:
        model: with its frozen layers, see `freeze`.
        shape: of an image's pixel values, [C, H, W].
    """
    training = model.training
    model.eval()
    model(pixel_values=torch.zeros(1, *shape, device=model.device)).logits.sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()
    model.train(training)


def parameter_groups(
    model: PreTrainedModel, learning_rate: float, backbone_lr: float, layer_decay: float, weight_decay: float
) -> list[dict]:
    """Return the optimizer's parameter groups of what is not frozen.

    The head learns at `learning_rate`, the layer before it at `backbone_lr`, and each one before that at `layer_decay`
    times the next one's rate. Biases and normalisation layers (all parameters of one dimension) have no weight decay.
    """
    numbers = layer_numbers(model)
    last = max(numbers.values())
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = last - numbers[name]
            rate = backbone_lr * layer_decay ** (depth - 1) if depth else learning_rate
            decay = weight_decay if parameter.ndim > 1 else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def training_size(model: PreTrainedModel, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the random crops that go with an evaluation view of this size, in pixels.

    A random crop shows objects larger than the evaluation view does. In smaller crops they have about the size that
    they have in evaluation (Touvron et al. 2019, FixRes), and a step costs half as much. A model that takes one size
    only, as most vision transformers do, keeps that.
    """
    side = max(32, round(TRAINING_SHARE * size[0] / 32) * 32)
    return (side, side) if size[0] == size[1] > side and takes_size(model, side) else size


def divide_logits(model: PreTrainedModel, temperature: float) -> None:
    """Divide all logits of a model by a temperature, in the weights and the bias of its linear head.

    A temperature of 1 changes nothing. A model whose head is not one linear layer stays as it is.
    """
    head = _linear_head(model)
    if temperature != 1 and head is not None:
        with torch.no_grad():
            head.weight.div_(temperature)
            head.bias.div_(temperature)


def shift_logits(model: PreTrainedModel, shift: np.ndarray) -> None:
    """Add a number [C] to the logit of each class, in the bias of a model's linear head; it has one."""
    head = _linear_head(model)
    assert head is not None  # see criterion.build_judge
    with torch.no_grad():
        head.bias.add_(torch.as_tensor(shift, dtype=head.bias.dtype, device=head.bias.device))


def _linear_head(model: PreTrainedModel) -> nn.Linear | None:
    name = linear_head(model)
    head = None if name is None else model.get_submodule(name)
    assert head is None or isinstance(head, nn.Linear)
    return head
