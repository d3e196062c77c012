"""Experiments are compared image by image."""

import csv
import errno
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from luthier.errors import UserError
from luthier.scoring.comparison import RunResult, compare_pairs, read_correct, vote_p_value


def test_image_in_two_classes_is_compared_with_itself_in_each(tmp_path):
    results = {}
    for name, predicted in (("a", "cat"), ("b", "dog")):
        path = tmp_path / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = [("x", label, predicted, "0") for label in ("cat", "dog")]
            csv.writer(file).writerows([("digest", "label", "predicted", "group"), *rows])
        results[name] = {"seed 1": RunResult({"data": {"fingerprint": ""}}, read_correct(path))}
    (verdict,) = compare_pairs(results)
    assert (verdict.for_a, verdict.for_b, verdict.n, verdict.p) == (1, 1, 2, 1.0)


def test_experiment_that_is_right_about_more_images_but_less_often_is_not_better():
    seeds = {  # 30 images: a is right twice, b once; 11 images: b three times, a never
        "a": [[True] * 30 + [False] * 11] * 2 + [[False] * 41],
        "b": [[False] * 30 + [True] * 11] * 2 + [[True] * 41],
    }

    def result(run: list[bool]) -> RunResult:
        return RunResult({"data": {"fingerprint": ""}}, [(str(row), right, "") for row, right in enumerate(run)])

    results = {name: {str(seed): result(run) for seed, run in enumerate(runs)} for name, runs in seeds.items()}
    (verdict,) = compare_pairs(results)
    assert (verdict.for_a, verdict.for_b, verdict.p) == (30, 11, 1.0) and not verdict.is_clear


def test_predictions_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    """Whoever removed the folder, as the advice is, would lose a run."""

    def refuse(*_, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "predictions.csv")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        read_correct(tmp_path / "predictions.csv")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "name;digest;label;predicted\na.png;x;a;a\n",
        "digest,label,predicted\n",
        "digest,label,predicted\nx,a\n",
        "digest,label,predicted,group,none\nx,a,a,1,0\ny,a,a\n",
    ],
)
def test_predictions_that_another_program_has_changed_give_one_message(tmp_path, text):
    if text:
        (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(UserError, match="is damaged, or another program has changed it"):
        read_correct(tmp_path / "predictions.csv")


def test_predictions_are_read_with_their_groups_and_without_images_of_no_class(tmp_path):
    rows = ["a.png,y,cat,dog,0.9,0.1,7,0", "b.png,x,dog,dog,0.9,0.9,7,0", "c.png,z,none,none,0.9,0.9,8,1"]
    header = "name,digest,label,predicted,confidence,probability_of_label,group,none"
    (tmp_path / "predictions.csv").write_text("\n".join([header, *rows]) + "\n")
    assert read_correct(tmp_path / "predictions.csv") == [("x", True, "7"), ("y", False, "7")]
    (tmp_path / "predictions.csv").write_text("digest,label,predicted\nx,a,a\n")
    assert read_correct(tmp_path / "predictions.csv") == [("x", True, "")]


@pytest.mark.parametrize(("groups", "lost"), [(10, 2), (30, 10)])
def test_p_value_of_groups_is_that_of_both_directions(groups, lost):
    """Of groups of one size it is the sign test's; of more than 14 by random flips."""
    votes, names = np.repeat([1, -1], [2 * (groups - lost), 2 * lost]), [str(row // 2) for row in range(2 * groups)]
    found = vote_p_value(votes, names)
    assert found == pytest.approx(binomtest(lost, groups).pvalue, abs=0.01)
    assert vote_p_value(-votes, names) == found
