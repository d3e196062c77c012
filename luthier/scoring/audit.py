"""What is wrong with a dataset: unreadable, misnamed, tiny, duplicate and mislabelled images."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict

from luthier.images.columns import GIVEN_GROUP
from luthier.images.groups import propose_grouping
from luthier.images.inspection import UnreadableImage
from luthier.images.splits import stratified_folds
from luthier.training.probe import cross_fit

# What Pillow calls a format, and the extensions that files of it may have.
EXTENSIONS_OF = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"},
    "MPO": {".jpg", ".jpeg", ".mpo"},
    "TIFF": {".tif", ".tiff"},
}
TINY = 32  # pixels: a shorter side below this shows little
FOLDS = 5
MAX_CELLS = 20_000_000  # images times classes up to which labels are checked: about a minute on two cores
KINDS = (
    "unreadable",
    "between_splits",
    "groups_between_splits",
    "between_classes",
    "exact_duplicates",
    "near_duplicates",
    "suspect_labels",
    "wrong_extension",
    "tiny",
)


def audit_images(splits: DatasetDict, unreadable: list[UnreadableImage]) -> dict:
    """Return what is wrong with the images of a dataset, as `data.load_splits` returns it.

    Each kind of `KINDS` is a list of findings; of duplicates a list of lists of images that belong together. An image
    is a dict of `split`, `row` (None if it was left out), `name`, `label`, and `why`. `between_splits` and
    `between_classes` repeat those duplicates that distort a score. `groups_between_splits` has an image of each split
    for each given group that is in several splits of the data's own. `suspect_labels` is None until `suspect_labels`
    has filled it in. `images` is how many there are, `classes` how many of each class. `grouping` is what
    `groups.propose_grouping` proposes where no groups are given.
    """
    names = next(iter(splits.values())).features["label"].names
    images, duplicates, groups = [], defaultdict(list), defaultdict(list)
    findings: dict = {kind: [] for kind in KINDS} | {"suspect_labels": None}
    findings["unreadable"] = [
        {"split": image.split, "row": None, "name": image.name, "label": image.label, "why": image.reason}
        for image in unreadable
    ]
    columns = ("name", "label", "duplicates", "pixels", "format", "width", "height")
    for split, dataset in splits.items():
        given = dataset[GIVEN_GROUP][:] if GIVEN_GROUP in dataset.column_names else [""] * len(dataset)
        values = zip(given, *(dataset[column][:] for column in columns), strict=True)
        for row, (group, name, label, alike, pixels, file_format, width, height) in enumerate(values):
            image = {"split": split, "row": row, "name": name, "label": names[label]}
            images.append(image)
            duplicates[alike].append((pixels, image))
            groups[group].append(image)
            suffix = Path(name).suffix.lower()
            if suffix and suffix not in EXTENSIONS_OF.get(file_format, {f".{file_format.lower()}"}):
                findings["wrong_extension"].append(image | {"why": f"it is {file_format}"})
            if min(width, height) < TINY:
                findings["tiny"].append(image | {"why": f"{width} x {height} px"})
    for members in duplicates.values():
        if len(members) > 1:
            _add_duplicates(findings, members)
    groups.pop("", None)
    first_of_split = [{image["split"]: image for image in reversed(members)} for members in groups.values()]
    findings["groups_between_splits"] = [list(first.values()) for first in first_of_split if len(first) > 1]
    counts = Counter(image["label"] for image in images)
    grouping = None if groups else propose_grouping([image["name"] for image in images], len(names))
    return findings | {
        "images": len(images),
        "classes": {name: counts[name] for name in names},
        "grouping": grouping,
    }


def _add_duplicates(findings: dict, members: list[tuple[str, dict]]) -> None:
    """Add a group of duplicates, each its pixels' digest and the image, to the findings that it makes."""
    by_pixels = defaultdict(list)
    for pixels, image in members:
        by_pixels[pixels].append(image)
    findings["exact_duplicates"] += [copies for copies in by_pixels.values() if len(copies) > 1]
    alike = [image for _, image in members]
    if len(by_pixels) > 1:
        findings["near_duplicates"].append(alike)
    for kind, key in (("between_splits", "split"), ("between_classes", "label")):
        if len({image[key] for image in alike}) > 1:
            findings[kind].append(alike)


def suspect_labels(splits: DatasetDict, features: torch.Tensor, strength: float) -> list[dict] | None:
    """Return the images whose label is likely wrong, the likeliest first; None where there are too many to check.

    Linear probes that have not learned from an image, nor from its duplicates, give its probabilities. A label is
    suspect where another class is likelier, and at least as likely as it is on average for that class's own images
    (confident learning, Northcutt et al. 2021).

    Args:
        splits: as `data.load_splits` returns them.
        features: float32 [N, D] of all splits' rows, in order, on the device of the fits.
        strength: of the probe.
    """
    names = splits["train"].features["label"].names
    places = [(split, row) for split, dataset in splits.items() for row in range(len(dataset))]
    labels, groups = (np.concatenate([d[column][:] for d in splits.values()]) for column in ("label", "group"))
    if len(labels) * len(names) > MAX_CELLS:
        return None
    folds = stratified_folds(labels, groups, FOLDS, seed=0)
    truth = torch.as_tensor(labels, device=features.device)
    (logits,) = cross_fit(features, truth, folds, len(names), (strength,))
    probabilities = logits.softmax(dim=1).double().cpu().numpy()
    # Its class has others to judge it by.
    known = np.array([(labels[folds != fold] == label).any() for fold, label in zip(folds, labels, strict=True)])
    given = probabilities[np.arange(len(labels)), labels]
    usual = np.array([given[labels == index].mean() if (labels == index).any() else 1 for index in range(len(names))])
    likelier = probabilities.argmax(axis=1)
    suspect = known & (likelier != labels) & (probabilities.max(axis=1) >= usual[likelier])
    return [
        {
            "split": places[row][0],
            "row": places[row][1],
            "name": splits[places[row][0]][places[row][1]]["name"],
            "label": names[labels[row]],
            "likelier": names[likelier[row]],
            "probability": float(given[row]),
            "why": f"looks like {names[likelier[row]]}; its own label has a probability of {given[row]:.1%}",
        }
        for row in sorted(np.flatnonzero(suspect), key=lambda row: given[row])
    ]
