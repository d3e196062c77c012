"""Run several experiments on identical splits and say which is better, and whether so few pictures can tell.

    python compare.py configs/a.yaml configs/b.yaml --seeds 3
    python compare.py configs/a.yaml --set augmentation=none,augmix --folds 5 --data_dir my_photos

Every combination of a config and the values of each --set is an experiment; all other options go to train.py as they
are. Each run is an ordinary `accelerate launch train.py`; finished ones are not run again.
"""

import argparse
import csv
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from arguments import has_ended, parse_arguments, settings_digest, user_errors

PROJECT = Path(__file__).parent
LEVEL = 0.05  # of the tests, over all pairs together


class Experiment(NamedTuple):
    """A name, and train.py's arguments for it."""

    name: str
    line: list[str]


class Run(NamedTuple):
    """One run: whose it is, what makes it one of several, its folder, and train.py's arguments."""

    experiment: str
    part: str
    folder: Path
    line: list[str]


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, print the table and write it as compare.md and compare.csv."""
    with user_errors():
        args, configs, rest = parse_line(sys.argv[1:] if argv is None else argv)
        experiments = build_experiments(configs, args.set)
        runs = build_runs(experiments, args, rest)
        missing = [run for run in runs if not finished(run)]
        for run in missing:
            parse_arguments(run.line)  # a slip in the last experiment is said before the first one runs
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for number, run in enumerate(runs, 1):
        if run in missing:
            execute(run)
        metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
        results.setdefault(run.experiment, {})[run.part] = (metrics, right_answers(run.folder))
        scored, seconds = metrics["test"], metrics["seconds"]["total"]
        again = "" if run in missing else ", from before"
        print(
            f"[{number}/{len(runs)}] {run.experiment}, {run.part}: test {scored['accuracy']:.1%} "
            f"(n = {scored['n']}), {seconds:.0f} s{again}",
            flush=True,
        )
        with user_errors():
            check_same_pictures(results, run.part)
    rows = [summarise(name, parts) for name, parts in results.items()]
    report = f"{as_markdown(rows)}\n\n" + "\n".join(verdicts(results)) + "\n"
    print(f"\n{report}", end="")
    (args.output_dir / "compare.md").write_text(report, encoding="utf-8")
    with (args.output_dir / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def parse_line(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return this command's own options, the configs, and what goes to train.py."""
    configs = list(itertools.takewhile(lambda word: word.endswith((".yaml", ".yml")), argv))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="compare.py [configs/NAME.yaml ...] [--seeds N | --folds K] [--set key=v1,v2 ...] [train.py's options]",
    )  # fmt: skip
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--seeds", type=int, default=3, help="training seeds, on one split (default: 3)")
    several.add_argument("--folds", type=int, help="folds, each picture in one test, instead of seeds")
    parser.add_argument("--set", action="append", default=[], metavar="key=v1,v2", help="an option and its values")
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, default=Path("outputs/compare"), help="(default: outputs/compare)"
    )
    args, rest = parser.parse_known_args(argv[len(configs) :])
    if args.seeds < 1 or (args.folds is not None and args.folds < 2):
        raise ValueError("--seeds must be at least 1, --folds at least 2")
    told = [word.split("=")[0].lstrip("-") for word in rest] + [setting.partition("=")[0] for setting in args.set]
    for option, why in (("seed", "--seeds"), ("fold", "--folds"), ("output_dir", "--output_dir")):
        if option in told:
            raise ValueError(f"{option} is this command's to set: say {why}")
    return args, configs, rest


def build_experiments(configs: list[str], settings: list[str]) -> list[Experiment]:
    """Return every combination of a config (or none) and the values of each setting.

    Raises:
        ValueError: a setting is not `key=v1,v2`, two configs have one name, or there is nothing to compare.
    """
    values = []
    for setting in settings:
        key, _, listed = setting.partition("=")
        if not key.isidentifier() or not all(listed.split(",")):
            raise ValueError(f"--set {setting} is no setting: write it as key=value1,value2")
        values.append([(key, value) for value in listed.split(",")])
    experiments = []
    for config, *chosen in itertools.product(configs or [None], *values):
        name = "_".join([*([Path(config).stem] if config else []), *(f"{key}-{value}" for key, value in chosen)])
        line = [*([config] if config else []), *(word for key, value in chosen for word in (f"--{key}", value))]
        experiments.append(Experiment("".join(c if c.isalnum() or c in "-_." else "-" for c in name), line))
    if len(experiments) < 2:
        raise ValueError("that is one experiment: give two configs, or --set with two values")
    if len({experiment.name for experiment in experiments}) < len(experiments):
        raise ValueError("two experiments have the same name: give the configs different names")
    return experiments


def build_runs(experiments: list[Experiment], args: argparse.Namespace, rest: list[str]) -> list[Run]:
    """Return the runs, experiment by experiment within each seed or fold."""
    if args.folds:
        parts = [(f"fold {i} of {args.folds}", ["--fold", f"{i}/{args.folds}"]) for i in range(1, args.folds + 1)]
    else:
        parts = [(f"seed {seed}", ["--seed", str(seed)]) for seed in range(1, args.seeds + 1)]
    runs = []
    for (part, words), experiment in itertools.product(parts, experiments):
        folder = args.output_dir / f"{experiment.name}-{part.replace(' ', '-')}"
        line = [*experiment.line, *rest, *words, "--disable_tqdm", "True", "--output_dir", str(folder)]
        runs.append(Run(experiment.name, part, folder, line))
    return runs


