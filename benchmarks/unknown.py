"""How well images of no known class can be told: a class is left out, and its test images are the unknown ones.

    python -m benchmarks.unknown path/to/instruments path/to/suite/cells ...

Each data set is a folder of class folders, with a test split or cut as Luthier cuts it. Once for each class, a linear
probe learns the others. Several figures rank the test images; of each the table has, on average over the classes, the
area under the ROC curve, and the share of unknown images that are answered where 95% of the right answers are kept.

    python -m benchmarks.unknown path/to/suite/cells --train full_from_probe --num_train_epochs 3

trains models instead, once without each class, as they would be shipped. The table has the same two figures, and what
is answered at the model's own threshold: of the images whose likeliest class is right, and of the unknown ones. It has
them once as `predict.py` decides, and once by the confidence alone.
Options after `--train RECIPE` go to `train.py`.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional

from benchmarks._common import PROJECT, build_parser, directory, run_command
from benchmarks.balance import load
from luthier.errors import exit_on_user_error
from luthier.familiarity import threshold_of
from luthier.images.splits import stratified_cut
from luthier.serving.classifier import Classifier
from luthier.serving.torch_network import TorchNetwork
from luthier.training.probe import LinearProbe, fit_probes

KEPT = 0.95  # share of the right answers
NEIGHBOURS = (1, 3, 10)
SHRINKAGE = 0.1  # of a covariance towards its diagonal

Familiarity = Callable[[torch.Tensor], torch.Tensor]  # features [N, D] to figures [N], higher for known classes


@exit_on_user_error
def main() -> None:
    """Print a row for each data set, and the means over the data sets."""
    parser = build_parser(__doc__)
    parser.add_argument("data", nargs="+", type=directory, help="folders of class folders")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help="a recipe, and more options of train.py")
    args = parser.parse_args()
    if args.train:
        print("| data | left out | decides | area, unknown at 95% | right answered | unknown answered |")
        print("|---|---|---|---|---|---|")
        for folder in args.data:
            train_without_each(folder, args.train)
        return
    means: dict[str, list[tuple[float, float]]] = {}
    for number, folder in enumerate(args.data):
        splits, features = load(folder)
        labels = {split: np.array(splits[split]["label"][:]) for split in splits}
        groups, names = np.array(splits["train"]["group"][:]), splits["train"].features["label"].names
        runs = [leave_out(features, labels, groups, len(names), out) for out in range(len(names))]
        for name in runs[0]:
            means.setdefault(name, []).append(average([run[name] for run in runs]))
        if number == 0:
            print(f"| data | {' | '.join(means)} |\n{'|---' * (len(means) + 1)}|")
        print(f"| {folder.name} | {' | '.join(describe(means[name][-1]) for name in means)} |", flush=True)
    print(f"| mean | {' | '.join(describe(average(means[name])) for name in means)} |")


def leave_out(
    features: dict[str, torch.Tensor], labels: dict[str, np.ndarray], groups: np.ndarray, classes: int, out: int
) -> dict[str, tuple[float, float]]:
    """Return for each figure the area under the ROC curve, and the share of unknown images that are answered."""
    known = np.flatnonzero(labels["train"] != out)
    truth = labels["train"][known] - (labels["train"][known] > out)
    names = [str(name) for name in range(classes - 1)]
    cut = stratified_cut(truth, names, {"validation": 0.2}, seed=1, groups=groups[known])
    train, validation = (features["train"][known[cut[split]]] for split in ("train", "validation"))
    probe, _ = fit_probes(train, torch.tensor(truth[cut["train"]]), validation, torch.tensor(truth[cut["validation"]]))
    unknown = labels["test"] == out
    answers = probe.logits(features["test"]).argmax(dim=1).numpy()
    right = ~unknown & (answers + (answers >= out) == labels["test"])
    figures = build_figures(probe, train, torch.tensor(truth[cut["train"]]), validation)
    return {name: rate(figure(features["test"]).numpy(), right, unknown) for name, figure in figures.items()}


def train_without_each(folder: Path, options: list[str]) -> None:
    """Train once without each class of a folder with `train` and `test`, and print how well that can be told."""
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    found: dict[str, list[np.ndarray]] = {"familiarity": [], "confidence": []}
    for out in names:
        with tempfile.TemporaryDirectory() as scratch:
            for split in ("train", "test"):
                Path(scratch, "data", split).mkdir(parents=True)
                for name in set(names) - {out}:
                    Path(scratch, "data", split, name).symlink_to((folder / split / name).resolve())
            command = ["train.py", "--data_dir", f"{scratch}/data", "--output_dir", f"{scratch}/out", "--recipe"]
            run_command([sys.executable, *command, *options], PROJECT)
            for by, rows in found.items():
                rows.append(ask(f"{scratch}/out", folder / "test", out, by))
                print_shipped(folder.name, out, by, rows[-1])
    for by, rows in found.items():
        print_shipped(folder.name, "mean", by, np.mean(rows, axis=0))


def ask(model: str, test: Path, out: str, by: str) -> np.ndarray:
    """Return how well a model tells images of the class `out`: the area, and three shares, see `print_shipped`."""
    network = TorchNetwork(model)
    if by == "confidence":
        network.familiarity, network.unsure_below = None, threshold_of(network.model)
    classifier = Classifier(network)
    right, unknown, sureness = [], [], []
    for path in sorted(path for path in test.rglob("*") if path.is_file()):
        probabilities, figure = network.rate([classifier.load_view(str(path))])
        sureness.append(figure.item())
        right.append(classifier.labels[int(probabilities.argmax())] == path.parent.name)
        unknown.append(path.parent.name == out)
    figures, correct, others = np.array(sureness), np.array(right), np.array(unknown)
    answered = figures >= network.unsure_below
    return np.array([*rate(figures, correct, others), answered[correct].mean(), answered[others].mean()])


def print_shipped(data: str, out: str, by: str, row: np.ndarray) -> None:
    """Print the area, unknown images answered at 95% of the right answers, right and unknown ones at the threshold."""
    area, at_kept, right, unknown = row
    print(f"| {data} | {out} | {by} | {area:.3f}, {at_kept:.0%} | {right:.1%} | {unknown:.1%} |", flush=True)


def rate(figures: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve of known against unknown, and the share of unknown that are answered."""
    ranks = rankdata(figures)
    n, m = int((~unknown).sum()), int(unknown.sum())
    area = (ranks[~unknown].sum() - n * (n + 1) / 2) / (n * m)
    return float(area), float((figures[unknown] >= np.quantile(figures[right], 1 - KEPT)).mean())


