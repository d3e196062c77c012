"""What is wrong with a data set: unreadable, misnamed, tiny, duplicate and mislabelled pictures; a command too.

    python audit.py my_photos
    python audit.py my_photos --output_dir audits/my_photos

prints what it finds; with --output_dir it writes audit.json and a page with the pictures, audit.html. The options of
train.py that say what the data is, and --model_name, whose features tell likely wrong labels, are understood here too.
Every run
of train.py with a linear probe does the same.
"""

import sys
from pathlib import Path

from arguments import parse_arguments, user_errors


def as_training_line(argv: list[str]) -> list[str]:
    """Return train.py's arguments for `DATA [--option value ...]`: a folder on disk, or a dataset's name."""
    if not argv or argv[0].startswith("-"):
        raise ValueError("name the data: python audit.py FOLDER, or a dataset's name; options are those of train.py")
    return ["--data_dir" if Path(argv[0]).expanduser().exists() else "--dataset_name", *argv]


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    with user_errors():
        parse_arguments(as_training_line(sys.argv[1:]))  # mistakes are said before the imports that take seconds

import json
from collections import Counter, defaultdict

import numpy as np
import torch
from datasets import DatasetDict
from transformers import Trainer

from data import CUT, collate, load_pictures, prepare
from inspection import BadImage
from machine import fit_machine, quiet_libraries
from models import build_model, linear_head
from probe import build_probe, fit_path, load_features
from splits import cut_missing_splits, stratified_folds
from views import EvaluationView

# What Pillow calls a format, and the extensions that files of it may have.
EXTENSIONS_OF = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"},
    "MPO": {".jpg", ".jpeg", ".mpo"},
    "TIFF": {".tif", ".tiff"},
}
TINY = 32  # pixels: a shorter side below this has little to tell
FOLDS = 5
MOST = 20_000_000  # pictures times classes up to which labels are checked: about a minute on two cores
KINDS = {  # of findings, as a person reads them
    "unreadable": "unreadable, left out",
    "between_splits": "the same picture, or nearly, in two splits",
    "between_classes": "the same picture, or nearly, in two classes",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates",
    "suspect_labels": "labels to check",
    "wrong_extension": "wrong extension",
    "tiny": f"smaller than {TINY} px",
}


def audit(splits: DatasetDict, bad: list[BadImage]) -> dict:
    """Return what is wrong with the pictures of a data set, as `data.load_splits` returns it.

    Each kind of `KINDS` is a list; of duplicates a list of lists of the pictures that belong together. A picture is a
    dict of `split`, `row` (None if it was left out), `name`, `label`, and what the kind is about. `between_splits` and
    `between_classes` repeat those duplicates that spoil a score. `suspect_labels` is None until `suspect_labels` has
    filled it in. `classes` has the number of pictures of each.
    """
    names = next(iter(splits.values())).features["label"].names
    pictures, groups = [], defaultdict(list)
    found = {kind: [] for kind in KINDS} | {"suspect_labels": None}  # which needs features
    found["unreadable"] = [
        {"split": b.split, "row": None, "name": b.name, "label": b.label, "why": b.reason} for b in bad
    ]
    columns = ("name", "label", "group", "pixels", "format", "width", "height")
    for split, dataset in splits.items():
        values = zip(*(dataset[column][:] for column in columns), strict=True)
        for row, (name, label, group, pixels, file_format, width, height) in enumerate(values):
            picture = {"split": split, "row": row, "name": name, "label": names[label]}
            pictures.append(picture)
            groups[group].append((pixels, picture))
            suffix = Path(name).suffix.lower()
            if suffix and suffix not in EXTENSIONS_OF.get(file_format, {f".{file_format.lower()}"}):
                found["wrong_extension"].append(picture | {"why": f"it is {file_format}"})
            if min(width, height) < TINY:
                found["tiny"].append(picture | {"why": f"{width} x {height} px"})
    for members in groups.values():
        if len(members) == 1:
            continue
        same, different = defaultdict(list), len({pixels for pixels, _ in members}) > 1
        for pixels, picture in members:
            same[pixels].append(picture)
        found["exact_duplicates"] += [copies for copies in same.values() if len(copies) > 1]
        alike = [picture for _, picture in members]
        if different:
            found["near_duplicates"].append(alike)
        for kind, key in (("between_splits", "split"), ("between_classes", "label")):
            if len({picture[key] for picture in alike}) > 1:
                found[kind].append(alike)
    counts = Counter(picture["label"] for picture in pictures)
    return found | {"pictures": len(pictures), "classes": {name: counts[name] for name in names}}


