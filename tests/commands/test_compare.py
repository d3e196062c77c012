"""compare.py: experiments on the same images, the table, the verdicts, and runs that are reused or resumed."""

import errno
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import draw_folder

from compare import Run, build_experiments, build_runs, execute, is_finished, main, parse_line, tell, terminate
from luthier.arguments import parse_arguments
from luthier.errors import UserError
from luthier.reporting.comparison import (
    comparison_in_words,
    leaks_of_experiments,
    probes_of_experiments,
    verdict_in_words,
)
from luthier.scoring.comparison import (
    RunResult,
    Verdict,
    check_same_data,
    check_same_images,
    compare_pairs,
    count_correct,
    summarise_experiment,
)
from luthier.scoring.intervals import interval_of_share, wilson_interval


def results(*experiments: tuple[str, list[list[bool]]], folds: bool = False, together: int = 0) -> dict:
    """Make up results: for each experiment, which predictions are correct with each random seed (or in each fold).

    So many images in a row are together in a group; 0 is none.
    """
    return {
        name: {
            str(number): RunResult(
                {"data": {"fingerprint": str(number) if folds else "x"}},
                [
                    (f"{row:03}", is_correct, str(row // together) if together else "")
                    for row, is_correct in enumerate(correct)
                ],
            )
            for number, correct in enumerate(runs)
        }
        for name, runs in experiments
    }


def verdicts(results: dict) -> list[str]:
    return [verdict_in_words(verdict) for verdict in compare_pairs(results)]


def finish(run: Run, **metrics) -> None:
    """Write what a finished run leaves."""
    run.folder.mkdir(parents=True)
    for name in ("README.md", "model.safetensors"):
        (run.folder / name).touch()
    (run.folder / "metrics.json").write_text(json.dumps({"time_limit": None} | metrics))


def test_config_that_changes_while_the_runs_go_on_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compare.execute", lambda run: finish(run, settings="others"))
    with pytest.raises(SystemExit) as exit_info:
        main(["--set", "augmentation=none,augmix", "--seeds", "1"])
    assert exit_info.value.code == 2 and "its config has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("experiment", "do not have the same splits in seed 1"),
        ("part", "have changed between seed 1 and seed 2 of augmentation-none"),
    ],
)
def test_runs_of_other_images_are_not_compared(tmp_path, monkeypatch, capsys, of, message):
    def trained(run):
        metrics = {"test": {"accuracy": 1.0, "n": 1}, "validation": {"accuracy": 1.0}, "seconds": {"total": 1.0}}
        finish(run, settings=run.settings, data={"fingerprint": getattr(run, of)}, **metrics)
        (run.folder / "predictions.csv").write_text("name,digest,label,predicted\na.png,x,a,a\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compare.execute", trained)
    with pytest.raises(SystemExit) as exit_info:
        main(["--set", "augmentation=none,augmix", "--seeds", "2"])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "outputs/compare/compare.md").exists()


def test_log_keeps_what_the_run_has_printed_before(tmp_path, monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: start([sys.executable, "-c", "print('new')"], **rest))
    run = Run("a", "seed 1", tmp_path / "a", [], "x")
    run.log.write_text("before\n")
    execute(run)
    assert run.log.read_text().split() == ["before", "new"]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (["start", "error: no images", *map(str, range(9))], ["error: no images", "0", "1", "2", "3"]),
        (["Traceback", *map(str, range(9))], ["4", "5", "6", "7", "8"]),
        (["killed"], ["killed"]),
    ],
)
def test_message_of_a_failed_run_is_shown_whatever_its_launcher_prints_after_it(
    tmp_path, monkeypatch, capsys, printed, shown
):
    start, program = subprocess.Popen, f"import sys; print({chr(10).join(printed)!r}); sys.exit(1)"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: start([sys.executable, "-c", program], **rest))
    run = Run("a", "seed 1", tmp_path / "a", [], "x")
    run.log.write_text("error: of an earlier attempt\n")
    with pytest.raises(SystemExit) as exit_info:
        execute(run)
    assert exit_info.value.code == 1 and capsys.readouterr().err.splitlines()[1:] == shown


