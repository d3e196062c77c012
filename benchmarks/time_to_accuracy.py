"""Accuracy against wall time: Luthier's default, fastai, the transformers example's recipe, a plain Trainer.

    pip install -r requirements-bench.txt
    python -m benchmarks.time_to_accuracy path/to/instruments [--seeds 3]

All start from the same ImageNet weights of EfficientNet-Lite0 and see the same split. Each run is a process of its own
with empty caches and is timed from its start. It reports its validation accuracy after each epoch and its test
accuracy at the end. Every tool runs at its defaults with every seed, and once with each of its settings in `TUNED`.
Finished runs are kept in --out, in a folder of the data's name, and not run again. The figures go to
time_to_accuracy.csv there, the chart to time_to_accuracy.png.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._common import LAUNCH, PROJECT, build_parser, directory, own_caches

# Libraries are imported in the functions: a run's seconds include its imports, so it imports only what it needs.
from luthier.errors import exit_on_user_error

DEFAULTS = {
    "luthier": {},
    "fastai": {"size": 160, "epochs": 3, "lr": 2e-3},  # fine_tune(3): its own learning rate, and a frozen epoch first
    "transformers example": {"size": 224, "epochs": 3, "lr": 5e-5, "batch": 8},  # run_image_classification.py's
    "plain Trainer": {"size": 160, "epochs": 5, "lr": 3e-4, "batch": 32},
}
TUNED = {
    "fastai": [{"size": 224, "epochs": 3, "lr": 5e-3}],
    "transformers example": [{"size": 224, "epochs": 3, "lr": 5e-4, "batch": 32}],
    "plain Trainer": [{"size": 224, "epochs": 5, "lr": 5e-4, "batch": 32}],
}


@exit_on_user_error
def main() -> None:
    """Run what is missing; write the CSV and the chart; print the table."""
    parser = build_parser(__doc__)
    parser.add_argument("data", type=directory, help="a folder of class folders")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("outputs/time_to_accuracy"), help="where the runs are kept")
    parser.add_argument("--only", nargs="*", choices=DEFAULTS, default=list(DEFAULTS), help="which tools")
    parser.add_argument("--defaults_only", action="store_true", help="leave out the tuned settings")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "SETTING", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, setting, seed = args.child
        fine_tune = fine_tune_with_fastai if name == "fastai" else fine_tune_with_trainer
        fine_tune(args.data, seed=int(seed), name=name, **json.loads(setting))
        return
    args.out /= args.data.resolve().name
    split = link_split(args.data, args.out.resolve() / "split")
    runs = []
    for name in args.only:
        runs += [run_timed(name, DEFAULTS[name], split, seed, args.out) for seed in range(1, args.seeds + 1)]
    for name in TUNED if not args.defaults_only else ():
        if name in args.only:
            runs += [run_timed(name, setting, split, 1, args.out) for setting in TUNED[name]]
    write_csv(runs, args.out / "time_to_accuracy.csv")
    groups = {}
    for run in runs:
        groups.setdefault((run["name"], json.dumps(run["setting"])), []).append(run)
    print_table(groups)
    plot_runs(groups, args.out / "time_to_accuracy.png")


def link_split(data: Path, folder: Path) -> Path:
    """Return a folder with Luthier's split as train / validation / test, so that all tools read the same files."""
    from benchmarks.suite import link_splits
    from data import load_splits

    if not folder.exists():
        splits, _ = load_splits(data_dir=str(data))
        link_splits(splits, {split: split for split in splits}, folder)
    return folder


