"""How often a model is unsure about images of none of its classes: here the built-in drawings.

    python -m benchmarks.unfamiliar outputs/efficientnet_lite0_instruments

It prints the share of OpenMoji's images that the model is unsure about, and the same share of its own test images,
from its metrics.json.
"""

import argparse
import json
from pathlib import Path

from datasets import Image

from luthier.images.decode import decode_rgb, read_bytes
from luthier.images.openmoji import load_openmoji
from luthier.serving.classifier import Classifier


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the output directory of a run")
    args = parser.parse_args()
    unsure = json.loads((args.model / "metrics.json").read_text())["unsure"]
    classifier = Classifier(str(args.model))
    rows = load_openmoji().cast_column("image", Image(decode=False))
    predictions = [classifier.predict(decode_rgb(read_bytes(row["image"])).image, 1) for row in rows]
    share = sum(prediction.unsure for prediction in predictions) / len(predictions)
    print(f"threshold {unsure['threshold']:.2f} of {unsure['by']}")
    print(f"its own test images: {1 - unsure['answered']:.1%} unsure")
    print(f"wrong predictions among them: {unsure['errors_withheld']:.1%} unsure")
    print(f"{len(predictions):,} drawings of none of its classes: {share:.1%} unsure")


if __name__ == "__main__":
    main()
