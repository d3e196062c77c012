"""Complete runs of the race, the refit, cross-validation, the time limit, and the choice of a view."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw, draw_folder, run
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import luthier.scoring.race as race
from data import load_splits
from luthier.output_dir import has_ended
from luthier.scoring import selection
from luthier.scoring.criterion import Judge
from luthier.scoring.race_record import Heat, Heats
from luthier.scoring.refit import plan_refit
from luthier.scoring.screening import cross_fitted_losses
from luthier.training.recipe import FROM_SCRATCH, RECIPES
from luthier.training.trainer import predict, predict_best

# The probe is out of the race: random features of a tiny model suit colours better than any training.
RACE = ["--per_device_train_batch_size", "16", "--num_train_epochs", "14"]
RACE += ["--keep", "trained", "--learning_rate", "1e-2"]
SCORED_KEYS = ("validation", "test", "unsure")


@pytest.fixture(scope="module")
def raced(timm_checkpoint, tmp_path_factory):
    """A run of the race on images with a few wrong labels: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("raced")
    draw_folder(folder / "images", per_class=30)
    for seed in range(8):  # or the probe would leave nothing to learn
        draw("red", 5000 + seed).save(folder / f"images/blue/{seed}-red.png")
    return folder, run(folder, timm_checkpoint, *RACE)


def test_best_weights_are_scored_by_the_answers_of_their_evaluation(timm_checkpoint, tmp_path, monkeypatch):
    draw_folder(tmp_path / "images", per_class=12)
    seen = []

    def compare(trainer, rows):
        best, last, known = trainer.state.best_global_step, trainer.state.global_step, trainer.evaluations
        (kept, labels), (again, same) = predict_best(trainer, rows), predict(trainer, rows)
        if best:  # the probe is not trained
            seen.append((best in known, best < last, np.array_equal(kept, again) and np.array_equal(labels, same)))
        return kept, labels

    monkeypatch.setattr(selection, "predict_best", compare)
    run(tmp_path, timm_checkpoint, "--recipe", "full", "--learning_rate", "3e-2", "--refit", "none")
    known, earlier, alike = zip(*seen, strict=True)
    assert any(known) and any(earlier) and all(alike)


@pytest.mark.parametrize("recipe", ["probe", pytest.param("full", marks=pytest.mark.slow)])
def test_test_images_choose_nothing_and_those_of_the_users_own_are_not_learned_from(timm_checkpoint, tmp_path, recipe):
    """With wrong labels on all test images the weights and thresholds are the same, and the score is another."""
    found = []
    for name in ("right", "wrong"):
        draw_folder(tmp_path / name / "images/train", per_class=12)
        test = draw_folder(tmp_path / name / "images/test", per_class=4, first=500)
        if name == "wrong":
            for old, new in (("blue", "x"), ("green", "blue"), ("red", "green"), ("x", "red")):
                (test / old).rename(test / new)
        metrics = run(tmp_path / name, timm_checkpoint, "--recipe", recipe, "--num_train_epochs", "2")
        config = json.loads((tmp_path / name / "out/config.json").read_text())
        chosen = [config["familiarity"], config["unsure_below"], metrics["calibration"]["temperature"]]
        chosen.append(metrics["baselines"]["linear_probe"]["strength"])
        found.append((metrics, load_file(tmp_path / name / "out/model.safetensors"), chosen))
    (right, weights, chosen), (wrong, others, chosen_again) = found
    assert chosen == chosen_again
    assert right["validation"] == wrong["validation"] and right["recipe"]["kept"] == wrong["recipe"]["kept"]
    assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items())
    assert right["test"]["accuracy"] != wrong["test"]["accuracy"]
    assert right["refit"]["images"] == 36 and right["data"]["splits"]["test"]["n"] == 12


