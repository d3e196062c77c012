"""Intervals: compared with known values, and with how far scores really scatter."""

import math

import numpy as np
import pytest

from luthier.scoring.intervals import (
    interval_of_balanced_accuracy,
    interval_of_difference,
    interval_of_macro_f1,
    interval_of_share,
    wilson_interval,
)
from luthier.scoring.metrics import score


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(154, 200, 0.7069, 0.8229), (181, 200, 0.8564, 0.9383), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx([low, high], abs=1e-4)


def test_interval_without_groups_is_wilsons():
    correct = np.arange(200) < 154
    assert interval_of_share(correct) == wilson_interval(154, 200)
    # Where each image is a group of its own, only the n - 1 of the variance is left.
    assert interval_of_share(correct, np.arange(200)) == pytest.approx(wilson_interval(154, 200), abs=1e-3)


def test_images_that_are_right_or_wrong_together_count_as_one():
    correct, groups = np.repeat(np.arange(20) < 15, 10), np.repeat(np.arange(20), 10)
    assert interval_of_share(correct, groups) == pytest.approx(wilson_interval(15, 20), abs=0.03)
    low, high = interval_of_share(np.ones(200, bool), groups)
    assert high == 1 and 0.8 < low < wilson_interval(20, 20)[0]
    for share in (0.5, 0.7):  # one patient tells little
        low, high = interval_of_share(np.arange(10) < 10 * share, np.zeros(10, int))
        assert high - low > 0.7


@pytest.mark.parametrize("count", [4, 40])
def test_interval_covers_the_truth_as_often_as_it_says(count):
    generator, covered = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(count), 20)
    for _ in range(500):
        patients = generator.beta(4, 1, count)  # 80% on average
        low, high = interval_of_share(generator.random(20 * count) < patients[groups], groups)
        covered += low <= 0.8 <= high
    assert 0.92 < covered / 500 < 0.99


@pytest.mark.slow
def test_intervals_are_as_wide_as_the_scores_scatter():
    generator = np.random.default_rng(0)

    def draw(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
        references = (generator.random(n) < 0.1).astype(int)
        wrong = generator.random(n) < np.where(references, 0.4, 0.1)
        return references, np.where(wrong, 1 - references, references)

    scored = [
        score(np.eye(2)[predictions], references, ["a", "b"]) for references, predictions in map(draw, [300] * 60)
    ]
    for name in ("balanced_accuracy", "macro_f1"):
        widths = [one[f"{name}_ci95"][1] - one[f"{name}_ci95"][0] for one in scored]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std([one[name] for one in scored]), rel=0.3)


@pytest.mark.parametrize(
    ("sizes", "recalls"),
    [([50, 2], [0.95, 0.7]), ([200, 5], [0.97, 0.8]), ([1] * 50, [0.8] * 50), ([40] * 10, [0.9] * 10)],
)
def test_interval_of_balanced_accuracy_covers_the_truth_where_classes_are_rare(sizes, recalls):
    """Nominal 95%. The bootstrap, for which a rare class is right in every draw or in none, has 48%, 64%, 83%, 95%."""
    generator, references = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    covered = 0
    for _ in range(400):
        low, high = interval_of_balanced_accuracy(
            references, generator.random(len(references)) < np.array(recalls)[references]
        )
        covered += low <= np.mean(recalls) <= high
    assert 0.89 < covered / 400 < 0.985


@pytest.mark.parametrize(("count", "size"), [(6, 10), (40, 10)])
def test_interval_of_balanced_accuracy_covers_the_truth_of_groups(count, size):
    """Nominal 95%; 79% and 91% by the bootstrap."""
    generator, covered = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(count), size)
    references = groups % 2
    for _ in range(300):
        together = generator.random(count) < 0.7  # groups whose images are right or wrong together
        chance = np.where(together[groups], generator.random(count)[groups], generator.random(len(groups)))
        low, high = interval_of_balanced_accuracy(references, chance < 0.8, groups)
        covered += low <= 0.8 <= high
    assert covered / 300 > 0.88


@pytest.mark.parametrize(("count", "size", "recall"), [(2, 100, 0.8), (5, 20, 0.85), (10, 10, 0.95)])
def test_class_of_few_groups_beside_a_class_of_single_images_is_uncertain(count, size, recall):
    generator, covered = np.random.default_rng(0), 0
    references = np.repeat([0, 1], [count * size, 100])
    groups = np.concatenate([np.repeat(np.arange(count), size), count + np.arange(100)])
    for _ in range(200):
        right = generator.random(len(groups)) < 0.9
        right[: count * size] = (generator.random(count) < recall)[groups[: count * size]]
        low, high = interval_of_balanced_accuracy(references, right, groups)
        covered += low <= (recall + 0.9) / 2 <= high
    assert covered / 200 > 0.9


def test_interval_of_macro_f1_is_no_narrower_than_that_of_balanced_accuracy():
    references = np.repeat([0, 1], [50, 2])
    scored = score(np.eye(2)[references], references, ["a", "b"])
    assert scored["macro_f1_ci95"] == scored["balanced_accuracy_ci95"] and scored["macro_f1_ci95"][0] < 0.75