def run_timed(name: str, setting: dict, split: Path, seed: int, out: Path) -> dict:
    """Run a tool once; return seconds and validation accuracy of each epoch, all seconds, and the test accuracy.

    A run that was finished earlier is read from its file.
    """
    label = "-".join([name.replace(" ", "_"), *(f"{key}{value}" for key, value in setting.items()), f"seed{seed}"])
    kept = out / f"{label}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.time_to_accuracy", str(split)]
        command += ["--child", name, json.dumps(setting), str(seed)]
        if name == "luthier":
            command = [*LAUNCH, str(PROJECT / "train.py")]
            command += ["--data_dir", str(split), "--seed", str(seed), "--output_dir", f"{folder}/out"]
            command += ["--refit", "none", "--disable_tqdm", "1"]  # the scores are of the model before a refit
        environment = os.environ | own_caches(Path(folder, "cache")) | {"PYTHONUNBUFFERED": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        epochs, test = [], None
        for line in process.stdout:
            words = line.split()
            if name == "luthier" and (accuracy := read_accuracy(line)) is not None:
                epochs.append((time.perf_counter() - start, accuracy))
            elif words[:1] == ["EPOCH"]:
                epochs.append((time.perf_counter() - start, float(words[1])))
            elif words[:1] == ["TEST"]:
                test = float(words[1])
        if process.wait():
            raise SystemExit(f"{label} failed: {' '.join(command)}")
        seconds = time.perf_counter() - start
        if name == "luthier":
            metrics = json.loads(Path(folder, "out/metrics.json").read_text())
            test = metrics["test"]["accuracy"]
            epochs.append((seconds, metrics["validation"]["accuracy"]))
    result = {"name": name, "setting": setting, "seed": seed, "epochs": epochs, "seconds": seconds, "test": test}
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result))
    print(f"{label}: {seconds:.0f} s, validation {epochs[-1][1]:.1%}, test {test:.1%}", flush=True)
    return result


def read_accuracy(line: str) -> float | None:
    """Return the validation accuracy that a line of train.py tells of: the probe's, or an epoch's in its table."""
    found = re.match(r"probe +validation accuracy ([\d.]+)%", line) or re.match(
        r" *[\d.]+ +(?:[\d.]+|nan) +(?:[\d.]+|nan)% +[\d.]+ +([\d.]+)% +[\d.]+ +[\d.]+ +\w+$", line
    )
    return float(found[1]) / 100 if found else None


def load_backbone() -> dict:
    """Return the ImageNet weights below the head, under timm's names."""
    from models import build_model

    model, _ = build_model("efficientnet_lite0", {0: "a", 1: "b"})
    return {key: value for key, value in model.timm_model.state_dict().items() if not key.startswith("classifier.")}


def fine_tune_with_fastai(data: Path, seed: int, name: str, size: int, epochs: int, lr: float) -> None:
    """Fine-tune as fastai's documentation does: `vision_learner`, its usual augmentation, `fine_tune`."""
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Normalize,
        Resize,
        accuracy,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    class Report(Callback):
        order = 60  # after fastai's Recorder

        def after_epoch(self):
            print("EPOCH", float(self.learn.recorder.values[-1][-1]), flush=True)

    set_seed(seed)
    normalize = Normalize.from_stats([0.5] * 3, [0.5] * 3)
    loaders = ImageDataLoaders.from_folder(
        data, train="train", valid="validation", item_tfms=Resize(size), batch_tfms=[*aug_transforms(), normalize]
    )
    learner = vision_learner(loaders, "tf_efficientnet_lite0", pretrained=False, normalize=False, metrics=accuracy)
    learner.model[0].model.load_state_dict(load_backbone())
    learner.freeze()  # as vision_learner does with weights that it downloads
    with learner.no_bar():
        learner.fine_tune(epochs, lr, cbs=Report())
        files = sorted((data / "test").rglob("*.*"))
        test = loaders.test_dl(files, with_labels=True)
        print("TEST", float(learner.validate(dl=test)[1]))


