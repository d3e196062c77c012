"""Frozen features: what enters a model's head for every image, computed once and cached."""

import copy
import itertools
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import DatasetDict
from torch import nn
from transformers import PreTrainedModel, Trainer

from luthier.cache import (
    AT_ONCE,
    as_bytes,
    cache_key,
    fill_rows,
    library_versions,
    list_of,
    warn_once,
    write_rows,
)
from luthier.errors import UserError
from luthier.fusion import fuse_batchnorm
from luthier.images.views import ImageRows
from luthier.processes import from_main_process
from luthier.terminal import Tenths, say
from luthier.training.trainer import concatenate_batches, model_of
from models import OF_CLASSES

LEARNABLE = ("train", "validation")  # what a probe may learn from: all but test
MAX_IN_MEMORY = 64_000_000  # bytes of features; more are in a temporary file
# What a model's config says of a run, and not of its backbone.
OF_RUN = {
    *OF_CLASSES, "_name_or_path", "architectures", "dtype", "id2label", "label2id", "num_classes", "num_labels",
    "problem_type", "transformers_version",
}  # fmt: skip


def load_features(
    trainer: Trainer, head: str, images: ImageRows, space: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return what enters the head, float32 [N, D], for every image; None on all but the main process.

    Features of earlier runs are reused, image by image. New ones are kept `rows_at_once`, so that a run that is
    interrupted goes on where it was.

    Args:
        trainer: runs the model, on its device and in its precision, over all of its processes.
        head: name of the model's head, see `models.linear_head`.
        images: of `data.feature_rows`. The model's weights and config, the precision, and the versions of torch and
            timm are added to their key.
        space: where the features are written, float32 [N, D]; None takes new space. Other processes have none.

    Raises:
        UserError: the features are not finite, or memory does not suffice.
    """
    model, (rows, key, digests) = model_of(trainer), images
    versions = library_versions("torch", "timm")
    precision, args = trainer.accelerator.mixed_precision, trainer.args
    if args.device.type == "cuda":  # whose float32 is TF32 in convolutions, and by `--tf32` everywhere or nowhere
        precision = f"{precision} cuda {args.tf32}"
    key = cache_key(key, precision, versions, *_parts_of_key(model, head))
    is_main_process, new = trainer.is_world_process_zero(), []
    if is_main_process:
        space = empty_rows(len(digests), feature_size(model, head)) if space is None else space
        is_cached = fill_rows("features", key, digests, space)
        _, first, number = np.unique(as_bytes(digests), return_index=True, return_inverse=True)
        new = np.sort(first[~is_cached[first]]).tolist()  # copies of an image are one
        if new and is_cached.any():
            say("reuse", f"features of {len(digests) - len(new):,} of {len(digests):,} images")
    new = from_main_process(new)  # all processes compute the same
    if new:
        backbone = build_backbone(model, head, rows)
        at_once = rows_at_once(trainer.args.device)
        progress = Tenths("features", len(new), "images", quiet_seconds=10)
        for begin in range(0, len(new), at_once):
            progress.reach(begin)
            part = new[begin : begin + at_once]
            computed = compute_features(trainer, backbone, rows.select(part))
            if computed is not None and space is not None:
                write_rows("features", key, [digests[row] for row in part], computed)
                space[part] = computed
    if space is None:
        return None
    copies = np.flatnonzero(first[number] != np.arange(len(digests)))
    space[copies] = space[first[number[copies]]]
    return space


def empty_rows(n: int, columns: int) -> torch.Tensor:
    """Return space for float32 [n, columns]: in memory, or if that is more than `MAX_IN_MEMORY` in a temporary file.

    The file is mapped into memory. The system keeps as much of it there as there is space for.
    """
    size = 4 * n * columns
    if size > MAX_IN_MEMORY:
        try:
            folder = Path(datasets.config.HF_DATASETS_CACHE)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # or a full disk would end the process when a row is written
                    os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(n, columns)))
        except OSError as error:
            warn_once(f"features are held in memory, because they cannot be in a file in {folder}: {error}")
    return torch.empty((n, columns))


def rows_at_once(device: torch.device) -> int:
    """Return how many rows of features to work on at a time: `AT_ONCE`, or so many that a GPU is busy with them."""
    return AT_ONCE if device.type == "cpu" else 8 * AT_ONCE


def feature_size(model: PreTrainedModel, head: str) -> int:
    """Return how many numbers enter a model's head."""
    layer = model.get_submodule(head)
    assert isinstance(layer, nn.Linear)  # see models.linear_head
    return layer.in_features


class Pool(NamedTuple):
    """Images of several splits, one after the other, for probes to learn from.

    Attributes:
        features: float32 [N, D], on the device of the fits, see `device_of_fits`.
        labels: int [N].
        groups: int [N], the same for images that belong together.
        names: the classes' names.
    """

    features: torch.Tensor
    labels: np.ndarray
    groups: np.ndarray
    names: list[str]


def pool_of(
    splits: DatasetDict, features: Mapping[str, torch.Tensor], device: torch.device, used: Collection[str] = LEARNABLE
) -> Pool:
    """Return images of several splits together.

    Args:
        splits: as loaded.
        features: float32 [N, D] by split.
        device: of the fits.
        used: the splits.
    """
    labels, groups = columns_of(splits, ("label", "group"), used)
    everything, names = join([features[split] for split in used]), splits["train"].features["label"].names
    return Pool(everything.to(device_of_fits(everything, device)), labels, groups, names)


def device_of_fits(features: torch.Tensor, device: torch.device) -> torch.device:
    """Return where probes are fitted: on the CPU if a GPU has no room for the features and a centred copy of them."""
    if device.type != "cuda":
        return device
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch, not in use
    room = torch.cuda.mem_get_info(device)[0] + reusable
    return torch.device("cpu") if 2.5 * features.nbytes > room else device


def columns_of(splits: DatasetDict, columns: Sequence[str], used: Collection[str] = LEARNABLE) -> list[np.ndarray]:
    """Return columns of several splits together, [N] each."""
    return [np.concatenate([list_of(splits[split], column) for split in used]) for column in columns]


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the features of several splits together, without a copy where they lie one after the other."""
    first, rows = parts[0], sum(map(len, parts))
    begins = itertools.accumulate((part.numel() for part in parts), initial=first.storage_offset())
    follow = all(part.storage_offset() == begin for part, begin in zip(parts, begins, strict=False))
    if follow and len({part.untyped_storage().data_ptr() for part in parts}) == 1:
        return first.as_strided((rows, first.shape[1]), first.stride())
    joined, begin = empty_rows(rows, first.shape[1]), 0
    for part in parts:
        joined[begin : begin + len(part)] = part
        begin += len(part)
    return joined


def build_backbone(model: PreTrainedModel, head: str, rows: Any) -> PreTrainedModel:
    """Return a copy of a model without its head, for inference on rows of one size; see `fusion.fuse_batchnorm`."""
    backbone = copy.deepcopy(model)
    backbone.set_submodule(head, nn.Identity())
    height, width = rows[0]["pixel_values"].shape[-2:]
    return fuse_batchnorm(backbone, (height, width))


def compute_features(trainer: Trainer, backbone: PreTrainedModel, rows: Any) -> torch.Tensor | None:
    """Return what a backbone makes of every row, float32 [N, D], and cache nothing.

    Args:
        trainer: runs the backbone instead of its own model.
        backbone: see `build_backbone`.
        rows: give `pixel_values` [3, H, W], all of one size.

    The return value and the errors are those of `load_features`.
    """
    features = run_backbone(trainer, backbone, rows)
    if not trainer.is_world_process_zero():
        return None
    if not torch.isfinite(features).all():
        raise UserError(
            "the model's features of these images are not finite numbers. Likely causes: half precision (--bf16 "
            "False, --fp16 False), or weights that are damaged or do not fit the architecture: use another checkpoint"
        )
    return features


def run_backbone(trainer: Trainer, backbone: PreTrainedModel, rows: Any) -> torch.Tensor:
    """Return what a backbone makes of every row, float32 [N, D], on every process, finite or not."""
    model = model_of(trainer)
    trainer.model = trainer.model_wrapped = backbone
    try:
        outputs = trainer.predict(rows, metric_key_prefix="features").predictions
    finally:
        trainer.model = trainer.model_wrapped = model
        trainer.accelerator.free_memory()
    return torch.from_numpy(concatenate_batches(outputs)).float().contiguous()


def _parts_of_key(model: PreTrainedModel, head: str) -> list[object]:
    """Return what the features depend on, as parts of a key: the config, less what is of a run, and the weights."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in OF_RUN}
    parts: list[object] = [json.dumps(config, sort_keys=True, default=str)]
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{head}."):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            parts += [name, memoryview(data.numpy())]
    return parts