def test_intervals_know_whole_groups():
    generator = np.random.default_rng(0)
    references, groups = np.repeat([0, 1] * 10, 10), np.repeat(np.arange(20), 10)
    predictions = np.where(np.repeat(generator.random(20) < 0.3, 10), 1 - references, references)
    alone, together = (
        (
            interval_of_balanced_accuracy(references, predictions == references, given),
            interval_of_macro_f1(references, predictions, 2, given),
        )
        for given in (None, groups)
    )
    assert (np.diff(together) > 2 * np.diff(alone)).all()


def test_score_says_how_many_groups_there_are():
    scored = score(np.eye(2)[[0, 1, 1, 0]], np.array([0, 1, 0, 0]), ["a", "b"], np.array([7, 7, 3, 3]))
    assert scored["groups"] == 2 and "groups" not in score(np.eye(2), np.arange(2), ["a", "b"])


def test_interval_of_macro_f1_is_about_the_score_where_classes_have_few_images():
    generator, references, inside = np.random.default_rng(0), np.repeat(np.arange(100), 2), 0
    for _ in range(20):
        wrong = generator.random(200) < 0.3
        predictions = np.where(wrong, (references + generator.integers(1, 100, 200)) % 100, references)
        scored = score(np.eye(100)[predictions], references, [str(index) for index in range(100)])
        low, high = scored["macro_f1_ci95"]
        assert low < scored["macro_f1"] < high
        inside += low <= 0.7 <= high  # what these predictions score on many images
    assert inside >= 16


def test_perfect_scores_on_few_images_are_as_uncertain_as_the_accuracy():
    references = np.repeat(np.arange(3), 4)
    for predictions, uncertain in ((references, [0.757, 1]), ((references + 1) % 3, [0, 0.243])):
        scored = score(np.eye(3)[predictions], references, ["a", "b", "c"])
        assert scored["accuracy_ci95"] == pytest.approx(uncertain, abs=1e-3)
        for name in ("balanced_accuracy_ci95", "macro_f1_ci95"):
            assert scored[name] == pytest.approx(uncertain, abs=0.06)


def test_one_answer_to_all_images_does_not_get_the_interval_of_its_accuracy():
    references = np.repeat(np.arange(2), [135, 15])
    scored = score(np.eye(2)[np.zeros(150, int)], references, ["a", "b"])
    low, high = scored["balanced_accuracy_ci95"]
    assert low <= 0.5 <= high < scored["accuracy_ci95"][0]


@pytest.mark.parametrize("n", [4, 10, 14, 75, 125])
def test_interval_of_all_and_none_has_the_share_in_it(n):
    assert wilson_interval(n, n)[1] == 1 and wilson_interval(0, n)[0] == 0


def test_interval_of_balanced_accuracy_knows_how_few_groups_there_are():
    generator = np.random.default_rng(0)
    references = np.tile(np.arange(3), 40)
    predictions = np.where(generator.random(120) < 0.8, references, (references + 1) % 3)
    widths = []
    for count in (2, 4, 30):
        low, high = interval_of_balanced_accuracy(references, predictions == references, np.arange(120) % count)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] and widths[0] > 0.2
    together = interval_of_balanced_accuracy(references, predictions == references, np.zeros(120, dtype=int))
    assert together == pytest.approx(interval_of_share(references == predictions, np.zeros(120, dtype=int)))


def test_large_group_does_not_hide_how_far_it_is_from_the_others():
    """Nominal 95%; 72% where the deviation from a mean that the large group dominates is taken for its own."""
    generator, sizes, covered = np.random.default_rng(0), [100, *[5] * 14], 0
    groups = np.repeat(np.arange(15), sizes)
    for _ in range(300):
        shares = generator.beta(3.2, 0.8, size=15)  # 80% on average
        low, high = interval_of_share(generator.random(len(groups)) < shares[groups], groups)
        covered += low <= 0.8 <= high
    assert covered > 0.86 * 300


def test_interval_of_macro_f1_leaves_out_refusals():
    references = np.repeat([0, 1], 100)
    predictions = np.where(np.arange(200) % 10, references, 2)  # a tenth is taken for none of the classes
    scored = score(np.eye(3)[predictions], references, ["a", "b", "none"], none=2)
    low, high = scored["macro_f1_ci95"]
    assert low < scored["macro_f1"] < high


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 10, 100), (0, 9, 10), (1, 0, 4), (40, 40, 90)])
def test_interval_of_a_difference_is_that_of_agresti_and_min(gained, lost, n):
    # Half an image is added to each of the four pairs of answers; then Wald's interval of two dependent shares.
    more, less, all_of = gained + 0.5, lost + 0.5, n + 2
    mean = (more - less) / all_of
    half = 1.959964 * math.sqrt(more + less - (more - less) ** 2 / all_of) / all_of
    expected = max(-1.0, mean - half), min(1.0, mean + half)
    assert interval_of_difference(np.repeat([1, -1, 0], [gained, lost, n - gained - lost])) == pytest.approx(expected)


def test_few_groups_tell_little_of_a_difference():
    differences = np.repeat([-1, 0, 0, 0], 25)  # one of four groups loses all of its images
    low, high = interval_of_difference(differences, np.repeat(np.arange(4), 25))
    assert low < -0.75 and high > 0.25  # t = 3.18 times the standard error, instead of 1.96


def test_groups_that_are_alike_by_chance_tell_no_more_than_their_images():
    correct = np.tile(np.arange(10) < 8, 20)
    correct[0] = False
    low, high = interval_of_share(correct, np.repeat(np.arange(20), 10))  # seven of ten once, and eight else
    least, most = interval_of_share(correct)
    assert low < least and most < high