def build_figures(
    probe: LinearProbe, train: torch.Tensor, truth: torch.Tensor, validation: torch.Tensor
) -> dict[str, Familiarity]:
    """Return the figures that are compared, each higher for images of known classes."""

    def confidence(rows: torch.Tensor) -> torch.Tensor:
        return probe.logits(rows).softmax(dim=1).max(dim=1).values

    def energy(rows: torch.Tensor) -> torch.Tensor:
        return probe.logits(rows).logsumexp(dim=1)

    figures: dict[str, Familiarity] = {"confidence": confidence, "energy": energy}
    normal = functional.normalize(train)

    def neighbours(k: int) -> Familiarity:
        return lambda rows: (functional.normalize(rows) @ normal.T).topk(k, dim=1).values[:, -1]

    figures |= {f"{k} neighbours": neighbours(k) for k in NEIGHBOURS}
    means = torch.stack([train[truth == label].mean(dim=0) for label in range(int(truth.max()) + 1)])
    within, whole = (invert(train - means[truth]), invert(train - train.mean(dim=0)))

    def distance(rows: torch.Tensor) -> torch.Tensor:
        differences = rows[:, None] - means
        return torch.einsum("ncd,de,nce->nc", differences, within, differences).min(dim=1).values

    def from_all(rows: torch.Tensor) -> torch.Tensor:
        differences = rows - train.mean(dim=0)
        return torch.einsum("nd,de,ne->n", differences, whole, differences)

    figures["Mahalanobis"] = lambda rows: -distance(rows)
    figures["relative Mahalanobis"] = lambda rows: from_all(rows) - distance(rows)

    def together(one: Familiarity, other: Familiarity) -> Familiarity:
        """Add two figures as standard scores, by their mean and deviation on validation."""
        return lambda rows: sum(
            (figure(rows) - figure(validation).mean()) / figure(validation).std() for figure in (one, other)
        )

    def sureness(rows: torch.Tensor) -> torch.Tensor:
        share = confidence(rows).clamp(1e-6, 1 - 1e-6)
        return (share / (1 - share)).log()

    for name in (f"{NEIGHBOURS[1]} neighbours", "relative Mahalanobis"):
        figures[f"confidence and {name}"] = together(sureness, figures[name])
    return figures


def invert(rows: torch.Tensor) -> torch.Tensor:
    """Return the inverse of the shrunken covariance [D, D] of centred rows [N, D]."""
    covariance = rows.T @ rows / len(rows)
    diagonal = covariance.diagonal()
    shrunken = (1 - SHRINKAGE) * covariance + SHRINKAGE * torch.diag(diagonal)
    return torch.linalg.inv(shrunken + 1e-4 * diagonal.mean() * torch.eye(len(diagonal)))


def average(rates: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the means of areas and of shares."""
    areas, shares = zip(*rates, strict=True)
    return statistics.mean(areas), statistics.mean(shares)


def describe(rates: tuple[float, float]) -> str:
    """Return an area and a share in words."""
    return f"{rates[0]:.3f}, {rates[1]:.0%}"


if __name__ == "__main__":
    main()
