"""How well the learning curve of half of the images predicts the accuracy with all of them.

    python -m benchmarks.learning_curve path/to/instruments

It uses the train and validation images of a folder and several random halves of them; it does not use test.
"""

import time

import numpy as np
import torch

from benchmarks._common import build_parser, directory, load_probe_features
from luthier.errors import exit_on_user_error
from luthier.scoring.learning_curve import FOLDS, learning_curve
from luthier.training.features import LEARNABLE, Pool, pool_of
from luthier.training.probe import fit_shared_probes


@exit_on_user_error
def main() -> None:
    """Print a row for each half."""
    parser = build_parser(__doc__)
    parser.add_argument("data", type=directory, help="a folder of class folders")
    parser.add_argument("--halves", type=int, default=10, help="how many (default: 10)")
    args = parser.parse_args()
    splits, features = load_probe_features(args.data, LEARNABLE)
    labels = {split: splits[split]["label"][:] for split in LEARNABLE}
    probe, _ = fit_shared_probes(torch.device("cpu"), features, labels)
    pool = pool_of(splits, features, torch.device("cpu"))
    images = len(pool.labels)
    n = round(images * (1 - 1 / FOLDS))
    start = time.perf_counter()
    measured = learning_curve(pool, probe.strength, n)["points"][-1]
    seconds = time.perf_counter() - start
    print(f"measured with {measured['n']} training images: {measured['accuracy']:.1%}, in {seconds:.1f} s\n")
    print("| half | predicted | 95% interval | inside |\n|---|---|---|---|")
    inside = 0
    for seed in range(args.halves):
        half = np.random.default_rng(seed).permutation(images)[: images // 2]
        part = Pool(pool.features[half], pool.labels[half], pool.groups[half], pool.names)
        twice = learning_curve(part, probe.strength, n // 2)["twice"]
        low, high = twice["ci95"]
        is_inside = low <= measured["accuracy"] <= high
        inside += is_inside
        print(f"| {seed} | {twice['accuracy']:.1%} | {low:.1%} to {high:.1%} | {'yes' if is_inside else 'no'} |")
    print(f"\ninside: {inside} of {args.halves}")


if __name__ == "__main__":
    main()
