"""How a linear probe's accuracy grows with the number of images, and what more of them would bring."""

import warnings

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from luthier.errors import UserError
from luthier.images.splits import rows_by_class, stratified_folds
from luthier.scoring.intervals import stretch
from luthier.terminal import plural
from luthier.training.features import Pool
from luthier.training.probe import cross_fit

FRACTIONS = (0.1, 0.18, 0.32, 0.56, 1.0)  # of the training images
FOLDS, REPEATS = 4, 3  # every image is held out once in each repeat
MANY = 20_000  # images from which on one repeat is enough: the error of an accuracy is a third of a point
RESAMPLES = 300


def learning_curve(pool: Pool, strength: float, target: int) -> dict:
    """Measure probes on growing parts of the images and extrapolate.

    Each part is drawn `FOLDS` x `REPEATS` times, or `FOLDS` times from `MANY` images on, class by class, and scored on
    the fold that is held out. A power law (Hestness et al. 2017; Viering and Loog 2022) is fitted to the mean errors,
    and to `RESAMPLES` bootstrap samples of the images, groups as a whole, which give the intervals. These cover the
    choice of the images that are tested, not of those that are learned from. The law never falls, so the gain is
    never below zero.

    Args:
        pool: of train and validation; test is not looked at.
        strength: of the probe.
        target: number of training images that is compared with twice as many.

    Returns `points` (`n`, `accuracy`, and `lowest` and `highest` of the draws), `now` and `twice` (`n`, `accuracy`,
    `ci95`), `gain` and `gain_ci95`, and the `curve` that was fitted (`n`, `accuracy`, `low`, `high`).

    Raises:
        UserError: a class has fewer images than there are folds, counting those of a group as one: a fold could
            hold all of them, and its probes would not know the class.
    """
    _, labels, groups, names = pool
    check_classes(labels, groups, names)
    correct = np.zeros((len(FRACTIONS), len(labels)))
    sizes = np.zeros(len(FRACTIONS))
    draws: list[list[float]] = [[] for _ in FRACTIONS]
    repeats = REPEATS if len(labels) < MANY else 1
    for seed in range(repeats):
        folds = stratified_folds(labels, groups, FOLDS, seed)
        ranks = np.ones((len(labels), FOLDS))  # below 1 for the images that a fold's probes may learn from
        for fold in range(FOLDS):
            ranks[folds != fold, fold] = _ranks_in_class(labels[folds != fold], groups[folds != fold], seed)
        for index, fraction in enumerate(FRACTIONS):
            learns, is_correct = ranks < fraction, np.empty(len(labels), dtype=bool)
            for part in cross_fit(pool, folds, strength, learns):
                is_correct[part.rows] = part.logits.argmax(dim=1).cpu().numpy() == labels[part.rows]
            correct[index] += is_correct / repeats
            draws[index] += [is_correct[folds == fold].mean() for fold in range(FOLDS)]
            sizes[index] += learns.sum() / (FOLDS * repeats)
    return {
        "points": [
            {"n": round(size), "accuracy": accuracy, "lowest": float(min(drawn)), "highest": float(max(drawn))}
            for size, accuracy, drawn in zip(sizes, correct.mean(axis=1).tolist(), draws, strict=True)
        ],
        **extrapolate(sizes, correct, groups, target),
    }


def check_classes(labels: np.ndarray, groups: np.ndarray, names: list[str]) -> None:
    """Check that every class has enough images for a learning curve.

    Args:
        labels, groups, names: see `features.Pool`.

    Raises:
        UserError: see `learning_curve`.
    """
    many = int(groups.max()) + 1
    sizes = np.bincount(np.unique(labels * many + groups) // many, minlength=len(names)).tolist()
    fewest = int(np.argmin(sizes))
    if sizes[fewest] < FOLDS:
        raise UserError(
            f"--learning_curve needs {FOLDS} images of each class in train and validation, where near-duplicates and "
            f"images of one group count as one, but {names[fewest]!r} has {plural(sizes[fewest], 'image')}: add some, "
            "or leave the option out"
        )


def _ranks_in_class(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return a random rank of each image's group in its class, from 0 up to 1: the first is in every part.

    A part has whole groups: a tenth of the images of every group would show nearly as much as all of them. Only a
    group of several classes has a rank in each of them, or a part could lack a class.
    """
    generator, ranks = np.random.default_rng(seed), np.empty(len(labels))
    for rows in rows_by_class(labels):
        own, number = np.unique(groups[rows], return_inverse=True)
        ranks[rows] = (generator.permutation(len(own)) / len(own))[number]
    return ranks


def extrapolate(sizes: np.ndarray, correct: np.ndarray, groups: np.ndarray, target: int) -> dict:
    """Fit power laws to accuracies at growing sizes; see `learning_curve`.

    Args:
        sizes: numbers of training images [S].
        correct: float [S, N], how often each image was predicted correctly when it was held out.
        groups: int [N].
        target: number of training images that is compared with twice as many.
    """
    grid = np.unique(np.geomspace(sizes[0], 2 * target, 40).round())
    asked = np.concatenate([[target, 2 * target], grid])
    fitted = _power_law(sizes, 1 - correct.mean(axis=1), asked)
    generator = np.random.default_rng(0)
    distinct, group = np.unique(groups, return_inverse=True)
    samples = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(distinct), size=len(distinct))
        times = np.bincount(drawn, minlength=len(distinct))[group]  # that each image is drawn with its group
        samples.append(_power_law(sizes, 1 - correct @ times / times.sum(), asked))
    resampled = np.array(samples)
    gain, gains = fitted[1] - fitted[0], resampled[:, 1] - resampled[:, 0]
    wider = stretch(len(distinct))
    low, high = np.clip(fitted + (np.quantile(resampled, (0.025, 0.975), axis=0) - fitted) * wider, 0, 1)
    ends = np.maximum(gain + (np.quantile(gains, (0.025, 0.975)) - gain) * wider, 0)
    return {
        "now": {"n": target, "accuracy": fitted[0], "ci95": [low[0], high[0]]},
        "twice": {"n": 2 * target, "accuracy": fitted[1], "ci95": [low[1], high[1]]},
        "gain": gain,
        "gain_ci95": ends.tolist(),
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
        warnings.simplefilter("ignore", OptimizeWarning)  # about the covariance of the parameters, which is not used
        try:
            parameters = curve_fit(error, sizes, errors, start, bounds=([0, 0, 0.05], [1, 1, 2]), max_nfev=2000)[0]
        except RuntimeError:  # no law fits: the accuracy of all images is the best guess
            parameters = (errors[-1], 0.0, 1.0)
    return 1 - error(asked, *parameters).clip(max=1)  # the law exceeds 1 below the sizes that were measured
