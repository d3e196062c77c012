"""Whether the learning curve keeps its word: half of the pictures foretelling the score at all of them.

    python benchmarks/foretell.py path/to/instruments

Train and validation pictures of a folder, several random halves; test is not looked at.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from arguments import parse_arguments
from data import collate, load_splits, prepare
from learning_curve import FOLDS, learning_curve
from machine import fit_machine, quiet_libraries
from models import build_model, linear_head
from probe import build_probe
from views import EvaluationView


def main() -> None:
    """Print a row for each half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of class folders")
    parser.add_argument("--halves", type=int, default=10, help="how many (default: 10)")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        line = ["--output_dir", folder, "--num_train_epochs", "1", "--learning_rate", "1", "--disable_tqdm", "1"]
        _, _, training_args = parse_arguments(line)
        fit_machine(training_args)
        pictures, _ = load_splits(data_dir=args.data)
        names = pictures["train"].features["label"].names
        model, image_processor = build_model("efficientnet_lite0", dict(enumerate(names)))
        view = EvaluationView(image_processor)
        splits = prepare(pictures, view)
        trainer = Trainer(model, training_args, collate, eval_dataset=splits["validation"])
        probe, features = build_probe(trainer, linear_head(model), splits, view)
    both = ("train", "validation")
    labels, groups = (np.concatenate([pictures[split][key][:] for split in both]) for key in ("label", "group"))
    pool = torch.cat([features[split] for split in both])
    n = round(len(labels) * (1 - 1 / FOLDS))
    begin = time.perf_counter()
    measured = learning_curve(pool, labels, names, groups, probe.strength, n)["points"][-1]
    seconds = time.perf_counter() - begin
    print(f"measured with {measured['n']} training pictures: {measured['accuracy']:.1%}, in {seconds:.1f} s\n")
    print("| half | foretold | 95% interval | inside |\n|---|---|---|---|")
    inside = 0
    for seed in range(args.halves):
        rows = np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 2]
        twice = learning_curve(pool[rows], labels[rows], names, groups[rows], probe.strength, n // 2)["twice"]
        low, high = twice["ci95"]
        inside += low <= measured["accuracy"] <= high
        print(
            f"| {seed} | {twice['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {'yes' if low <= measured['accuracy'] <= high else 'no'} |"
        )
    print(f"\ninside: {inside} of {args.halves}")


if __name__ == "__main__":
    main()
