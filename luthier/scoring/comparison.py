"""Which of several experiments is better, and whether the test images are enough to tell."""

import itertools
import statistics
from typing import NamedTuple

from scipy.stats import binomtest

from luthier.errors import UserError
from luthier.scoring.intervals import wilson_interval

LEVEL = 0.05  # of the tests, over all pairs together


class RunResult(NamedTuple):
    """One run of an experiment: its `metrics.json`, and whether each test image was predicted correctly.

    Attributes:
        metrics: what `metrics.json` holds.
        correct: (digest of the image, whether it was correct), in the order of the digests.
    """

    metrics: dict
    correct: list[tuple[str, bool]]


class Verdict(NamedTuple):
    """The comparison of two experiments.

    Attributes:
        a, b: their names.
        for_a, for_b: test images that a, or b, predicts correctly in more of its runs.
        n: test images.
        p: of the exact McNemar test, adjusted for all pairs by Holm (1979).
    """

    a: str
    b: str
    for_a: int
    for_b: int
    n: int
    p: float

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


def summarise_experiment(name: str, parts: dict[str, RunResult]) -> dict[str, str | int | float]:
    """Return an experiment's row of the table. The interval is of one test set, or of all folds together."""
    metrics = [result.metrics for result in parts.values()]
    accuracies = [m["test"]["accuracy"] for m in metrics]
    tested = {m["data"]["fingerprint"]: m["test"]["n"] for m in metrics}
    n = sum(tested.values())
    mean = sum(m["test"]["accuracy"] * m["test"]["n"] for m in metrics) / sum(m["test"]["n"] for m in metrics)
    low, high = wilson_interval(round(mean * n), n)
    return {
        "experiment": name, "runs": len(parts), "test accuracy": mean, "lowest": min(accuracies),
        "highest": max(accuracies), "interval low": low, "interval high": high, "n": n,
        "validation accuracy": statistics.mean(m["validation"]["accuracy"] for m in metrics),
        "seconds": statistics.mean(m["seconds"]["total"] for m in metrics),
    }  # fmt: skip


def count_votes(a: dict[str, RunResult], b: dict[str, RunResult]) -> list[int]:
    """Return for each test image in how many more of its runs experiment a predicts it correctly than b does.

    Runs of several seeds have one test set, runs of several folds one each.
    """
    votes: dict[tuple, int] = {}
    for part, result in a.items():
        for row, ((digest, first), (_, second)) in enumerate(zip(result.correct, b[part].correct, strict=True)):
            key = result.metrics["data"]["fingerprint"], digest, row
            votes[key] = votes.get(key, 0) + first - second
    return list(votes.values())


def compare_pairs(results: dict[str, dict[str, RunResult]]) -> list[Verdict]:
    """Compare each pair of experiments by the exact McNemar test on the same images.

    With several seeds an image counts for the experiment that predicts it correctly in more of them. With several
    pairs the p-values are adjusted by Holm (1979), so that the chance of any wrong verdict stays below `LEVEL`. A
    verdict is about the trained models. How much another seed would change them is not in it: use several seeds or
    folds.
    """
    verdicts = []
    for a, b in itertools.combinations(results, 2):
        votes = count_votes(results[a], results[b])
        for_a, for_b = sum(vote > 0 for vote in votes), sum(vote < 0 for vote in votes)
        p = binomtest(for_a, for_a + for_b).pvalue if for_a + for_b else 1.0
        verdicts.append(Verdict(a, b, for_a, for_b, len(votes), p))
    adjusted, highest = {}, 0.0
    for rank, verdict in enumerate(sorted(verdicts, key=lambda verdict: verdict.p)):
        highest = max(highest, min(1.0, verdict.p * (len(verdicts) - rank)))
        adjusted[verdict.a, verdict.b] = highest
    return [verdict._replace(p=adjusted[verdict.a, verdict.b]) for verdict in verdicts]
