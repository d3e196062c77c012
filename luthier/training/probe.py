"""The linear probe: a logistic regression on frozen features, a baseline and the start of some recipes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.processes import from_main_process
from luthier.training.balance import Balance
from luthier.training.features import Pool, device_of_fits, empty_rows, rows_at_once

# Penalties tried, from strong to weak; the best is at an end on easy images alone, where all do (docs/experiments.md).
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
# The penalty of the probe that fine-tuning of all layers starts from: with a weaker one it fits the training images so
# well that they teach the layers below nothing (docs/experiments.md).
SOFT = 3.0

# Images, and images times classes, that a cross-fitted probe learns from; so many logits, at most, are held at a time.
MAX_LEARNED, MAX_CELLS = 100_000, 20_000_000
MAX_WEIGHTS = 2_000_000  # of probes that are fitted at once: L-BFGS holds twenty times as much

# From MANY images on the penalty is first chosen with one image in SAMPLED (docs/experiments.md).
MANY, SAMPLED = 80_000, 8
# A fit ends when a step lowers the objective by less than the first; with MANY images by less than the second.
TOLERANCE, LOOSE_TOLERANCE = 1e-6, 1e-5


class LinearProbe(NamedTuple):
    """A fitted probe: logits = features @ weight.T + bias.

    Attributes:
        weight: float32 [C, D], for features as the backbone gives them.
        bias: float32 [C].
        strength: the L2 penalty that it was fitted with, see `fit_path`.
        loss: mean cross-entropy on validation, in nats; NaN where it was not measured.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    loss: float

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, C] of features [N, D]."""
        return nn.functional.linear(features, self.weight, self.bias)


def fit_shared_probes(
    device: torch.device,
    features: Mapping[str, torch.Tensor] | None,
    labels: Mapping[str, Sequence[int]],
    balance: Balance | None = None,
) -> tuple[LinearProbe, LinearProbe]:
    """Fit the probe that is best on validation, and the soft one, and return them to all processes.

    Args:
        device: of the run, see `device_of_fits`.
        features: of "train" and "validation", float32 [N, D]; None on all but the main process.
        labels: class indices of both.
        balance: see `fit_path`.
    """
    fitted: Iterable[LinearProbe] = ()
    if features is not None:
        device = device_of_fits(features["train"], device)
        train, validation = (
            (features[split].to(device), torch.tensor(labels[split]).to(device)) for split in ("train", "validation")
        )
        fitted = fit_probes(*train, *validation, balance)
    best, soft = _share(fitted)
    return best, soft


def fit_shared_probe(
    device: torch.device,
    features: torch.Tensor | None,
    labels: Sequence[int],
    strength: float,
    balance: Balance | None,
) -> LinearProbe:
    """Fit the probe of one penalty, and return it to all processes.

    Args:
        device: of the run, see `device_of_fits`.
        features: float32 [N, D]; None on all but the main process.
        labels: class indices [N].
        strength: the penalty.
        balance: see `fit_path`.
    """
    fitted: Iterable[LinearProbe] = ()
    if features is not None:
        device = device_of_fits(features, device)
        truth = torch.tensor(labels).to(device)
        fitted = fit_path(features.to(device), truth, max(labels) + 1, (strength,), balance)
    (probe,) = _share(fitted)
    return probe


def _share(fitted: Iterable[LinearProbe]) -> list[LinearProbe]:
    """Return to all processes the probes that the main one has fitted, on the CPU."""
    return from_main_process([each._replace(weight=each.weight.cpu(), bias=each.bias.cpu()) for each in fitted])


def fit_probes(
    features: torch.Tensor,
    labels: torch.Tensor,
    validation: torch.Tensor,
    validation_labels: torch.Tensor,
    balance: Balance | None = None,
) -> tuple[LinearProbe, LinearProbe]:
    """Fit multinomial logistic regressions; return the one with the lowest validation loss, and the soft one.

    With many images a sample finds the penalty, and the soft one is of the sample, which has every class. More images
    never ask for a stronger penalty, so the probe of all starts from the sample's and tries weaker ones.

    Args:
        features, validation: float32 [N, D], on the device of the fit.
        labels, validation_labels: int64 [N], every class among `labels`.
        balance: see `fit_path`.
    """
    classes, rows = int(labels.max()) + 1, None
    if len(labels) >= MANY:
        order = np.random.default_rng(0).permutation(len(labels))
        first_of_class = np.unique(labels.cpu().numpy()[order], return_index=True)[1]
        sample = np.union1d(np.arange(len(labels) // SAMPLED), first_of_class)
        rows = torch.from_numpy(np.sort(order[sample])).to(features.device)
    path = fit_path(features, labels, classes, (SOFT, *STRENGTHS), balance, rows)
    soft = next(path)  # and the others start from it
    best = choose_probe(path, validation, validation_labels)
    if rows is not None:
        weaker = STRENGTHS[STRENGTHS.index(best.strength) :]
        path = fit_path(features, labels, classes, weaker, balance, start=best)
        best = choose_probe(path, validation, validation_labels)
    return best, soft


def choose_probe(path: Iterator[LinearProbe], validation: torch.Tensor, labels: torch.Tensor) -> LinearProbe:
    """Return the probe of a path with the lowest validation loss; the first that is worse is the last one fitted.

    Args:
        path: from the strongest penalty to the weakest.
        validation: features, float32 [N, D].
        labels: int64 [N].
    """
    best: LinearProbe | None = None
    for probe in path:
        loss = nn.functional.cross_entropy(probe.logits(validation), labels).item()
        if best is not None and loss > best.loss:
            break
        best = probe._replace(loss=loss)
    assert best is not None  # there are penalties
    return best


def fit_path(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strengths: tuple[float, ...],
    balance: Balance | None = None,
    rows: torch.Tensor | None = None,
    start: LinearProbe | None = None,
) -> Iterator[LinearProbe]:
    """Yield the probe of each strength, one after the other; its `loss` is NaN.

    The features are standardised, see `_measure_scale`. The penalty is strength / 2 times the squared weights beside
    the *mean* cross-entropy, so that a strength means the same for any number of images (scikit-learn's C is
    1 / (N strength)). The standardisation is then folded into the weights.

    Args:
        features: float32 [N, D], on the device of the fit.
        labels: int64 [N].
        classes: how many there are, C.
        strengths: the penalties.
        balance: how much an image of each class counts; None counts all alike. The logits still tell the
            probabilities in data like these: a probe that has learned from weighted images lacks the shares of the
            classes, and its bias gets them.
        rows: which images are learned from, int64 [n]; None is all.
        start: where the first fit begins; None is at 0.
    """
    for (probe,) in _fit_paths(features, labels, classes, strengths, balance, rows, start=start):
        yield probe


def _fit_paths(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strengths: tuple[float, ...],
    balance: Balance | None = None,
    rows: torch.Tensor | None = None,
    learns: torch.Tensor | None = None,
    start: LinearProbe | None = None,
) -> Iterator[list[LinearProbe]]:
    """Yield the probes of each strength that learn from several parts of some rows; see `fit_path`.

    All are fitted at once: their objectives are added up, and every look at the features serves all of them.

    Args:
        features, labels, classes, strengths, balance, rows, start: see `fit_path`.
        learns: whether a probe learns from a row, bool [n, K]; None is one probe that learns from all. A probe of a
            single row learns nothing: all classes stay equally likely.
    """
    labels = labels if rows is None else labels[rows]
    learns = torch.ones_like(labels, dtype=torch.bool)[:, None] if learns is None else learns
    numbers = learns.sum(dim=0)
    centred, mean = _centre(features, rows)
    scale = _measure_scale(centred, learns)
    counts = (learns & (numbers > 1)) / numbers.clamp_min(1)
    log_shares: torch.Tensor | float = 0.0
    if balance and balance.class_weights is not None:
        counts = counts * features.new_tensor(balance.class_weights)[labels][:, None]
        log_shares = features.new_tensor(balance.log_shares)
    shape = (len(numbers), classes, features.shape[1])
    weight, bias = features.new_zeros(shape), features.new_zeros(shape[:2])
    if start is not None:  # a feature of infinite scale has no weight
        weight += (start.weight * scale[:, None]).nan_to_num(0, 0, 0)
        bias += start.bias + start.weight @ mean - log_shares
    weight.requires_grad_(), bias.requires_grad_()
    for strength in strengths:
        minimise(centred, labels, weight, bias, strength, counts, scale)
        folded = weight.detach() / scale[:, None]
        biases = bias.detach() - folded @ mean + log_shares
        yield [LinearProbe(*each, strength, float("nan")) for each in zip(folded, biases, strict=True)]


class HeldOut(NamedTuple):
    """Some images, as probes see them that have not learned from their fold.

    Attributes:
        rows: int [n].
        logits: float32 [n, C]; all are 0 where there were no others to learn from.
        sample: about how many images these probes have learned from; None where it is all of the other folds.
        learned: which classes these are of, bool [C].
    """

    rows: np.ndarray
    logits: torch.Tensor
    sample: int | None
    learned: np.ndarray


def most_learned(classes: int) -> int:
    """Return how many images a cross-fitted probe learns from, at most."""
    return max(1, min(MAX_LEARNED, MAX_CELLS // classes))


def cross_fit(pool: Pool, folds: np.ndarray, strength: float, learns: np.ndarray | None = None) -> Iterator[HeldOut]:
    """Yield the logits of all rows, in parts, by probes that have not learned from the row's fold.

    Args:
        pool: the images.
        folds: int [N].
        strength: the penalty.
        learns: whether the probe for a fold learns from an image, bool [N, K]; None is all of the other folds, or of
            many images about `most_learned`, drawn at random from them.
    """
    features, labels, _, names = pool
    _, fold_of = np.unique(folds, return_inverse=True)
    k, classes, at_once, sample = int(fold_of.max()) + 1, len(names), rows_at_once(features.device), None
    if learns is None:
        learns, most = fold_of[:, None] != np.arange(k), most_learned(classes)
        if (k - 1) * len(folds) > k * most:
            sample = most
            learns[np.random.default_rng(0).permutation(len(folds))[k * most // (k - 1) :]] = False
    truth = torch.as_tensor(labels, device=features.device)
    for fold, probes in enumerate(fit_parts(features, truth, classes, (strength,), learns)):
        held_out = np.flatnonzero(fold_of == fold)
        learned = np.bincount(labels[learns[:, fold]], minlength=classes) > 0
        for begin in range(0, len(held_out), at_once):
            part = held_out[begin : begin + at_once]
            logits = probes[0].logits(features[part]) if probes else features.new_zeros((len(part), classes))
            yield HeldOut(part, logits, sample, learned)


def fit_parts(
    features: torch.Tensor, labels: torch.Tensor, classes: int, strengths: tuple[float, ...], learns: np.ndarray
) -> Iterator[list[LinearProbe]]:
    """Yield for each of several parts of the images the probes of each strength that learn from it.

    A part without images has no probes.

    Args:
        features, labels, classes, strengths: see `fit_path`.
        learns: whether a part has an image, bool [N, K].
    """
    together = max(1, MAX_WEIGHTS // (classes * features.shape[1]))
    for begin in range(0, learns.shape[1], together):
        some = learns[:, begin : begin + together]
        rows = np.flatnonzero(some.any(axis=1))
        chosen, own = (torch.from_numpy(each).to(features.device) for each in (rows, some[rows]))
        path = []
        if len(rows):
            path = list(_fit_paths(features, labels, classes, strengths, rows=chosen, learns=own))
        for number in range(some.shape[1]):
            yield [probes[number] for probes in path]


def _centre(features: torch.Tensor, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of some rows of features, or all, less their mean; and the mean [D]. A large copy is in a file."""
    at_once = rows_at_once(features.device)
    chosen = list(features.split(at_once)) if rows is None else rows.split(at_once)
    n = len(features) if rows is None else len(rows)
    mean = torch.zeros(features.shape[1], dtype=_exact(features), device=features.device)
    on_cpu, begin = features.device.type == "cpu", 0
    centred = empty_rows(n, features.shape[1]) if on_cpu else features.new_empty(n, features.shape[1])
    for part in chosen:
        copy = centred[begin : begin + len(part)].copy_(part if rows is None else features[part])
        mean = mean + copy.sum(dim=0, dtype=mean.dtype) / n
        begin += len(part)
    for part in centred.split(at_once):
        part -= mean.float()
    return centred, mean.float()


