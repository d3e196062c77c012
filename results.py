"""What is written and said about a score, of a run and of a finished model alike; apart from train.py, which runs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import DatasetDict
from transformers import Trainer

import audit
from arguments import settings_digest
from report import write_metrics, write_predictions, write_report
from summary import command, versions
from terminal import Stopwatch, percent_with_interval, say


class Test(NamedTuple):
    """What the test was: all pictures, and the logits [N, C] and true classes [N] of the split "test"."""

    pictures: DatasetDict
    logits: np.ndarray
    references: np.ndarray


def write_results(trainer: Trainer, argv: list[str], metrics: dict, test: Test, found: dict, clock: Stopwatch) -> dict:
    """Write all there is to say about a score into the output directory, and say it; return it completed."""
    output_dir = Path(trainer.args.output_dir)
    metrics |= {
        "audit": {kind: None if found[kind] is None else len(found[kind]) for kind in audit.KINDS},
        "versions": versions(),
        "command": command(argv),
        "settings": settings_digest(argv),
        "seconds": clock.seconds,
    }
    write_metrics(output_dir / "metrics.json", metrics)  # first: the rest can be made again
    write_predictions(output_dir / "predictions.csv", metrics["data"]["labels"], *test)
    audit.write_audit(output_dir / "audit.json", found)
    write_report(output_dir, metrics, found, *test)
    clock.stop("save")
    total = round(sum(metrics["seconds"].values()), 3)
    parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items())
    metrics["seconds"]["total"] = total
    write_metrics(output_dir / "metrics.json", metrics)

    scored, majority = metrics["test"], metrics["baselines"]["majority"]
    probe, before = metrics["baselines"].get("linear_probe"), metrics["calibration"].get("before")
    beside = f"; its probe {probe['test']['accuracy']:.1%}" if probe else ""
    say(trainer.args, "test", f"accuracy {percent_with_interval(scored)}")
    always = f"always {majority['label']!r} {majority['accuracy']:.1%}"
    say(trainer.args, "", f"macro F1 {scored['macro_f1']:.3f}{beside}; {always}")
    uncalibrated = f", uncalibrated {before['test']['ece']:.1%}" if before else ""
    say(trainer.args, "", f"calibration error {scored['ece']:.1%}{uncalibrated}")
    say(trainer.args, "time", f"{parts}: {total:.0f} s")
    say(trainer.args, "saved", f"{output_dir}, with report.html to look at")
    return metrics
