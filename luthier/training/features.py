"""Frozen features: what enters a model's head for every image, computed once and cached."""

import copy
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, Trainer

from luthier.cache import cache_key, read_rows, write_rows
from luthier.errors import UserError
from luthier.fusion import fuse_batchnorm
from luthier.images.views import ImageRows
from luthier.terminal import say
from luthier.training.trainer import concatenate_batches, model_of


def load_features(trainer: Trainer, head: str, images: ImageRows) -> torch.Tensor | None:
    """Return what enters the head, float32 [N, D], for every image; None on all but the main process.

    Features of earlier runs are reused, image by image.

    Args:
        trainer: runs the model, on its device and in its precision, over all of its processes.
        head: name of the model's head, see `models.linear_head`.
        images: of `data.feature_rows`. The model's weights, the precision and torch's version are added to their key.

    Raises:
        UserError: the features are not finite.
    """
    model, (rows, key, digests) = model_of(trainer), images
    key = cache_key(key, trainer.accelerator.mixed_precision, torch.__version__, *_backbone_weights(model, head))
    blocks, place_of = read_rows("features", key, digests) if trainer.is_world_process_zero() else ([], {})
    first = {digest: row for row, digest in reversed(list(enumerate(digests)))}  # copies of an image have one row
    new = sorted(row for digest, row in first.items() if digest not in place_of)
    (new,) = broadcast_object_list([new])  # all processes compute the same
    if new:
        if place_of:
            say("reuse", f"features of {len(digests) - len(new):,} of {len(digests):,} images")
        computed = compute_features(trainer, build_backbone(model, head, size_of(rows)), rows.select(new))
        if computed is None:
            return None
        names, begin = [digests[row] for row in new], len(place_of)
        write_rows("features", key, names, computed)
        place_of |= {name: begin + row for row, name in enumerate(names)}
        blocks.append(computed)
    return torch.cat(blocks)[[place_of[digest] for digest in digests]] if blocks else None


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
        rows: give `pixel_values` [3, H, W], all of one size.

    The return value and the errors are those of `load_features`.
    """
    features = run_backbone(trainer, backbone, rows)
    if not trainer.is_world_process_zero():
        return None
    if not torch.isfinite(features).all():
        raise UserError(
            "the model's features of these images are not finite numbers: its weights are damaged, or do not fit "
            "its architecture. Use another checkpoint"
        )
    return features


def run_backbone(trainer: Trainer, backbone: PreTrainedModel, rows: Any) -> torch.Tensor:
    """Return what a backbone makes of every row, float32 [N, D], on every process, whatever it is."""
    model = model_of(trainer)
    trainer.model = trainer.model_wrapped = backbone
    try:
        outputs = trainer.predict(rows, metric_key_prefix="features").predictions
    finally:
        trainer.model = trainer.model_wrapped = model
        trainer.accelerator.free_memory()
    return torch.from_numpy(concatenate_batches(outputs)).float().contiguous()


def _backbone_weights(model: PreTrainedModel, head: str) -> list[object]:
    parts: list[object] = []
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{head}."):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            parts += [name, memoryview(data.numpy())]
    return parts