def _measure_scale(centred: torch.Tensor, learns: torch.Tensor) -> torch.Tensor:
    """Return what centred features [n, D] are divided by for each probe [K, D]: their standard deviation in its rows.

    It is at least that of the median feature. Otherwise a feature that hardly ever differs from 0 would be a thousand
    times as large on the first image where it does, and decide there alone (docs/experiments.md). It is infinite where
    a feature is constant and not 0: a probe cannot learn from it, and must not believe it elsewhere.
    """
    sums = squares = torch.zeros(learns.shape[1], centred.shape[1], dtype=_exact(centred), device=centred.device)
    at_once = rows_at_once(centred.device)
    for part, own in zip(centred.split(at_once), learns.split(at_once), strict=True):
        values, member = part.to(sums.dtype), own.T.to(sums.dtype)
        sums, squares = sums + member @ values, squares + member @ values.square()
    numbers = learns.sum(dim=0)[:, None]
    means = sums / numbers.clamp_min(1)
    deviation = ((squares - sums * means) / (numbers - 1).clamp_min(1)).clamp_min(0).sqrt()
    constant = deviation < 1e-5 * means.abs()
    varying = deviation.where((deviation > 0) & ~constant, torch.nan).cpu()  # not every device has nanmedian
    median = varying.nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0).to(deviation.device)
    return torch.where(constant, torch.inf, deviation.maximum(median)).float()


