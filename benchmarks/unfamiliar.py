"""How often a model is unsure about images of none of its classes: here the built-in drawings.

    python -m benchmarks.unfamiliar outputs/efficientnet_lite0_instruments

It prints the share of OpenMoji's images that the model is unsure about, the same by the confidence alone, and the
share of its own test images, from its metrics.json.
"""

import json

from datasets import Image

from benchmarks._common import build_parser, directory
from luthier.errors import exit_on_user_error
from luthier.familiarity import threshold_of
from luthier.images.decode import read_bytes
from luthier.images.openmoji import load_openmoji
from luthier.serving.parity import Images
from luthier.serving.torch_network import TorchNetwork


@exit_on_user_error
def main() -> None:
    """Print the shares."""
    parser = build_parser(__doc__)
    parser.add_argument("model", type=directory, help="the output directory of a run")
    args = parser.parse_args()
    unsure = json.loads((args.model / "metrics.json").read_text())["unsure"]
    network = TorchNetwork(str(args.model))
    rows = load_openmoji().cast_column("image", Image(decode=False))
    drawings = Images([*map(str, range(len(rows)))], lambda number: read_bytes(rows[number]["image"]))
    probabilities, sureness = drawings.rate(network, "drawings")
    print(f"its own test images: {1 - unsure['answered']:.1%} unsure")
    if unsure["errors_withheld"] is not None:  # None where all predictions are right
        print(f"wrong predictions among them: {unsure['errors_withheld']:.1%} unsure")
    unfamiliar, below = (
        (figure < threshold).mean()
        for figure, threshold in (
            (sureness, network.unsure_below),
            (probabilities.max(axis=1), threshold_of(network.model)),
        )
    )
    print(f"{len(rows):,} drawings of none of its classes: {unfamiliar:.1%} unsure, {below:.1%} by confidence alone")


if __name__ == "__main__":
    main()
