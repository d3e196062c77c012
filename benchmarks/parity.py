"""Whether exports answer as the models do: trained models on data sets, and architectures with random weights.

    pip install -r requirements-export.txt
    python -m benchmarks.parity FOLDER [--also path/to/instruments]

FOLDER holds data sets, as for benchmarks.suite. On each of them `train.py --recipe probe` trains a model, and
`export.py --int8 --fp16` compares its exports on the test images: fp32 with the shipped weights, the others with the
scored ones. Then networks with random weights are exported and compared on the images of the first data set. These are
close to undecided on every image, so that their likeliest class changes more easily.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from benchmarks._common import PROJECT, build_parser, directory, run_command
from benchmarks._networks import NAMES, save_network
from luthier.errors import exit_on_user_error
from models import build_model, save_model

OPTIONS = ["--recipe", "probe", "--disable_tqdm", "1"]


@exit_on_user_error
def main() -> None:
    """Print the table."""
    parser = build_parser(__doc__)
    parser.add_argument("folder", type=directory, help="a folder of data sets, each with train and test")
    parser.add_argument("--also", nargs="*", type=directory, default=[], help="more data sets")
    args = parser.parse_args()
    sets = [*sorted(path for path in args.folder.iterdir() if path.is_dir()), *args.also]
    print("| model | precision | MB | same class | largest difference | model / export | points (95% interval) |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for data in sets:
            output_dir, line = Path(scratch, data.name), [sys.executable, "train.py", *OPTIONS]
            run_command([*line, "--data_dir", str(data.resolve()), "--output_dir", str(output_dir)], PROJECT)
            compare(f"EfficientNet-Lite0, {data.name}", output_dir)
        test = (sets[0] / "test" if (sets[0] / "test").is_dir() else sets[0]).resolve()
        for name, folder in random_networks(Path(scratch)).items():
            compare(f"{name}, random weights", folder, "--check", str(test), "--output_dir", str(folder))


def compare(name: str, folder: Path, *options: str) -> None:
    """Export a model in all precisions, and print how each compares."""
    run_command([sys.executable, "export.py", str(folder), "--int8", "--fp16", "--allow_worse", *options], PROJECT)
    for file, row in json.loads((folder / "export.json").read_text()).items():
        size = (folder / "onnx" / file).stat().st_size / 1e6
        low, high = (100 * end for end in row["difference_ci95"])
        (before, after), same = row["accuracy"], f"{row['same']:,} of {row['n']:,}"
        shares = f"{before:.1%} / {after:.1%}" if row["labelled"] else "-"
        print(
            f"| {name} | {row['precision']} | {size:.1f} | {same} | {row['largest_difference']:.2g} | {shares} "
            f"| {100 * (after - before):+.1f} ({low:+.1f} to {high:+.1f}) |",
            flush=True,
        )


def random_networks(scratch: Path) -> dict[str, Path]:
    """Save networks of several families with random weights; return their folders by name."""
    torch.manual_seed(0)
    id2label = dict(enumerate(NAMES))
    own = {
        "transformers' ViT": (
            ViTForImageClassification(ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=3,
                                                intermediate_size=768, id2label=id2label)),
            ViTImageProcessor(),
        ),
        "transformers' ResNet": (
            ResNetForImageClassification(ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", id2label=id2label,
                                                      hidden_sizes=[64, 128, 256, 512])),
            BitImageProcessor(size={"shortest_edge": 256}),
        ),
        "transformers' ConvNeXt": (
            ConvNextForImageClassification(ConvNextConfig(id2label=id2label)),
            ConvNextImageProcessor(size={"shortest_edge": 224}),
        ),
        "simple_cnn": build_model("simple_cnn", id2label),
    }  # fmt: skip
    folders = {name: save_network(name, scratch / name) for name in ("resnet18", "vit_small_patch16_224")}
    for number, (name, (model, image_processor)) in enumerate(own.items()):
        folders[name] = scratch / f"own-{number}"
        save_model(model.eval(), image_processor, folders[name])
    return folders


if __name__ == "__main__":
    main()
