"""Whether the mirror shows something else than the images do, as `--augmentation auto` finds out.

python -m benchmarks.mirror path/to/instruments path/to/suite/cells ...
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks._common import directory
from data import feature_rows, load_splits, prepare
from luthier.arguments import parse_arguments
from luthier.errors import exit_on_user_error
from luthier.images.views import EvaluationView
from luthier.machine import set_up_process
from luthier.scoring.baselines import measure_probe
from luthier.scoring.mirror import Mirror, measure_mirror
from luthier.training.trainer import build_predictor
from models import build_model


@exit_on_user_error
def main() -> None:
    """Print a row for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=directory, nargs="+", help="folders of class folders")
    folders = parser.parse_args().data
    print("| data | loss of a probe | of mirror images | difference | its standard error | training |")
    print("|---|---|---|---|---|---|")
    for folder in folders:
        mirror = measure(folder)
        difference = mirror.mirrored - mirror.loss
        print(f"| {folder.name} | {mirror.loss:.3f} | {mirror.mirrored:.3f} | {difference:+.3f} | ", end="")
        print(f"{mirror.error:.3f} | {'crop' if mirror.is_worse else 'flip_crop'} |", flush=True)


def measure(folder: Path) -> Mirror:
    """Return what probes on `efficientnet_lite0` make of the images of a folder and of their mirror images."""
    with tempfile.TemporaryDirectory() as output:
        line = ["--output_dir", f"{output}/out", "--disable_tqdm", "1", "--eval_strategy", "no"]
        training_args = parse_arguments(line).training_args
        set_up_process(training_args)
        splits, _ = load_splits(data_dir=str(folder))
        names = dict(enumerate(splits["train"].features["label"].names))
        model, image_processor = build_model("efficientnet_lite0", names)
        view = EvaluationView(image_processor)
        rows, trainer = feature_rows(prepare(splits, view), view), build_predictor(model, training_args)
        mirror = measure_mirror(trainer, splits, rows, measure_probe(trainer, splits, rows))
    assert mirror is not None  # this is the main process
    return mirror


if __name__ == "__main__":
    main()
