"""Export a trained model to ONNX, and compare both on its test images; needs requirements-export.txt.

    python export.py outputs/my_run
    python export.py outputs/my_run --int8
    python export.py me/instruments --output_dir exported --check my_photos
    python export.py outputs/my_run --web page

The first command writes onnx/model.onnx into the model's folder. The export is
compared with the model on all test images of the run; an image that gets
another class stops it. Exit code 1: an export is worse than the model, and was
not written; 2: the command is wrong.
"""

import argparse
import json
import os
import sys
import tempfile
import unicodedata
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.command_line import CommandParser, path_of_option
from luthier.errors import UserError, exit_on_user_error, message_for_user, require
from luthier.files import atomic_copy, lock_folder
from luthier.images.decode import is_image
from luthier.images.image_files import walk
from luthier.options import EXPORT_PACKAGES
from luthier.run_files import DIGEST, IMAGES, ONNX, ONNX_FILES, SCORED
from luthier.terminal import of_project, plural, quote, say

if TYPE_CHECKING:
    from luthier.serving.parity import Images, Parity

CALIBRATION = 200  # training images that decide the ranges of 8-bit activations


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = CommandParser(prog="export.py", description=__doc__)
    parser.add_argument("model", help="a folder with a saved model, or a name on the Hub")
    parser.add_argument("--output_dir", type=path_of_option, help="where to write, if not into the model's folder")
    parser.add_argument("--int8", action="store_true", help="write a quantised model too, for CPUs")
    parser.add_argument("--fp16", action="store_true", help="write a model of half the size too, for GPUs")
    parser.add_argument(
        "--check", type=path_of_option, metavar="FOLDER",
        help="compare on these images, in class folders or not, instead of the run's test images",
    )  # fmt: skip
    parser.add_argument(
        "--web", type=path_of_option, metavar="FOLDER", help="write a page that runs the model in the browser"
    )
    parser.add_argument("--push_to_space", metavar="OWNER/NAME", help="publish this page on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="hide a new page on the Hub from others")
    parser.add_argument("--vendor", action="store_true", help="copy what the page needs of ONNX Runtime into it")
    parser.add_argument("--allow_worse", action="store_true", help="write an export that is worse than the model, too")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export a model; see `python export.py --help`."""
    args = build_parser().parse_args(argv)
    require("an export", EXPORT_PACKAGES, "requirements-export.txt")
    if args.private and not args.push_to_space:
        raise UserError("--private hides a page on the Hub: give --push_to_space OWNER/NAME too, or leave it out")
    if args.vendor and not (args.web or args.push_to_space):
        raise UserError("--vendor is for the page: give --web FOLDER or --push_to_space OWNER/NAME too")
    folder = args.output_dir or Path(args.model)
    if folder.is_file() and not args.output_dir:
        raise UserError(f"{args.model} is a file: give the folder of the trained model, such as outputs/my_run")
    if not args.output_dir and not folder.is_dir():
        raise UserError(f"there is no folder {args.model!r}: for a model of the Hub, give --output_dir too")
    check_destinations(args)
    precisions = [name for name in ("fp16", "int8") if getattr(args, name)]
    busy = f"another export is writing into {folder}: wait for it"
    with lock_folder(folder, ".export.lock", busy) if folder.is_dir() else nullcontext():
        refused = export(args.model, folder, precisions, args.check, args.allow_worse)
    model = folder / ONNX / ONNX_FILES["fp32"]
    if model.name not in refused:
        publish_page(args, model)
        say("next", quote("python", of_project("predict.py"), str(model), "image.jpg"))
    if refused:
        sys.exit("\n".join([*(f"{file} {why}" for file, why in refused.items()), "To write it: --allow_worse"]))


def check_destinations(args: argparse.Namespace) -> None:
    """Check that all can be written where it shall be, before anything is exported.

    Raises:
        UserError: it cannot.
    """
    from luthier.serving import hub
    from luthier.serving.web_page import check_folder, find_npm

    if args.vendor:
        find_npm()
    if args.web:
        check_folder(args.web)
    own = ("the model's folder", Path(args.model)) if args.output_dir is None else ("--output_dir", args.output_dir)
    for option, path in (own, ("--web", args.web)):
        if path is None:
            continue
        existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UserError(f"{option} {path} cannot be written: {existing} is not a folder that you may write to")
    if args.push_to_space:
        if not all(args.push_to_space.partition("/")):
            raise UserError(f"--push_to_space {args.push_to_space} is not a name for a Space: give owner/name")
        hub.check_name(args.push_to_space)
        hub.check_login(args.push_to_space)


def publish_page(args: argparse.Namespace, model: Path) -> None:
    """Write the page of an exported model, and publish it, each if asked for.

    Raises:
        UserError: see `web_page.write_page` and `web_page.push_page`.
    """
    from luthier.serving.web_page import push_page, write_page

    name = Path(args.model).resolve().name
    if args.web:
        write_page(model, args.web, name, args.vendor)
        serve = quote("python", "-m", "http.server", "-d", str(args.web))
        say("page", f"{args.web}; to look at it: {serve}, and open http://localhost:8000")
    if args.push_to_space:
        say("pushed", push_page(model, args.push_to_space, name, args.vendor, args.private))


def export_run(output_dir: Path) -> str:
    """Export the model of a finished run; where that fails, return why, and how to repeat it."""
    try:
        refused = export(str(output_dir), output_dir, [], None, allow_worse=False)
        why = "; ".join(f"{file} {reason}" for file, reason in refused.items())
    except Exception as error:
        why = message_for_user(error) or f"{type(error).__name__}: {error}"
    command = quote("python", of_project("export.py"), str(output_dir))
    return why and f"not exported: {why}\nThe run is complete, in {output_dir}. To export it again:\n  {command}"


def export(
    model_name: str, folder: Path, precisions: list[str], check: Path | None, allow_worse: bool
) -> dict[str, str]:
    """Write a model as ONNX in float32 and in other precisions, each if it answers as the model does.

    Where the run has other weights that were scored, what another precision costs is measured with these: the shipped
    ones may have learned from the images, and on such images a model hardly ever errs. The shipped file must not be
    worse either.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.
        folder: where to write; files of earlier exports are replaced once the new ones are whole.
        precisions: besides fp32, of `ONNX_FILES`.
        check: a folder of images to compare on; None is the test images of the run.
        allow_worse: write what is worse too.

    Returns why a file was not written, by its name.

    Raises:
        ModelError, UserError: the model cannot be loaded or exported, or there are no images to compare on.
    """
    from luthier.serving.export import RANGED, count_overflows, export_precisions
    from luthier.serving.onnx_network import OnnxNetwork
    from luthier.serving.parity import compare
    from luthier.serving.torch_network import TorchNetwork

    network, refused, scored = TorchNetwork(model_name), dict[str, str](), None
    if precisions and check is None and Path(model_name, SCORED).is_dir():
        scored = TorchNetwork(str(Path(model_name, SCORED)))
    images, calibration = find_images(model_name, check, network.labels, "int8" in precisions)
    say("check", f"on {plural(len(images.names), 'image')}{'' if images.labels is not None else ', without labels'}")

    def build(network: TorchNetwork, scratch: str, compared: list[str]) -> dict[str, tuple[Path, "Parity"]]:
        rated = images.rate(network, "model")
        files = export_precisions(network, Path(scratch), precisions, calibration)
        found = {name: (files[name], compare(OnnxNetwork(files[name]), rated, images, name)) for name in compared}
        if "fp16" in found:
            path, parity = found["fp16"]
            # From all over: the images of a run are in the order of their classes.
            views = images.views(OnnxNetwork(files["fp32"]), "range", RANGED)
            found["fp16"] = path, parity._replace(overflows=count_overflows(files["fp32"], views))
        return found

    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as other:
        built = build(network, scratch, ["fp32", *precisions])
        measured = build(scored, other, precisions) if scored else {}
        for name, (path, shipped) in built.items():
            parity = measured[name][1] if name in measured else shipped
            say(name, f"{path.stat().st_size / 1e6:.1f} MB, {parity}")
            why = parity.refusal or shipped.refusal
            for warning in filter(None, (why, parity.doubt)):
                say("careful", warning)
            if why and not allow_worse:
                refused[path.name] = f"was not written: {why}"
            else:
                about = {"images": "of test" if check is None else "others",
                         "weights": "scored" if name in measured else "shipped"}  # fmt: skip
                write_export(path, folder, parity._asdict() | about)
                say("saved", str(folder / ONNX / path.name))
    return refused


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
    folders = walk(check) if check.is_dir() else ()
    paths = [folder / name for folder, names in folders for name in names if is_image(name)]
    paths = [paths[row] for row in draw_order(map(str, range(len(paths))), seed=1)]
    used = min(CALIBRATION, len(paths) // 2) if calibrate else 0
    if not paths or (calibrate and not used):
        least = "at least two images, one of them to calibrate --int8 with" if calibrate else "images"
        raise UserError(f"--check {check} is not a folder with {least}: give another")

    def class_of(path: Path) -> str | None:
        folders = [*path.relative_to(check).parts[:-1], check.resolve().name]
        names = [unicodedata.normalize("NFC", folder) for folder in folders]  # as training does
        return next((name for name in names if name in labels), None)

    def images(paths: list[Path]) -> Images:
        classes = [name for path in paths if (name := class_of(path)) is not None]
        numbers = np.array(list(map(labels.index, classes))) if len(classes) == len(paths) else None
        return Images([str(path) for path in paths], lambda number: paths[number].read_bytes(), numbers)

    return images(paths[used:]), images(paths[:used])


def images_of_run(folder: Path, labels: list[str]) -> tuple["Images", "Images"]:
    """Return the test images of a run that its scored weights have not learned from, and some of its other images.

    Raises:
        UserError: the folder does not say which they are, or they are no longer there.
    """
    import numpy as np
    from datasets import Dataset, concatenate_datasets

    from data import load_images
    from luthier.images.decode import read_bytes
    from luthier.images.groups import groups_of
    from luthier.images.splits import draw_order
    from luthier.images.streams import open_stream
    from luthier.machine import configure_bars
    from luthier.serving.parity import Images

    configure_bars()
    advice = "give images to compare the export with: --check FOLDER"
    try:
        record = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
        test, options = set(record["test"]), dict(record["options"])
        paths = {key: folder / options[key] for key in ("data_dir", "labels", "dataset_name") if options.get(key)}
        options |= {key: str(path) for key, path in paths.items() if path.exists()}
    except FileNotFoundError as error:
        raise UserError(f"{folder} does not say which images its model was scored on: {advice}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / IMAGES} is damaged ({error}): {advice}") from error
    try:
        if "stream" in options:
            options["stream"] = open_stream(options.get("data_dir") or options["dataset_name"], **options["stream"])
        splits, _ = load_images(**options)
    except (TypeError, KeyError) as error:  # an option that there is none of, or one is missing
        raise UserError(f"{folder / IMAGES} is damaged ({error}): {advice}") from error
    except UserError as error:
        if away := [path.resolve() for key, path in paths.items() if key != "dataset_name" and not path.exists()]:
            raise UserError(f"the images of the run are not there any more ({away[0]}): {advice}") from error
        raise UserError(f"the images of the run are not what they were ({error}). Or {advice}") from error
    if splits["train"].features["label"].names != labels:
        raise UserError(f"the images of the run have other classes than its model by now: {advice}")
    rows = concatenate_datasets(list(splits.values()))
    digests = rows["digest"][:]
    of_test = np.array([digest[:DIGEST] in test for digest in digests])
    missing = len(test - {digest[:DIGEST] for digest in digests})
    if not of_test.any() or of_test.all():
        gone = "other images" if of_test.any() else "test images"
        raise UserError(f"the {gone} of the run are no longer there: {advice}")
    if missing:
        say("careful", f"not there any more, or changed: {plural(missing, 'test image')} of the run")

    def images(rows: Dataset) -> Images:
        column, groups = rows["image"], groups_of(rows)
        return Images(rows["name"][:], lambda n: read_bytes(column[n]), np.array(rows["label"][:]), groups)

    others = np.flatnonzero(~of_test)
    drawn = others[draw_order([digests[row] for row in others], seed=1)[:CALIBRATION]]
    return images(rows.select(np.flatnonzero(of_test))), images(rows.select(drawn))


def write_export(path: Path, folder: Path, record: dict) -> None:
    """Copy an exported file into a model's folder, and note in `export.json` and the model card how it compares."""
    from luthier.reporting.card import note_export

    target = folder / ONNX / path.name
    atomic_copy(path, target)
    note_export(folder, target.name, record)


if __name__ == "__main__":
    main()
