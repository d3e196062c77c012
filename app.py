"""Try a model in the browser; needs requirements-app.txt.

    python app.py outputs/my_run
    python app.py me/instruments --push_to_space me/instruments-demo

The first command serves the app on this machine only, and prints its address
(GRADIO_SERVER_NAME and GRADIO_SERVER_PORT change it). The second publishes it
as a Space, which loads the model from the Hub.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.command_line import CommandParser, path_of_option
from luthier.errors import UserError, exit_on_user_error, require
from luthier.images.decode import is_image, reason
from luthier.terminal import percent, say

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

    from luthier.serving.classifier import Classifier

TOP = 5  # classes
MAX_FILE_SIZE = "64mb"
FETCHES = 4  # addresses at a time, so that one slow server does not hold up all visitors
MAX_WAITING = 100  # requests
CLEAN = (600, 3600)  # seconds: how often images that were given to the page are deleted, and how old they are then


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = CommandParser(prog="app.py", description=__doc__)
    parser.add_argument("model", help="a folder with a saved model, a name on the Hub, or a .onnx file")
    parser.add_argument("--examples", type=path_of_option, help="a folder of images to offer")
    parser.add_argument("--always_answer", action="store_true", help='never say "unsure" or "none of these"')
    parser.add_argument("--push_to_space", metavar="OWNER/NAME", help="publish the app as a Space instead")
    parser.add_argument("--private", action="store_true", default=None, help="hide a new Space from others")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Serve the app, or publish it; see `python app.py --help`."""
    args = build_parser().parse_args(argv)
    require("the app", ["gradio"], "requirements-app.txt")
    if args.private and not args.push_to_space:
        raise UserError("--private hides a Space: give --push_to_space OWNER/NAME too, or leave it out")
    if args.push_to_space:
        if args.examples or args.always_answer:
            raise UserError("--examples and --always_answer are for the app on this machine: leave them out")
        from luthier.serving.space import push_to_space

        say("pushed", push_to_space(args.model, args.push_to_space, args.private))
        return
    examples = images_in(args.examples) if args.examples else []
    port = os.environ.get("GRADIO_SERVER_PORT", "0")
    if not port.isdecimal() or int(port) > 65535:  # gradio's own error is a traceback
        raise UserError(f"GRADIO_SERVER_PORT is {port!r}, but must be a number such as 7860, below 65536")
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if direct != "*":  # gradio asks its own page whether it is there
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [direct, "localhost", "127.0.0.1"]))
    page = build_page(args.model, args.always_answer, examples)
    try:
        # With the port of the environment alone, gradio takes the next one where that is taken, as by another app.
        page.launch(max_file_size=MAX_FILE_SIZE, allowed_paths=examples, server_port=int(port) or None)
    except OSError as error:
        remedy = "set GRADIO_SERVER_NAME or GRADIO_SERVER_PORT to another address or port"
        raise UserError(f"the app cannot be served ({error}): {remedy}") from error


def images_in(folder: Path) -> list[str]:
    """Return the images of a folder.

    Raises:
        UserError: it has none.
    """
    paths = sorted(str(path) for path in folder.glob("*") if is_image(path.name))
    if not paths:
        raise UserError(f"--examples {folder} is not a folder with images: give another, or leave the option out")
    return paths


def build_page(model_name: str, always_answer: bool, examples: list[str]) -> "gradio.Blocks":
    """Return the page of a model; raises the errors of `open_network`."""
    import gradio

    from luthier.serving.classifier import Classifier, open_network

    classifier = Classifier(open_network(model_name), always_answer)
    name = Path(model_name).name
    with gradio.Blocks(title=name, analytics_enabled=False, delete_cache=CLEAN) as page:
        gradio.Textbox(name, label="Model", interactive=False)
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
                # Gradio's own opens the file first, by Pillow's rules, and says no more than "Error".
                setattr(image, "preprocess", lambda file: file.path if file else None)  # noqa: B010
                url = gradio.Textbox(label="Or its address", placeholder="https://...", max_lines=1)
                # Gradio would fetch an address that a request gives as a file, whatever its size and its network.
                for block in (image, url):
                    setattr(block, "async_move_resource_to_block_cache", _refuse_addresses(block))  # noqa: B010
                ask = gradio.Button("Classify the address")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", interactive=False, lines=2)
                classes = gradio.Label(label="Classes", num_top_classes=TOP, show_heading=False)
        if examples:
            gradio.Examples(examples, image)
        load = file_loader(classifier, [Path(image.GRADIO_CACHE), *map(Path, examples)])
        asked = gradio.on(
            [ask.click, url.submit], answerer(classifier, classifier.load_url), url, [answer, classes], api_name="url",
            concurrency_limit=FETCHES,
        )  # fmt: skip
        image.change(  # without a wait for an address, which would replace the answer of a newer image
            answerer(classifier, load), image, [answer, classes], api_name="image", cancels=[asked]
        )
    return page.queue(max_size=MAX_WAITING)


def _refuse_addresses(block: "gradio.components.Component") -> Callable:
    move = block.async_move_resource_to_block_cache

    async def move_file(name: str | Path | None) -> str | None:
        if "://" in str(name):
            raise ValueError("an address is classified by the function `url`")
        return await move(name)

    return move_file


def file_loader(classifier: "Classifier", allowed: list[Path]) -> Callable[[str], "Image"]:
    """Return the function that loads an image that was given to the page: a file in or at one of the allowed paths.

    A request to the server that does not come from the page may name any file of the machine.
    """
    places = [path.resolve() for path in allowed]

    from luthier.serving.classifier import MAX_FOREIGN_PIXELS

    def load(name: str) -> "Image":
        path = Path(name).resolve()
        if not path.is_file() or not any(path.is_relative_to(place) for place in places):
            raise OSError("only images that were given to this page are opened")
        return classifier.load_file(str(path), MAX_FOREIGN_PIXELS)

    return load


def answerer(classifier: "Classifier", load: Callable) -> Callable[[str | None], tuple[str, dict[str, float]]]:
    """Return the function from what `load` takes to the answer in words, and the classes with their probabilities."""

    def answer(source: str | None) -> tuple[str, dict[str, float]]:
        if not source or not source.strip():
            return "", {}
        try:
            prediction = classifier.predict(load(source.strip()), TOP)
        except Exception as error:  # Pillow raises errors of any kind on damaged data
            return f"No prediction: {reason(error)}", {}
        if prediction.error:
            return f"No prediction: {prediction.error}", {}
        label, share = prediction.top[0]
        shown: dict[str, float] = {}
        for name, probability in prediction.top:
            shown.setdefault(name, probability)  # of classes with one name the likeliest
        if prediction.none:
            return "None of these", shown
        likeliest = f"{label} ({percent(share, 0)})"
        return (f"Unsure. Most likely: {likeliest}" if prediction.unsure else likeliest), shown

    return answer


if __name__ == "__main__":
    main()
