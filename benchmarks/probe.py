"""The probe's fit compared with scikit-learn's: seconds and validation loss of one logistic regression each.

    python -m benchmarks.probe
    python -m benchmarks.probe --folds

Both minimise the same objective with L-BFGS, from zero and to the same size of the gradient, on the same drawn
features (overlapping clusters of 1,280 dimensions), in one process and in turns. Luthier also ends where a step gains
less than 1e-6, or 1e-5 with many images. At the largest size both stop after 15 iterations. scikit-learn has no GPU
path; Luthier's fit runs where the features are.

With `--folds` the probes of five folds are fitted at once, as a run does, and one after the other.
"""

import time
import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks._common import build_parser
from luthier.training import probe
from luthier.training.features import Pool
from luthier.training.probe import minimise

SIZES = ((10, 1_000), (100, 10_000), (1_000, 100_000))  # classes, images
STRENGTH = 0.01


def main() -> None:
    """Print a row for each size."""
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns (default: 3; the largest size has one)")
    parser.add_argument("--folds", action="store_true", help="compare ways to fit the probes of five folds")
    args = parser.parse_args()
    if args.folds:
        compare_folds(args.rounds)
        return
    warnings.simplefilter("ignore")  # scikit-learn warns of too few iterations
    print("| classes | images | torch, s | scikit-learn, s | ratio | loss on others, torch | scikit-learn |")
    print("|---|---|---|---|---|---|---|")
    for classes, images in SIZES:
        for _ in range(args.rounds if images < 100_000 else 1):
            torch.manual_seed(0)
            iterations = 200 if images < 100_000 else 15
            centres = 0.12 * torch.randn(classes, 1280)
            (features, labels), (others, other_labels) = (draw(centres, n) for n in (images, 2_000))
            start = time.perf_counter()
            weight = torch.zeros(1, classes, 1280, requires_grad=True)
            bias = torch.zeros(1, classes, requires_grad=True)
            counts, scale = torch.full((images, 1), 1 / images), torch.ones(1, 1280)
            minimise(features, labels, weight, bias, STRENGTH, counts, scale, iterations)
            ours = time.perf_counter() - start
            start = time.perf_counter()
            theirs = LogisticRegression(C=1 / (images * STRENGTH), tol=1e-5, max_iter=iterations)
            theirs.fit(features.numpy(), labels.numpy())
            seconds = time.perf_counter() - start
            logits = (
                nn.functional.linear(others, weight[0], bias[0]),
                torch.from_numpy(theirs.decision_function(others.numpy())),
            )
            losses = [loss(each, other_labels) for each in logits]
            print(
                f"| {classes:,} | {images:,} | {ours:.1f} | {seconds:.1f} | {seconds / ours:.2f} "
                f"| {losses[0]:.4f} | {losses[1]:.4f} |",
                flush=True,
            )


def compare_folds(rounds: int) -> None:
    """Print the seconds of both ways to fit the probes of five folds of ten classes, in turns."""
    print(
        "| images | at once, s | one after the other, s | ratio, median | lowest to highest |\n|---|---|---|---|---|"
    )
    at_once = probe.MAX_WEIGHTS
    for images in (1_000, 10_000, 50_000):
        features, labels = draw(0.12 * torch.randn(10, 1280), images)
        pool = Pool(features, labels.numpy(), np.arange(images), list("0123456789"))
        seconds: dict[int, list[float]] = {at_once: [], 1: []}
        for _ in range(rounds):
            for most, taken in seconds.items():
                probe.MAX_WEIGHTS = most
                start = time.perf_counter()
                list(probe.cross_fit(pool, np.arange(images) % 5, STRENGTH))
                taken.append(time.perf_counter() - start)
        ratios = np.array(seconds[1]) / seconds[at_once]
        both = " | ".join(f"{np.median(each):.1f}" for each in seconds.values())
        row = f"| {images:,} | {both} | {np.median(ratios):.2f} | {ratios.min():.2f} to {ratios.max():.2f} |"
        print(row, flush=True)


def draw(centres: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [n, 1280] around the centres of their classes, and the classes [n]."""
    labels = torch.arange(n) % len(centres)
    return centres[labels] + torch.randn(n, 1280), labels


def loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(logits, labels).item()


if __name__ == "__main__":
    main()
