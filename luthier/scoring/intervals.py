"""How far a score can be trusted: standard errors and 95% intervals, which know what images belong together."""

import math

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import t

RESAMPLES = 1000
MAX_DRAWS = 20_000_000  # of all resamples together; more cells or groups than that allows get fewer resamples
MIN_RESAMPLES = 200
NORMAL_95 = 1.959964  # standard deviations on both sides that hold 95% of a normal distribution
TINY = 1e-12  # a variance, or a standard error, that is nothing but rounding


def standard_error(values: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Return the standard error of the mean of values [N]; those of a group, int [N], vary together."""
    if groups is None:
        return float(values.std() / math.sqrt(len(values)))
    _, index = np.unique(groups, return_inverse=True)
    return float(np.linalg.norm(np.bincount(index, weights=values - values.mean())) / len(values))


def wilson_interval(correct: float, n: float, z: float = NORMAL_95) -> list[float]:
    """Return both ends of Wilson's (1927) score interval for `correct` in `n`; 95% by default."""
    share = correct / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exact where all or none are correct, which rounding would miss.
    return [(centre - half) / scale if correct > 0 else 0.0, (centre + half) / scale if correct < n else 1.0]


def interval_of_share(correct: np.ndarray, groups: np.ndarray | None = None) -> list[float]:
    """Return the interval of a share of images, such as the accuracy.

    It is Wilson's, with the number of images that would tell as much if each stood alone (Kish 1965): ten images of
    one patient that are right or wrong together count as one. Few groups estimate that number badly, which the t
    distribution makes up for (Korn and Graubard 1998).

    Args:
        correct: bool [N], or the share of runs that are right about an image, from 0 to 1.
        groups: int [N], the same for images that belong together; None where each stands alone.
    """
    n, share = len(correct), float(correct.mean())
    if groups is None:
        return wilson_interval(share * n, n)
    _, index = np.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    if count == 1:
        return wilson_interval(share, 1)
    sizes = np.bincount(index)
    # The jackknife leaves out one group at a time: a large one pulls the share to itself, so that it deviates little.
    without = (correct.sum() - np.bincount(index, weights=correct)) / (n - sizes)
    variance = (count - 1) / count * float(((without - share) ** 2).sum())
    effective = float(np.clip(share * (1 - share) / variance, 1, n)) if variance > TINY else count
    return wilson_interval(share * effective, effective, float(t.ppf(0.975, count - 1)))


def interval_of_difference(differences: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """Return both ends of the interval of a paired difference of two shares (Agresti and Min 2005).

    Half an image is added to those that are right by one and wrong by the other, either way, so that no difference at
    all among a few images is no proof of none. Images that belong together widen the interval as in
    `interval_of_share`, and never narrow it.

    Args:
        differences: of each image, from -1 to 1 [N].
        groups: int [N], the same for images that belong together; None where each stands alone.
    """
    n, mean = len(differences) + 2, float(differences.sum()) / (len(differences) + 2)
    added = 1 + 2 * mean**2  # the squared deviations of half an image of -1, half of 1, and one of 0
    half = NORMAL_95 * math.sqrt(float(((differences - mean) ** 2).sum()) + added) / n
    if groups is not None:
        _, index = np.unique(groups, return_inverse=True)
        count = int(index.max()) + 1
        if count == 1:
            return -1.0, 1.0
        sums = np.bincount(index, weights=differences - mean)
        variance = count / (count - 1) * float((sums**2).sum()) + added
        half = max(half, float(t.ppf(0.975, count - 1)) * math.sqrt(variance) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def stretch(groups: int) -> float:
    """Return how much wider an interval from bootstrap samples of so few groups must be: they estimate it badly."""
    return float(t.ppf(0.975, max(1, groups - 1))) / NORMAL_95


def balanced_accuracy(correct: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return the mean recall of the classes that occur [...], from correct answers and images by class [..., C]."""
    occurs = support > 0
    return (correct / np.maximum(support, 1)).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def macro_f1(correct: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the classes that occur or are predicted [...], from counts by class [..., C]."""
    occurs = (support + predicted) > 0
    f1 = 2 * correct / np.maximum(support + predicted, 1)
    return f1.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def interval_of_balanced_accuracy(
    references: np.ndarray, correct: np.ndarray, groups: np.ndarray | None = None
) -> list[float]:
    """Return the interval of the mean recall of the classes that occur.

    It is Wilson's, with the number of images that would tell as much about one share. The variance of each recall is
    that with one more image that is right and one that is wrong (Laplace's rule): of two images that are both right
    nobody knows that all others are. The jackknife says by how much groups raise the variance, as in
    `interval_of_share`; a class of one group has one image's.

    Args:
        references: int [N], the true classes.
        correct: bool [N].
        groups: int [N], the same for images that belong together; None where each stands alone.
    """
    _, truth, counts = np.unique(references, return_inverse=True, return_counts=True)
    recalls, images, z = np.bincount(truth, weights=correct) / counts, counts.astype(float), NORMAL_95
    if groups is not None:
        _, index = np.unique(groups, return_inverse=True)
        count = int(index.max()) + 1
        if count == 1:
            return wilson_interval(float(recalls.mean()), 1)
        images, z = _effective_images(truth, correct - recalls[truth], index), float(t.ppf(0.975, count - 1))
    smoothed = (recalls * images + 1) / (images + 2)
    variance = float((smoothed * (1 - smoothed) / images).sum()) / len(counts) ** 2
    score, mean = float(recalls.mean()), float(smoothed.mean())
    effective = max(1.0, mean * (1 - mean) / variance)
    return wilson_interval(score * effective, effective, z)


def _effective_images(truth: np.ndarray, deviations: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return how many images that stand alone would tell as much about the recall of each class, float [C].

    All classes together tell how much the images of a group are alike, and each class by itself too; the smaller
    number counts, because one class may have large groups where another has none.

    Args:
        truth: int [N], the true classes, from 0 on.
        deviations: float [N], 1 for a correct answer and 0 for a wrong one, less the recall of the class.
        groups: int [N], from 0 on.
    """
    classes = int(truth.max()) + 1
    counts = np.bincount(truth)
    cells, index, sizes = np.unique(groups * classes + truth, return_inverse=True, return_counts=True)
    groups_of_cells, classes_of_cells = np.divmod(cells, classes)
    occurs_in = np.bincount(classes_of_cells)  # groups
    # How the recall of its class changes without each group, and the mean recall; then the same without each image.
    others = counts[classes_of_cells] - sizes
    shrink = np.sqrt((occurs_in - 1) / occurs_in)[classes_of_cells]
    changes = np.bincount(index, weights=deviations) / np.maximum(others, 1) * shrink
    together = float((np.bincount(groups_of_cells, weights=changes) ** 2).sum())
    alone = np.bincount(truth, weights=deviations**2) / (np.maximum(counts - 1, 1) * counts)
    of_class = np.bincount(classes_of_cells, weights=changes**2)
    if min(together, alone.sum()) <= TINY:
        return occurs_in.astype(float)
    known = np.minimum(of_class, alone) > TINY  # a class that is all right, or all wrong, tells nothing of its groups
    own = np.where(known, counts / np.maximum(of_class / np.maximum(alone, TINY), 1), occurs_in)
    pooled = counts / max(1.0, together / float(alone.sum()))
    return np.where(occurs_in == 1, 1.0, np.maximum(np.minimum(own, pooled), 1.0))


def interval_of_macro_f1(
    references: np.ndarray,
    predictions: np.ndarray,
    classes: int,
    groups: np.ndarray | None,
    none: int | None = None,
) -> list[float]:
    """Return the interval of macro F1, by the bootstrap (Efron and Tibshirani 1993).

    Images are drawn again with replacement, or whole groups of them. Draws lack classes of which there are few images,
    so that their mean is below the score: the interval is moved by that bias. A single image that is right is right in
    every draw, so the interval is on both sides at least as wide as that of balanced accuracy. Few groups widen it
    as in `interval_of_share`.

    Args:
        references, predictions: int [N], true and predicted classes.
        classes: how many there are.
        groups: int [N], the same for images that belong together; None where each stands alone.
        none: a class whose predictions are no answers.
    """
    # What is drawn are groups; or, because images of the same two classes are alike, such pairs by their frequency.
    keys = references * classes + predictions if groups is None else groups
    _, first, units, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    rows, times = (first, sizes) if groups is None else (np.arange(len(keys)), np.ones(len(first), dtype=int))
    hits, answered = rows[references[rows] == predictions[rows]], rows[predictions[rows] != none]
    matrices = [
        csr_matrix((np.ones(len(chosen)), (units[chosen], column[chosen])), shape=(len(first), classes))
        for chosen, column in ((hits, references), (rows, references), (answered, predictions))
    ]

    def count(units_drawn: np.ndarray) -> list[np.ndarray]:
        return [units_drawn @ matrix for matrix in matrices]  # correct answers, images and answers by class

    found = count(times)
    score, recall = float(macro_f1(*found)), float(balanced_accuracy(*found[:2]))
    resamples = int(np.clip(MAX_DRAWS / len(first), MIN_RESAMPLES, RESAMPLES))
    draws, shares, generator = int(times.sum()), times / times.sum(), np.random.default_rng(0)
    drawn = np.array([float(macro_f1(*count(generator.multinomial(draws, shares)))) for _ in range(resamples)])
    ends = np.quantile(drawn, (0.025, 0.975)) - drawn.mean()
    if groups is not None:
        ends = ends * stretch(len(first))
    low, high = interval_of_balanced_accuracy(references, references == predictions, groups)
    low, high = score + min(ends[0], low - recall), score + max(ends[1], high - recall)
    return [max(0.0, float(low)), min(1.0, float(high))]
