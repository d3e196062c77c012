"""Export a trained model to ONNX, and prove that the export answers as the model does; needs requirements-export.txt.

    python export.py outputs/my_run
    python export.py outputs/my_run --int8
    python export.py me/instruments --output_dir exported --check my_photos
    python export.py outputs/my_run --web page

The first command writes onnx/model.onnx into the model's folder. The export is
compared with the model on all test images of the run; an image that gets
another class stops it. Exit code 1: the export is worse than the model; 2: the
command is wrong.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import UserError, exit_on_user_error, require
from luthier.images.decode import is_image
from luthier.terminal import plural, say

if TYPE_CHECKING:
    from luthier.serving.parity import Images, Parity

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CALIBRATION = 200  # training images that decide the ranges of 8-bit activations


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with a saved model, or a name on the Hub")
    parser.add_argument("--output_dir", type=Path, help="where to write, if not into the model's folder")
    parser.add_argument("--int8", action="store_true", help="write a quantised model too, for CPUs")
    parser.add_argument("--fp16", action="store_true", help="write a model of half the size too, for GPUs")
    parser.add_argument(
        "--check", type=Path, metavar="FOLDER",
        help="compare on these images, in class folders or not, in the place of the run's test images",
    )  # fmt: skip
    parser.add_argument("--web", type=Path, metavar="FOLDER", help="write a page that runs the model in the browser")
    parser.add_argument("--push_to_space", metavar="OWNER/NAME", help="publish this page on the Hub")
    parser.add_argument("--vendor", action="store_true", help="copy what the page needs of ONNX Runtime into it")
    parser.add_argument("--allow_worse", action="store_true", help="keep an export that is worse than the model")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export a model; see `python export.py --help`."""
    args = build_parser().parse_args(argv)
    require("an export", PACKAGES, "requirements-export.txt")
    if args.vendor and not (args.web or args.push_to_space):
        raise UserError("--vendor is for the page: give --web FOLDER or --push_to_space OWNER/NAME too")
    folder = args.output_dir or Path(args.model)
    if not args.output_dir and not folder.is_dir():
        raise UserError(f"there is no folder {args.model!r}: for a model of the Hub, give --output_dir too")
    if args.web or args.push_to_space:
        check_page(args)
    precisions = [name for name in ("fp16", "int8") if getattr(args, name)]
    worse = export(args.model, folder, precisions, args.check, args.allow_worse)
    if worse and not args.allow_worse:
        sys.exit("\n".join([*worse, "It was not written; to write it all the same: --allow_worse"]))
    say("saved", f"{folder / 'onnx'}")
    publish_page(args, folder / "onnx" / "model.onnx")
    say("next", f"python predict.py {folder / 'onnx' / 'model.onnx'} image.jpg")


def check_page(args: argparse.Namespace) -> None:
    """Check that the page can be written and published, before anything is exported."""
    from luthier.serving import hub
    from luthier.serving.web_page import check_folder

    if args.web:
        check_folder(args.web)
    if args.push_to_space:
        args.push_to_space = hub.check_access(args.push_to_space, private=None, repo_type="space", sdk="static")


def publish_page(args: argparse.Namespace, model: Path) -> None:
    """Write the page of an exported model, and publish it, each if asked for."""
    from luthier.serving.web_page import push_page, write_page

    name = Path(args.model).resolve().name
    if args.web:
        write_page(model, args.web, name, args.vendor)
        say("page", f"{args.web}: to look at it, python -m http.server -d {args.web}")
    if args.push_to_space:
        say("pushed", push_page(model, args.push_to_space, name, args.vendor))


def export_run(output_dir: Path, wanted: bool) -> None:
    """Export the model of a finished run, if wanted; where that fails, say how to repeat it, and exit with 1."""
    if not wanted:
        return
    try:
        why = "; ".join(export(str(output_dir), output_dir, [], None, allow_worse=False))
    except UserError as error:
        why = str(error)
    if why:
        command = shlex.join(["python", "export.py", str(output_dir)])
        sys.exit(f"error: not exported: {why}\nThe run is complete, in {output_dir}. To export it again:\n  {command}")


