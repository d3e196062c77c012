"""The accuracy of the configs: every experiment through `accelerate launch train.py`, over several training seeds.

    python -m benchmarks.results openmoji
    python -m benchmarks.results path/to/instruments

The split is the same in all runs. Each row has a cache of its own, so its first run takes as long as a user's first. A
finished run is not run again, and an interrupted one goes on. To repeat it, delete its folder and the row's cache.
"""

import json
import statistics
from pathlib import Path

from benchmarks._common import LAUNCH, PROJECT, build_parser, run_command
from luthier.errors import exit_on_user_error
from luthier.output_dir import has_ended

EXPERIMENTS = {
    "`simple_cnn`, 32 px, from scratch": ["configs/simple_cnn_openmoji.yaml"],
    "`efficientnet_lite0`, probe": ["--recipe", "probe"],
    "`efficientnet_lite0`, the default": [],
    "`efficientnet_lite0`, lp_ft": ["--recipe", "lp_ft"],
    "`efficientnet_lite0`, full": ["--recipe", "full"],
    "`efficientnet_lite0`, head": ["configs/efficientnet_lite0_openmoji_head.yaml"],
}


@exit_on_user_error
def main() -> None:
    """Run what is missing, and print the table as Markdown."""
    parser = build_parser(__doc__)
    parser.add_argument("data", help="openmoji, or a folder of class folders")
    parser.add_argument("--seeds", type=int, default=3, help="how many training seeds (default: 3)")
    parser.add_argument("--rows", type=int, nargs="*", help="which rows, from 0 (default: all)")
    parser.add_argument("--out", type=Path, default=Path("outputs/results"), help="where the runs are kept")
    args = parser.parse_args()
    data = (
        ["--dataset_name", "openmoji"] if args.data == "openmoji" else ["--data_dir", str(Path(args.data).resolve())]
    )

    print("| model | test accuracy, mean of seeds | lowest to highest | 95% interval of a run | n | minutes, first |")
    print("|---|---|---|---|---|---|")
    for number, (name, config) in enumerate(EXPERIMENTS.items()):
        if args.rows and number not in args.rows:
            continue
        runs = []
        for seed in range(1, args.seeds + 1):
            output_dir = (args.out / f"{Path(args.data).name}-{number}-{seed}").resolve()
            if not has_ended(output_dir):
                command = [*LAUNCH, "train.py", *config, *data, "--seed", str(seed)]
                command += ["--output_dir", str(output_dir), "--resume_from_checkpoint", "auto"]
                cache = (args.out / f"{Path(args.data).name}-{number}-cache").resolve()
                run_command(command, PROJECT, {"HF_DATASETS_CACHE": str(cache)})
            runs.append(json.loads((output_dir / "metrics.json").read_text()))
        accuracies = [run["test"]["accuracy"] for run in runs]
        low, high = runs[0]["test"]["accuracy_ci95"]
        minutes = runs[0]["seconds"]["total"] / 60  # later runs take the features from the cache
        print(
            f"| {name} | {statistics.mean(accuracies):.1%} | {min(accuracies):.1%} to {max(accuracies):.1%} "
            f"| {low:.1%} to {high:.1%} | {runs[0]['test']['n']} | {minutes:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
