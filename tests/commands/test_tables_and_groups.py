"""Complete runs on a table with groups, and the score of a finished model on another table."""

import json
from pathlib import Path

import pytest
from conftest import draw

import audit
import score
import train


@pytest.fixture(scope="module")
def run(timm_checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    """A run on 60 images of 20 patients, listed in a table: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "images").mkdir()
    rows = []
    for number in range(60):
        label = ("blue", "green", "red")[number // 3 % 3]
        draw(label, number).save(folder / f"images/{number:03}.png")
        rows.append(f"{number:03};{label};p{number // 3}")
    (folder / "labels.csv").write_text("\n".join(["id;class;patient", *rows]))
    options = ["--data_dir", str(folder / "images"), "--labels", str(folder / "labels.csv")]
    options += ["--group_column", "patient", "--recipe", "probe", "--disable_tqdm", "1"]
    train.main([*options, "--model_name", str(timm_checkpoint), "--output_dir", str(folder / "out")])
    return folder, json.loads((folder / "out/metrics.json").read_text())


def test_patients_are_on_one_side_of_the_cut(run):
    folder, metrics = run
    tested = [line.split(",")[0] for line in (folder / "out/predictions.csv").read_text().splitlines()[1:]]
    patients = {int(Path(name).stem) // 3 for name in tested}
    assert len(tested) == metrics["test"]["n"] == 3 * len(patients)


def test_report_and_card_say_what_the_groups_keep_apart(run):
    folder, metrics = run
    measured = metrics["groups"]
    assert measured["groups"] == measured["images"] / 3 and len(measured["ci95"]) == 2
    for name in ("report.html", "README.md"):
        assert "With splits that ignore the groups" in (folder / "out" / name).read_text()
    assert str(folder) not in metrics["command"] and "--labels labels.csv" in metrics["command"]


def test_audit_says_what_the_groups_keep_apart(run, timm_checkpoint, capsys):
    folder, _ = run
    data = [str(folder / "images"), "--labels", str(folder / "labels.csv"), "--group_column", "patient"]
    audit.main([*data, "--model_name", str(timm_checkpoint), "--output_dir", str(folder / "audit")])
    for text in (capsys.readouterr().out, (folder / "audit/audit.html").read_text()):
        assert "With splits that ignore the groups" in text


def test_intervals_and_predictions_know_the_groups(run):
    folder, metrics = run
    assert metrics["test"]["groups"] == metrics["test"]["n"] / 3
    rows = (folder / "out/predictions.csv").read_text().splitlines()
    assert rows[0].endswith(",group") and len({row.split(",")[-1] for row in rows[1:]}) == metrics["test"]["groups"]


def test_model_is_scored_on_the_test_rows_of_a_table_without_train(run):
    folder, _ = run
    (folder / "test.csv").write_text("file,class,split\n000.png,blue,test\n003.png,green,test\n006.png,red,val\n")
    data = ["--data_dir", str(folder / "images"), "--labels", str(folder / "test.csv")]
    score.main([str(folder / "out"), *data, "--output_dir", str(folder / "score"), "--disable_tqdm", "1"])
    assert json.loads((folder / "score/metrics.json").read_text())["test"]["n"] == 2