def export(model_name: str, folder: Path, precisions: list[str], check: Path | None, allow_worse: bool) -> list[str]:
    """Write a model as ONNX in float32 and in other precisions, each if it answers as the model does.

    Where the shipped weights were refit on the test images too, what another precision costs is measured with the
    weights that were scored: on images that a model has learned it hardly ever errs.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.
        folder: where to write; files of earlier exports are replaced once the new ones are whole.
        precisions: besides fp32, of `FILES`.
        check: a folder of images to compare on; None is the test images of the run.
        allow_worse: write what is worse too.

    Returns for each export that is worse than the model what it is called and why.

    Raises:
        ModelError, UserError: the model cannot be loaded or exported, or there are no images to compare on.
    """
    from luthier.reporting.results import SCORED
    from luthier.serving.export import export_precisions
    from luthier.serving.onnx_network import OnnxNetwork
    from luthier.serving.parity import compare
    from luthier.serving.torch_network import TorchNetwork

    network, worse = TorchNetwork(model_name), list[str]()
    images, calibration = find_images(model_name, check, network.labels, "int8" in precisions)
    say("check", f"on {plural(len(images.names), 'image')}{'' if images.labels is not None else ', without labels'}")

    def build(network: TorchNetwork, scratch: str, compared: list[str]) -> dict[str, tuple[Path, "Parity"]]:
        rated = images.rate(network, "model")
        files = export_precisions(network, Path(scratch), precisions, calibration)
        return {name: (files[name], compare(OnnxNetwork(files[name]), rated, images, name)) for name in compared}

    with tempfile.TemporaryDirectory() as shipped, tempfile.TemporaryDirectory() as scored:
        built = build(network, shipped, ["fp32", *precisions])
        if precisions and check is None and Path(model_name, SCORED).is_dir():
            measured = build(TorchNetwork(str(Path(model_name, SCORED))), scored, precisions)
            built |= {name: (built[name][0], parity) for name, (_, parity) in measured.items()}
        for name, (path, parity) in built.items():
            say(name, f"{path.stat().st_size / 1e6:.1f} MB, {parity}")
            if parity.refusal:
                worse.append(f"{path.name} is worse than the model: {parity.refusal}")
            if allow_worse or not parity.refusal:
                write_export(path, folder, parity)
    return worse


def find_images(model_name: str, check: Path | None, labels: list[str], calibrate: bool) -> tuple["Images", "Images"]:
    """Return the images to compare on, and some to calibrate 8-bit activations with.

    Args:
        model_name: of the model.
        check: a folder of images; None is the test images of the run, by its `images.json`.
        labels: the model's classes.
        calibrate: some are needed to calibrate with: the run's training images, or some of the folder's, which are
            then not compared on.

    Raises:
        UserError: there are none.
    """
    import numpy as np

    from luthier.images.splits import draw_order
    from luthier.serving.parity import Images

    if check is None:
        return images_of_run(Path(model_name), labels)
    paths = sorted(path for path in check.rglob("*") if is_image(path.name) and path.is_file())
    paths = [paths[row] for row in draw_order(map(str, range(len(paths))), seed=1).argsort()]
    used = min(CALIBRATION, len(paths) // 2) if calibrate else 0
    if not paths[used:]:
        raise UserError(f"--check {check} is not a folder with images")

    def images(paths: list[Path]) -> Images:
        known = all(path.parent.name in labels for path in paths)
        numbers = np.array([labels.index(path.parent.name) for path in paths]) if known else None
        return Images([str(path) for path in paths], lambda number: paths[number].read_bytes(), numbers)

    return images(paths[used:]), images(paths[:used])


def images_of_run(folder: Path, labels: list[str]) -> tuple["Images", "Images"]:
    """Return the test images of a run, and some of its training images.

    Raises:
        UserError: the folder does not say which they are, or they are no longer there.
    """
    import numpy as np
    from datasets import Dataset, concatenate_datasets

    from data import load_splits
    from luthier.images.decode import read_bytes
    from luthier.images.groups import groups_of
    from luthier.images.splits import draw_order
    from luthier.reporting.results import IMAGES
    from luthier.serving.parity import Images

    advice = "give images to compare the export with: --check FOLDER"
    try:
        options = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
        folds = options.pop("folds")
        splits, _ = load_splits(**options)
    except FileNotFoundError as error:
        raise UserError(f"{folder} does not say which images its model was scored on: {advice}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / IMAGES} is damaged ({error}): {advice}") from error
    except UserError as error:
        raise UserError(f"the images of the run are not what they were ({error}). Or {advice}") from error
    if splits["train"].features["label"].names != labels:
        raise UserError(f"the images of the run have other classes than its model by now: {advice}")

    def images(rows: Dataset) -> Images:
        column, groups = rows["image"], groups_of(rows)
        return Images(rows["name"][:], lambda n: read_bytes(column[n]), np.array(rows["label"][:]), groups)

    drawn = draw_order(splits["train"]["digest"][:], seed=1).argsort()[:CALIBRATION]
    test = concatenate_datasets(list(splits.values())) if folds else splits["test"]
    return images(test), images(splits["train"].select(drawn))


def write_export(path: Path, folder: Path, parity: "Parity") -> None:
    """Move an exported file into a model's folder, and note in `export.json` and the model card how it compares."""
    from luthier.reporting.results import note_export

    target = folder / "onnx" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_name(f".{path.name}")
    shutil.copyfile(path, whole)  # not moved: the two may be on different disks
    whole.replace(target)
    note_export(folder, target.name, parity._asdict())


if __name__ == "__main__":
    main()
