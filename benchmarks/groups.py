"""What a score gains by ignoring which images belong together: `--group_by`, measured by linear probes.

    python -m benchmarks.groups path/to/instruments
    python -m benchmarks.groups path/to/suite/cells --group_by '([12])_'

Without --group_by bursts are made: a few photographs of each class, each seen in several frames (random crops of at
least 40%, another brightness), as a camera takes them. `IMG_0007_2.jpg` is the third frame of the seventh burst.
"""

import tempfile
from pathlib import Path

import torch
from torchvision.transforms import v2

from benchmarks._common import build_parser, directory, load_for_probe
from luthier.errors import exit_on_user_error
from luthier.images.decode import decode_rgb
from luthier.reporting.console import inflation_in_words
from luthier.scoring.baselines import measure_probe

BURSTS, FRAMES = 15, 5  # of each class
PATTERN = r"^(IMG_\d+)_"


@exit_on_user_error
def main() -> None:
    """Print what ignoring the groups adds to a probe's accuracy."""
    parser = build_parser(__doc__)
    parser.add_argument("data", type=directory, help="a folder of class folders")
    parser.add_argument("--group_by", help="the groups of these images, as train.py takes them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data if args.group_by else make_bursts(args.data, Path(folder, "bursts"))
        inflation = measure_probe(*load_for_probe(data, f"{folder}/out", args.group_by or PATTERN)).inflation
    assert inflation is not None  # the images have groups
    print(inflation_in_words(inflation))


def make_bursts(data: Path, folder: Path) -> Path:
    """Write bursts of the first images of each class; return their folder."""
    torch.manual_seed(0)
    change = v2.Compose([v2.RandomResizedCrop(224, scale=(0.4, 0.9), antialias=True), v2.ColorJitter(brightness=0.3)])
    number = 0
    for label in sorted(path for path in data.iterdir() if path.is_dir()):
        (folder / label.name).mkdir(parents=True)
        for file in sorted(label.iterdir())[:BURSTS]:
            number += 1
            image = decode_rgb(file.read_bytes()).image
            for frame in range(FRAMES):
                change(image).save(folder / label.name / f"IMG_{number:04}_{frame}.jpg", quality=92)
    return folder


if __name__ == "__main__":
    main()
