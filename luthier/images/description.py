"""What is said of a dataset: images by split and class, and one hash of all of it."""

import hashlib
from collections import Counter

import numpy as np
from datasets import DatasetDict

from luthier.cache import list_of
from luthier.images.openmoji import ATTRIBUTION
from luthier.images.streams import Stream


def describe(splits: DatasetDict, name: str, built_in: bool = False, stream: Stream | None = None) -> dict:
    """Return what `metrics.json` says of prepared splits: images by split and class, and one hash of all of it.

    The hash covers every file's bytes, class and split. Neither names nor order of the files change it.

    Args:
        splits: of `data.prepare`.
        name: of the dataset.
        built_in: it is OpenMoji, whose author must be named.
        stream: what train is a sample of. It is counted as a whole; of its files the hash covers the labels.
    """
    labels = next(iter(splits.values())).features["label"].names
    counts, lines = {}, []
    for split, dataset in splits.items():
        indices, digests = list_of(dataset, "label"), list_of(dataset, "digest")
        count = Counter(indices)
        counts[split] = {"n": len(indices), "per_class": {label: count[index] for index, label in enumerate(labels)}}
        lines += [f"{split}\t{labels[index]}\t{digest}" for index, digest in zip(indices, digests, strict=True)]
    data = {"name": name, "attribution": ATTRIBUTION if built_in else "", "splits": counts, "labels": labels}
    if stream:
        lines.append(stream.fingerprint)
        data["sample"] = counts["train"]["n"]
        per_class = np.bincount(stream.labels, minlength=len(labels)).tolist()
        counts["train"] = {"n": len(stream.labels), "per_class": dict(zip(labels, per_class, strict=True))}
    return data | {"fingerprint": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()}