def test_race_runs_every_recipe_and_stops_the_losers_early(raced):
    _, metrics = raced
    heats = metrics["race"]["heats"]
    tried = {heat["arm"] for heat in heats}
    assert tried == {"lp_ft", "full_from_probe", "full"}
    counts = {arm: sum(heat["arm"] == arm for heat in heats) for arm in tried}
    assert 1 <= counts["lp_ft"] <= 2 and sorted(counts.values())[1] == 2 < max(counts.values())
    assert metrics["race"]["ended"] == "its last heat"
    assert all(heat["loss"] > 0 and heat["seconds"] > 0 for heat in heats)
    winner = min(tried, key=lambda arm: [heat["loss"] for heat in heats if heat["arm"] == arm][-1])
    assert metrics["recipe"]["recipe"].startswith(f"{winner}: ")


def test_report_shows_what_was_tried(raced):
    folder, metrics = raced
    page = (folder / "out/report.html").read_text()
    assert "What was tried" in page and all(heat["arm"] in page for heat in metrics["race"]["heats"])
    assert "on all 98" in page
    assert "on all 98" in (folder / "out/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [5, 1])
def test_interrupted_race_ends_like_an_uninterrupted_one(raced, timm_checkpoint, monkeypatch, capsys, kept):
    """Cut in the second heats, or after the first heat of the first recipe."""
    folder, whole = raced
    name, write_record = f"cut after {kept}", race.write_record

    def cut(course: race.Course, arms: list, heats: Heats, *rest) -> None:
        write_record(course, arms, heats, *rest)
        if len(heats) == kept:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(race, "write_record", cut)
        run(folder, timm_checkpoint, *RACE, out=name)
    assert not (folder / name / "metrics.json").exists()
    begun = json.loads((folder / name / "race.json").read_text())["heats"]
    resume = ["--resume_from_checkpoint", "auto"]
    with pytest.raises(SystemExit) as ended:  # its losses do not compare
        run(folder, timm_checkpoint, *RACE, *resume, "--metric", "accuracy", out=name)
    assert ended.value.code == 2 and "and now there would be --metric accuracy" in capsys.readouterr().err
    again = run(folder, timm_checkpoint, *RACE, *resume, out=name)
    assert [heat["arm"] for heat in again["race"]["heats"]] == [heat["arm"] for heat in whole["race"]["heats"]]
    assert again["race"]["heats"][:kept] == begun  # with the same seconds: they were not run again
    assert all(again[key] == whole[key] for key in SCORED_KEYS)
    weights, expected = (load_file(folder / each / "model.safetensors") for each in (name, "out"))
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


def test_scored_weights_stay_and_shipped_ones_have_learned_from_all_images(raced):
    folder, metrics = raced
    shipped, scored = (load_file(folder / name / "model.safetensors") for name in ("out", "out/scored"))
    assert any(not torch.equal(shipped[key], scored[key]) for key in scored)
    assert metrics["refit"]["done"] and metrics["refit"]["images"] == 98
    learned = {name: (folder / name / "learned_from.txt").read_text().split() for name in ("out", "out/scored")}
    assert len(learned["out"]) == 98 and set(learned["out/scored"]) < set(learned["out"])
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ("out", "out/scored")]
    assert configs[0]["unsure_below"] == configs[1]["unsure_below"]
    assert configs[0]["familiarity"] == configs[1]["familiarity"]
    correct = [
        pipeline("image-classification", str(folder / "out"))(str(path), top_k=1)[0]["label"] == "green"
        for path in sorted((folder / "images/green").iterdir())[:5]
    ]
    assert all(correct)


def test_time_limit_leaves_the_probe(timm_checkpoint, tmp_path, capsys):
    draw_folder(tmp_path / "images", per_class=10)
    metrics = run(tmp_path, timm_checkpoint, "--time_limit", "0.001")
    assert metrics["race"]["heats"] == [] and metrics["race"]["ended"] == "the time limit"
    probe = metrics["baselines"]["linear_probe"]["validation"]
    assert metrics["race"]["probe"]["accuracy"] == probe["accuracy"]
    assert metrics["recipe"]["kept"] == "the probe" and not metrics["refit"]["done"]
    assert "refit    not done: the time limit" in capsys.readouterr().out


