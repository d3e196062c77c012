"""How a linear probe's accuracy grows with the number of pictures, and what more of them would buy.

Apart from probe.py, because it is asked for seldom; on features that are there already it takes seconds.
"""

import warnings

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, curve_fit

from probe import fit_path
from splits import stratified_folds

FRACTIONS = (0.1, 0.18, 0.32, 0.56, 1.0)  # of the training pictures
FOLDS, REPEATS = 4, 3  # every picture is held out once in each repeat
RESAMPLES = 300


def learning_curve(
    features: torch.Tensor, labels: np.ndarray, names: list[str], groups: np.ndarray, strength: float, target: int
) -> dict:
    """Measure probes on growing parts of the pictures and extrapolate.

    Each part is drawn `FOLDS` x `REPEATS` times, class by class, and scored on the fold that is held out. A power law
    (Hestness et al. 2017; Viering and Loog 2022) is fitted to the mean errors, and to `RESAMPLES` bootstrap samples of
    the pictures, groups as a whole, which give the intervals: of which pictures were tested, not of which ones were
    learned from. The law never falls, so that the gain is never below zero.

    Args:
        features: float32 [N, D] of train and validation, on the device of the fits.
        labels: int [N].
        names: the classes' names.
        groups: int [N], see `data.load_splits`.
        strength: of the probe.
        target: number of training pictures to speak of; twice as many are compared with it.

    Returns `points` (`n`, `accuracy`, and `lowest` and `highest` of the draws), `now` and `twice` (`n`, `accuracy`,
    `ci95`), `gain` and `gain_ci95`, and the `curve` that was fitted (`n`, `accuracy`, `low`, `high`).

    Raises:
        ValueError: a class has fewer pictures than there are folds.
    """
    fewest = min(range(len(names)), key=lambda index: (labels == index).sum())
    if (labels == fewest).sum() < FOLDS:
        raise ValueError(
            f"--learning_curve needs {FOLDS} pictures of each class in train and validation, but {names[fewest]!r} "
            f"has {(labels == fewest).sum()}: add some, or leave the option out"
        )
    truth = torch.as_tensor(labels, device=features.device)
    hits = np.zeros((len(FRACTIONS), len(labels)))
    sizes, draws = np.zeros(len(FRACTIONS)), [[] for _ in FRACTIONS]
    for seed in range(REPEATS):
        folds = stratified_folds(labels, groups, FOLDS, seed)
        for fold in range(FOLDS):
            held_out, rows = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            ranks = _ranks_in_class(labels[rows], seed)
            for index, fraction in enumerate(FRACTIONS):
                drawn = rows[ranks < fraction]
                (probe,) = fit_path(features[drawn], truth[drawn], len(names), (strength,))
                right = (probe.logits(features[held_out]).argmax(dim=1) == truth[held_out]).cpu().numpy()
                hits[index, held_out] += right / REPEATS
                draws[index].append(right.mean())
                sizes[index] += len(drawn) / (FOLDS * REPEATS)
    return {
        "points": [
            {"n": round(size), "accuracy": accuracy, "lowest": float(min(drawn)), "highest": float(max(drawn))}
            for size, accuracy, drawn in zip(sizes, hits.mean(axis=1).tolist(), draws, strict=True)
        ],
        **extrapolate(sizes, hits, groups, target),
    }


def _ranks_in_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a random rank for each picture among those of its class, from 0 up to 1: the first is in every part."""
    generator, ranks = np.random.default_rng(seed), np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ranks[generator.permutation(rows)] = np.arange(len(rows)) / len(rows)
    return ranks


def extrapolate(sizes: np.ndarray, hits: np.ndarray, groups: np.ndarray, target: int) -> dict:
    """Fit power laws to accuracies at growing sizes; see `learning_curve`.

    Args:
        sizes: numbers of training pictures [S].
        hits: float [S, N], how often each picture was told when it was held out.
        groups: int [N].
        target: number of training pictures to speak of.
    """
    grid = np.unique(np.geomspace(sizes[0], 2 * target, 40).round())
    asked = np.concatenate([[target, 2 * target], grid])
    fitted = _power_law(sizes, 1 - hits.mean(axis=1), asked)
    generator = np.random.default_rng(0)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    samples = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[index] for index in generator.integers(len(members), size=len(members))])
        samples.append(_power_law(sizes, 1 - hits[:, rows].mean(axis=1), asked))
    samples = np.array(samples)
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    gains = samples[:, 1] - samples[:, 0]
    return {
        "now": {"n": target, "accuracy": fitted[0], "ci95": [low[0], high[0]]},
        "twice": {"n": 2 * target, "accuracy": fitted[1], "ci95": [low[1], high[1]]},
        "gain": fitted[1] - fitted[0],
        "gain_ci95": np.quantile(gains, (0.025, 0.975)).tolist(),
        "curve": {
            "n": grid.tolist(),
            "accuracy": fitted[2:].tolist(),
            "low": low[2:].tolist(),
            "high": high[2:].tolist(),
        },
    }


def _power_law(sizes: np.ndarray, errors: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the accuracies at the sizes asked for, by the law error = floor + scale * size ** -exponent."""

    def error(size: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return floor + scale * (size / sizes[0]) ** -exponent

    start = (errors.min() / 2, max(errors[0] - errors.min() / 2, 1e-3), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # of the parameters' own covariance, which is not used
        try:
            found = curve_fit(error, sizes, errors, start, bounds=([0, 0, 0.05], [1, 1, 2]), max_nfev=2000)[0]
        except RuntimeError:  # no law fits: the last part's accuracy is all that is known
            found = (errors[-1], 0.0, 1.0)
    return 1 - error(asked, *found)


def in_words(curve: dict) -> str:
    """Say what twice the pictures would buy."""
    now, twice = curve["now"], curve["twice"]
    low, high = (100 * gain for gain in curve["gain_ci95"])
    return (
        f"With twice the training pictures ({twice['n']:,} instead of {now['n']:,}) a linear probe would score about "
        f"{twice['accuracy']:.1%} instead of {now['accuracy']:.1%}: {100 * curve['gain']:+.1f} points "
        f"(95% interval {low:+.1f} to {high:+.1f})"
    )
