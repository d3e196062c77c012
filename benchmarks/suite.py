"""Test accuracy, seconds and regret of Luthier and of other tools on several data sets.

    pip install -r requirements-bench.txt
    python -m benchmarks.suite FOLDER [--also path/to/instruments] [--seeds 3]

FOLDER holds data sets, each a folder with `train` and `test`. --also adds folders; one without a test split is cut as
Luthier cuts it. OpenMoji is added unless --without_openmoji is given. Every run is a process of its own with empty
caches, and is timed from its start. All tools start from the same ImageNet weights of EfficientNet-Lite0. The other
tools learn from all images that are not test, as what Luthier ships has. No run chooses anything by test images: they
make the table only.

    python -m benchmarks.suite FOLDER --only probe "probe of lite2" "probe of auto"

compares backbones, and what `--model_name auto` chooses, by their probes.

Luthier's accuracy is that of the model it ships. `as scored` is that of the weights before the refit. A
contestant's regret on a data set is how far its mean accuracy over the seeds is below the best contestant's. A
seed also decides which of the images that are not test are for validation.

Finished runs are kept in --out and not run again. The tables go to suite.md, the runs to suite.csv, the chart to
suite.png. `--runs suite.csv` adds runs that were made elsewhere, which are not run again either; their seconds may be
left empty where they do not compare with those measured here. `--seeds 0` runs nothing: the tables are of --runs.
"""

import csv
import io
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from PIL import Image

from benchmarks._common import LAUNCH, PROJECT, build_parser, directory, own_caches, run_command
from luthier.errors import UserError, exit_on_user_error
from luthier.files import atomic_write

LUTHIER = {  # the options of train.py
    "Luthier": [],
    "probe": ["--recipe", "probe"],
    "lp_ft": ["--recipe", "lp_ft"],
    "full_from_probe": ["--recipe", "full_from_probe"],
    "full": ["--recipe", "full"],
    "full, long": ["--recipe", "full", "--num_train_epochs", "30"],
}
BACKBONES = {  # the same; not run unless asked for
    "probe of lite2": ["--recipe", "probe", "--model_name", "efficientnet_lite2"],
    "probe of auto": ["--recipe", "probe", "--model_name", "auto"],
}
OTHERS = {  # the tool and its setting, see benchmarks.time_to_accuracy
    "plain Trainer": ("plain Trainer", {"size": 224, "epochs": 8, "lr": 5e-4, "batch": 32}),
    "fastai": ("fastai", {"size": 224, "epochs": 5, "lr": 2e-3}),
    "transformers example": ("transformers example", {"size": 224, "epochs": 3, "lr": 5e-5, "batch": 8}),
}


class Run(NamedTuple):
    """One finished run.

    Attributes:
        data, contestant, seed: what was run.
        accuracy: of the model that is shipped, on test.
        scored: of the weights before the refit; the same where there is no refit.
        seconds: of the whole process; NaN where they are not known.
        said: what the run said of its choice, and the heats of the race: recipe, epochs so far, loss, seconds. A rule
            of the race can be tried on them.
        alone: the seconds without the heats of recipes that were not kept; NaN where they are not known.
    """

    data: str
    contestant: str
    seed: int
    accuracy: float
    scored: float
    seconds: float
    said: str = ""
    alone: float = math.nan


@exit_on_user_error
def main() -> None:
    """Run what is missing, print the tables, and write them."""
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=directory, help="a folder of data sets, each with train and test")
    parser.add_argument("--also", type=directory, nargs="*", default=[], help="more data sets")
    parser.add_argument("--without_openmoji", action="store_true", help="leave OpenMoji out")
    parser.add_argument("--sets", nargs="*", help="which data sets, by name (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of training and of the cut (default: 3)")
    parser.add_argument("--only", nargs="*", choices=[*LUTHIER, *BACKBONES, *OTHERS], help="which contestants")
    parser.add_argument("--checkout", type=directory, default=PROJECT, help="the checkout of Luthier that is measured")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="suite.csv of earlier times")
    parser.add_argument("--out", type=Path, default=Path("outputs/suite"), help="where the runs are kept")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folders = collect_sets(args.folder, args.also, not args.without_openmoji, out / "data") if args.seeds else {}
    if unknown := set(args.sets or ()) - set(folders) if args.seeds else set():
        parser.error(f"there is no data set {min(unknown)}: there are {', '.join(folders)}")
    known: dict[tuple, Run] = {}
    for path in args.runs:
        own = {(run.data, run.contestant, run.seed): run for run in read_csv(path)}
        if again := own.keys() & known.keys():
            print(f"{len(again)} runs of {path} take the place of those of an earlier file")
        known |= own
    runs = [] if args.seeds else [run for run in known.values() if run.contestant in (args.only or LUTHIER | OTHERS)]
    for seed in range(1, args.seeds + 1):
        for name, folder in folders.items():
            if not args.sets or name in args.sets:
                for contestant in args.only or [*LUTHIER, *OTHERS]:
                    run = known.get((name, contestant, seed))
                    runs.append(run or run_once(name, folder, contestant, seed, out, args.checkout.resolve()))
    if not runs:
        parser.error("nothing was run, and --runs holds nothing that is asked for")
    tables = f"{accuracy_table(runs)}\n\n{summary_table(runs)}\n\n{refit_sentence(runs)}\n{choice_sentence(runs)}\n"
    print(f"\n{tables}", end="")
    (out / "suite.md").write_text(tables, encoding="utf-8")
    write_csv(runs, out / "suite.csv")
    plot_runs(runs, out / "suite.png")


