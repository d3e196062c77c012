"""The linear probe: a logistic regression on frozen features, the baseline of every fine-tune and where it starts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, Trainer

from luthier.cache import empty_rows, rows_at_once

# Penalties tried, from strong to weak; on 100 to 100,000 images the best was never at an end (docs/experiments.md).
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)

# The penalty of the probe that fine-tuning of all layers starts from: with a weaker one it fits the training images so
# well that they teach the layers below nothing (docs/experiments.md).
SOFT = 3.0

MAX_LEARNED, MAX_CELLS = 100_000, 20_000_000  # images, and images times classes, that a cross-fitted probe learns from


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

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, C] of features [N, D]."""
        return nn.functional.linear(features, self.weight, self.bias)


def fit_shared_probes(
    trainer: Trainer,
    features: Mapping[str, torch.Tensor] | None,
    labels: Mapping[str, Sequence[int]],
    class_weights: list[float] | None = None,
) -> tuple[LinearProbe, LinearProbe]:
    """Fit the probe that is best on validation, and the soft one, and return them to all processes.

    Args:
        trainer: knows the processes and the device.
        features: of "train" and "validation", float32 [N, D]; None on all but the main process.
        labels: class indices of both.
        class_weights: see `fit_path`.
    """

    def fit(device: torch.device) -> list[LinearProbe]:
        assert features is not None  # on the main process
        train, validation = (
            (features[split].to(device), torch.tensor(labels[split]).to(device)) for split in ("train", "validation")
        )
        soft = fit_path(*train, int(train[1].max()) + 1, (SOFT,), class_weights)
        return [fit_probe(*train, *validation, class_weights), *soft]

    best, soft = _on_main_process(trainer, fit)
    return best, soft


def fit_shared_probe(
    trainer: Trainer,
    features: torch.Tensor | None,
    labels: Sequence[int],
    strength: float,
    class_weights: list[float] | None = None,
) -> LinearProbe:
    """Fit the probe of one penalty, and return it to all processes.

    Args:
        trainer: knows the processes and the device.
        features: float32 [N, D]; None on all but the main process.
        labels: class indices [N].
        strength: the penalty.
        class_weights: see `fit_path`.
    """

    def fit(device: torch.device) -> list[LinearProbe]:
        assert features is not None  # on the main process
        truth = torch.tensor(labels).to(device)
        return list(fit_path(features.to(device), truth, max(labels) + 1, (strength,), class_weights))

    (probe,) = _on_main_process(trainer, fit)
    return probe


def _on_main_process(trainer: Trainer, fit: Callable[[torch.device], list[LinearProbe]]) -> list[LinearProbe]:
    """Fit on the main process, on the Trainer's device, and return the probes to all, on the CPU."""
    answer: list[list[LinearProbe] | None] = [None]
    if trainer.is_world_process_zero():
        answer = [
            [probe._replace(weight=probe.weight.cpu(), bias=probe.bias.cpu()) for probe in fit(trainer.args.device)]
        ]
    (shared,) = broadcast_object_list(answer)
    assert shared is not None  # the main process has sent it
    return shared


def fit_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    validation: torch.Tensor,
    validation_labels: torch.Tensor,
    class_weights: list[float] | None = None,
) -> LinearProbe:
    """Fit multinomial logistic regressions and return the one with the lowest validation loss.

    They are fitted from the strongest penalty to the weakest, each starting from the one before. The first that is
    worse on validation is the last.

    Args:
        features, validation: float32 [N, D], on the device of the fit.
        labels, validation_labels: int64 [N], every class among `labels`.
        class_weights: see `fit_path`.
    """
    best: LinearProbe | None = None
    for probe in fit_path(features, labels, int(labels.max()) + 1, STRENGTHS, class_weights):
        loss = nn.functional.cross_entropy(probe.logits(validation), validation_labels).item()
        if best is not None and loss > best.loss:
            break
        best = probe._replace(loss=loss)
    assert best is not None  # STRENGTHS is not empty
    return best


def fit_path(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strengths: tuple[float, ...],
    class_weights: list[float] | None = None,
    rows: torch.Tensor | None = None,
) -> Iterator[LinearProbe]:
    """Yield the probe of each strength, one after the other; its `loss` is NaN.

    The features are standardised. The penalty is strength / 2 times the squared weights beside the *mean*
    cross-entropy, so that a strength means the same for any number of images (scikit-learn's C is 1 / (N strength)).
    The standardisation is then folded into the weights.

    Args:
        features: float32 [N, D], on the device of the fit.
        labels: int64 [N].
        classes: how many there are, C.
        strengths: the penalties.
        class_weights: of `criterion.Balance`, how much an image of each class counts; None counts all alike. The
            logits still tell the probabilities in data like these: a probe that has learned from weighted images
            lacks the shares of the classes, and its bias gets them.
        rows: which images are learned from, int64 [n]; None is all.
    """
    labels = labels if rows is None else labels[rows]
    centred, mean, scale = _centre(features, rows)
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    weights = None if class_weights is None else torch.tensor(class_weights, device=features.device)
    log_shares = 0 if weights is None else -(classes * weights).log()
    for strength in strengths:
        minimise(centred, labels, weight, bias, strength, weights, scale)
        folded = weight.detach() / scale
        yield LinearProbe(folded, bias.detach() - folded @ mean + log_shares, strength, float("nan"))


