"""What --balance changes where classes are rare: linear probes on long-tailed draws of data sets.

    python -m benchmarks.balance path/to/instruments path/to/suite/cells ...

Each data set is a folder of class folders, with a test split or cut as Luthier cuts it. A draw orders the classes at
random and takes fewer training images of each than of the one before, from all that the smallest class has down to a
tenth or a fiftieth of them, at least two. A quarter of the draw is for validation. Test stays as it is. The log loss
weighs the test images as if their classes had the shares of the draw.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets
from scipy.special import log_softmax
from scipy.stats import t as student

from benchmarks._common import build_parser, directory, load_probe_features
from luthier.errors import exit_on_user_error
from luthier.images.splits import stratified_cut
from luthier.scoring.criterion import Criterion
from luthier.scoring.intervals import balanced_accuracy, macro_f1
from luthier.training.balance import Balance
from luthier.training.probe import fit_probes

RATIOS = (10, 50)
OPTIONS = ("none", "logit_adjusted", "weighted")
SCORES = ("balanced accuracy", "macro F1", "accuracy", "log loss")


@exit_on_user_error
def main() -> None:
    """Print a row for each data set, ratio and option, and the mean gains with the interval over the data sets."""
    parser = build_parser(__doc__)
    parser.add_argument("data", nargs="+", type=directory, help="folders of class folders")
    parser.add_argument("--draws", type=int, default=5, help="how many (default: 5)")
    args = parser.parse_args()
    gains: dict[int, list[np.ndarray]] = {ratio: [] for ratio in RATIOS}
    print("| data | ratio | --balance | " + " | ".join(SCORES) + " |\n|---|---|---|" + "---|" * len(SCORES))
    for folder in args.data:
        splits, features = load(folder)
        for ratio in RATIOS:
            draws = [measure(splits, features, ratio, seed) for seed in range(args.draws)]
            for option in OPTIONS:
                cells = [spread([draw[option][number] for draw in draws]) for number in range(len(SCORES))]
                print(f"| {folder.name} | 1:{ratio} | {option} | {' | '.join(cells)} |", flush=True)
            gains[ratio].append(np.mean([draw["logit_adjusted"] - draw["none"] for draw in draws], axis=0))
    for ratio, differences in gains.items():
        said = []
        for name, column in zip(SCORES, np.transpose(differences), strict=True):
            # The draws of a data set share its images, so that each set counts once.
            half = student.ppf(0.975, len(column) - 1) * column.std(ddof=1) / np.sqrt(len(column))
            said.append(f"{name} {column.mean():+.3f} ({column.mean() - half:+.3f} to {column.mean() + half:+.3f})")
        print(f"1:{ratio}, logit_adjusted minus none, {len(differences)} data sets: {', '.join(said)}")


def load(folder: Path) -> tuple[DatasetDict, dict[str, torch.Tensor]]:
    """Return the images to draw from as "train", and "test", with the features of both."""
    splits, features = load_probe_features(folder, ("train", "validation", "test"))
    pool = concatenate_datasets([splits["train"], splits["validation"]])
    joined = torch.cat([features["train"], features["validation"]])
    return DatasetDict(train=pool, test=splits["test"]), {"train": joined, "test": features["test"]}


def draw_rows(labels: np.ndarray, ratio: int, seed: int) -> np.ndarray:
    """Return rows of a long-tailed draw: their number falls by one factor from class to class (Cui et al. 2019)."""
    generator, sizes = np.random.default_rng(seed), np.bincount(labels)
    falling = sizes.min() * ratio ** -np.linspace(0, 1, len(sizes))
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[: max(2, round(count))]
        for label, count in zip(generator.permutation(len(sizes)), falling, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def measure(splits: DatasetDict, features: Mapping[str, torch.Tensor], ratio: int, seed: int) -> dict[str, np.ndarray]:
    """Return the `SCORES` on test of each option on one draw."""
    names = splits["train"].features["label"].names
    every, groups = (np.array(splits["train"][column][:]) for column in ("label", "group"))
    drawn = draw_rows(every, ratio, seed)
    cut = stratified_cut(every[drawn], names, {"validation": 0.25}, seed=seed, groups=groups[drawn])
    train, validation = (drawn[cut[split]] for split in ("train", "validation"))
    truth = np.array(splits["test"]["label"][:])
    scores = {}
    for option in OPTIONS:
        shares = np.bincount(every[train], minlength=len(names)) / len(train)
        balance = None if option == "none" else Balance(shares, weighted=option == "weighted")
        criterion = Criterion("balanced_accuracy", balance)
        probe, _ = fit_probes(
            features["train"][train], torch.tensor(every[train]), features["train"][validation],
            torch.tensor(every[validation]), balance,
        )  # fmt: skip
        known, logits = (probe.logits(part).numpy() for part in (features["train"][validation], features["test"]))
        answers = criterion.adjust(logits) / criterion.temperature(known, every[validation])
        likely = answers + balance.log_shares if balance else answers
        scores[option] = score(likely, answers.argmax(axis=1), truth, shares)
    return scores


def score(logits: np.ndarray, predictions: np.ndarray, truth: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the `SCORES` of logits [N, C] and predictions [N], for classes of these shares [C]."""
    classes = len(shares)
    support, predicted, correct = (
        np.bincount(of, minlength=classes) for of in (truth, predictions, truth[truth == predictions])
    )
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(truth)), truth]
    loss = np.average(losses, weights=(shares / np.maximum(support, 1))[truth])
    return np.array(
        [balanced_accuracy(correct, support), macro_f1(correct, support, predicted), correct.sum() / len(truth), loss]
    )


def spread(values: list[float]) -> str:
    """Return a mean, with the lowest and the highest."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
