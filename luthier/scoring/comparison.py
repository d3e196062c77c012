"""Which of several experiments is better, and whether the test images are enough to tell."""

import csv
import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from luthier.errors import UserError
from luthier.scoring.intervals import interval_of_share

LEVEL = 0.05  # of the tests, over all pairs together
EXACT, FLIPS = 14, 20_000  # groups whose signs are all tried, and random flips of more groups


class RunResult(NamedTuple):
    """One run of an experiment: its `metrics.json`, and whether each test image was predicted correctly.

    Attributes:
        metrics: what `metrics.json` holds.
        correct: (digest of the image, whether it was correct, its group or ""), in the order of the digests.
    """

    metrics: dict
    correct: list[tuple[str, bool, str]]


class Verdict(NamedTuple):
    """The comparison of two experiments.

    Attributes:
        a, b: their names.
        for_a, for_b: test images that a predicts correctly in more of its runs than b does, and the reverse.
        n: test images.
        p: of `vote_p_value`, adjusted for all pairs by Holm (1979).
        groups: how many the test images are in; None where each stands alone.
        alike: whether both are right about the same images in every run.
    """

    a: str
    b: str
    for_a: int
    for_b: int
    n: int
    p: float
    groups: int | None = None
    alike: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether the difference is unlikely to be chance."""
        return self.p < LEVEL


def check_same_images(results: dict[str, dict[str, RunResult]], part: str) -> None:
    """Refuse experiments that were not trained and tested on the same images in a seed or fold.

    Raises:
        UserError: that is so.
    """
    fingerprints = {
        name: parts[part].metrics["data"]["fingerprint"] for name, parts in results.items() if part in parts
    }
    if len(set(fingerprints.values())) > 1:
        raise UserError(
            f"{', '.join(fingerprints)} do not have the same splits in {part}: name the data and the split once, for "
            "all of them, on the command line of compare.py"
        )
    counted = {tuple(digest for digest, *_ in parts[part].correct) for parts in results.values() if part in parts}
    if len(counted) > 1:
        raise UserError(
            f"{', '.join(fingerprints)} do not count the same test images in {part}: name --none_class once, for all "
            "of them, on the command line of compare.py"
        )


def check_same_data(name: str, parts: dict[str, RunResult], part: str, folds: bool) -> None:
    """Refuse a seed or fold of an experiment whose images are others than those of its first one.

    Raises:
        UserError: images or labels have changed, so that an image would count twice.
    """
    (before, first), last = next(iter(parts.items())), parts[part]
    if folds:  # each has a fingerprint of its own
        tested = {digest for other, result in parts.items() if other != part for digest, *_ in result.correct}
        changed = not tested.isdisjoint(digest for digest, *_ in last.correct)
        changed |= _images_by_class(first) != _images_by_class(last)
    else:
        changed = first.metrics["data"]["fingerprint"] != last.metrics["data"]["fingerprint"]
    if changed:
        raise UserError(
            f"the images, or their labels, have changed between {before} and {part} of {name}: an image would count "
            "twice. Put them back and remove the folders of the runs that had others, or give another --output_dir"
        )


def _images_by_class(result: RunResult) -> Counter:
    """Return how many images of each class all splits of a run have together."""
    return sum((Counter(split["per_class"]) for split in result.metrics["data"]["splits"].values()), Counter())


def summarise_experiment(name: str, parts: dict[str, RunResult]) -> dict[str, str | int | float]:
    """Return an experiment's row of the table. The interval is of one test set, or of all folds together."""
    metrics = [result.metrics for result in parts.values()]
    accuracies = [m["test"]["accuracy"] for m in metrics]
    counts, groups = count_correct(parts)
    correct = counts * len(counts) / sum(len(result.correct) for result in parts.values())  # share of the runs
    low, high = interval_of_share(correct, groups)
    return {
        "experiment": name, "runs": len(parts), "test accuracy": float(correct.mean()), "lowest": min(accuracies),
        "highest": max(accuracies), "interval low": low, "interval high": high, "n": len(counts),
        "validation accuracy": statistics.mean(m["validation"]["accuracy"] for m in metrics),
        "seconds": statistics.mean(m["seconds"]["total"] for m in metrics),
    }  # fmt: skip