def fine_tune_with_trainer(data: Path, seed: int, name: str, size: int, epochs: int, lr: float, batch: int) -> None:
    """Fine-tune all layers, BatchNorm too, with the Trainer and timm's own training and evaluation transforms.

    "transformers example" does as that example does. "plain Trainer" has mild crops and a cosine schedule.
    """
    import numpy as np
    from datasets import load_dataset
    from timm.data import create_transform
    from torch.utils.data import default_collate
    from transformers import (
        TimmWrapperConfig,
        TimmWrapperForImageClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    class Report(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            print("EPOCH", metrics["eval_accuracy"], flush=True)

    set_seed(seed)
    plain = name == "plain Trainer"
    view = {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    scale = {"scale": (0.35, 1.0)} if plain else {}
    evaluation = create_transform(**view, crop_pct=0.875)
    train = create_transform(**view, is_training=True, **scale)

    def batch_transform(transform):
        return lambda batch: {
            "pixel_values": [transform(image.convert("RGB")) for image in batch["image"]],
            "labels": batch["label"],
        }

    splits = load_dataset("imagefolder", data_dir=str(data))
    for split in splits:
        splits[split] = splits[split].with_transform(batch_transform(train if split == "train" else evaluation))
    labels = splits["train"].features["label"].names
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=len(labels), pretrained_cfg={})
    )
    model.timm_model.load_state_dict(load_backbone(), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        training_args = TrainingArguments(
            output_dir=folder, seed=seed, num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=batch,
            lr_scheduler_type="cosine" if plain else "linear", warmup_steps=0.1 if plain else 0, eval_strategy="epoch",
            save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=training_args, data_collator=default_collate, train_dataset=splits["train"],
            eval_dataset=splits["validation"], callbacks=[Report()],
            compute_metrics=lambda result: {"accuracy": float(np.mean(result[0].argmax(-1) == result[1]))},
        )  # fmt: skip
        trainer.train()
        print("TEST", trainer.predict(splits["test"]).metrics["test_accuracy"])


def write_csv(runs: list[dict], path: Path) -> None:
    """Write a row for each epoch of each run."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "setting", "seed", "seconds", "validation accuracy", "test accuracy at the end"])
        for run in runs:
            for seconds, accuracy in run["epochs"]:
                row = [run["name"], json.dumps(run["setting"]), run["seed"], f"{seconds:.1f}", f"{accuracy:.4f}"]
                table.writerow([*row, f"{run['test']:.4f}"])


def is_tuned(name: str, setting: str) -> bool:
    """Return whether a setting is not the tool's default."""
    return json.loads(setting) != DEFAULTS[name]


def print_table(groups: dict[tuple[str, str], list[dict]]) -> None:
    """Print a row for each tool and setting."""
    print("| what | setting | runs | seconds | test accuracy | validation after each epoch (first run) |")
    print("|---|---|---|---|---|---|")
    for (name, setting), group in groups.items():
        mean = [sum(run[key] for run in group) / len(group) for key in ("seconds", "test")]
        spread = [(min(run[key] for run in group), max(run[key] for run in group)) for key in ("seconds", "test")]
        curve = ", ".join(f"{accuracy:.1%} {seconds:.0f}" for seconds, accuracy in group[0]["epochs"])
        shown = ", ".join(f"{key} {value:g}" for key, value in json.loads(setting).items()) or "default"
        mark = " (another setting)" if is_tuned(name, setting) else ""
        print(
            f"| {name} | {shown}{mark} | {len(group)} | {mean[0]:.0f} ({spread[0][0]:.0f} to {spread[0][1]:.0f}) "
            f"| {mean[1]:.1%} ({spread[1][0]:.1%} to {spread[1][1]:.1%}) | {curve} |"
        )


def plot_runs(groups: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """Write the chart of all runs at default settings (solid) and at other ones (dashed)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(DEFAULTS, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
    for (name, setting), group in groups.items():
        tuned = is_tuned(name, setting)
        for number, run in enumerate(group):
            axes.plot(
                *zip(*run["epochs"], strict=True), color=colours[name], linestyle="--" if tuned else "-", marker=".",
                label=f"{name}{', another setting' if tuned else ''}" if number == 0 else None,
            )  # fmt: skip
    axes.set(xlabel="seconds from the start of the process", ylabel="validation accuracy", ylim=(None, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
