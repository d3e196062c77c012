"""How a dataset is divided into train, validation and test."""

import hashlib
from collections.abc import Collection, Iterable

import numpy as np
from datasets import DatasetDict

from luthier.cache import list_of
from luthier.errors import UserError
from luthier.options import check_fraction
from luthier.processes import are_alike, processes_started
from luthier.terminal import plural, say, some_of

MAX_NAMED = 5  # classes that a message names
MAX_SINGLE = 10  # classes of an image each; more are the names of the images
FEW_VALIDATION = 50  # images: fewer than these, and than a tenth of train's, choose badly
REMOVE = "or remove the split to have one cut from train"
MIN_VALIDATION, MAX_VALIDATION, MAX_VALIDATION_SHARE = 150, 10_000, 0.25


def cut_splits(
    splits: DatasetDict,
    split_seed: int = 1,
    validation_fraction: float | None = None,
    test_fraction: float = 0.2,
    fold: tuple[int, int] | None = None,
) -> DatasetDict:
    """Return train, validation and test; those that the data lacks are cut from train.

    Args:
        splits: of `data.load_images`: with the columns `label`, `digest` and `group`. Images of one group stay on
            one side.
        split_seed: decides the cut, together with the images' content; the training seed does not change it.
        validation_fraction, test_fraction: share of each class to cut; with a fold, of the images outside it. For None
            see `validation_share`.
        fold: (i, k): test is the i-th of k parts, from 1 on, instead of `test_fraction`.

    Raises:
        UserError: the fractions leave nothing, a class, split or fold is too small, or `fold` is beside a test split.
    """
    if fold and "test" in splits:
        raise UserError(
            "--fold and --folds cut the test split, but the data has one of its own: leave the option out, or move "
            "the images of test into train"
        )
    train, names = splits["train"], splits["train"].features["label"].names
    labels, digests, groups = (np.array(list_of(train, column)) for column in ("label", "digest", "group"))
    rows, cut, kept = np.arange(len(labels)), {}, _shared_with_own(splits, labels, groups)
    if fold:
        folds = _deal_folds(labels, groups, digests, fold[1], split_seed, kept)
        cut["test"], rows = np.flatnonzero(folds == fold[0] - 1), np.flatnonzero(folds != fold[0] - 1)
    if validation_fraction is None:
        validation_fraction = validation_share(len(rows))
    fractions = {"validation": validation_fraction, "test": test_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if split not in (*splits, *cut)}
    for split, fraction in fractions.items():
        check_fraction(split, fraction)
    if sum(fractions.values()) >= 1:
        raise UserError(f"--validation_fraction and --test_fraction leave nothing to train on: {fractions}")
    rest = stratified_cut(labels[rows], names, fractions, split_seed, groups[rows], digests[rows], kept[rows])
    cut |= {split: rows[part] for split, part in rest.items()}
    if not fold:
        _report_missing(labels, names, cut)
    elif fold[0] == 1:  # once, for all folds
        _report_missing(labels, names, {"test": np.flatnonzero(folds >= 0)})
        if n := int(kept.sum()):
            say("careful", f"no fold scores {plural(n, 'image')} of train: validation has others of the same groups")
    complete = {**splits, **{split: train.select(part) for split, part in cut.items()}}
    if empty := [split for split in ("validation", "test") if not len(complete[split])]:
        remedy = "too few images, or groups, are left for it: add some" if empty[0] in cut else f"fill it, {REMOVE}"
        raise UserError(f"the {empty[0]} split is empty: {remedy}")
    n, remedy = len(complete["validation"]), "add images" if "validation" in cut else f"add some, {REMOVE}"
    if n < min(FEW_VALIDATION, len(complete["train"]) / 10):  # of classes of two images none is cut for validation
        say("careful", f"{plural(n, 'validation image')} cannot tell weights apart: {remedy}")
    return DatasetDict({split: complete[split] for split in ("train", "validation", "test")})


