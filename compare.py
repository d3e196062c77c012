"""Compare experiments on identical splits: which is better, or too close to call.

    python compare.py configs/a.yaml configs/b.yaml --seeds 3
    python compare.py configs/a.yaml --set "augmentation=none,augmix" --folds 5 --data_dir my_photos

Every combination of a config and the values of each --set is an experiment.
All other options go to train.py. Each run is an ordinary `accelerate launch
train.py`. Finished runs are not run again, interrupted ones are resumed.
"""

import argparse
import contextlib
import csv
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from luthier.command_line import CommandParser, path_of_option
from luthier.errors import UserError, exit_on_user_error
from luthier.files import atomic_write, expand_home
from luthier.output_dir import has_ended, read_metrics, wait_for_lock
from luthier.run_files import PREDICTIONS
from luthier.terminal import PROJECT, ignore_closed, percent, say

SEEDS = 3  # where neither seeds nor folds are given
PATIENCE = 60  # seconds in which a run that is stopped may write its checkpoint
FIXED = {  # what compare.py gives to every run, and the option to use instead, if there is one
    "seed": "--seeds",
    "fold": "--folds",
    "output_dir": "--output_dir",
    "refit": "",
    "disable_tqdm": "",
    "push_to_hub": "",
    "resume_from_checkpoint": "",
}


class Experiment(NamedTuple):
    """A name, and train.py's arguments for it."""

    name: str
    line: list[str]


