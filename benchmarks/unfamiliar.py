"""How often a model is unsure about images of none of its classes: here the built-in drawings.

    python -m benchmarks.unfamiliar outputs/efficientnet_lite0_instruments

It prints the share of OpenMoji's images that the model is unsure about, the same by the confidence alone, and the
share of its own test images, from its metrics.json.
"""

import argparse
import json

import numpy as np
from datasets import Image

from benchmarks._common import directory
from luthier.errors import exit_on_user_error
from luthier.familiarity import threshold_of
from luthier.images.decode import decode_rgb, read_bytes
from luthier.images.openmoji import load_openmoji
from luthier.serving.torch_network import TorchNetwork

BATCH = 16


@exit_on_user_error
def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=directory, help="the output directory of a run")
    args = parser.parse_args()
    unsure = json.loads((args.model / "metrics.json").read_text())["unsure"]
    network = TorchNetwork(str(args.model))
    rows = load_openmoji().cast_column("image", Image(decode=False))
    views = [network.view(decode_rgb(read_bytes(row["image"])).image) for row in rows]
    rated = [network.rate(views[first : first + BATCH]) for first in range(0, len(views), BATCH)]
    sureness = np.concatenate([each for _, each in rated])
    confidence = np.concatenate([probabilities.max(axis=1) for probabilities, _ in rated])
    print(f"its own test images: {1 - unsure['answered']:.1%} unsure")
    print(f"wrong predictions among them: {unsure['errors_withheld']:.1%} unsure")
    unfamiliar, below = (
        (figure < threshold).mean()
        for figure, threshold in ((sureness, network.unsure_below), (confidence, threshold_of(network.model)))
    )
    print(f"{len(views):,} drawings of none of its classes: {unfamiliar:.1%} unsure, {below:.1%} by confidence alone")


if __name__ == "__main__":
    main()