@pytest.mark.slow
def test_score_on_random_crops_is_named_as_such(timm_checkpoint, tmp_path, capsys):
    draw_folder(tmp_path / "images", per_class=10)
    metrics = run(tmp_path, timm_checkpoint, "--recipe", "probe", "--test_view", "random_crop")
    assert metrics["recipe"]["test view"] == "random crops, which distort the score"
    assert "careful  The model has seen test in random crops" in capsys.readouterr().out
    card, page = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert "**The model has seen test in random crops, which distort the score.**" in card
    assert "<td>random crops, which distort the score</td>" in page


@pytest.mark.slow
def test_time_limit_ends_a_training_without_heats_after_an_epoch(tmp_path):
    draw_folder(tmp_path / "images", per_class=10)
    metrics = run(tmp_path, Path("simple_cnn"), "--time_limit", "0.001")
    (heat,) = metrics["race"]["heats"]
    assert heat["epochs"] == 1 and metrics["race"]["ended"] == "the time limit" and metrics["test"]["n"] == 6
    (tmp_path / "out/README.md").unlink()  # as if it had been killed before its end
    resume = ["--resume_from_checkpoint", "auto", "--time_limit"]
    again = run(tmp_path, Path("simple_cnn"), *resume, "0.001")
    assert again["race"]["heats"] == [heat] and again["history"] == metrics["history"][:-1]  # but the seconds
    assert run(tmp_path, Path("simple_cnn"), *resume, "9", "--seed", "7") == again  # which is finished
    for old in ("scored/config.json", "onnx/model.onnx", "export.json"):  # of the earlier weights
        (tmp_path / "out" / old).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / old).touch()
    draw("red", 999).save(tmp_path / "images/red/new.png")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, Path("simple_cnn"), *resume, "9")
    assert ended.value.code == 2 and has_ended(tmp_path / "out")  # what cannot go on stays as it was
    (tmp_path / "images/red/new.png").unlink()
    more = run(tmp_path, Path("simple_cnn"), *resume, "9")["race"]
    assert more["heats"][0] == heat and more["heats"][-1]["epochs"] > 1 and more["ended"] == "its last heat"
    assert not (tmp_path / "out/onnx").exists() and not (tmp_path / "out/export.json").exists()


@pytest.mark.slow
def test_folds_score_every_image_once(timm_checkpoint, tmp_path):
    draw_folder(tmp_path / "images", per_class=15)
    metrics = run(tmp_path, timm_checkpoint, "--folds", "3", "--recipe", "probe")
    assert metrics["test"]["n"] == 45 and metrics["baselines"]["linear_probe"]["test"]["n"] == 45
    assert metrics["refit"]["images"] == 45 and len((tmp_path / "out/learned_from.txt").read_text().split()) == 45
    names = [line.split(",")[0] for line in (tmp_path / "out/predictions.csv").read_text().splitlines()[1:]]
    assert len(set(names)) == 45
    compared = set(json.loads((tmp_path / "out/images.json").read_text())["test"])  # on which exports are compared
    learned = set((tmp_path / "out/scored/learned_from.txt").read_text().split())
    assert len(compared | learned) == 45, "but the images that a fold tests, it has learned from all"
    assert 0 < len(compared & learned) < len(compared), "the validation split of that fold, which has chosen"


