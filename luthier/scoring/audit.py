"""What is wrong with a dataset: unreadable, misnamed, tiny, duplicate and mislabelled images."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import DatasetDict, concatenate_datasets

from luthier.cache import list_of
from luthier.images.columns import fixed_width
from luthier.images.decode import extensions_of
from luthier.images.groups import given_groups, propose_grouping
from luthier.images.inspection import UnreadableImage
from luthier.images.splits import stratified_folds
from luthier.terminal import percent, plural
from luthier.training.features import Pool
from luthier.training.probe import cross_fit

TINY = 32  # pixels: a shorter side below this shows little
FOLDS = 5
COLUMNS = ["name", "label", "duplicates", "pixels", "format", "width", "height"]
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
    """Return what is wrong with the images of a dataset, as `data.load_images` returns it, or cut into splits.

    Each kind of `KINDS` is a list of findings. A finding is an image; of duplicates and groups it is a list of images
    that belong together. An image is a dict of `split`, `row` (None if it was left out), `name` and `label`; with
    `why`, what is wrong with it, where it is alone. `between_splits` and `between_classes` repeat those duplicates
    that distort a score. `groups_between_splits` has an image of each split
    for each given group that is in several splits of the data's own. `suspect_labels` and `checked_by` are None until
    the function `suspect_labels` has told them. `images` is how many there are, `classes` how many of each class.
    `grouping` is what `groups.propose_grouping` proposes where no groups are given. `leaks` is how many images of test
    have `duplicates` in another split, and how many given `groups` have images in test and in another split.
    """
    names = next(iter(splits.values())).features["label"].names
    images = concatenate_datasets([dataset.select_columns(COLUMNS) for dataset in splits.values()])
    files, labels = list_of(images, "name"), list_of(images, "label")
    image = _finder(splits, files, labels)
    findings: dict = {kind: [] for kind in KINDS} | {"suspect_labels": None, "checked_by": None}
    findings["unreadable"] = [
        {"split": each.split, "row": None, "name": each.name, "label": each.label, "why": each.reason}
        for each in unreadable
    ]
    for number, (name, file_format) in enumerate(zip(files, list_of(images, "format"), strict=True)):
        suffix = Path(name).suffix.lower()
        if suffix and suffix not in extensions_of(file_format):
            findings["wrong_extension"].append(image(number) | {"why": f"it is {file_format}"})
    width, height = (np.array(list_of(images, side)) for side in ("width", "height"))
    findings["tiny"] = [
        image(number) | {"why": f"{width[number]} x {height[number]} px"}
        for number in np.flatnonzero(np.minimum(width, height) < TINY)
    ]
    pixels = fixed_width(images, "pixels")
    for members in _together(list_of(images, "duplicates")):
        _add_duplicates(findings, [(pixels[number].tobytes(), image(number)) for number in members])
    given = given_groups(splits)
    rank = {name: number for number, name in enumerate(sorted(set(given)))}
    for members in _together([rank[name] for name in given]):
        first = {entry["split"]: entry for entry in map(image, members[::-1])}
        if given[members[0]] and len(first) > 1:
            findings["groups_between_splits"].append(list(first.values())[::-1])
    counts = np.bincount(labels, minlength=len(names))
    return findings | {
        "images": len(images),
        "classes": dict(zip(names, counts.tolist(), strict=True)),
        "leaks": {
            "duplicates": sum(entry["split"] == "test" for alike in findings["between_splits"] for entry in alike),
            "groups": sum(
                any(entry["split"] == "test" for entry in group) for group in findings["groups_between_splits"]
            ),
        },
        "grouping": None if any(given) else propose_grouping(files, len(names), [names[label] for label in labels]),
    }


def _finder(splits: DatasetDict, files: list, labels: list | np.ndarray) -> Callable[[int | np.integer], dict]:
    """Return the function from the number of an image, among those of all splits, to what a finding says of it."""
    names, begins = list(splits), np.cumsum([0, *map(len, splits.values())])
    classes = next(iter(splits.values())).features["label"].names

    def image(number: int | np.integer) -> dict:
        index = int(np.searchsorted(begins, number, side="right")) - 1
        row, label = int(number - begins[index]), classes[labels[number]]
        return {"split": names[index], "row": row, "name": files[number], "label": label}

    return image


def _together(values: Sequence) -> Iterator[np.ndarray]:
    """Yield the numbers of those that have a value in common."""
    _, number, count = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(number, kind="stable")
    for end, size in zip(np.cumsum(count), count, strict=True):
        if size > 1:
            yield order[end - size : end]


def _add_duplicates(findings: dict, members: list[tuple[bytes, dict]]) -> None:
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


def suspect_labels(splits: DatasetDict, pool: Pool, strength: float) -> tuple[list[dict], int | None]:
    """Return the images whose label is likely wrong, the likeliest first, and the size of the probes' sample.

    That is about how many images each probe has learned from; None where it is all that it may learn from.

    Linear probes that have not learned from an image, nor from its duplicates, give its probabilities. A label is
    suspect where another class is likelier, and at least as likely as it is on average for that class's own images
    (confident learning, Northcutt et al. 2021).

    Args:
        splits: as loaded.
        pool: of all splits.
        strength: of the probe.
    """
    _, labels, groups, names = pool
    folds = stratified_folds(labels, groups, FOLDS, seed=0)
    given, highest, likelier = np.zeros(len(labels)), np.zeros(len(labels)), np.zeros(len(labels), dtype=int)
    sample, known = None, np.zeros(len(labels), dtype=bool)
    for part in cross_fit(pool, folds, strength):
        probabilities = part.logits.softmax(dim=1).cpu().double().numpy()  # Apple's GPUs have no float64
        given[part.rows] = probabilities[np.arange(len(part.rows)), labels[part.rows]]
        highest[part.rows], likelier[part.rows] = probabilities.max(axis=1), probabilities.argmax(axis=1)
        own = labels[part.rows], likelier[part.rows]  # there must be others of both classes to judge by
        known[part.rows] = part.learned[own[0]] & part.learned[own[1]]
        sample = part.sample or sample
    counts, sums = (np.bincount(labels[known], weights, len(names)) for weights in (None, given[known]))
    usual = np.where(counts > 0, sums / np.maximum(counts, 1), 1)
    suspect = np.flatnonzero(known & (likelier != labels) & (highest >= usual[likelier]))
    files = [name for dataset in splits.values() for name in list_of(dataset, "name")]
    image, found = _finder(splits, files, labels), []
    for number in suspect[np.argsort(given[suspect], kind="stable")]:
        likely, probability = names[likelier[number]], float(given[number])
        why = f"looks like {likely}; its own label has a probability of {percent(probability)}"
        found.append(image(number) | {"likelier": likely, "probability": probability, "why": why})
    return found, sample


def leaks_in_words(metrics: Mapping) -> str:
    """Return why a score may be too high, as far as the audit knows; empty where nothing is known.

    Args:
        metrics: what `metrics.json` holds.
    """
    leaks, reasons = metrics.get("leaks", {}), []  # metrics.json of an earlier version has none
    if leaks.get("duplicates"):
        images = plural(metrics["data"]["splits"]["test"]["n"], "test image")
        known = f"{leaks['duplicates']:,} of {images} {'is' if leaks['duplicates'] == 1 else 'are'}"
        reasons.append(f"{known} also in train or validation, exactly or nearly")
    if leaks.get("groups"):
        groups = plural(leaks["groups"], "group has", "groups have")
        reasons.append(f"{groups} images in test and also in train or validation")
    if leaks.get("learned_from"):
        reasons.append(f"the model knew {plural(leaks['learned_from'], 'image')} of test or validation before")
    return f"The score may be too high: {'; '.join(reasons)}" if reasons else ""