def _shared_with_own(splits: DatasetDict, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return which images of train are in a group with images of the data's own validation split, bool [N].

    Cut for test, they would not be independent of what is chosen by. Not those of a class that are most of it.
    """
    shared = np.isin(groups, list_of(splits["validation"], "group") if "validation" in splits else [])
    most = 2 * np.bincount(labels, shared) > np.bincount(labels)
    return shared & ~np.isin(groups, groups[shared & most[labels]])


def _deal_folds(
    labels: np.ndarray, groups: np.ndarray, digests: np.ndarray, k: int, seed: int, kept: np.ndarray
) -> np.ndarray:
    """Return the fold, from 0 to k - 1, that tests each row; -1 for rows that stay in train, as those of `kept` do.

    It depends on the content of the images, and not on their names or order.

    Raises:
        UserError: one of the folds would be empty.
    """
    order, folds = draw_order(digests, seed), np.full(len(labels), -1)
    dealt = order[~kept[order]]
    folds[dealt] = stratified_folds(labels[dealt], groups[dealt], k, seed)
    folds[_holds_class(labels, groups)] = -1
    for rows in (order[places] for places in rows_by_class(labels[order])):
        # A class that shares its groups may have all of them in one fold, and none to learn from.
        if folds[rows[0]] >= 0 and (folds[rows] == folds[rows[0]]).all():
            own, first, counts = np.unique(groups[rows], return_index=True, return_counts=True)
            folds[groups == own[np.lexsort((first, counts))[0]]] = -1  # of equal ones, not the first by file name
    if len(empty := np.setdiff1d(np.arange(k), folds)):  # any fold: the first ones would have been trained in vain
        count = plural(len(np.unique(groups[dealt])), "group")
        raise UserError(
            f"fold {empty[0] + 1} of {k} would be empty: the images form {count} of near-duplicates or of your "
            "own. Use fewer folds"
        )
    return folds


def rows_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each class that occurs, in one pass: there may be thousands of classes."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def hash_splits(splits: DatasetDict) -> str:
    """Return a hash of the images of each split, by content, with their order and classes."""
    total = hashlib.sha256()
    for split, dataset in splits.items():
        total.update(f"{split} {dataset.features['label'].names} {list_of(dataset, 'label')}".encode())
        total.update("".join(list_of(dataset, "digest")).encode())
    return total.hexdigest()


def check_same_images(splits: DatasetDict, stream: str = "") -> None:
    """Check that all processes have the same images: what they compute is put together by row.

    Args:
        splits: as loaded.
        stream: fingerprint of what train is a sample of, if it is one.

    Raises:
        UserError: another process has others.
    """
    if processes_started() > 1 and not are_alike(hash_splits(splits) + stream):
        raise UserError(
            "the processes have read different images: some changed or could not be read in the meantime, or another "
            "machine has other files. Start again, with the same files on every machine"
        )


def _holds_class(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return whether a row's group holds all images of a class, bool [N]: such a group is needed in train."""
    _, first, classes = np.unique(labels, return_index=True, return_inverse=True)
    others = np.bincount(classes, groups != groups[first][classes])  # images outside of the group of the class's first
    return np.isin(groups, groups[first][others == 0])


def _report_missing(labels: np.ndarray, names: list[str], cut: dict[str, np.ndarray]) -> None:
    """Say which classes are too small to be in every split of a cut; of folds, the cut has what any of them tests.

    Raises:
        UserError: no class is in one of the splits.
    """
    sizes = np.bincount(labels, minlength=len(names))
    for split, rows in cut.items():
        missing = [names[index] for index in np.setdiff1d(np.arange(len(names)), labels[rows])]
        if len(missing) == len(names):
            largest = int(sizes.argmax())
            if sizes[largest] == 1 and len(names) > MAX_SINGLE:
                raise UserError(
                    f"there are as many classes as images, such as {names[largest]!r}: is that the class, and not the "
                    "name of an image? In a table, name the column of the classes with --label_column"
                )
            raise UserError(
                f"the class {names[largest]!r} has {plural(int(sizes[largest]), 'image')}, too few for one each in "
                f"{', '.join(sorted(cut))}, or copies, or in too few groups, and no other class has more: add others"
            )
        if missing:
            named = some_of([*map(repr, missing)], MAX_NAMED)
            say("careful", f"{split} has no image of {named}: these have too few images, or groups")


def validation_share(images: int) -> float:
    """Return the share of images to cut for validation: a tenth, or more where that is too few to choose by.

    `MIN_VALIDATION` images tell accuracies apart that differ by five points or so, and more than `MAX_VALIDATION` take
    longer than they tell. A refit learns from them too, so that the shipped model loses nothing by a larger share.
    """
    return min(max(min(0.1, MAX_VALIDATION / images), MIN_VALIDATION / images), MAX_VALIDATION_SHARE)


def stratified_folds(labels: np.ndarray, groups: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Return the fold, from 0 to k - 1, of each row: each class dealt out evenly, each group as a whole.

    What is left over of a class goes to the folds that are smallest so far, so that small classes fill all of them.

    Args:
        labels, groups: int [N].
        k: number of folds; a class with fewer groups is missing from some of them.
        seed: decides the order in which groups are dealt.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    fold_of: dict[int, int] = {}
    filled = np.zeros(k)
    for rows in _rows_of_classes(labels, np.arange(len(labels)), numbers):
        taken, size = np.zeros(k), _sizes(numbers[np.random.default_rng(seed).permutation(rows)])
        for group in sorted(size, key=lambda group: group not in fold_of):  # those that an earlier class dealt first
            fold = fold_of.setdefault(group, int(np.lexsort((filled, taken))[0]))
            taken[fold] += size[group]
            filled[fold] += size[group]
    return np.array([fold_of[group] for group in range(len(fold_of))], dtype=int)[numbers]


def _rows_of_classes(labels: np.ndarray, order: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each class that occurs, in this order.

    Classes that share groups with others come first, and of these the one with the fewest groups: the groups of a
    frequent class would otherwise have their places before a rare one could be in every split.

    Args:
        labels: int [N].
        order: of the rows.
        groups: int [N], from 0 on.
    """
    if not len(order):
        return []
    classes = [order[rows] for rows in rows_by_class(labels[order])]
    many = int(labels.max()) + 1
    owners = np.bincount(np.unique(groups * many + labels) // many)  # classes of each group

    def rank(rows: np.ndarray) -> float:
        own = np.unique(groups[rows])
        return len(own) if (owners[own] > 1).any() else np.inf

    return sorted(classes, key=rank)


def _sizes(groups: np.ndarray) -> dict[int, int]:
    """Return how many rows each group has, in the order in which they come first."""
    own, first, counts = np.unique(groups, return_index=True, return_counts=True)
    by = np.argsort(first)
    return dict(zip(own[by].tolist(), counts[by].tolist(), strict=True))


def draw_order(names: Iterable[object], seed: int) -> np.ndarray:
    """Return the rows of names in a random order, int [N], which stays what it is when names are added or removed."""
    return np.argsort(_draw_numbers(names, seed), kind="stable")


def _draw_numbers(names: Iterable[object], seed: int) -> np.ndarray:
    """Return a random number for each name, uint64 [N]; it depends on the name and the seed, and on nothing else."""
    hashes = [hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def _draw_groups(names: np.ndarray, numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows in a random order of their groups, int [N].

    The place of a group is that of one of its images, the least by name. If it were that of its first image in a
    random order, large groups would come first: test, which takes those, would be of large groups, and validation of
    small ones.

    Args:
        names: of the rows [N], which the order depends on.
        numbers: int [N], the group of each row, from 0 on.
        seed: decides the order.
    """
    drawn, by_group = _draw_numbers(names, seed), np.lexsort((names, numbers))
    first = by_group[np.searchsorted(numbers[by_group], np.arange(numbers.max(initial=-1) + 1))]
    return np.lexsort((drawn, drawn[first][numbers]))


def stratified_cut(
    labels: np.ndarray,
    names: list[str],
    fractions: dict[str, float],
    seed: int,
    groups: np.ndarray | None = None,
    digests: np.ndarray | None = None,
    kept: np.ndarray | bool = False,
) -> dict[str, np.ndarray]:
    """Divide row numbers into "train" and the splits of `fractions`, each class by itself, each group as a whole.

    Images that are added later change the split of few others: test takes those that come first in a random order of
    the digests, validation those that come last.

    Args:
        labels: int [N], the class of each row.
        names: the classes' names, for the error.
        fractions: share of each class to cut, for "validation", "test" or both; at least one image of each class is
            cut. A class too small for every split is left out of validation first, if there is a test split; with a
            single image or group it is left out of test too.
        seed: decides the order.
        groups: int [N]; rows of the same number go to the same split. A group that is larger than what test still
            lacks may go to validation, and at last to train. Without it every row is a group of its own.
        digests: str [N], what the order depends on; without it the row numbers.
        kept: bool [N], rows whose groups stay in train.

    Returns the sorted row numbers of each split.

    Raises:
        UserError: a class has no image that could be in train.
    """
    ids = np.arange(len(labels)) if digests is None else digests
    groups = np.arange(len(labels)) if groups is None else groups
    distinct, numbers = np.unique(groups, return_inverse=True)
    order = _draw_groups(ids, numbers, seed)
    split_of = dict.fromkeys(numbers[_holds_class(labels, groups) | kept].tolist(), "train")  # by group
    last = _LastGroups(labels, numbers, set(split_of))
    for rows in _rows_of_classes(labels, order, numbers):
        _deal(_sizes(numbers[rows]), len(rows), fractions, split_of, last)
    split = np.array([split_of[group] for group in range(len(distinct))], dtype=object)[numbers]
    parts = {name: np.flatnonzero(split == name) for name in (*fractions, "train")}
    present = set(labels[parts["train"]])
    for index, name in enumerate(names):
        if index not in present:
            raise UserError(
                f"the images of the class {name!r} are too few, or copies of other classes' images, or in groups "
                "with them: none is left to train on. Add some or remove the class"
            )
    return parts


class _LastGroups:
    """Tells which groups must stay in train: the last of a class that are left for it, and those that are given.

    Args:
        labels: int [N].
        numbers: int [N], the group of each row, from 0 on.
    """

    def __init__(self, labels: np.ndarray, numbers: np.ndarray, needed: Collection[int] = ()):
        self._needed, many = needed, int(labels.max(initial=0)) + 1
        pairs = np.unique(numbers * many + labels)  # of groups and their classes
        self._classes = (pairs % many).tolist()
        self._begins = np.searchsorted(pairs // many, np.arange(numbers.max(initial=-1) + 2)).tolist()
        self._left = np.bincount(pairs % many, minlength=many).tolist()  # groups of each class that are not cut

    def has(self, group: int) -> bool:
        """Tell whether a class would have no group left without this one, or it must stay."""
        return group in self._needed or any(self._left[label] == 1 for label in self._of(group))

    def cut(self, group: int) -> None:
        """Count a group as one that is not in train."""
        for label in self._of(group):
            self._left[label] -= 1

    def _of(self, group: int) -> list[int]:
        return self._classes[self._begins[group] : self._begins[group + 1]]


def _deal(
    size: dict[int, int], images: int, fractions: dict[str, float], split_of: dict[int, str], last: _LastGroups
) -> None:
    """Give each group of a class a split: test takes the first ones, validation the last ones.

    Args:
        size: images of the class by group, in the order that decides.
        images: of the class.
        fractions: see `stratified_cut`.
        split_of: of every group that has one; the class's other groups are added.
        last: which groups a class needs in train, because its others have been cut; changed as these are.
    """
    lacking = {split: max(1, round(fraction * images)) for split, fraction in fractions.items()}
    while sum(lacking.values()) >= images and max(lacking.values()) > 1:  # rounded up, or one at least
        lacking[max(lacking, key=lambda split: lacking[split])] -= 1
    for split in sorted(fractions, reverse=True):  # validation first: test is what the score is of
        if sum(lacking.values()) >= images:
            del lacking[split]
    wanted, own = sorted(lacking), {group for group in size if group not in split_of}
    for group in size:  # one that has images of an earlier class too
        if split_of.get(group) in lacking:
            lacking[split_of[group]] -= size[group]
    cut = sum(size[group] for group in size if split_of.get(group, "train") != "train")
    margin = images - cut - sum(max(lack, 0) for lack in lacking.values())  # what would be left for train
    for split in wanted:
        for group in size if split == "test" else reversed(size):
            excess = size[group] - lacking[split]
            # A group that does not fit goes there too if its share is closer then: only small ones would be left over.
            fits = group not in split_of and (excess <= 0 or excess < min(lacking[split], margin))
            if fits and not last.has(group):
                split_of[group] = split
                last.cut(group)
                lacking[split] -= size[group]
                margin -= max(excess, 0)
    for group in size:
        split_of.setdefault(group, "train")
    for split in wanted:
        if any(split_of[group] == split for group in size):
            continue
        # The smallest group in train goes there, and at last one of an earlier class; never the last one of a class.
        in_train = [group for group in size if split_of[group] == "train"]
        spare = [group for group in in_train if not last.has(group)]
        if spare and len(in_train) > 1:
            chosen = min(spare, key=lambda group: (group not in own, size[group]))
            split_of[chosen] = split
            last.cut(chosen)
            continue
        # Train has no other: every second group of the other split goes there, and its only one to test.
        others = [group for group in size if group in own and split_of[group] in wanted]
        for group in others[1::2] or (others if split == "test" else []):
            split_of[group] = split
