"""By how much a score is too high that ignores which images belong together."""

import numpy as np

from luthier.images.splits import stratified_folds
from luthier.scoring.intervals import interval_of_difference, stretch
from luthier.training.features import Pool
from luthier.training.probe import cross_fit, most_learned

FOLDS, REPEATS = 5, 3
RESAMPLES = 1000


def measure_inflation(pool: Pool, duplicates: np.ndarray, strength: float) -> dict | None:
    """Return the accuracy of cross-fitted probes with folds that keep groups together, and with folds that do not.

    Both keep duplicates together. An image counts if all of its probes have learned its class, which they cannot where
    the class has one group. The interval of the difference comes from bootstrap samples of the groups; it is at least
    that of `interval_of_difference`, because no difference in a few groups is no proof of none. Among many images it
    is measured on some of the groups.

    Args:
        pool: the images.
        duplicates: int [N], the same for images that are nearly the same.
        strength: of the probes.

    Returns `images` and `groups` that count, `accuracy`, `ignoring` (the accuracy without groups), `inflation` and its
    `ci95`; None where no image counts.
    """
    pool, duplicates = _some_groups(pool, duplicates)
    _, labels, groups, _ = pool
    correct = {"accuracy": np.zeros(len(labels)), "ignoring": np.zeros(len(labels))}
    counts = np.ones(len(labels), dtype=bool)  # whether an image does
    for seed in range(REPEATS):
        for name, together in (("accuracy", groups), ("ignoring", duplicates)):
            folds = stratified_folds(labels, together, FOLDS, seed)
            for part in cross_fit(pool, folds, strength):
                likely = part.logits.argmax(dim=1).cpu().numpy()
                correct[name][part.rows] += (likely == labels[part.rows]) / REPEATS
                counts[part.rows] &= part.learned[labels[part.rows]]
    if not counts.any():
        return None
    correct = {name: values[counts] for name, values in correct.items()}
    _, index = np.unique(groups[counts], return_inverse=True)
    sizes = np.bincount(index)
    gains = np.bincount(index, weights=correct["ignoring"] - correct["accuracy"])
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(sizes), size=len(sizes))
        resampled.append(gains[drawn].sum() / sizes[drawn].sum())
    inflation = float(gains.sum() / sizes.sum())
    ends = np.quantile(resampled, (0.025, 0.975)) - inflation
    low, high = np.clip(inflation + ends * stretch(len(sizes)), -1, 1).tolist()
    least = interval_of_difference(correct["ignoring"] - correct["accuracy"], groups[counts])
    return {
        "images": int(counts.sum()),
        "groups": len(sizes),
        **{name: float(values.mean()) for name, values in correct.items()},
        "inflation": inflation,
        "ci95": [min(low, least[0]), max(high, least[1])],
    }


def _some_groups(pool: Pool, duplicates: np.ndarray) -> tuple[Pool, np.ndarray]:
    """Return whole groups, of no more images than probes learn from: in a sample of images a group would lack some."""
    most = most_learned(len(pool.names)) * FOLDS // (FOLDS - 1)
    if len(pool.labels) <= most:
        return pool, duplicates
    own, index, sizes = np.unique(pool.groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(0).permutation(len(own))
    rows = np.flatnonzero(np.isin(index, order[np.cumsum(sizes[order]) <= most]))
    if not len(rows):  # the first group alone has more
        return pool, duplicates
    return Pool(pool.features[rows], pool.labels[rows], pool.groups[rows], pool.names), duplicates[rows]