class HeldOut(NamedTuple):
    """Some images, as probes see them that have not learned from their fold.

    Attributes:
        rows: int [n].
        logits: float32 [S, n, C], by probes of each strength.
        sample: how many images these probes have learned from; None where it is all of the other folds.
        learned: which classes these are of, bool [C].
    """

    rows: np.ndarray
    logits: torch.Tensor
    sample: int | None
    learned: np.ndarray


def cross_fit(
    features: torch.Tensor, labels: torch.Tensor, folds: np.ndarray, classes: int, strengths: tuple[float, ...]
) -> Iterator[HeldOut]:
    """Yield the logits of all rows, in parts, by probes that have not learned from the row's fold.

    A probe learns from no more than `MAX_LEARNED` images, and `MAX_CELLS` images times classes, drawn at random from
    the other folds.

    Args:
        features: float32 [N, D], on the device of the fits.
        labels: int64 [N], on the same device.
        folds: int [N].
        classes: how many there are, C.
        strengths: the penalties, S of them.
    """
    most, generator = max(1, min(MAX_LEARNED, MAX_CELLS // classes)), np.random.default_rng(0)
    for fold in np.unique(folds):
        rows, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        sample = most if len(rows) > most else None
        if sample:
            rows = np.sort(generator.choice(rows, sample, replace=False))
        learned = np.bincount(labels.cpu().numpy()[rows], minlength=classes) > 0
        probes = []
        if len(rows) > 1:  # or there is nothing to learn from, or to standardise: all classes stay equally likely
            probes = list(fit_path(features, labels, classes, strengths, rows=torch.from_numpy(rows)))
        at_once = rows_at_once(features.device)
        for begin in range(0, len(held_out), at_once):
            part = held_out[begin : begin + at_once]
            logits = features.new_zeros((len(strengths), len(part), classes))
            for number, probe in enumerate(probes):
                logits[number] = probe.logits(features[part])
            yield HeldOut(part, logits, sample, learned)


def _centre(features: torch.Tensor, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return some rows of features, or all, less their mean; the mean [D]; and the standard deviation [D].

    They are a copy, in a file where it is large.
    """
    at_once = rows_at_once(features.device)
    chosen = list(features.split(at_once)) if rows is None else rows.split(at_once)
    n = len(features) if rows is None else len(rows)
    exact = torch.float32 if features.device.type == "mps" else torch.float64
    mean = squares = torch.zeros(features.shape[1], dtype=exact, device=features.device)
    on_cpu, begin = features.device.type == "cpu", 0
    centred = empty_rows(n, features.shape[1]) if on_cpu else features.new_empty(n, features.shape[1])
    for part in chosen:
        copy = centred[begin : begin + len(part)].copy_(part if rows is None else features[part])
        mean = mean + copy.sum(dim=0, dtype=exact) / n
        begin += len(part)
    for part in centred.split(at_once):
        part -= mean.float()
        squares = squares + part.square().sum(dim=0, dtype=exact)
    return centred, mean.float(), (squares / max(1, n - 1)).sqrt().float().clamp_min(1e-6)


def minimise(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    strength: float,
    class_weights: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    iterations: int = 200,
) -> None:
    """Fit one logistic regression in place, by full-batch L-BFGS.

    Args:
        features: float32 [N, D].
        labels: int64 [N].
        weight, bias: where it begins, float32 [C, D] and [C].
        strength: the penalty.
        class_weights: how much an image of each class counts, float32 [C].
        scale: what the features are divided by [D].
        iterations: at most.
    """
    n, at_once = len(labels), rows_at_once(features.device)
    scale = torch.ones_like(weight[0]) if scale is None else scale
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def objective() -> torch.Tensor:
        # The gradient by hand and in parts: for 100,000 images of 1,000 classes autograd would hold 400 MB several
        # times over.
        loss, scaled = strength / 2 * weight.square().sum(), weight / scale
        weight_grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
        for part, truth in zip(features.split(at_once), labels.split(at_once), strict=True):
            residuals = torch.log_softmax(nn.functional.linear(part, scaled, bias), dim=1)
            counts = 1.0 if class_weights is None else class_weights[truth][:, None]
            loss -= (counts * residuals.gather(1, truth[:, None])).sum() / n
            residuals.exp_().scatter_add_(1, truth[:, None], residuals.new_full((len(part), 1), -1.0)).mul_(counts)
            weight_grad.addmm_(residuals.T, part, alpha=1 / n)
            bias_grad += residuals.sum(dim=0) / n
        weight.grad, bias.grad = weight_grad / scale + strength * weight, bias_grad
        return loss

    optimizer.step(objective)


def state_with_probe(model: PreTrainedModel, head: str, probe: LinearProbe) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state with the probe as its head: its logits are then the probe's."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe_head = {f"{head}.weight": probe.weight, f"{head}.bias": probe.bias}
    return state | {name: tensor.to(model.device) for name, tensor in probe_head.items()}
