"""The probe's fit compared with scikit-learn's: seconds and validation loss of one logistic regression each.

    python -m benchmarks.probe

Both minimise the same objective with L-BFGS, from zero and to the same tolerance, on the same drawn features
(overlapping clusters of 1,280 dimensions), in one process and in turns. At the largest size both stop after 15
iterations. scikit-learn has no GPU path; Luthier's fit runs where the features are.
"""

import argparse
import time
import warnings

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from luthier.training.probe import minimise

SIZES = ((10, 1_000), (100, 10_000), (1_000, 100_000))  # classes, images
STRENGTH = 0.01


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns (default: 3; the largest size has one)")
    args = parser.parse_args()
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
            weight = torch.zeros(classes, 1280, requires_grad=True)
            bias = torch.zeros(classes, requires_grad=True)
            minimise(features, labels, weight, bias, STRENGTH, iterations=iterations)
            ours = time.perf_counter() - start
            start = time.perf_counter()
            theirs = LogisticRegression(C=1 / (images * STRENGTH), tol=1e-5, max_iter=iterations)
            theirs.fit(features.numpy(), labels.numpy())
            seconds = time.perf_counter() - start
            logits = (
                nn.functional.linear(others, weight, bias),
                torch.from_numpy(theirs.decision_function(others.numpy())),
            )
            losses = [loss(each, other_labels) for each in logits]
            print(
                f"| {classes:,} | {images:,} | {ours:.1f} | {seconds:.1f} | {seconds / ours:.2f} "
                f"| {losses[0]:.4f} | {losses[1]:.4f} |",
                flush=True,
            )


def draw(centres: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [n, 1280] around the centres of their classes, and the classes [n]."""
    labels = torch.arange(n) % len(centres)
    return centres[labels] + torch.randn(n, 1280), labels


def loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(logits, labels).item()


if __name__ == "__main__":
    main()
