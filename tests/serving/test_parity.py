"""What is said of an exported model, and what refuses it, by the figures alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from luthier.serving.network import Rated
from luthier.serving.parity import Images, Parity, compare

SAME = Parity("fp32", 9, 9, 0, 0, 1e-6, True, (1.0, 1.0), (-0.01, 0.01))
INT8 = Parity("int8", 100, 97, 0, 0, 0.1, True, (0.9, 0.8), (-0.15, -0.05))


def test_loss_of_an_export_is_said_in_its_direction():
    assert "the same class for 97 of 100 images; accuracy 80.0% instead of 90.0% (-10.0 points" in str(INT8)
    assert "95% interval -15.0 to -5.0" in str(INT8)
    assert str(SAME).endswith("9 of 9 images; largest difference of a probability 1e-06")
    assert "accuracy" not in str(INT8._replace(labelled=False))


@pytest.mark.parametrize(
    ("parity", "refusal"),
    [
        (SAME, None),
        (SAME._replace(same=8), "1 image gets another class"),
        (SAME._replace(other_answers=1), "1 image is unsure by one of the two alone"),
        (SAME._replace(not_finite=2), "the answers to 2 images are no finite numbers"),
        (SAME._replace(precision="fp16", overflows=2), "values inside it are too large for float16, for 2 images"),
        (INT8, "it loses more than 1 point"),
        (INT8._replace(difference_ci95=(-0.02, -0.009)), None),
        (INT8._replace(difference_ci95=(-0.02, -0.011)), "it loses more than 1 point"),
    ],
)
def test_export_that_is_worse_is_refused(parity, refusal):
    assert parity.refusal == refusal or (refusal and parity.refusal.startswith(refusal))


@pytest.mark.parametrize(
    ("n", "most", "expected"),
    [(9, 3, [0, 3, 6]), (7, 3, [0, 2, 4]), (4, 3, [0, 1, 2]), (2, 5, [0, 1]), (3, None, [0, 1, 2])],
)
def test_some_views_are_of_images_from_all_over(monkeypatch, n, most, expected):
    """Those of a run are in the order of their classes."""
    monkeypatch.setattr("luthier.serving.parity.decode_rgb", lambda number: SimpleNamespace(image=number))
    network = SimpleNamespace(view=lambda image: image)
    images = Images([str(number) for number in range(n)], lambda number: number)
    assert [*images.views(network, "range", most)] == expected


@pytest.mark.parametrize(("low", "doubtful"), [(-0.04, False), (-0.06, True)])
def test_few_images_leave_a_doubt(low, doubtful):
    assert bool(INT8._replace(difference_ci95=(low, 0.02)).doubt) == doubtful
    assert SAME._replace(difference_ci95=(low, 0.02)).doubt is None


def compared(before: list[tuple], after: list[tuple], labels=None, precision: str = "fp32") -> Parity:
    """Compare answers, each the probability of the first of two classes, and the sureness."""
    rated, other = (
        Rated(np.array([(share, 1 - share) for share, _ in each]), np.array([sureness for _, sureness in each]))
        for each in (before, after)
    )

    class Fixed(Images):
        def rate(self, network, topic):
            return other

    images = Fixed(["image"] * len(before), lambda number: b"", labels)
    return compare(SimpleNamespace(unsure_below=0.6), rated, images, precision)


@pytest.mark.parametrize(
    ("before", "after", "not_finite", "other_answers"),
    [
        ((0.9, 0.7), (0.9, 0.5), 0, 1),
        ((0.9, 0.5), (0.9, 0.7), 0, 1),
        ((0.9, 0.595), (0.9, 0.605), 0, 0),  # either answer is right
        ((0.9, 0.6), (0.9, 0.65), 0, 0),  # at the threshold it answers
        ((0.9, 0.7), (0.9, np.nan), 1, 1),
        ((np.nan, np.nan), (np.nan, np.nan), 0, 0),  # as the trained one does
    ],
)
def test_answers_of_one_of_the_two_alone_are_counted_both_ways(before, after, not_finite, other_answers):
    parity = compared([before], [after])
    assert (parity.not_finite, parity.other_answers) == (not_finite, other_answers)


def test_trained_models_answers_are_correct_where_no_labels_are_known():
    before, after = [(0.9, 0.9)] * 10, [(0.9, 0.9)] * 8 + [(0.1, 0.9)] * 2
    unknown = compared(before, after, precision="int8")
    assert unknown.accuracy == (1.0, 0.8) and sum(unknown.difference_ci95) < 0 and not unknown.labelled
    known = compared(before, after, np.array([0] * 8 + [1] * 2), "int8")
    assert known.accuracy == (0.8, 1.0) and sum(known.difference_ci95) > 0 and known.labelled


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_that_are_no_numbers_are_refused(precision):
    before = [(0.9, 0.9)] * 300
    parity = compared(before, [(np.nan, 0.9)] * 20 + before[20:], np.zeros(300, int), precision)
    assert parity.refusal == "the answers to 20 images are no finite numbers" and parity.largest_difference == 1