def collect_sets(folder: Path, also: list[Path], openmoji: bool, out: Path) -> dict[str, Path]:
    """Return the data sets by name, each a folder with `train` and `test`."""
    from data import load_splits

    sets = {path.name: path for path in sorted(folder.iterdir()) if (path / "train").is_dir()}
    whole = {path.name: {"data_dir": str(path)} for path in also if not (path / "test").is_dir()}
    sets |= {path.name: path for path in also if path.name not in whole}
    if openmoji:
        whole["openmoji"] = {"dataset_name": "openmoji"}
    for name, source in whole.items():
        sets[name] = out / name
        if not sets[name].exists():
            halves = {"train": "train", "validation": "train", "test": "test"}
            link_splits(load_splits(**source)[0], halves, sets[name])
    return {name: path.resolve() for name, path in sets.items()}


def link_splits(splits: dict, names: dict[str, str], folder: Path) -> None:
    """Write splits as folders of class folders, with links to the files where the images are files.

    Args:
        splits: of `data.load_splits`.
        names: the folder of each split.
        folder: where they go; it exists only once it is whole.
    """
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for split, dataset in splits.items():
        for number, row in enumerate(dataset):
            source, label = row["image"], dataset.features["label"].int2str(row["label"])
            target = partial / names[split] / label
            target.mkdir(parents=True, exist_ok=True)
            if source["bytes"] is None:
                path = Path(source["path"]).resolve()
                (target / f"{split}{number}{path.suffix}").symlink_to(path)
            else:
                suffix = Image.open(io.BytesIO(source["bytes"])).format.lower()
                (target / f"{split}{number}.{suffix}").write_bytes(source["bytes"])
    partial.rename(folder)


def run_once(data: str, folder: Path, contestant: str, seed: int, out: Path, checkout: Path) -> Run:
    """Run a contestant on a data set; a run that was finished earlier is read from its file.

    Raises:
        UserError: that was on other images, or by another checkout.
    """
    origin = {"folder": str(folder), "checkout": str(checkout)}
    kept = out / f"{data}-{contestant.replace(', ', '_').replace(' ', '_')}-seed{seed}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder_of_run:
            temporary = Path(folder_of_run)
            environment = own_caches(temporary / "cache") | {"PYTHONUTF8": "1"}
            if contestant in OTHERS:
                run = run_other(data, cut(data, folder, seed, out), contestant, seed, environment)
            else:
                run = run_luthier(data, folder, contestant, seed, temporary, checkout, environment)
        with atomic_write(kept) as whole:
            whole.write_text(json.dumps(run._asdict() | {"of": origin}, indent=2))
        print(f"{data}, {contestant}, seed {seed}: {run.accuracy:.1%}, {run.seconds:.0f} s  {run.said}", flush=True)
    found = json.loads(kept.read_text())
    earlier = found.pop("of", origin)
    if earlier != origin:
        raise UserError(f"{kept} is of {' and '.join(earlier.values())}: give another --out")
    return Run(**found)


