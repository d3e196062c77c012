"""Experiments are compared image by image."""

import csv

from luthier.scoring.comparison import RunResult, compare_pairs, read_correct


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
