"""Whether the mirror shows something else than the images do, as `--augmentation auto` finds out.

python -m benchmarks.mirror path/to/instruments path/to/suite/cells ...
"""

import tempfile
from pathlib import Path

from benchmarks._common import build_parser, directory, load_for_probe
from luthier.errors import exit_on_user_error
from luthier.scoring.mirror import Mirror, measure_mirror


@exit_on_user_error
def main() -> None:
    """Print a row for each data set."""
    parser = build_parser(__doc__)
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
    """Return what probes make of the images of a folder and of their mirror images."""
    with tempfile.TemporaryDirectory() as output:
        trainer, splits, rows = load_for_probe(folder, f"{output}/out")
        mirror = measure_mirror(trainer, splits["train"], rows["train"])
    assert mirror is not None  # this is the main process
    return mirror


if __name__ == "__main__":
    main()