def _exact(features: torch.Tensor) -> torch.dtype:
    """Return the type for sums over many rows; Apple's GPUs have no float64."""
    return torch.float32 if features.device.type == "mps" else torch.float64


def minimise(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    strength: float,
    counts: torch.Tensor,
    scale: torch.Tensor,
    iterations: int = 200,
) -> None:
    """Fit logistic regressions of the same features in place, by full-batch L-BFGS on the sum of their objectives.

    Args:
        features: float32 [N, D].
        labels: int64 [N].
        weight, bias: where they begin, float32 [K, C, D] and [K, C].
        strength: the penalty.
        counts: how much an image counts in each, float32 [N, K].
        scale: what the features are divided by in each [K, D].
        iterations: at most.
    """
    fits, classes, _ = weight.shape
    at_once = max(1, min(rows_at_once(features.device), MAX_CELLS // (fits * classes)))
    tolerance = TOLERANCE if len(labels) < MANY else LOOSE_TOLERANCE
    # The first step follows the gradient, and is left out where its square is below `tolerance_change`. What is left
    # to gain is at most this square divided by twice the strength: `tolerance` itself would end fits where they begin.
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1, max_eval=iterations * 5 // 4, history_size=10, tolerance_grad=1e-5,
        tolerance_change=2 * strength * tolerance, line_search_fn="strong_wolfe",
    )  # fmt: skip

    @torch.no_grad()
    def objective() -> torch.Tensor:
        # The gradient by hand and in parts: for 100,000 images of 1,000 classes autograd would hold 400 MB several
        # times over.
        loss, scaled = strength / 2 * weight.square().sum(), (weight / scale[:, None]).flatten(0, 1)
        weight_grad, bias_grad = torch.zeros_like(scaled), torch.zeros_like(bias)
        for part, truth, count in zip(*(each.split(at_once) for each in (features, labels, counts)), strict=True):
            logits = nn.functional.linear(part, scaled, bias.flatten()).unflatten(1, (fits, classes))
            residuals, true = torch.log_softmax(logits, dim=2), truth[:, None, None].expand(-1, fits, 1)
            loss -= (count * residuals.gather(2, true)[..., 0]).sum()
            residuals.exp_().scatter_add_(2, true, residuals.new_full(true.shape, -1.0)).mul_(count[..., None])
            weight_grad.addmm_(residuals.flatten(1).T, part)
            bias_grad += residuals.sum(dim=0)
        weight.grad, bias.grad = weight_grad.view_as(weight) / scale[:, None] + strength * weight, bias_grad
        return loss

    optimizer.step(objective)
    optimizer.param_groups[0].update(max_iter=iterations - 1, tolerance_change=tolerance)
    optimizer.step(objective)


def state_with_probe(model: PreTrainedModel, head: str, probe: LinearProbe) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state with the probe as its head, in main memory: its logits are the probe's."""
    state = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return state | {f"{head}.weight": probe.weight.cpu(), f"{head}.bias": probe.bias.cpu()}