def run_luthier(
    data: str, folder: Path, contestant: str, seed: int, temporary: Path, checkout: Path, environment: dict
) -> Run:
    """Train as a user would, and score what is shipped."""
    accelerate = [*LAUNCH, "--quiet"]
    line = [*accelerate, str(checkout / "train.py"), "--data_dir", str(folder), *(LUTHIER | BACKBONES)[contestant]]
    line += ["--seed", str(seed), "--split_seed", str(seed), "--output_dir", f"{temporary}/out", "--disable_tqdm", "1"]
    _, seconds = timed(line, environment, checkout)
    metrics = json.loads((temporary / "out/metrics.json").read_text())
    scored = shipped = metrics["test"]["accuracy"]
    if (metrics.get("refit") or {}).get("done"):  # otherwise the weights that are shipped are those that were scored
        line = [*accelerate, str(checkout / "score.py"), f"{temporary}/out", "--data_dir", str(folder)]
        timed([*line, "--output_dir", f"{temporary}/score", "--disable_tqdm", "1"], environment, checkout)
        shipped = json.loads((temporary / "score/metrics.json").read_text())["test"]["accuracy"]
    kept, (winner, _, _) = metrics["recipe"].get("kept", ""), metrics["recipe"]["recipe"].partition(":")
    heats, arm = (metrics.get("race") or {}).get("heats", []), "probe" if kept == "the probe" else winner
    lost = sum(heat["seconds"] for heat in heats if heat["arm"] != arm)
    tried = [f"{heat['arm']} {heat['epochs']:g} epochs {heat['loss']:.4f} {heat['seconds']:.0f} s" for heat in heats]
    said = f"{arm}: {kept}; {', '.join(tried) or 'no race'}"
    return Run(data, contestant, seed, shipped, scored, seconds, said, seconds - lost)


def cut(data: str, folder: Path, seed: int, out: Path) -> Path:
    """Return a folder with Luthier's cut of a data set; validation is in train too, as nothing is chosen by it."""
    from datasets import concatenate_datasets

    from data import load_splits

    target = out / "cut" / f"{data}-seed{seed}"
    if not target.exists():
        splits, _ = load_splits(data_dir=str(folder), split_seed=seed)
        splits["train"] = concatenate_datasets([splits["train"], splits["validation"]])
        link_splits(splits, {split: split for split in splits}, target)
    return target


def run_other(data: str, folder: Path, contestant: str, seed: int, environment: dict) -> Run:
    """Train with another tool on Luthier's cut of the images."""
    tool, setting = OTHERS[contestant]
    line = [sys.executable, "-m", "benchmarks.time_to_accuracy", str(folder), "--child", tool, json.dumps(setting)]
    said, seconds = timed([*line, str(seed)], environment, PROJECT)
    (accuracy,) = (float(words[1]) for line in said.splitlines() if (words := line.split())[:1] == ["TEST"])
    return Run(data, contestant, seed, accuracy, accuracy, seconds)


def timed(line: list[str], environment: dict, folder: Path) -> tuple[str, float]:
    """Run a command; return what it prints and its seconds.

    Exits where the command fails.
    """
    begin = time.perf_counter()
    return run_command(line, folder, environment), time.perf_counter() - begin


def of_seeds(runs: list[Run], data: str, contestant: str, key: str = "accuracy") -> list[float]:
    """Return what is known of a contestant's runs on a data set."""
    values = [getattr(run, key) for run in runs if (run.data, run.contestant) == (data, contestant)]
    return [value for value in values if not math.isnan(value)]


def average(runs: list[Run], contestant: str, key: str = "accuracy") -> float:
    """Return the mean over the data sets of a contestant's means over the seeds; NaN where nothing is known."""
    means = [mean(own) for data in sets_of(runs) if (own := of_seeds(runs, data, contestant, key))]
    return mean(means) if means else math.nan


def sets_of(runs: list[Run]) -> list[str]:
    """Return the data sets, in the order of the tables."""
    return list(dict.fromkeys(run.data for run in runs))


def contestants(runs: list[Run]) -> list[str]:
    """Return the contestants, in the order of the tables."""
    return [name for name in (*LUTHIER, *BACKBONES, *OTHERS) if any(run.contestant == name for run in runs)]


def regrets(runs: list[Run], contestant: str) -> dict[str, float]:
    """Return by data set how far a contestant's mean accuracy is below the best contestant's."""
    found = {}
    for data in sets_of(runs):
        accuracies = {name: mean(own) for name in contestants(runs) if (own := of_seeds(runs, data, name))}
        if contestant in accuracies:
            found[data] = max(accuracies.values()) - accuracies[contestant]
    return found