@pytest.mark.slow
def test_interrupted_folds_end_like_uninterrupted_ones(timm_checkpoint, tmp_path, monkeypatch):
    draw_folder(tmp_path / "images", per_class=15)
    options = ["--folds", "3", "--recipe", "full", "--keep", "trained", "--num_train_epochs", "2"]
    whole, write_record = run(tmp_path, timm_checkpoint, *options), race.write_record
    folders = {path.name for path in (tmp_path / "out").glob("fold-*")}
    assert whole["test"]["n"] == 45 and folders == {"fold-1", "fold-2", "fold-3"}

    def cut(course: race.Course, arms: list, heats: Heats, *rest) -> None:
        write_record(course, arms, heats, *rest)
        if course.folder.name == "fold-2" and heats:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(race, "write_record", cut)
        run(tmp_path, timm_checkpoint, *options, out="cut")
    records = [tmp_path / f"cut/fold-{number}/race.json" for number in (1, 2)]
    before = [json.loads(record.read_text())["heats"] for record in records]
    again = run(tmp_path, timm_checkpoint, *options, "--resume_from_checkpoint", "auto", out="cut")
    for record, heats in zip(records, before, strict=True):
        assert heats and json.loads(record.read_text())["heats"][: len(heats)] == heats, "not trained again"
    assert again["test"] == whole["test"] and again["unsure"] == whole["unsure"]
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out"))
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_folds_leave_a_validation_split_of_the_users_own_as_it_is(timm_checkpoint, tmp_path):
    draw_folder(tmp_path / "images/train", per_class=12)
    draw_folder(tmp_path / "images/validation", per_class=4, first=500)
    draw("red", 7000).save(tmp_path / "images/validation/blue/red.png")  # a suspect label
    metrics = run(tmp_path, timm_checkpoint, "--folds", "3", "--recipe", "probe")
    assert {split: count["n"] for split, count in metrics["data"]["splits"].items()} == {"test": 36, "validation": 13}
    assert metrics["refit"]["images"] == 49
    page = (tmp_path / "out/report.html").read_text()
    assert "Each test image was scored once, by a model" in page and "Validation chose" in page
    assert "fitted on these predictions" in page


@pytest.mark.slow
def test_refit_trains_as_many_epochs_where_the_steps_are_limited(timm_checkpoint, tmp_path):
    draw_folder(tmp_path / "images", per_class=12)
    options = ["--recipe", "full", "--keep", "trained", "--max_steps", "6", "--eval_strategy", "no"]
    metrics = run(tmp_path, timm_checkpoint, *options, "--per_device_train_batch_size", "16")
    assert metrics["data"]["splits"]["train"]["n"] <= 32 and metrics["refit"]["images"] == 36
    assert [path.name for path in (tmp_path / "out/refit/full-6").glob("checkpoint-9")] == ["checkpoint-9"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "trained"])
def test_checkpoint_is_continued_in_another_directory(timm_checkpoint, tmp_path, keep):
    draw_folder(tmp_path / "images", per_class=12)
    options = ["--recipe", "full", *RACE, "--keep", keep]
    whole = run(tmp_path, timm_checkpoint, *options)
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again = run(tmp_path, timm_checkpoint, *options, "--resume_from_checkpoint", str(last), out="again")
    assert len(whole["race"]["heats"]) > 1 and all(again[key] == whole[key] for key in SCORED_KEYS)
    (tmp_path / "again/metrics.json").unlink()  # as if it had been killed before the end
    again = run(tmp_path, timm_checkpoint, *options, "--resume_from_checkpoint", "auto", out="again")
    assert len(again["race"]["heats"]) == 1 and all(again[key] == whole[key] for key in SCORED_KEYS)