def finished(run: Run) -> bool:
    """Return whether a run has ended before; what an interrupted one left is removed.

    Raises:
        ValueError: its folder holds a run with other settings.
    """
    path = run.folder / "metrics.json"
    if not (has_ended(run.folder) and path.exists()):
        shutil.rmtree(run.folder, ignore_errors=True)
        return False
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if metrics["settings"] != settings_digest(run.line):
        raise ValueError(
            f"{run.folder} holds a run with other settings ({metrics['command']}, or its config has changed): give "
            "another --output_dir, or remove the folder"
        )
    return True


def execute(run: Run) -> None:
    """Train; what train.py prints goes to a file beside the run's folder. Ends this command where the run fails."""
    log = run.folder.with_name(f"{run.folder.name}.log")
    command = [shutil.which("accelerate") or "accelerate", "launch", "--quiet", str(PROJECT / "train.py"), *run.line]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        print(f"error: {run.experiment}, {run.part} failed; all it printed is in {log}:\n{last}", file=sys.stderr)
        sys.exit(1)


def right_answers(folder: Path) -> list[tuple[str, bool]]:
    """Return the digest of each test picture and whether it was told right, in the order of the digests."""
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return sorted((row["digest"], row["label"] == row["predicted"]) for row in csv.DictReader(file))


def check_same_pictures(results: dict[str, dict], part: str) -> None:
    """Raise ValueError where experiments were not trained and tested on the same pictures in a seed or fold."""
    prints = {name: parts[part][0]["data"]["fingerprint"] for name, parts in results.items() if part in parts}
    if len(set(prints.values())) > 1:
        raise ValueError(
            f"{', '.join(prints)} do not have the same splits in {part}: name the data and the split once, for all of "
            "them, on the line of compare.py"
        )


def summarise(name: str, parts: dict) -> dict[str, str | int | float]:
    """Return an experiment's row of the table. The interval is of one test set, or of all folds together."""
    from metrics import wilson_interval

    metrics = [metrics for metrics, _ in parts.values()]
    accuracies = [m["test"]["accuracy"] for m in metrics]
    tested = {m["data"]["fingerprint"]: m["test"]["n"] for m in metrics}
    n = sum(tested.values())
    mean = sum(m["test"]["accuracy"] * m["test"]["n"] for m in metrics) / sum(m["test"]["n"] for m in metrics)
    low, high = wilson_interval(round(mean * n), n)
    return {
        "experiment": name, "runs": len(parts), "test accuracy": mean, "lowest": min(accuracies),
        "highest": max(accuracies), "interval low": low, "interval high": high, "n": n,
        "validation accuracy": statistics.mean(m["validation"]["accuracy"] for m in metrics),
        "seconds": statistics.mean(m["seconds"]["total"] for m in metrics),
    }  # fmt: skip


def as_markdown(rows: list[dict]) -> str:
    """Return the table of `summarise`'s rows."""
    lines = [
        "| experiment | runs | test accuracy, mean (lowest to highest) | 95% interval | n | validation | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['experiment']} | {row['runs']} "
            f"| {row['test accuracy']:.1%} ({row['lowest']:.1%} to {row['highest']:.1%}) "
            f"| {row['interval low']:.1%} to {row['interval high']:.1%} | {row['n']} "
            f"| {row['validation accuracy']:.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def votes(a: dict, b: dict) -> list[int]:
    """Return for each test picture in how many more of its runs experiment a told it right than b did.

    Runs of several seeds have one test set, runs of several folds one each.
    """
    counted = {}
    for part, (metrics, answers) in a.items():
        for row, ((digest, first), (_, second)) in enumerate(zip(answers, b[part][1], strict=True)):
            key = metrics["data"]["fingerprint"], digest, row
            counted[key] = counted.get(key, 0) + first - second
    return list(counted.values())


def verdicts(results: dict[str, dict]) -> list[str]:
    """Return a sentence for each pair of experiments: better, worse, or too close to call.

    The exact McNemar test on the same pictures; of several seeds a picture counts for the experiment that told it
    right in more of them. With several pairs the p-values are those of Holm (1979), so that the chance of any wrong
    verdict stays below `LEVEL`. A verdict is about the trained models: how much another seed would change them is not
    in it, which is why several seeds or folds are the rule.
    """
    from scipy.stats import binomtest

    found = {}
    for a, b in itertools.combinations(results, 2):
        counted = votes(results[a], results[b])
        more, less = sum(vote > 0 for vote in counted), sum(vote < 0 for vote in counted)
        p = binomtest(more, more + less).pvalue if more + less else 1.0
        found[a, b] = (p, more, less, len(counted))
    adjusted, highest = {}, 0.0
    for rank, pair in enumerate(sorted(found, key=found.get)):
        highest = adjusted[pair] = max(highest, min(1.0, found[pair][0] * (len(found) - rank)))
    sentences = []
    for (a, b), (_, more, less, n) in found.items():
        p = adjusted[a, b]
        counts = f"of {n} test pictures {more} speak for {a}, {less} for {b}; p = {p:.2g}"
        if p >= LEVEL:
            sentences.append(f"- {a} and {b}: too close to call at n = {n} ({counts}).")
        else:
            sentences.append(f"- {a} is {'better' if more > less else 'worse'} than {b} ({counts}).")
    return sentences


if __name__ == "__main__":
    main()
