"""Frozen features: what enters a model's head for every image, computed once and cached."""

import copy
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, Trainer

from luthier.cache import cache_key, read_cached, write_cached
from luthier.errors import UserError
from luthier.fusion import fuse_batchnorm
from luthier.training.trainer import concatenate_batches, model_of


def load_features(trainer: Trainer, head: str, rows: Any, key: str) -> torch.Tensor | None:
    """Return what enters the head, float32 [N, D], for every row; None on all but the main process.

    Args:
        trainer: runs the model, on its device and in its precision, over all of its processes.
        head: name of the model's head, see `models.linear_head`.
        rows: give `pixel_values` [3, H, W], all of one size.
        key: of all that the rows depend on; the model's weights, the precision and torch's version are added to it.
            See `data.feature_rows` for both.

    Raises:
        UserError: the features are not finite.
    """
    model = model_of(trainer)
    key = cache_key(key, trainer.accelerator.mixed_precision, torch.__version__, *_backbone_weights(model, head))
    main = trainer.is_world_process_zero()
    features = read_cached("features", key) if main else None
    if features is not None and len(features) != len(rows):
        features = None
    (cached,) = broadcast_object_list([features is not None])  # all processes compute, or none
    if not cached:
        features = compute_features(trainer, build_backbone(model, head, size_of(rows)), rows)
        if features is not None:
            write_cached("features", key, features)
    return features


def build_backbone(model: PreTrainedModel, head: str, size: tuple[int, int]) -> PreTrainedModel:
    """Return a copy of a model without its head, for inference; see `fusion.fuse_batchnorm`."""
    backbone = copy.deepcopy(model)
    backbone.set_submodule(head, nn.Identity())
    return fuse_batchnorm(backbone, size)


def size_of(rows: Any) -> tuple[int, int]:
    """Return the (height, width) of the `pixel_values` of rows in pixels."""
    height, width = rows[0]["pixel_values"].shape[-2:]
    return height, width


def compute_features(trainer: Trainer, backbone: PreTrainedModel, rows: Any) -> torch.Tensor | None:
    """Return what a backbone makes of every row, float32 [N, D], and cache nothing.

    Args:
        trainer: runs the backbone in the place of its own model.
        backbone: see `build_backbone`.
        rows, the return value and the errors: see `load_features`.
    """
    model = model_of(trainer)
    trainer.model = trainer.model_wrapped = backbone
    try:
        outputs = trainer.predict(rows, metric_key_prefix="features").predictions
    finally:
        trainer.model = trainer.model_wrapped = model
        trainer.accelerator.free_memory()
    if not trainer.is_world_process_zero():
        return None
    features = torch.from_numpy(concatenate_batches(outputs)).float().contiguous()
    if not torch.isfinite(features).all():
        raise UserError(
            "the model's features of these images are not finite numbers: its weights are damaged, or do not fit "
            "its architecture. Use another checkpoint"
        )
    return features


def _backbone_weights(model: PreTrainedModel, head: str) -> list[object]:
    parts: list[object] = []
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{head}."):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            parts += [name, memoryview(data.numpy())]
    return parts
