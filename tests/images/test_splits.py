"""Splitting: stratified, the same for the same random seed, groups in one split, folds that cover every image once."""

import itertools

import numpy as np
import pytest
from conftest import draw_folder, load
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from luthier.errors import UserError
from luthier.images.description import describe
from luthier.images.groups import groups_of
from luthier.images.splits import (
    _deal,
    _deal_folds,
    _LastGroups,
    check_same_images,
    cut_splits,
    hash_splits,
    stratified_cut,
    stratified_folds,
    validation_share,
)
from luthier.reporting.results import warn_if_learned
from luthier.scoring.audit import audit_images

NAMES = ["a", "b", "c"]
FRACTIONS = {"validation": 0.1, "test": 0.2}


def labelled(labels, names, groups=None):
    """Return images with these labels and groups, or each in a group of its own, and another digest each."""
    rows = range(len(labels))
    columns = {"label": labels, "digest": [f"{row:064x}" for row in rows], "group": rows if groups is None else groups}
    features = Features({"label": ClassLabel(names=names), "digest": Value("string"), "group": Value("int64")})
    return Dataset.from_dict(columns, features)


def random_groups(n: int, seed: int = 0) -> np.ndarray:
    """Return a random group for each row: groups have about two rows, and may span classes."""
    return np.random.default_rng(seed).integers(0, n // 2, n)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_fractions_are_kept(seed):
    labels, groups = np.arange(600) % 3, random_groups(600, seed)
    cut = stratified_cut(labels, NAMES, FRACTIONS, seed, groups)
    assert np.array_equal(np.sort(np.concatenate(list(cut.values()))), np.arange(600))
    parts = {split: set(groups[rows]) for split, rows in cut.items()}
    assert not parts["train"] & parts["test"] and not parts["validation"] & (parts["train"] | parts["test"])
    for split, expected in (("validation", 20), ("test", 40)):
        assert all(abs((labels[cut[split]] == index).sum() - expected) <= 4 for index in range(3))


def test_without_groups_every_class_is_split_exactly():
    cut = stratified_cut(np.arange(300) % 3, NAMES, FRACTIONS, seed=1)
    assert {split: len(rows) for split, rows in cut.items()} == {"validation": 30, "test": 60, "train": 210}
    repeated = stratified_cut(np.arange(300) % 3, NAMES, FRACTIONS, seed=1)
    assert all(np.array_equal(cut[split], repeated[split]) for split in cut)


def test_images_that_are_added_change_the_split_of_few_others():
    digests = np.array([f"{row:064x}" for row in np.random.default_rng(0).permutation(660)])
    labels, everyone = np.arange(660) % 3, np.arange(660)
    before = stratified_cut(labels[:600], NAMES, FRACTIONS, 1, digests=digests[:600])
    after = stratified_cut(labels, NAMES, FRACTIONS, 1, digests=digests)
    changed = sum(len(np.setdiff1d(before[split], after[split])) for split in before)
    assert changed <= 12, "of 600: a tenth more images take the place of some at the edges of test and validation"
    mixed = np.random.default_rng(1).permutation(everyone)
    again = stratified_cut(labels[mixed], NAMES, FRACTIONS, 1, digests=digests[mixed])
    assert all({*mixed[again[split]]} == {*after[split]} for split in after), "the order of the files tells nothing"
    other = stratified_cut(labels, NAMES, FRACTIONS, 2, digests=digests)
    assert len(np.intersect1d(after["test"], other["test"])) < 60, "of 132; another seed is another cut"


def test_order_of_the_files_tells_nothing_of_groups_either():
    digests = np.array([f"{row:064x}" for row in np.random.default_rng(0).permutation(600)])
    labels, groups, mixed = np.arange(600) % 3, random_groups(600), np.random.default_rng(1).permutation(600)
    cut = stratified_cut(labels, NAMES, FRACTIONS, 1, groups, digests)
    again = stratified_cut(labels[mixed], NAMES, FRACTIONS, 1, groups[mixed], digests[mixed])
    assert all({*mixed[again[split]].tolist()} == {*cut[split].tolist()} for split in cut)


@pytest.mark.parametrize("size", [2, 5, 10])
def test_images_of_groups_have_the_same_share_in_every_split(size):
    """Half of 800 images are in groups. If a group came as early as its first image, test would have most of them."""
    shares: dict[str, list[float]] = {"train": [], "validation": [], "test": []}
    for seed in range(20):
        generator = np.random.default_rng(seed)
        groups = np.concatenate([np.repeat(np.arange(400 // size), size), 400 + np.arange(400)])
        labels = generator.integers(4, size=800)[groups]
        digests = np.array([f"{number:064x}" for number in generator.permutation(800)])
        cut = stratified_cut(labels, list("abcd"), {"validation": 0.15, "test": 0.2}, 1, groups, digests)
        for split, rows in cut.items():
            shares[split].append(float((rows < 400).mean()))
        assert abs(len(cut["test"]) - 160) <= 40 and abs(len(cut["validation"]) - 120) <= 40
    for split, found in shares.items():
        assert np.mean(found) == pytest.approx(0.5, abs=0.1), split


def test_large_group_goes_to_train():
    labels, groups = np.zeros(20, dtype=int), np.array([0] * 8 + list(range(1, 13)))
    for seed in range(10):
        assert 0 in stratified_cut(labels, ["a"], FRACTIONS, seed, groups)["train"]


def test_class_of_duplicate_pairs_is_in_every_split():
    labels, groups = np.zeros(8, dtype=int), np.repeat(np.arange(4), 2)
    cut = stratified_cut(labels, ["a"], {"validation": 0.1, "test": 0.1}, 1, groups)
    assert {split: len(rows) for split, rows in cut.items()} == {"validation": 2, "test": 2, "train": 4}


def test_class_of_copies_of_one_image_is_in_train_alone():
    labels, groups = np.array([0] * 9 + [1] * 9), np.array([0] * 9 + list(range(1, 10)))
    cut = stratified_cut(labels, ["a", "b"], FRACTIONS, 1, groups)
    assert {split: {*labels[rows].tolist()} for split, rows in cut.items()} == {
        "train": {0, 1}, "validation": {1}, "test": {1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("images", "splits"), [(1, {"train"}), (2, {"train", "test"}), (3, set(FRACTIONS) | {"train"})]
)
def test_rare_class_is_in_train_then_test_then_validation(images, splits, capsys):
    labels = np.array([0] * 20 + [1] * images)
    train = labelled(labels, ["many", "few"])
    for seed in range(5):
        complete = cut_splits(DatasetDict(train=train), seed, 0.2, 0.2)
        assert {split for split, dataset in complete.items() if 1 in dataset["label"][:]} == splits
        assert capsys.readouterr().out.count("'few'") == 3 - len(splits)


@pytest.mark.parametrize("seed", range(5))
def test_group_that_holds_a_class_goes_to_train_as_a_whole(seed):
    """A class of one image, in a group with images of a larger class."""
    labels, groups = np.array([0] * 12 + [1]), np.array([*range(11), 11, 11])
    cut = stratified_cut(labels, ["a", "b"], FRACTIONS, seed, groups)
    assert {11, 12} <= {*cut["train"].tolist()}
    train = labelled(labels, ["a", "b"], groups)
    for i in (1, 2, 3):
        complete = cut_splits(DatasetDict(train=train), seed, 0.2, 0.2, (i, 3))
        sides = [{*dataset["group"][:]} for dataset in complete.values()]
        assert not any(one & other for one, other in itertools.combinations(sides, 2))


def test_more_folds_than_groups_are_refused():
    labels, groups = np.tile([0, 1], 8), np.repeat(np.arange(4), 4)
    train = labelled(labels, ["a", "b"], groups)
    with pytest.raises(UserError, match="fold 5 of 5 would be empty: the images form 4 groups"):
        cut_splits(DatasetDict(train=train), 1, 0.2, 0.2, (1, 5))  # at once, and not at its turn


def test_folds_depend_on_content_and_not_on_order():
    train, order = labelled(np.tile([0, 1], 30), ["a", "b"]), np.random.default_rng(0).permutation(60)
    one, other = (cut_splits(DatasetDict(train=rows), 1, 0.2, 0.2, (2, 5)) for rows in (train, train.select(order)))
    for split in ("train", "validation", "test"):
        assert {*one[split]["digest"][:]} == {*other[split]["digest"][:]}


def test_class_of_one_group_is_in_train_in_every_fold():
    labels = np.array([0] * 20 + [1] * 2)
    train = labelled(labels, ["many", "few"], [*range(20), 20, 20])
    cuts = [cut_splits(DatasetDict(train=train), 1, 0.2, 0.2, (i, 3)) for i in (1, 2, 3)]
    assert all(complete["train"]["label"][:].count(1) == 2 for complete in cuts)
    assert sum(len(complete["test"]) for complete in cuts) == 20


def test_class_without_training_images_is_refused():
    with pytest.raises(UserError, match=r"the class 'b' are too few, .* none is left to train on"):
        stratified_cut(np.zeros(6, dtype=int), ["a", "b"], {"test": 0.2}, 1)


def test_class_that_shares_its_groups_keeps_images_to_train_on():
    # The first two images of b are copies of images of a, so they are in the same split.
    labels, groups = np.array([0] * 3 + [1] * 3), np.array([0, 1, 2, 0, 1, 3])
    for seed in range(20):
        cut = stratified_cut(labels, ["a", "b"], {"validation": 0.3, "test": 0.3}, seed, groups)
        assert {*labels[cut["train"]]} == {0, 1}


@pytest.mark.parametrize("own", [(), ("test",), ("validation",)])
def test_groups_stay_on_one_side_whichever_splits_are_cut(own):
    groups = random_groups(300)
    splits = {split: labelled(np.arange(30) % 3, NAMES, 1000 * n + np.arange(30)) for n, split in enumerate(own, 1)}
    cut = cut_splits(DatasetDict(train=labelled(np.arange(300) % 3, NAMES, groups), **splits), 1, 0.2, 0.2)
    sides = [{*part["group"][:]} for part in cut.values()]
    assert not any(one & other for one, other in itertools.combinations(sides, 2))
    assert sum(map(len, cut.values())) == 300 + 30 * len(own)


def test_small_class_does_not_take_the_last_group_of_another_class_out_of_train():
    # The class b has groups that are all its own or of a; the larger ones of a leave room for none of them.
    for seed in range(20):
        labels = np.array([0] * 4 + [1] * 3 + [2] * 4)
        groups = np.array([0, 1, 2, 3, 4, 4, 5, 4, 6, 6, 6])
        cut = stratified_cut(labels, ["a", "b", "c"], {"validation": 0.2, "test": 0.2}, seed, groups)
        assert {*labels[cut["train"]].tolist()} == {0, 1, 2}


@pytest.mark.parametrize(("n", "k"), [(8, 5), (14, 10), (6, 4), (3, 5), (100, 7)])
def test_folds_are_even_for_every_class_size(n, k):
    labels = np.repeat(np.arange(3), n)
    folds = stratified_folds(labels, np.arange(3 * n), k, seed=1)
    for index in range(3):
        counts = np.bincount(folds[labels == index], minlength=k)
        assert counts.sum() == n and counts.max() - counts.min() <= 1


def dataset(n, groups=None):
    return DatasetDict(train=labelled([row % 3 for row in range(n)], NAMES, groups))


def test_folds_are_disjoint_and_cover_everything():
    groups = random_groups(150)
    splits = dataset(150, groups).map(lambda row, index: {"row": index}, with_indices=True)
    tested = []
    for fold in range(1, 6):
        cut = cut_splits(splits, 1, 0.1, 0.2, (fold, 5))
        rows = {split: set(part["row"]) for split, part in cut.items()}
        assert not rows["test"] & (rows["train"] | rows["validation"]) and sum(map(len, rows.values())) == 150
        assert not {*groups[list(rows["test"])]} & {*groups[list(rows["train"] | rows["validation"])]}
        tested += rows["test"]
    assert sorted(tested) == list(range(150))


def test_validation_is_a_share_of_what_a_fold_leaves():
    cut = cut_splits(dataset(120), 1, 0.6, 0.9, (1, 2))
    assert {split: len(part) for split, part in cut.items()} == {"train": 24, "validation": 36, "test": 60}
    assert len(cut_splits(dataset(1000), fold=(1, 5))["validation"]) == pytest.approx(150, abs=3), "of 800"


def test_fold_of_data_with_a_test_split_is_refused():
    splits = DatasetDict(train=dataset(30)["train"], test=dataset(6)["train"])
    with pytest.raises(UserError, match="--fold and --folds cut the test split, but the data has one"):
        cut_splits(splits, 1, 0.1, 0.2, (1, 5))


def test_hash_of_splits_tells_images_classes_order_and_split_apart():
    splits = cut_splits(dataset(30), 1, 0.2, 0.2)
    train, test = splits["train"], splits["test"]
    others = [
        cut_splits(dataset(30), 2, 0.2, 0.2),
        DatasetDict(splits | {"train": train.select(range(1, len(train)))}),
        DatasetDict(splits | {"train": train.select(range(len(train) - 1, -1, -1))}),
        DatasetDict(splits | {"train": test, "test": train}),
        DatasetDict(splits | {"train": train.map(lambda row: {"label": 1 - row["label"]})}),
        cut_splits(DatasetDict(train=labelled([row % 3 for row in range(30)], ["a", "b", "d"])), 1, 0.2, 0.2),
    ]
    hashes = [hash_splits(each) for each in (splits, *others)]
    assert len(set(hashes)) == 7
    again = cut_splits(dataset(30), 1, 0.2, 0.2)
    assert hash_splits(again) == hashes[0]


def test_small_classes_fill_all_folds():
    labels = np.repeat(np.arange(50), 2)
    assert np.bincount(stratified_folds(labels, np.arange(100), 5, seed=1)).tolist() == [20] * 5


def test_rare_class_among_the_groups_of_a_frequent_one_is_in_every_split():
    """Forty patients with images of one class, and three of them with images of another, which comes later."""
    for seed in range(20):
        own = np.random.default_rng(seed).choice(40, 3, replace=False)
        patients = np.concatenate([np.repeat(np.arange(40), 5), own])
        labels = np.repeat([0, 1], (200, 3))
        parts = stratified_cut(labels, ["a", "b"], {"validation": 0.15, "test": 0.2}, seed, patients)
        assert all((labels[rows] == 1).sum() == 1 for rows in parts.values())
        folds = stratified_folds(labels, patients, 5, seed)
        assert len(set(folds[labels == 1])) == 3


def test_each_class_is_dealt_evenly_and_so_are_all_images():
    labels = np.repeat(np.arange(4), (7, 8, 12, 3))
    folds = stratified_folds(labels, np.arange(30), 5, seed=3)
    counts = np.array([np.bincount(folds[labels == label], minlength=5) for label in range(4)])
    assert np.ptp(counts, axis=1).max() == 1 and np.ptp(counts.sum(axis=0)) == 0
    assert not np.array_equal(folds, stratified_folds(labels, np.arange(30), 5, seed=4))


def test_empty_split_of_the_users_own_is_refused():
    splits = {split: labelled([0, 1] * 10, ["a", "b"]) for split in ("train", "test")}
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=f"the {split} split is empty: fill it"):
            cut_splits(DatasetDict(splits | {split: labelled([], ["a", "b"])}))


@pytest.mark.parametrize(("images", "share"), [(100, 0.25), (1000, 0.15), (10_000, 0.1), (400_000, 0.025)])
def test_validation_is_a_tenth_or_enough_to_choose_by(images, share):
    assert validation_share(images) == share


def test_classes_that_are_too_small_are_named_or_taken_for_names(capsys):
    names = [f"c{number}" for number in range(8)]
    cut_splits(DatasetDict(train=labelled([*range(7), *[7] * 40], names)))
    assert (
        "test has no image of 'c0', 'c1', 'c2', 'c3', 'c4' and 2 more: these have too few images, or groups"
        in capsys.readouterr().out
    )
    names = [f"c{number}" for number in range(11)]
    with pytest.raises(UserError, match="is that the class, and not the name of an image"):
        cut_splits(DatasetDict(train=labelled(range(11), names)))
    with pytest.raises(UserError, match="too few for one each in test, train, validation"):
        cut_splits(DatasetDict(train=labelled(range(2), ["a", "b"])))
    with pytest.raises(UserError, match=r"has 5 images, .*, or copies, or in too few groups"):
        cut_splits(DatasetDict(train=labelled([0, 1] * 5, ["a", "b"], [0, 1] * 5)))


BOTH, SINGLES = {"validation": 0.3, "test": 0.3}, dict.fromkeys(range(1, 8), 1)


@pytest.mark.parametrize(
    ("size", "fractions", "before", "expected"),
    [
        # Two images are lacking: four are no nearer to that than none, three are.
        ({0: 4} | dict.fromkeys(range(1, 7), 1), {"test": 0.2}, {}, {"test": {1, 2}}),
        ({0: 3} | SINGLES, {"test": 0.2}, {}, {"test": {0}}),
        (dict.fromkeys(range(11), 1), {"test": 0.2}, {}, {"test": {0, 1}}),  # of 2.2
        # What exceeds a share must leave something for train.
        ({0: 3, 1: 1}, {"validation": 0.25, "test": 0.4}, {}, {"test": {1}}),
        ({0: 3, 1: 3}, {"validation": 0.34, "test": 0.34}, {}, {"test": {0}}),
        ({0: 4, 1: 3}, BOTH, {0: "test"}, {"test": {0}}),
        ({0: 9, 1: 6}, {"test": 0.2}, {}, {"test": {1}}),  # none fits: the smallest
    ],
)
def test_groups_of_a_class_go_where_the_shares_are_nearest(size, fractions, before, expected):
    split_of = dict(before)
    _deal(size, sum(size.values()), fractions, split_of, _LastGroups(np.zeros(len(size), int), np.arange(len(size))))
    found = {split: {group for group in size if split_of[group] == split} for split in fractions}
    assert {split: groups for split, groups in found.items() if groups} == expected


@pytest.mark.parametrize("seed", range(5))
def test_folds_of_groups_of_mixed_sizes_are_even_in_images(seed):
    groups = np.concatenate([np.repeat(np.arange(20), 5), 20 + np.arange(100)])
    folds = stratified_folds(np.zeros(200, dtype=int), groups, 5, seed)
    assert np.ptp(np.bincount(folds, minlength=5)) <= 5


@pytest.mark.parametrize("seed", range(5))
def test_images_that_are_in_a_fold_already_are_made_up_for(seed):
    labels = np.array([1, 1] + [0] * 20)
    groups = np.array([0, 1] + [0] * 10 + [*range(2, 12)])  # the rare class deals a group with half of the other
    folds = stratified_folds(labels, groups, 2, seed)
    assert np.bincount(folds[labels == 0]).tolist() == [10, 10]


def test_processes_with_other_images_are_refused(monkeypatch):
    """Each process is played in turn; the value that it gives is compared with that of the main one."""
    given = []

    def are_alike(value):
        given.append(value)
        return value == given[0]

    monkeypatch.setattr("luthier.images.splits.processes_started", lambda: 2)
    monkeypatch.setattr("luthier.images.splits.are_alike", are_alike)
    rows = labelled([0, 1, 2, 0], NAMES)
    check_same_images(DatasetDict(train=rows))
    check_same_images(DatasetDict(train=rows))
    for others in (rows.select([1, 0, 2, 3]), rows.select([0, 1, 2])):
        with pytest.raises(UserError, match="have read different images"):
            check_same_images(DatasetDict(train=others))
    with pytest.raises(UserError, match="with the same files on every machine"):
        check_same_images(DatasetDict(train=rows), "another stream")


@pytest.mark.parametrize(("train", "validation", "said"), [(2000, 10, True), (2000, 60, False), (80, 10, False)])
def test_few_validation_images_of_the_users_own_are_named(capsys, train, validation, said):
    of = {"train": train, "validation": validation, "test": 20}
    cut_splits(DatasetDict({split: labelled([0, 1] * (n // 2), ["a", "b"]) for split, n in of.items()}))
    assert ("10 validation images cannot tell weights apart" in capsys.readouterr().out) == said


def test_few_validation_images_of_a_cut_are_named(capsys):
    """Classes of two images have one in train and one in test; only the class of three has one to choose by."""
    names = [f"c{number:02}" for number in range(21)]
    parts = cut_splits(DatasetDict(train=labelled([*range(20)] * 2 + [20] * 3, names)))
    assert {split: len(part) for split, part in parts.items()} == {"train": 21, "validation": 1, "test": 21}
    said = capsys.readouterr().out
    assert "1 validation image cannot tell weights apart: add images\n" in said


def test_fold_that_leaves_nothing_for_validation_is_not_called_a_split_of_the_users_own():
    with pytest.raises(UserError, match="the validation split is empty: too few images, or groups, are left for it"):
        cut_splits(DatasetDict(train=labelled([0, 0, 1, 1], ["a", "b"])), fold=(1, 2))


@pytest.mark.parametrize("seed", range(8))
def test_no_class_loses_its_last_group_to_the_splits_of_others_or_to_a_fold(seed):
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3])
    groups = np.array([1, 2, 4, 5, 1, 4, 10, 11, 12, 13, 14])  # class 2 shares both of its groups
    cut = stratified_cut(labels, list("abcd"), FRACTIONS, seed, groups)
    assert set(labels[cut["train"]]) == {0, 1, 2, 3}
    for fold in (1, 2):
        cut = cut_splits(DatasetDict(train=labelled(labels, list("abcd"), groups)), seed, 0.1, fold=(fold, 2))
        assert set(cut["train"]["label"][:]) == {0, 1, 2, 3}


def test_splits_that_were_cut_are_read_without_a_table_of_each_row(tmp_path, monkeypatch):
    splits = load(data_dir=str(draw_folder(tmp_path, 10)))
    expected, described, groups = hash_splits(splits), describe(splits, "drawn"), groups_of(splits["train"])
    monkeypatch.setattr("datasets.table.IndexedTableMixin.fast_gather", lambda *_: pytest.fail("row by row"))
    assert hash_splits(splits) == expected and audit_images(splits, [])["images"] == sum(map(len, splits.values()))
    assert describe(splits, "drawn") == described and np.array_equal(groups_of(splits["train"]), groups)
    assert warn_if_learned("nowhere", splits)["learned_from"] == 0
    assert len(cut_splits(DatasetDict(train=splits["train"]))) == 3


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([40] + [1] * 10, (5, 5, 40)), ([10, 1, 1], (1, 1, 10)), ([55, 45], (0, 45, 55))],
)
def test_class_with_a_large_group_is_in_every_split_or_in_test_first(sizes, expected):
    groups = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), 1000 + np.arange(200)])
    labels = np.repeat([1, 0], (sum(sizes), 200))
    for seed in range(5):
        cut = stratified_cut(labels, ["a", "b"], {"validation": 0.25, "test": 0.2}, seed, groups)
        assert tuple((labels[cut[split]] == 1).sum() for split in ("validation", "test", "train")) == expected


def test_class_whose_groups_others_have_dealt_is_in_every_split():
    for seed in range(50):  # patients with images of several classes
        generator = np.random.default_rng(seed)
        drawn = [generator.choice(40, generator.integers(5, 9), replace=False) for _ in range(10)]
        labels = np.repeat(np.arange(10), [3 * len(own) for own in drawn])
        cut = stratified_cut(
            labels, list("abcdefghij"), {"validation": 0.15, "test": 0.2}, seed, np.repeat(np.concatenate(drawn), 3)
        )
        assert all(len(set(labels[rows])) == 10 for rows in cut.values())


def test_groups_of_the_users_own_validation_are_not_cut_for_test():
    train, own = labelled([0, 1] * 100, ["a", "b"]), labelled([0, 1] * 20, ["a", "b"], range(40))
    cut = cut_splits(DatasetDict(train=train, validation=own), 1)
    assert len(cut["test"]) == 40 and not {*cut["test"]["group"]} & {*own["group"]}
    # One class of which most are shared leaves the others as they are.
    train = labelled([0] * 100 + [1] * 3, ["a", "b"])
    own = labelled([0] * 30 + [1] * 2, ["a", "b"], [*range(30), 100, 101])
    cut = cut_splits(DatasetDict(train=train, validation=own), 1)
    assert set(cut["test"]["label"]) == {0, 1} and not {*cut["test"]["group"]} & {*range(30)}


def test_groups_of_the_users_own_validation_are_in_no_fold(capsys):
    train, own, tested = labelled([0, 1] * 100, ["a", "b"]), labelled([0, 1] * 20, ["a", "b"], range(40)), []
    for i in range(1, 6):
        cut = cut_splits(DatasetDict(train=train, validation=own), 1, fold=(i, 5))
        assert {split: len(part) for split, part in cut.items()} == {"train": 168, "validation": 40, "test": 32}
        tested += cut["test"]["group"][:]
    assert sorted(tested) == list(range(40, 200)), "the others are dealt evenly"
    said = "no fold scores 40 images of train: validation has others of the same groups"
    assert capsys.readouterr().out.count(said) == 1


def test_class_that_is_mostly_in_groups_of_the_users_own_validation_is_in_folds_all_the_same():
    train, tested = labelled([0] * 100 + [1] * 4, ["a", "b"]), []
    own = labelled([0] * 30 + [1] * 3, ["a", "b"], [*range(30), 100, 101, 102])
    for i in (1, 2):
        tested += cut_splits(DatasetDict(train=train, validation=own), 1, fold=(i, 2))["test"]["group"][:]
    assert sorted(tested) == list(range(30, 104))


def test_folds_of_too_few_groups_beside_the_users_own_validation_are_refused():
    train, own = labelled([0, 1] * 4, ["a", "b"]), labelled([0, 1] * 2, ["a", "b"], range(4))
    with pytest.raises(UserError, match="fold 5 of 5 would be empty: the images form 4 groups"):
        cut_splits(DatasetDict(train=train, validation=own), 1, fold=(1, 5))


def test_kept_group_is_not_cut_for_a_class_that_has_no_other_to_spare():
    labels = np.repeat([0, 1, 2], [20, 10, 5])  # group 100 has all of class 2
    groups = np.concatenate([np.arange(20), np.repeat([100, 101, 100], 5)])
    cut = stratified_cut(labels, list("abc"), {"test": 0.2}, 1, groups, kept=groups == 101)
    assert 101 not in groups[cut["test"]] and len(cut["test"])


def test_groups_of_all_classes_are_not_gone_through_for_each_class():
    class Table(dict):
        def keys(self):
            pytest.fail("each class goes through the groups of all")

    _deal({0: 1, 1: 1, 2: 1}, 3, {"test": 0.3}, Table(), _LastGroups(np.zeros(3, int), np.arange(3)))


@pytest.mark.parametrize("seed", range(8))
def test_group_that_a_class_keeps_in_train_does_not_depend_on_order(seed):
    labels, groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]), np.array([1, 2, 4, 5, 1, 4, 10, 11, 12, 13, 14])
    digests = np.array([f"{row:064x}" for row in range(11)])
    none = np.zeros(len(labels), dtype=bool)
    folds = _deal_folds(labels, groups, digests, 2, seed, none)
    again = _deal_folds(labels[::-1], 20 - groups[::-1], digests[::-1], 2, seed, none)
    assert np.array_equal(folds, again[::-1])


@pytest.mark.parametrize(("images", "test"), [(3, 0.5), (5, 0.7)])
def test_class_of_three_is_in_every_split_whatever_the_fractions(images, test):
    labels = np.repeat([0, 1], (40, images))
    cut = stratified_cut(labels, ["a", "b"], {"validation": 0.25, "test": test}, 1)
    assert all((labels[rows] == 1).any() for rows in cut.values())
