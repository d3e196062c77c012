"""What "unsure" does to pictures of none of a model's classes: here the built-in drawings.

    python benchmarks/unfamiliar.py outputs/efficientnet_lite0_instruments

prints the share of OpenMoji's pictures that the model calls unsure, beside the same of its own test pictures, from its
metrics.json.
"""

import argparse
import json
import sys
from pathlib import Path

from datasets import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from classifier import Classifier
from images import decode_rgb, read
from openmoji import load_openmoji


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what a run left")
    args = parser.parse_args()
    unsure = json.loads((args.model / "metrics.json").read_text())["unsure"]
    classifier = Classifier(str(args.model))
    pictures = load_openmoji().cast_column("image", Image(decode=False))
    answers = [classifier.answer(decode_rgb(read(row["image"])).image, 1) for row in pictures]
    share = sum(answer.unsure for answer in answers) / len(answers)
    print(f"threshold {unsure['threshold']:.2f}")
    print(f"its own test pictures: {1 - unsure['answered']:.1%} unsure")
    print(f"of those that it gets wrong: {unsure['errors_withheld']:.1%} unsure")
    print(f"{len(answers):,} drawings of none of its classes: {share:.1%} unsure")


if __name__ == "__main__":
    main()