def count_correct(parts: dict[str, RunResult]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return in how many runs of an experiment each test image is predicted correctly, int [N], and its group.

    Runs of several seeds have one test set, runs of several folds one each. The groups are None where each image
    stands alone; otherwise an image without a group gets one of its own.
    """
    counts: dict[tuple, int] = {}
    groups: dict[tuple, str] = {}
    for result in parts.values():
        for row, (digest, is_correct, group) in enumerate(result.correct):
            key = result.metrics["data"]["fingerprint"], digest, row
            counts[key] = counts.get(key, 0) + is_correct
            groups[key] = group
    names = [group or f"alone {row}" for row, group in enumerate(groups.values())]
    return np.array(list(counts.values())), np.array(names) if any(groups.values()) else None


def vote_p_value(votes: np.ndarray, groups: np.ndarray | None) -> float:
    """Return the p-value of the votes of images for one experiment (above 0) or another (below 0).

    An image counts once, whatever the number of runs. Without groups this is the exact McNemar test. With groups whole
    groups change sides: the sign-flip permutation test of the groups' sums, exact or on `FLIPS` random flips.

    Args:
        votes: int [N], in how many more of its runs the first predicts an image correctly.
        groups: of each image, [N]; None where each stands alone.
    """
    sums = np.sign(votes)
    if groups is not None:
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=sums)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    if (np.abs(sums) == 1).all():
        return float(binomtest(int((sums > 0).sum()), len(sums)).pvalue)
    if len(sums) <= EXACT:
        flips = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float((np.abs(flips @ sums) >= abs(sums.sum())).mean())
    generator = np.random.default_rng(0)
    extreme = sum(
        int((np.abs(generator.choice((-1, 1), (1000, len(sums))) @ sums) >= abs(sums.sum())).sum())
        for _ in range(FLIPS // 1000)
    )
    return (extreme + 1) / (FLIPS + 1)


def compare_pairs(results: dict[str, dict[str, RunResult]]) -> list[Verdict]:
    """Compare each pair of experiments on the same images, see `vote_p_value`.

    With several seeds an image counts for the experiment that predicts it correctly in more of them. With several
    pairs the p-values are adjusted by Holm (1979), so that the chance of any wrong verdict stays below `LEVEL`. A
    verdict is about the trained models. How much another seed would change them is not in it: use several seeds or
    folds. Where two experiments have other groups, as where one alone was told them, the fewest count.
    """
    verdicts = []
    for a, b in itertools.combinations(results, 2):
        (first, of_a), (second, of_b) = count_correct(results[a]), count_correct(results[b])
        votes = first - second
        for_a, for_b = int((votes > 0).sum()), int((votes < 0).sum())
        told = [(len(np.unique(groups)), groups) for groups in (of_a, of_b) if groups is not None]
        together, groups = min(told, key=lambda each: each[0], default=(None, None))
        # Without the groups, which only one of them may have been told.
        alike = all(
            [each[:2] for each in run.correct] == [each[:2] for each in results[b][part].correct]
            for part, run in results[a].items()
        )
        # With several seeds one may be right about more images, and the other more often: neither is better.
        agrees = int(votes.sum()) * (for_a - for_b) > 0
        p = vote_p_value(votes, groups) if agrees else 1.0
        verdicts.append(Verdict(a, b, for_a, for_b, len(votes), p, together, alike))
    adjusted, highest = {}, 0.0
    for rank, verdict in enumerate(sorted(verdicts, key=lambda verdict: verdict.p)):
        highest = max(highest, min(1.0, verdict.p * (len(verdicts) - rank)))
        adjusted[verdict.a, verdict.b] = highest
    return [verdict._replace(p=adjusted[verdict.a, verdict.b]) for verdict in verdicts]


def read_correct(path: Path) -> list[tuple[str, bool, str]]:
    """Return of each image of a `predictions.csv` its digest, whether it is correct, and its group, if any; sorted.

    Images of none of the classes are left out.

    Raises:
        UserError: it is not there, or damaged.
        OSError: it cannot be read, which says nothing about its content.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: (row["digest"], row["label"]))  # one image, two labels
        if not rows or any(None in row.values() for row in rows):
            raise ValueError("it has been cut off")
        return [
            (row["digest"], row["label"] == row["predicted"], row.get("group", ""))
            for row in rows
            if row.get("none") != "1"
        ]
    except (FileNotFoundError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged, or another program has changed it ({type(error).__name__}: {error}): put it back, or "
            "remove its folder, and the same command makes this run again"
        ) from error