def accuracy_table(runs: list[Run]) -> str:
    """Return the mean accuracy of every contestant, its range, and its mean minutes, by data set, in Markdown."""
    heads, rows = "", dict.fromkeys((*sets_of(runs), "mean"), "")
    for name in contestants(runs):
        heads += f" {name} | minutes |"
        for data in sets_of(runs):
            own, seconds = of_seeds(runs, data, name), of_seeds(runs, data, name, "seconds")
            low, high = (f"{100 * end(own):.1f}" if own else "" for end in (min, max))
            accuracy = f"{mean(own):.1%}{f' ({low} to {high})' if low != high else ''}" if own else ""
            rows[data] += f" {accuracy} | {_minutes(mean(seconds) if seconds else math.nan)} |"
        rows["mean"] += f" {average(runs, name):.1%} | {_minutes(average(runs, name, 'seconds'))} |"
    rule = "---|" * (heads.count("|") + 1)
    return "\n".join([f"| data |{heads}", f"|{rule}", *(f"| {data} |{cells}" for data, cells in rows.items())])


def _minutes(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds / 60:.1f}"


def summary_table(runs: list[Run]) -> str:
    """Return each contestant's means over the data sets, and its regret, in Markdown."""
    lines = [
        "| contestant | runs | mean accuracy | as scored | mean regret | largest regret |",
        "|---|---|---|---|---|---|",
    ]
    for name in contestants(runs):
        lost, count = regrets(runs, name), sum(run.contestant == name for run in runs)
        worst = max(lost, key=lambda data: lost[data])
        lines.append(
            f"| {name} | {count} | {average(runs, name):.1%} | {average(runs, name, 'scored'):.1%} "
            f"| {100 * mean(lost.values()):.1f} | {100 * lost[worst]:.1f} ({worst}) |"
        )
    return "\n".join(lines)


def refit_sentence(runs: list[Run]) -> str:
    """Return what the refit gains over the weights that were scored, with a 95% interval over the runs."""
    import numpy as np

    gains = np.array([100 * (run.accuracy - run.scored) for run in runs if run.contestant not in OTHERS])
    if len(gains) < 2:
        return "Too few runs to tell what the refit gains."
    drawn = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"The refit gains {gains.mean():+.1f} points ({low:+.1f} to {high:+.1f}; paired, {len(gains)} runs)."


def choice_sentence(runs: list[Run]) -> str:
    """Return what the choice of a recipe costs: the seconds of whole runs to those without the recipes that lost."""
    shares = [run.seconds / run.alone for run in runs if run.contestant == "Luthier" and not math.isnan(run.alone)]
    if not shares:
        return "What the choice costs is not known."
    return (
        f"A run takes {mean(shares):.2f} times as long as it would without the recipes that were not kept "
        f"({min(shares):.2f} to {max(shares):.2f}; {len(shares)} runs)."
    )


def read_csv(path: Path) -> list[Run]:
    """Return the runs of a file of `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Run(
            **row
            | {"seed": int(row["seed"])}
            | {key: float(row.get(key) or "nan") for key in ("accuracy", "scored", "seconds", "alone")}
        )
        for row in rows
    ]


def write_csv(runs: list[Run], path: Path) -> None:
    """Write a row for each run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(Run._fields)
        table.writerows(runs)


def plot_runs(runs: list[Run], path: Path) -> None:
    """Write the chart: test accuracy of every contestant on every data set, and its mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names, sets = [*contestants(runs)[1:], *contestants(runs)[:1]], sets_of(runs)  # Luthier on top of the others
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    others, recipes = iter((("s", "#0072B2"), ("^", "#009E73"), ("v", "#CC79A7"))), itertools.cycle("|x+1*.")
    for name in names:
        lost = regrets(runs, name)
        accuracies = [mean(of_seeds(runs, data, name) or [math.nan]) for data in sets]
        accuracies.append(average(runs, name))
        if name == "Luthier":
            style = {"marker": "o", "color": "#D55E00", "markersize": 10}
        elif name in OTHERS:
            marker, color = next(others)
            style = {"marker": marker, "color": color, "markersize": 7}
        else:
            style = {"marker": next(recipes), "color": "0.4", "markersize": 9}
        label = f"{name} ({accuracies[-1]:.1%}, regret {100 * mean(lost.values()):.1f})"
        axes.plot(accuracies, range(len(accuracies)), linestyle="", label=label, **style)
    axes.axhline(len(sets) - 0.5, color="0.7", linewidth=0.8)
    axes.set_yticks(range(len(sets) + 1), [*sets, "mean"])
    axes.set(xlabel="test accuracy")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(
        title="mean test accuracy; regret: mean points below the best on a data set", loc="outside lower center",
        ncols=3, fontsize="small", title_fontsize="small",
    )  # fmt: skip
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