def suspect_labels(splits: DatasetDict, features: torch.Tensor, strength: float) -> list[dict] | None:
    """Return the pictures whose label is likely wrong, the likeliest first; None where there are too many to check.

    Out-of-fold probabilities of linear probes tell, groups of duplicates in one fold: another class is likelier than
    the given one, and at least as likely as that class's own pictures are on average (confident learning, Northcutt
    et al. 2021).

    Args:
        splits: as `data.load_splits` returns them.
        features: float32 [N, D] of all splits' rows, in order, on the device of the fits.
        strength: of the probe.
    """
    names = splits["train"].features["label"].names
    where = [(split, row) for split, dataset in splits.items() for row in range(len(dataset))]
    labels, groups = (np.concatenate([d[column][:] for d in splits.values()]) for column in ("label", "group"))
    if len(labels) * len(names) > MOST:
        return None
    folds = stratified_folds(labels, groups, FOLDS, seed=0)
    truth = torch.as_tensor(labels, device=features.device)
    probabilities = np.zeros((len(labels), len(names)))
    known = np.zeros(len(labels), dtype=bool)
    for fold in range(FOLDS):
        rows, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        (probe,) = fit_path(features[rows], truth[rows], len(names), (strength,))
        probabilities[held_out] = probe.logits(features[held_out]).softmax(dim=1).cpu().numpy()
        known[held_out] = np.isin(labels[held_out], labels[rows])  # of its class there are others to judge it by
    given = probabilities[np.arange(len(labels)), labels]
    usual = np.array([given[labels == index].mean() if (labels == index).any() else 1 for index in range(len(names))])
    likelier = probabilities.argmax(axis=1)
    suspect = known & (likelier != labels) & (probabilities.max(axis=1) >= usual[likelier])
    return [
        {
            "split": where[row][0],
            "row": where[row][1],
            "name": splits[where[row][0]][where[row][1]]["name"],
            "label": names[labels[row]],
            "likelier": names[likelier[row]],
            "probability": float(given[row]),
            "why": f"looks like {names[likelier[row]]}; its label has {given[row]:.1%}",
        }
        for row in sorted(np.flatnonzero(suspect), key=lambda row: given[row])
    ]


def in_words(found: dict) -> str:
    """Say in a line how much was found of each kind."""
    counted = [f"{name} {len(found[kind])}" for kind, name in KINDS.items() if found[kind]]
    unchecked = ["labels not checked"] if found["suspect_labels"] is None else []
    return ", ".join(counted + unchecked) or "nothing found"


def listing(found: dict, most: int = 20) -> str:
    """Return all that was found, for the terminal: a line for each picture or set of pictures."""
    classes = sorted(found["classes"].items(), key=lambda item: -item[1])
    (largest, most_of), (smallest, fewest) = classes[0], classes[-1]
    sizes = f"from {fewest:,} ({smallest}) to {most_of:,} ({largest})"
    lines = [f"{found['pictures']:,} pictures of {len(classes)} classes, {sizes}"]
    for kind, name in KINDS.items():
        if found[kind] is None:
            lines.append(f"\n{name}: not checked")
        if not found[kind]:
            continue
        lines.append(f"\n{name}: {len(found[kind])}")
        lines += [f"  {as_line(entry)}" for entry in found[kind][:most]]
        if len(found[kind]) > most:
            lines.append(f"  ... and {len(found[kind]) - most} more")
    return "\n".join(lines)


def as_line(entry: dict | list[dict]) -> str:
    """Say a finding: a picture and what is wrong with it, or the pictures that belong together."""
    if isinstance(entry, dict):
        return f"{entry['name']} ({entry['label']}): {entry['why']}"
    more = f" and {len(entry) - 4} more" if len(entry) > 4 else ""
    return " = ".join(f"{p['name']} ({p['label']}, {p['split']})" for p in entry[:4]) + more


def write_audit(path: Path, found: dict) -> None:
    """Write `audit.json`."""
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Audit a data set; see `python audit.py --help`."""
    from report import write_audit_page  # it needs this module

    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    with user_errors():
        data_args, model_args, training_args = parse_arguments(as_training_line(argv))
        fit_machine(training_args)
        options = data_args.for_loading()
        cut = {key: options.pop(key) for key in CUT}
        pictures, bad = load_pictures(**options | {"most_bad": 1.0})
        try:
            pictures = cut_missing_splits(pictures, np.array(pictures["train"]["group"][:]), **cut)
        except (
            ValueError
        ) as error:  # as it is, it cannot be trained on; what is wrong with it can be said all the same
            print(f"careful: {error}\n")
        found = audit(pictures, bad)
        labels = dict(enumerate(pictures["train"].features["label"].names))
        model, image_processor = build_model(model_args.model_name, labels, model_args.image_size)
        head = linear_head(model)
        if model_args.model_name != "simple_cnn" and head and "validation" in pictures:
            view = EvaluationView(image_processor)
            splits = prepare(pictures, view)
            # It predicts alone; but train.py's arguments ask for a split to evaluate.
            trainer = Trainer(model, training_args, collate, eval_dataset=splits["validation"])
            probe, _ = build_probe(trainer, head, splits, view)
            features = {split: load_features(trainer, head, dataset, view) for split, dataset in splits.items()}
            pool = torch.cat(list(features.values())).to(training_args.device)
            found["suspect_labels"] = suspect_labels(pictures, pool, probe.strength)
        print(listing(found))
        if any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in argv):
            folder = Path(training_args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_audit(folder / "audit.json", found)
            write_audit_page(folder / "audit.html", data_args.name, found, pictures)
            print(f"\nwritten: {folder / 'audit.html'}")


if __name__ == "__main__":
    main()