def test_reader_that_leaves_does_not_end_the_comparison(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    tell("one")
    assert not isinstance(sys.stdout, Closed)


def test_output_dir_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, _, _ = parse_line(["--set", "augmentation=none,crop", "--output_dir=~/cmp"])
    assert args.output_dir == tmp_path / "cmp"


def test_verdict_is_that_of_the_exact_mcnemar_test():
    a = [True] * 90 + [False] * 10
    b = [True] * 80 + [False] * 10 + [True] * 2 + [False] * 8
    (sentence,) = verdicts(results(("a", [a]), ("b", [b])))
    # p for 10 against 2: twice the sum of C(12, k) / 2**12 for k <= 2.
    assert "10 for a, 2 for b, of 100 test images; p = 0.039" in sentence and "a is better than b" in sentence
    (sentence,) = verdicts(results(("b", [b]), ("a", [a])))
    assert "b is worse than a" in sentence
    (sentence,) = verdicts(results(("a", [a[:82]]), ("b", [b[:82]])))
    assert "too close to call at n = 82" in sentence and "p = 0.5" in sentence
    (sentence,) = verdicts(results(("a", [a]), ("b", [a])))
    assert "right and wrong on the same of 100 test images" in sentence and "has an effect" in sentence
    (sentence,) = verdicts(results(("a", [[True, False], [False, True]]), ("b", [[False, True], [True, False]])))
    assert "too close to call" in sentence, "as often right, about different images in each run"


def test_groups_change_sides_as_a_whole():
    a, b = [True] * 60, [True] * 50 + [False] * 10
    (alone,) = compare_pairs(results(("a", [a]), ("b", [b])))
    (grouped,) = compare_pairs(results(("a", [a]), ("b", [b]), together=5))
    (pairs,) = compare_pairs(results(("a", [a]), ("b", [[False] * 60]), together=2))
    assert alone.p == pytest.approx(2**-9) and alone.groups is None
    assert grouped.p == 0.5 and grouped.groups == 12  # two groups, of which either could have been for b
    assert "10 for a, 0 for b, of 60 test images in 12 groups; p = 0.5" in verdict_in_words(grouped)
    assert pairs.p < 0.001  # 30 groups for a, by random flips


def test_groups_that_one_experiment_alone_was_told_count_whichever_comes_first():
    a, b = [True] * 60, [True] * 50 + [False] * 10
    grouped, alone = results(("a", [a]), together=5), results(("b", [b]))
    for both in (grouped | alone, alone | grouped, grouped | results(("b", [b]), together=2)):
        (found,) = compare_pairs(both)
        assert (found.p, found.groups) == (0.5, 12) and not found.alike
    (same,) = compare_pairs(grouped | results(("b", [a])))
    assert same.alike, "other groups, but right and wrong on the same images"


def test_interval_is_of_images_or_of_groups():
    parts = results(("a", [[True] * 45 + [False] * 15] * 2), together=5)["a"]
    for result in parts.values():
        result.metrics.update(test={"accuracy": 0.75}, validation={"accuracy": 0.7}, seconds={"total": 1})
    row = summarise_experiment("a", parts)
    assert row["n"] == 60 and row["test accuracy"] == 0.75 and row["runs"] == 2
    assert [row["interval low"], row["interval high"]] == pytest.approx(wilson_interval(8.25, 11, z=2.201), abs=1e-3)


def test_folds_are_pooled_and_seeds_are_not():
    a, b = [True] * 10, [False] * 3 + [True] * 7
    (folds,) = verdicts(results(("a", [a, a]), ("b", [b, b]), folds=True))
    (seeds,) = verdicts(results(("a", [a, a]), ("b", [b, b])))
    assert "6 for a, 0 for b, of 20 test images" in folds and "3 for a, 0 for b, of 10 test images" in seeds


def test_several_pairs_need_smaller_p_values():
    a = [True] * 100
    b = [True] * 93 + [False] * 7  # p = 0.016 alone
    sentences = verdicts(results(("a", [a]), ("b", [b]), ("c", [a]), ("d", [a])))
    assert len(sentences) == 6 and sum("too close" in sentence for sentence in sentences) == 3  # the others are equal
    assert not any("better" in sentence or "worse" in sentence for sentence in sentences)


def test_best_of_several_experiments_is_said_to_look_better_than_it_is():
    figures = ("test accuracy", "lowest", "highest", "interval low", "interval high", "validation accuracy")
    rows = [{"experiment": name, "runs": 1, "n": 9, "seconds": 1.0} | dict.fromkeys(figures, 0.9) for name in "abc"]
    assert "the best of several experiments looks a little better" in comparison_in_words(rows, []).lower()
    assert "the best of several" not in comparison_in_words(rows[:2], []).lower()


def test_experiments_whose_scores_may_be_too_high_are_named():
    found = results(*((name, [[True], [True]]) for name in "abc"))
    assert leaks_of_experiments(found) == []
    for name, known in (("a", (0, 3)), ("b", (3, 3)), ("c", (0, 3))):
        for part, learned_from in enumerate(known):
            found[name][str(part)].metrics["leaks"] = {"duplicates": 0, "groups": 0, "learned_from": learned_from}
    why = "The score may be too high: the model knew 3 images of test or validation before."
    lines = leaks_of_experiments(found)
    assert lines == [f"- a, c (1): {why}", f"- b (0): {why}"]
    row = dict.fromkeys(["test accuracy", "lowest", "highest", "interval low", "interval high"], 0.5)
    row |= {"experiment": "a", "runs": 1, "n": 9, "validation accuracy": 0.5, "seconds": 1.0}
    assert all(line in comparison_in_words([row], [], lines).splitlines() for line in lines)


def test_experiments_that_were_scored_by_the_probe_although_they_trained_are_named():
    found = results(*((name, [[True], [True], [True]]) for name in ("a", "b", "c", "d")))
    kept = {
        "a": ("probe: fit", "the probe"),
        "b": ("full: 1 epoch", "the probe"),
        "c": ("full: 1", "the trained weights"),
    }
    for name, parts in found.items():
        for run in parts.values():
            run.metrics["recipe"] = dict(zip(("recipe", "kept"), kept.get(name, kept["c"]), strict=True))
    found["d"]["1"].metrics["recipe"]["kept"] = "the probe"
    line = "- Training did not beat the probe, which was scored in its place: b (3 of 3 runs), d (1 of 3 runs)."
    assert probes_of_experiments(found) == [line]
    assert probes_of_experiments({"a": found["a"], "c": found["c"]}) == []


def test_adjusted_p_values_and_what_an_interval_is_of_are_said():
    verdict = Verdict("a", "b", 10, 2, 100, 0.12)
    row = dict.fromkeys(["test accuracy", "lowest", "highest", "interval low", "interval high"], 0.5)
    row |= {"experiment": "a", "runs": 3, "n": 9, "validation accuracy": 0.5, "seconds": 1.0}
    said = comparison_in_words([row], [verdict] * 3)
    assert "Each p is adjusted for 3 comparisons (Holm)." in said and "interval is by the test images" in said
    assert "are of single runs" in said and "those of several folds have other test images too" in said
    said = comparison_in_words([row | {"runs": 1}], [verdict])
    assert "Holm" not in said and "interval is by" not in said


def test_experiments_are_all_combinations():
    experiments = build_experiments(["x.yaml", "y.yaml"], ["augmentation=none,augmix"])
    assert [experiment.name for experiment in experiments] == [
        "x_augmentation-none", "x_augmentation-augmix", "y_augmentation-none", "y_augmentation-augmix",
    ]  # fmt: skip
    assert experiments[1].line == ["x.yaml", "--augmentation", "augmix"]
    _, configs, rest = parse_line(["x.yaml", "y.yaml", "--data_dir", "my.yaml", "--seeds", "2"])
    assert configs == ["x.yaml", "y.yaml"] and rest == ["--data_dir", "my.yaml"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, launch):
    folder = tmp_path_factory.mktemp("compare")
    draw_folder(folder / "images", per_class=10)
    flags = ["--set", "learning_rate=1e-2,1e-9", "--seeds", "1", "--data_dir", "images", "--model_name", "simple_cnn"]
    flags += ["--num_train_epochs", "4", "--per_device_train_batch_size", "4"]
    return folder, flags, launch("compare.py", *flags, cwd=folder)


@pytest.mark.slow
def test_table_and_verdict(compared):
    folder, _, result = compared
    assert result.returncode == 0, result.stderr
    assert "[2/2] learning_rate-1e-9, seed 1: test" in result.stdout
    assert "| learning_rate-1e-2 | 1 |" in result.stdout and "of 6 test images" in result.stdout
    table = (folder / "outputs/compare/compare.csv").read_text().splitlines()
    assert len(table) == 3 and table[0].startswith("experiment,runs,test accuracy")
    assert "| learning_rate-1e-9 | 1 |" in (folder / "outputs/compare/compare.md").read_text()


@pytest.mark.slow
def test_finished_runs_are_not_run_again(compared, launch):
    folder, flags, _ = compared
    first, second = sorted((folder / "outputs/compare").glob("*/metrics.json"))
    before = second.stat().st_mtime_ns
    first.unlink()  # as an interrupted run would leave its folder
    again = launch("compare.py", *flags, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("from before") == 1
    assert second.stat().st_mtime_ns == before and first.exists()
    other = launch("compare.py", *flags, "--weight_decay", "0.5", cwd=folder)
    assert other.returncode == 2 and "holds a run with other settings" in other.stderr


def build_run(tmp_path, flags: list[str]) -> Run:
    args, configs, rest = parse_line([*flags, "--output_dir", str(tmp_path / "out")])
    return build_runs(build_experiments(configs, args.set), args, rest)[0]


def test_interrupted_run_is_resumed_and_a_run_with_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = build_run(tmp_path, ["--set", "augmentation=none,augmix"])
    assert run.line[-2:] == ["--resume_from_checkpoint", "auto"] and not is_finished(run)
    (run.folder / "checkpoint-5").mkdir(parents=True)
    run.note.write_text(run.settings)
    assert not is_finished(run) and (run.folder / "checkpoint-5").exists()
    other = build_run(tmp_path, ["--set", "augmentation=none,augmix", "--weight_decay", "0.5"])
    with pytest.raises(UserError, match="holds a run with other settings"):
        is_finished(other)
    assert (run.folder / "checkpoint-5").exists()


def test_run_is_stopped_with_the_command(tmp_path, monkeypatch, capsys):
    told = []
    process = SimpleNamespace(
        wait=lambda: told.append("wait") if "terminate" in told else sys.exit(143),
        poll=lambda: 143 if "wait" in told else None,
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: nullcontext(process))
    monkeypatch.setattr("compare.terminate", lambda process: told.append("terminate"))
    with pytest.raises(SystemExit) as exit_info:
        execute(Run("a", "seed 1", tmp_path / "a", [], "x"))
    assert exit_info.value.code == 143 and told == ["terminate", "wait"] and "to go on" in capsys.readouterr().err


def test_second_ctrl_c_is_left_to_the_run(tmp_path, monkeypatch, capsys):
    pressed = [KeyboardInterrupt, KeyboardInterrupt]

    def wait():
        if pressed:
            raise pressed.pop()

    process = SimpleNamespace(wait=wait, poll=lambda: None if pressed else 130)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: nullcontext(process))
    with pytest.raises(SystemExit) as exit_info:
        execute(Run("a", "seed 1", tmp_path / "a", [], "x"))
    assert exit_info.value.code == 130 and not pressed and "to go on" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process could answer")
def test_sigterm_reaches_what_the_launcher_has_started(tmp_path):
    below = f"import time; open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {below!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher]) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        (child,) = psutil.Process(process.pid).children(recursive=True)
        terminate(process)
        child.wait(10)  # raises TimeoutExpired if it goes on
        process.wait(10)
    terminate(process)  # nothing is left


def test_mistake_on_the_command_line_deletes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = build_run(tmp_path, ["--set", "augmentation=none,augmix"])
    (run.folder / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit_info:
        main(["--set", "augmentation=none,augmix", "--output_dir", str(tmp_path / "out"), "--learning_rat", "1"])
    assert exit_info.value.code == 2 and "did you mean 'learning_rate'" in capsys.readouterr().err
    assert (run.folder / "checkpoint-5").exists()


@pytest.mark.slow
def test_interrupted_run_resumes_from_its_checkpoint(compared, launch):
    folder, flags, _ = compared
    run = sorted((folder / "outputs/compare").glob("*/metrics.json"))[0].parent
    (run / "README.md").unlink()  # as if the run was killed while it wrote its results
    again = launch("compare.py", *flags, cwd=folder)
    assert again.returncode == 0, again.stderr
    log = run.with_name(f"{run.name}.log").read_text()
    assert f"resume   from {run.relative_to(folder)}/checkpoint-" in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "augmentation=none"], "that is one experiment"),
        (["--set", "augmentation"], "write it as key=value1,value2"),
        (["--set", "augmentation=none,fancy"], "fancy"),
        (["--set", "augmentation=none,augmix", "--seed", "3"], "compare.py sets seed itself: use --seeds"),
        (["--set", "augmentation=none,augmix", "--augmentation", "none"], "augmentation is given twice"),
        (["--set", "refit=auto,none"], "compare.py sets refit itself: leave it out"),
        (["--set", "learning_rate=1e-3,0.001"], "have the same settings"),
        (["--set", "data_dir=a,b"], "do not have the same data: give --data_dir or --dataset_name once"),
        (["--set", "split_seed=1,2"], "do not have the same splits: give --split_seed"),
        (["--set", "test_fraction=0.1,0.3"], "do not have the same splits"),
        (["--set", "seed=1,2"], "compare.py sets seed itself: use --seeds"),
        (["nowhere.yaml", "else.yaml"], "nowhere.yaml"),
        (["a/x.yaml", "b/x.yaml"], "the same name"),
        (["--set", "augmentation=none,augmix", "--folds", "1"], "--folds at least 2"),
        (["--set", "augmentation=none,augmix", "--push_to_hub"], "compare.py sets push_to_hub itself: leave it out"),
        (["--set", "augmentation=none,augmix", "--folds", "5", "--seed", "3"], "sets seed itself: leave it out"),
        (["--seeds", "2", "a.yaml", "b.yaml"], "first on the line"),
        (["a.json", "b.json"], "YAML files"),
        (["--set", "augmentation=none,none"], "has none twice"),
        (["--set", "output-dir=a,b"], "compare.py sets output_dir itself"),
        (["--set", "augmentation=none,augmix", "--seeds", "3", "--folds", "5"], "not allowed with"),
        (["--set", "augmentation=none,augmix", "--seeds", "few"], "invalid int value: 'few'; give a whole number"),
        (["--set", "augmentation=none,augmix", "--seds", "5"], "unknown option --seds; did you mean 'seeds'"),
        (["--set", "augmentation=none,augmix", "--dataset", "x"], "--dataset; did you mean 'data_dir'"),
        (["--set", "augmentation=none,augmix", "--overwrite_output_dir"], "nothing is overwritten"),
    ],
)
def test_mistake_on_the_command_line_is_reported_before_anything_runs(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_near_duplicates_in_one_fold_do_not_join_the_images_of_the_others():
    """A fold without near-duplicates has no groups in its predictions."""
    first_fold, second_fold = [True, False] * 20, [True] * 40
    runs = results(("a", [first_fold, second_fold]), ("b", [second_fold, first_fold]), folds=True)
    for parts in runs.values():
        first = parts["0"].correct
        parts["0"] = parts["0"]._replace(correct=[(digest, right, "g") for digest, right, _ in first[:2]] + first[2:])
    (verdict,) = compare_pairs(runs)
    assert (verdict.n, verdict.groups) == (80, 79)
    correct, groups = count_correct(runs["a"])
    alone = interval_of_share(correct)
    assert interval_of_share(correct, groups) == pytest.approx(alone, abs=0.02)
    (only,) = compare_pairs(results(("a", [first_fold]), ("b", [second_fold])))
    assert only.groups is None and count_correct({"0": runs["a"]["1"]})[1] is None


def test_other_images_are_refused():
    runs = results(("a", [[True]]), ("b", [[True]]))
    runs["b"]["0"].metrics["data"]["fingerprint"] = "y"
    with pytest.raises(UserError, match="a, b do not have the same splits in 0"):
        check_same_images(runs, "0")
    others = results(("a", [[True, False]]), ("b", [[True]]))  # one of them with --none_class
    with pytest.raises(UserError, match="a, b do not count the same test images in 0: name --none_class once"):
        check_same_images(others, "0")


def with_data(digests: str, fingerprint: str, images: int) -> RunResult:
    counts = {"train": images - len(digests), "test": len(digests)}
    splits = {split: {"per_class": {"x": n}} for split, n in counts.items()}
    return RunResult({"data": {"fingerprint": fingerprint, "splits": splits}}, [(each, True, "") for each in digests])


@pytest.mark.parametrize(
    ("second", "folds", "changed"),
    [
        (("ab", "1", 4), False, False),
        (("ab", "2", 4), False, True),  # another seed, other images
        (("cd", "2", 4), True, False),
        (("cd", "2", 5), True, True),  # one image more
        (("bd", "2", 4), True, True),  # tested twice
    ],
)
def test_images_that_change_between_seeds_or_folds_are_refused(second, folds, changed):
    parts = {"1": with_data("ab", "1", 4)}
    check_same_data("a", parts, "1", folds)
    parts["2"] = with_data(*second)
    if changed:
        with pytest.raises(UserError, match="have changed between 1 and 2 of a"):
            check_same_data("a", parts, "2", folds)
    else:
        check_same_data("a", parts, "2", folds)


def test_setting_may_be_written_with_hyphens_and_spaces():
    one, two = build_experiments([], ["weight-decay=0, 0.1"])
    assert (one.line, two.line) == (["--weight_decay", "0"], ["--weight_decay", "0.1"])


def test_runs_of_configs_are_not_published_and_say_once_what_they_leave_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("data_dir: x\ngroup_by: folder\npush_to_hub: true\nhub_model_id: me/x\n")
    (tmp_path / "b.yaml").write_text("augmentation: none\n")
    args, configs, rest = parse_line(["a.yaml", "b.yaml", "--data_dir", "z"])
    runs = build_runs(build_experiments(configs, args.set), args, rest)
    assert len(runs) == 6 and capsys.readouterr().out.count("group_by is left out") == 1
    assert not any(parse_arguments(run.line).run_args.push_to_hub for run in runs)


@pytest.mark.slow
def test_failed_run_is_named_with_its_log(tmp_path, launch):
    result = launch("compare.py", "--set", "augmentation=none,augmix", "--data_dir", "nowhere", cwd=tmp_path)
    assert result.returncode == 1 and "augmentation-none, seed 1 failed" in result.stderr
    (log,) = (tmp_path / "outputs/compare").glob("*.log")
    assert "nowhere is not a folder" in result.stderr and "nowhere is not a folder" in log.read_text()


def test_copies_of_a_test_image_count_each():
    runs = results(("a", [[True] * 4]), ("b", [[False] * 4]))
    for parts in runs.values():
        parts["0"] = parts["0"]._replace(correct=[("000", right, "") for _, right, _ in parts["0"].correct])
    (verdict,) = compare_pairs(runs)
    assert (verdict.for_a, verdict.n) == (4, 4)


def test_adjusted_p_value_is_never_below_that_of_a_clearer_pair():
    right = np.ones((3, 40), dtype=bool)
    right[1, :6] = right[2, 6:12] = False  # 6 against 0 twice, 6 against 6
    runs = results(*((name, [row.tolist()]) for name, row in zip("abc", right, strict=True)))
    found = {(verdict.a, verdict.b): verdict.p for verdict in compare_pairs(runs)}
    assert found == {("a", "b"): 6 / 64, ("a", "c"): 6 / 64, ("b", "c"): 1.0}  # 3 times 2/64


def test_accuracy_of_folds_is_that_of_all_their_images():
    parts = results(("a", [[True] * 45 + [False] * 15, [True] * 30]), folds=True)["a"]
    for result in parts.values():
        result.metrics.update(test={"accuracy": 0.75}, validation={"accuracy": 0.7}, seconds={"total": 1})
    row = summarise_experiment("a", parts)
    assert row["n"] == 90 and row["test accuracy"] == pytest.approx(75 / 90)
    assert row["interval low"] < 75 / 90 < row["interval high"]


@pytest.mark.parametrize(
    ("option", "parts", "word", "values"),
    [
        ("--folds", ["fold 1 of 3", "fold 2 of 3", "fold 3 of 3"], "--fold", ["1/3", "2/3", "3/3"]),
        ("--seeds", ["seed 1", "seed 2", "seed 3"], "--seed", ["1", "2", "3"]),
    ],
)
def test_every_part_of_every_experiment_is_run(tmp_path, monkeypatch, option, parts, word, values):
    monkeypatch.chdir(tmp_path)
    args, configs, rest = parse_line(["--set", "augmentation=none,augmix", option, "3", "--output_dir", "out"])
    runs = build_runs(build_experiments(configs, args.set), args, rest)
    names = ["augmentation-none", "augmentation-augmix"]
    assert [(run.part, run.experiment) for run in runs] == [(part, name) for part in parts for name in names]
    assert [run.line[run.line.index(word) + 1] for run in runs] == [value for value in values for _ in names]
    assert len({run.folder for run in runs}) == 6


def test_finished_run_counts_with_the_time_that_it_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--set", "augmentation=none,augmix", "--time_limit"]
    run = build_run(tmp_path, [*flags, "5"])
    finish(run, settings=run.settings.split()[0], time_limit=5.0)
    assert is_finished(run)
    longer = build_run(tmp_path, [*flags, "6"])
    assert longer.folder == run.folder
    with pytest.raises(UserError, match="holds a run with other settings"):
        is_finished(longer)


def test_table_has_each_figure_in_its_column():
    row = {"experiment": "a", "runs": 3, "test accuracy": 0.8, "lowest": 0.7, "highest": 0.9, "interval low": 0.75}
    row |= {"interval high": 0.85, "n": 90, "validation accuracy": 0.6, "seconds": 12.4}
    head, _, line = comparison_in_words([row], []).splitlines()[:3]
    assert line == "| a | 3 | 80.0% (70.0% to 90.0%) | 75.0% to 85.0% | 90 | 60.0% | 12 |"
    assert head.count("|") == line.count("|")


def test_full_disk_leaves_the_note_of_an_interrupted_run(tmp_path, monkeypatch):
    run = Run("a", "seed 1", tmp_path / "a", [], "x")
    run.folder.mkdir()
    run.note.write_text("x\n")

    def full(path, *_, **__):
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full)
        execute(run)
    assert not is_finished(run)