class Run(NamedTuple):
    """One run: experiment, seed or fold, folder, train.py's arguments, settings as `with_time_limit` tells them."""

    experiment: str
    part: str
    folder: Path
    line: list[str]
    settings: str

    @property
    def note(self) -> Path:
        """The file beside the folder that holds the digest of the settings: an unfinished run has no metrics.json."""
        return self.folder.with_name(f"{self.folder.name}.settings")

    @property
    def log(self) -> Path:
        """The file beside the folder that holds what train.py prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run what is missing, print the table and write it as compare.md and compare.csv."""
    args, configs, rest = parse_line(sys.argv[1:] if argv is None else argv)
    runs = build_runs(build_experiments(configs, args.set), args, rest)
    finished = {run.folder for run in runs if is_finished(run)}
    from luthier.output_dir import create_output_dir
    from luthier.reporting.comparison import comparison_in_words, leaks_of_experiments, probes_of_experiments
    from luthier.scoring.comparison import (
        RunResult,
        check_same_data,
        check_same_images,
        compare_pairs,
        read_correct,
        summarise_experiment,
    )

    create_output_dir(args.output_dir)
    results: dict[str, dict[str, RunResult]] = {}
    for number, run in enumerate(runs, 1):
        if run.folder not in finished:
            tell(f"[{number}/{len(runs)}] {run.experiment}, {run.part}: its output goes to {run.log}")
            execute(run)
            is_finished(run)  # refuses a run whose config has changed since the beginning
        metrics = read_metrics(run.folder)
        correct = read_correct(run.folder / PREDICTIONS)
        results.setdefault(run.experiment, {})[run.part] = RunResult(metrics, correct)
        scored, seconds = metrics["test"], metrics["seconds"]["total"]
        tell(
            f"[{number}/{len(runs)}] {run.experiment}, {run.part}: test {percent(scored['accuracy'])} "
            f"(n = {scored['n']}), {seconds:.0f} s{', from before' if run.folder in finished else ''}"
        )
        check_same_images(results, run.part)
        check_same_data(run.experiment, results[run.experiment], run.part, bool(args.folds))
    rows = [summarise_experiment(name, parts) for name, parts in results.items()]
    found = probes_of_experiments(results) + leaks_of_experiments(results)
    report = comparison_in_words(rows, compare_pairs(results), found) + "\n"
    tell(f"\n{report.rstrip()}")
    (args.output_dir / "compare.md").write_text(report, encoding="utf-8")
    with (args.output_dir / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    say("saved", f"{args.output_dir / 'compare.md'}, and the same table as compare.csv")


def tell(text: str) -> None:
    """Print a text as it is; whoever read along may be gone."""
    with ignore_closed("stdout"):
        print(text, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command's own options."""
    from luthier.parsing import HelpFormatter

    parser = CommandParser(
        prog="compare.py",
        usage="compare.py [configs/NAME.yaml ...] [--seeds N | --folds K] [--set key=v1,v2 ...] [train.py's options]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--seeds", type=int, help=f"training seeds, on one split; {SEEDS} if there are no folds")
    several.add_argument("--folds", type=int, help="folds, each image in one test split, instead of seeds")
    parser.add_argument("--set", action="append", default=[], metavar="key=v1,v2", help="an option and its values")
    parser.add_argument("--output_dir", type=path_of_option, default=Path("outputs/compare"), help="where the runs go")
    return parser


def parse_line(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return this command's own options, the configs, and what goes to train.py.

    Raises:
        UserError: an option is wrong, or belongs to this command.
    """
    from luthier.parsing import option_names_in

    configs = list(itertools.takewhile(lambda word: word.endswith((".yaml", ".yml")), argv))
    args, rest = build_parser().parse_known_args(argv[len(configs) :])
    args.seeds = SEEDS if args.seeds is None else args.seeds  # as a default, argparse would miss that it was given
    if args.seeds < 1 or (args.folds is not None and args.folds < 2):
        raise UserError("--seeds must be at least 1, --folds at least 2")
    for_all = option_names_in(rest)
    for_each = [_key_and_values(setting)[0] for setting in args.set]
    twice = next((option for option in for_each if option in for_all or for_each.count(option) > 1), None)
    if twice:
        raise UserError(f"{twice} is given twice: leave --{twice} out, or one --set")
    for option, instead in FIXED.items():
        if option in (*for_all, *for_each):
            own = instead if not (option == "seed" and args.folds) else ""  # seeds and folds exclude each other
            raise UserError(f"compare.py sets {option} itself: {f'use {own}' if own else 'leave it out'}")
    return args, configs, rest


def build_experiments(configs: list[str], settings: list[str]) -> list[Experiment]:
    """Return every combination of a config (or none) and the values of each setting.

    Raises:
        UserError: a setting is not `key=v1,v2`, two configs have one name, or there is nothing to compare.
    """
    values = []
    for setting in settings:
        key, listed = _key_and_values(setting)
        if not key.isidentifier() or not all(listed):
            raise UserError(f"--set {setting} is not a setting: write it as key=value1,value2")
        if twice := [value for value in listed if listed.count(value) > 1]:
            raise UserError(f"--set {setting} has {twice[0]} twice: leave one out")
        values.append([(key, value) for value in listed])
    experiments = []
    for config in configs or [""]:
        for chosen in itertools.product(*values):
            name = "_".join([*([Path(config).stem] if config else []), *(f"{key}-{value}" for key, value in chosen)])
            line = [*([config] if config else []), *(word for key, value in chosen for word in (f"--{key}", value))]
            experiments.append(Experiment("".join(c if c.isalnum() or c in "-_." else "-" for c in name), line))
    if len(experiments) < 2:
        raise UserError(
            "that is one experiment: give two configs (YAML files, first on the line), or --set with two values"
        )
    if len({experiment.name for experiment in experiments}) < len(experiments):
        raise UserError("two experiments have the same name: give the configs different names")
    return experiments


def _key_and_values(setting: str) -> tuple[str, list[str]]:
    """Return the two sides of `key=v1,v2`; the key as a config writes it."""
    key, _, listed = setting.partition("=")
    return key.strip().lstrip("-").replace("-", "_"), [value.strip() for value in listed.split(",")]


def build_runs(experiments: list[Experiment], args: argparse.Namespace, rest: list[str]) -> list[Run]:
    """Return the runs, experiment by experiment within each seed or fold; every line is checked before any runs.

    Raises:
        UserError: train.py does not accept a line, or two experiments have the same settings, or do not have the same
            data and splits.
    """
    from luthier.arguments import parse_arguments

    if args.folds:
        parts = [(f"fold {i} of {args.folds}", ["--fold", f"{i}/{args.folds}"]) for i in range(1, args.folds + 1)]
    else:
        parts = [(f"seed {seed}", ["--seed", str(seed)]) for seed in range(1, args.seeds + 1)]
    runs: list[Run] = []
    sources: dict[tuple, str] = {}
    cuts: dict[tuple, str] = {}
    for (part, words), experiment in itertools.product(parts, experiments):
        folder = args.output_dir / f"{experiment.name}-{part.replace(' ', '-')}"
        line = [*experiment.line, "--refit", "none", "--push_to_hub", "false", *rest, *words]  # nothing is shipped
        line += ["--disable_tqdm", "True", "--output_dir", str(folder)]
        line += ["--resume_from_checkpoint", "auto"]  # from the start where there is nothing to resume
        with contextlib.nullcontext() if part == parts[0][0] else contextlib.redirect_stdout(io.StringIO()):
            parsed = parse_arguments(line, own=vars(args))  # says once what it leaves out
        data = parsed.data_args
        folder_of_data = data.data_dir and expand_home(data.data_dir).resolve()
        sources.setdefault((folder_of_data, data.dataset_name, data.dataset_config_name), experiment.name)
        if part == parts[0][0]:
            cut = data.for_cut() | ({"test_fraction": None} if args.folds else {})  # which folds do not use
            cuts.setdefault(tuple(cut.values()), experiment.name)
        settings = with_time_limit(parsed.run_args.settings, parsed.model_args.time_limit)
        runs.append(Run(experiment.name, part, folder, line, settings))
    # `check_same_images` would find that when they are trained.
    _check_same("data", "--data_dir or --dataset_name", [*sources.values()])
    _check_same("splits", "--split_seed, --validation_fraction, --test_fraction and --fold", [*cuts.values()])
    first: dict[tuple[str, str], str] = {}
    for run in runs:
        if (same := first.setdefault((run.part, run.settings), run.experiment)) != run.experiment:
            raise UserError(f"{same} and {run.experiment} have the same settings: leave one of them out")
    return runs


def _check_same(what: str, options: str, experiments: list[str]) -> None:
    """Refuse experiments that differ in what must be the same for all.

    Args:
        what: the experiments must have in common.
        options: that say it.
        experiments: one for each of what there is.

    Raises:
        UserError: there are several.
    """
    if len(experiments) > 1:
        one, other, *_ = experiments
        raise UserError(f"{one} and {other} do not have the same {what}: give {options} once, to compare.py")


def is_finished(run: Run) -> bool:
    """Return whether a run has ended before.

    Raises:
        UserError: its folder holds a run with other settings, finished or not, or its metrics.json is damaged.
    """
    settings = None
    finished = has_ended(run.folder)
    if finished:
        metrics = read_metrics(run.folder)
        settings = with_time_limit(metrics.get("settings"), metrics.get("time_limit"))
    elif run.note.exists():
        settings = run.note.read_text(encoding="utf-8").strip()
    if settings != run.settings and run.folder.exists():
        raise UserError(
            f"{run.folder} holds a run with other settings, or of another version, or its config has changed since: "
            "give another --output_dir, or remove the folder"
        )
    return finished


def with_time_limit(settings: str | None, time_limit: float | None) -> str:
    """Return what tells runs apart: the digest of their settings, and the time limit, which the digest leaves out."""
    return str(settings) if time_limit is None else f"{settings} {time_limit:g}"


def execute(run: Run) -> None:
    """Train, or resume; what train.py prints goes to a file beside the run's folder.

    Exits with 1 where the run fails, with 130 after Ctrl-C, which the run has received too, with 143 after SIGTERM.
    """
    log = run.log
    before = log.stat().st_size if log.exists() else 0
    with atomic_write(run.note) as whole:  # a full disk leaves the note of an interrupted run as it was
        whole.write_text(f"{run.settings}\n", encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]  # this environment's accelerate
    environment = os.environ | {"PYTHONUTF8": "1"}  # class names may not fit into the code page of Windows
    with (
        log.open("a", encoding="utf-8") as file,  # after what it printed before it was interrupted
        subprocess.Popen(
            [*launch, str(PROJECT / "train.py"), *run.line], stdout=file, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            code = process.wait()
        except (KeyboardInterrupt, SystemExit) as stopped:
            if isinstance(stopped, SystemExit):
                terminate(process)
            while process.poll() is None:
                with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C is for the run, which has received it
                    process.wait()
            with contextlib.suppress(KeyboardInterrupt):
                wait_for_lock(run.folder, PATIENCE)  # accelerate ends before its process, which writes a checkpoint
            print(f"stopped in {run.experiment}, {run.part}: give the same command to go on", file=sys.stderr)
            sys.exit(getattr(stopped, "code", 130))
    if code:
        last = last_words(log.read_bytes()[before:].decode("utf-8", errors="replace"))
        print(f"error: {run.experiment}, {run.part} failed; all it printed is in {log}:\n{last}", file=sys.stderr)
        sys.exit(1)


def last_words(printed: str) -> str:
    """Return five lines of what a failed run has printed: those from its own message on, or else the last ones.

    Where several processes train, torch's launcher prints a report of more than five lines after the message.
    """
    lines = printed.splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith("error: ")), -5)
    return "\n".join(lines[begin:][:5])


def terminate(process: subprocess.Popen) -> None:
    """Send SIGTERM to the launcher of a run and to all that it has started, to which it may not pass it on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
    process.terminate()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `execute` passes it on
    main()