@pytest.mark.slow
def test_image_processor_that_can_only_crop_is_left_as_it_is(resnet_checkpoint, tmp_path):
    draw_folder(tmp_path / "images", per_class=12)
    metrics = run(tmp_path, resnet_checkpoint, "--recipe", "full", "--num_train_epochs", "1")
    assert metrics["recipe"]["view"].startswith("cropped; ") and "squeezed" not in metrics["recipe"]["view"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "1"], "--folds is 1, but must be a number from 2 to 1,000"),
        (["--folds", "3", "--fold", "1/3"], "--folds runs every fold: leave --fold out"),
        (
            ["--resume_from_checkpoint", "out/checkpoint-5"],
            "out/checkpoint-5 is not a checkpoint: give auto",
        ),
        (["--time_limit", "0"], "--time_limit is 0.0, but must be a number above 0"),
        (["--save_only_model", "1"], "--save_only_model would keep checkpoints that nothing can be resumed from"),
        (["--load_best_model_at_end", "1"], "--load_best_model_at_end has no effect"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "reduce_lr_on_plateau follows the evaluations"),
    ],
)
def test_wrong_options_are_refused(tmp_path, timm_checkpoint, options, message, capsys):
    draw_folder(tmp_path / "images", per_class=5)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, timm_checkpoint, *options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_view_shows_what_a_crop_would_hide(tmp_path, timm_checkpoint):
    """The class is at the left and right ends of wide images; the centre is the same for all."""
    generator = np.random.default_rng(1)
    for name, colour in (("blue", (40, 60, 200)), ("red", (210, 50, 40)), ("green", (30, 180, 60))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            pixels = generator.integers(0, 60, (40, 120, 3), dtype=np.uint8)
            pixels[:, :30] = pixels[:, 90:] = np.array(colour, np.uint8) - generator.integers(0, 20, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    metrics = run(tmp_path, timm_checkpoint, "--recipe", "probe")
    assert metrics["recipe"]["view"].split(";")[0] in ("squeezed", "padded")
    assert metrics["test"]["accuracy"] > 0.9
    classify = pipeline("image-classification", str(tmp_path / "out"))
    assert classify(str(tmp_path / "images/red/0.png"), top_k=1)[0]["label"] == "red"


def test_cross_fitted_losses_are_those_of_images_that_were_not_learned_from():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 20, generator=generator)
    folds = np.arange(60) % 4
    assert (
        cross_fitted_losses(noise, labels, folds).mean() > 0.9
    )  # nothing to learn, though 60 images are easily fitted
    telling = noise + 5 * torch.nn.functional.one_hot(labels, 20)
    assert cross_fitted_losses(telling, labels, folds).mean() < 0.6


def one_arm(tmp_path, epochs, best_step, own_splits=frozenset({"test"})):
    """Return an experiment of ten images a split, and its result: ten steps of one arm, in 30 seconds."""
    course = race.Course(Judge([]), None, tmp_path, SimpleNamespace(total=lambda: 100.0), time_limit=1.0)
    state = SimpleNamespace(best_global_step=best_step, global_step=10)
    heats = Heats([Heat("full", 10, epochs, 0.5, 0.9, 30.0)])
    result = SimpleNamespace(
        course=course,
        outcome=race.Outcome(heats, "", winner=race.Trained(SimpleNamespace(recipe=RECIPES["full"]), [], state)),
        kept=SimpleNamespace(arm="full", is_probe=False), learned_from=["digest"] * 10,
        probe=SimpleNamespace(strength=None),
    )  # fmt: skip
    splits = {"train": range(10), "validation": range(10), "test": range(10)}
    return SimpleNamespace(splits=splits, own_splits=own_splits, stream=None), result


def test_refit_has_the_time_limit_of_the_whole_run(tmp_path):
    run = one_arm(tmp_path, epochs=1.0, best_step=5)  # its course has the limit of a fold, in minutes
    refused = plan_refit(*run, "auto", time_limit=1.0)
    assert refused.refusal == "the time limit" and not refused.averaged
    plan = plan_refit(*run, "auto", time_limit=3.0)
    assert plan.done and plan.averaged and plan.seconds == 30.0, "half of the steps on twice the images"


def test_refit_of_weights_from_after_the_last_heat_takes_longer_than_the_heats(tmp_path):
    """A run that was killed within a heat has checkpoints of it."""
    experiment, result = one_arm(tmp_path, epochs=1.0, best_step=20)
    result.outcome.winner.state.global_step = 20
    assert plan_refit(experiment, result, "auto", None).seconds == 120.0


def test_refit_is_at_most_as_much_work_as_the_run(tmp_path, monkeypatch):
    """An epoch of ten images is 30 predictions; the run adds 10 of validation an epoch, and 10 of test."""
    assert plan_refit(*one_arm(tmp_path, epochs=1.0, best_step=10), "auto", None).done, "it is over in no time"
    monkeypatch.setattr("luthier.scoring.refit.AROUND", 0)
    assert plan_refit(*one_arm(tmp_path, epochs=1.0, best_step=8), "auto", None).done, "48 of 50"
    late = one_arm(tmp_path, epochs=1.0, best_step=10)
    assert "more work than the run" in plan_refit(*late, "auto", None).refusal, "60 of 50"
    assert plan_refit(*late, "auto", None, folds=2).done
    cut = one_arm(tmp_path, epochs=1.0, best_step=8, own_splits=frozenset())
    assert not plan_refit(*cut, "auto", None).done, "72 of 50"
    assert plan_refit(*one_arm(tmp_path, epochs=1.0, best_step=8), "none", None).refusal == "--refit none"


@pytest.mark.parametrize(("is_probe", "images"), [(True, 10), (False, 99)])
def test_run_that_streams_is_not_refit(tmp_path, is_probe, images):
    """The probe has learned from a sample, and trained weights from the whole stream."""
    experiment, result = one_arm(tmp_path, epochs=1.0, best_step=5)
    experiment.stream, result.kept.is_probe = SimpleNamespace(labels=range(99)), is_probe
    plan = plan_refit(experiment, result, "auto", None)
    assert (plan.refusal, plan.scored_on, plan.images) == ("the images are streamed", images, images)


@pytest.mark.slow
def test_weights_that_are_not_refit_have_learned_from_train_alone(timm_checkpoint, tmp_path):
    draw_folder(tmp_path / "images", per_class=12)
    metrics = run(tmp_path, timm_checkpoint, "--recipe", "probe", "--refit", "none")
    learned = (tmp_path / "out/learned_from.txt").read_text().split()
    counts = metrics["data"]["splits"]
    assert len(learned) == counts["train"]["n"] + counts["validation"]["n"] < 36, "and validation has chosen them"
    assert not (tmp_path / "out/scored").exists() and metrics["refit"]["done"] is False
    folds = run(tmp_path, timm_checkpoint, "--recipe", "probe", "--refit", "none", "--folds", "3", out="folds")
    assert 0 < len((tmp_path / "folds/learned_from.txt").read_text().split()) < folds["test"]["n"]
    assert "The shipped weights are those of one of the folds" in (tmp_path / "folds/README.md").read_text()
    config = json.loads((tmp_path / "folds/config.json").read_text())
    assert config["familiarity"]["unsure_below"] == folds["unsure"]["threshold"]


@pytest.mark.parametrize(
    ("recipe", "is_probe", "averaged"),
    [(RECIPES["full"], False, True), (FROM_SCRATCH, False, False), (RECIPES["full"], True, False)],
)
def test_mean_is_planned_of_fine_tuned_weights_alone(tmp_path, recipe, is_probe, averaged):
    experiment, result = one_arm(tmp_path, epochs=1.0, best_step=5)
    result.outcome.winner.arm.recipe, result.kept.is_probe = recipe, is_probe
    plan = plan_refit(experiment, result, "auto", None)
    assert plan.done and plan.averaged == averaged


def test_work_of_a_run_is_that_of_all_its_arms_and_of_its_features(tmp_path, monkeypatch):
    """The refit is 60 predictions; training one arm and the score are 50."""
    monkeypatch.setattr("luthier.scoring.refit.AROUND", 0)
    experiment, result = one_arm(tmp_path, epochs=1.0, best_step=10)
    assert not plan_refit(experiment, result, "auto", None).done
    result.probe.strength = 0.1
    assert plan_refit(experiment, result, "auto", None).done, "80 with the features of 30 images"
    result.probe.strength = None
    result.outcome.heats.append(Heat("lp_ft", 10, 1.0, 0.6, 0.9, 30.0))
    assert plan_refit(experiment, result, "auto", None).done, "90 with the other arm"


class Drawn(Exception):
    """Ends a run where its sample is drawn."""


def test_view_and_backbone_are_chosen_by_training_images_alone(timm_checkpoint, tmp_path, monkeypatch):
    """Where Luthier cuts the splits itself."""
    seen = []

    def draw_sample(train_images, *_):
        seen.extend(train_images["digest"][:])
        raise Drawn

    monkeypatch.setattr("luthier.scoring.screening.draw_sample", draw_sample)
    draw_folder(tmp_path / "images", per_class=8)
    with pytest.raises(Drawn):
        run(tmp_path, timm_checkpoint)
    splits, _ = load_splits(data_dir=str(tmp_path / "images"))
    assert sorted(seen) == sorted(splits["train"]["digest"][:])
