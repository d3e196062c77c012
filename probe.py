"""The linear probe: a logistic regression on frozen features, the baseline of every fine-tune and where it starts."""

import copy
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from data import evaluation_rows, preparation_key
from inference import fold
from views import EvaluationView

logger = logging.getLogger(__name__)

# Penalties tried, from strong to weak; on 100 to 100,000 pictures the best was never at an end (docs/experiments.md).
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)

ROWS = 8192  # pictures at a time in a fit


class LinearProbe(NamedTuple):
    """A fitted probe: logits = features @ weight.T + bias.

    Attributes:
        weight: float32 [C, D], for features as the backbone gives them.
        bias: float32 [C].
        strength: the L2 penalty that was best on validation.
        loss: mean cross-entropy on validation.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    loss: float

    def as_head(self, head: str) -> dict[str, torch.Tensor]:
        """Return the state of the head of this name with which a network's logits are the probe's."""
        return {f"{head}.weight": self.weight, f"{head}.bias": self.bias}

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, C] of features [N, D]."""
        return nn.functional.linear(features, self.weight, self.bias)


def fit_probe(
    features: torch.Tensor, labels: torch.Tensor, validation: torch.Tensor, validation_labels: torch.Tensor
) -> LinearProbe:
    """Fit multinomial logistic regressions and return the one with the lowest validation loss.

    Each fit starts from the one before, with a stronger penalty; the first that is worse on validation is the last.

    Args:
        features, validation: float32 [N, D], on the device where the fit shall run.
        labels, validation_labels: int64 [N], every class among `labels`.
    """
    best = None
    for probe in fit_path(features, labels, int(labels.max()) + 1, STRENGTHS):
        loss = nn.functional.cross_entropy(probe.logits(validation), validation_labels).item()
        if best is not None and loss > best.loss:
            break
        best = probe._replace(loss=loss)
    return best


def fit_path(
    features: torch.Tensor, labels: torch.Tensor, classes: int, strengths: tuple[float, ...]
) -> Iterator[LinearProbe]:
    """Yield the probe of each strength, one after the other; `loss` is left open.

    The features are standardised, the penalty is strength / 2 times the squared weights beside the *mean*
    cross-entropy, so that a strength means the same for any number of images (scikit-learn's C is 1 / (N strength)).
    The standardisation is folded into the weights.
    """
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    standardised = (features - mean) / scale
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    for strength in strengths:
        _minimise(standardised, labels, weight, bias, strength)
        folded = weight.detach() / scale
        yield LinearProbe(folded, bias.detach() - folded @ mean, strength, float("nan"))


def _minimise(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    strength: float,
    iterations: int = 200,
) -> None:
    """Fit one logistic regression in place, by full-batch L-BFGS."""
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def objective() -> torch.Tensor:
        # By hand and in parts: of 100,000 pictures and 1,000 classes autograd would hold 400 MB several times over.
        loss, weight.grad, bias.grad = strength / 2 * weight.square().sum(), strength * weight, torch.zeros_like(bias)
        for part, truth in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            residuals = torch.log_softmax(nn.functional.linear(part, weight, bias), dim=1)
            loss -= residuals.gather(1, truth[:, None]).sum() / len(features)
            residuals.exp_().scatter_add_(1, truth[:, None], residuals.new_full((len(part), 1), -1.0))
            weight.grad.addmm_(residuals.T, part, alpha=1 / len(features))
            bias.grad += residuals.sum(dim=0) / len(features)
        return loss

    optimizer.step(objective)


def build_probe(
    trainer: Trainer, head: str, splits: DatasetDict, view: EvaluationView
) -> tuple[LinearProbe, dict[str, torch.Tensor | None]]:
    """Fit the probe of a model on a prepared data set; its strength is chosen on validation.

    Args:
        trainer: runs the model, on its device and in its precision, over all of its processes.
        head: the name of the model's head, see `models.linear_head`.
        splits: train and validation, as `data.prepare` returns them; test is not looked at.
        view: the evaluation view in which both are seen.

    Returns the probe, and the features of both splits as `load_features` returns them.

    Raises:
        ValueError: the features are not finite.
    """
    device = trainer.args.device
    features = {split: load_features(trainer, head, splits[split], view) for split in ("train", "validation")}
    answer = [None]
    if trainer.is_world_process_zero():
        data = [
            part.to(device)
            for split in features
            for part in (features[split], torch.tensor(splits[split]["label"][:]))
        ]
        probe = fit_probe(*data)
        answer = [probe._replace(weight=probe.weight.cpu(), bias=probe.bias.cpu())]
    return broadcast_object_list(answer)[0], features


def load_features(trainer: Trainer, head: str, dataset: Dataset, view: EvaluationView) -> torch.Tensor | None:
    """Return what enters the head, float32 [N, D], for every picture; None on all but the main process.

    The features are computed once and kept in the cache directory of `datasets`, under a name made of what they depend
    on: the pictures and their order, the backbone's weights, the view, the precision.
    """
    model = trainer.model
    key = hashlib.sha256(preparation_key(view).encode())
    stored = "exactly" if "view" in dataset.column_names else "small"
    key.update(f"{stored} {trainer.accelerator.mixed_precision} {torch.__version__} {dataset['digest'][:]}".encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{head}."):
            key.update(name.encode())
            key.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    path = Path(datasets.config.HF_DATASETS_CACHE, "luthier_features", f"{key.hexdigest()[:40]}.safetensors")

    main = trainer.is_world_process_zero()
    features = _read(path) if main else None
    if features is not None and len(features) != len(dataset):
        features = None
    (cached,) = broadcast_object_list([features is not None])  # all processes compute, or none
    if cached:
        return features
    backbone = build_backbone(model, head, view.size)
    trainer.model = trainer.model_wrapped = backbone
    trainer.args.eval_do_concat_batches = False  # it would copy all that came before with every batch
    try:
        batches = trainer.predict(evaluation_rows(dataset, view), metric_key_prefix="features").predictions
    finally:
        trainer.args.eval_do_concat_batches = True
        trainer.model = trainer.model_wrapped = model
        trainer.accelerator.free_memory()
    if not main:
        return None
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    features = torch.from_numpy(np.concatenate(batches)).float().contiguous()
    if not torch.isfinite(features).all():
        raise ValueError(
            "the model's features of these pictures are not finite numbers: its weights are damaged, or do not fit "
            "its architecture. Take another checkpoint"
        )
    _write(path, features)
    return features


def build_backbone(model: PreTrainedModel, head: str, size: tuple[int, int]) -> PreTrainedModel:
    """Return a copy of a model without its head, for evaluation alone; see `inference.fold`."""
    backbone = copy.deepcopy(model)
    backbone.set_submodule(head, nn.Identity())
    return fold(backbone, size)


def _read(path: Path) -> torch.Tensor | None:
    """Return cached features, None where there are none or the file is damaged."""
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, features: torch.Tensor) -> None:
    """Cache features, whole or not at all; without space or rights they are computed anew the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file({"features": features}, Path(folder, path.name))
            Path(folder, path.name).replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning(f"The features are not kept for the next run: {error}")
