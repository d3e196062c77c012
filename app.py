"""A page on which a person tries a model; needs requirements-app.txt.

    python app.py outputs/my_run
    python app.py me/instruments --push_to_space me/instruments-demo

The first serves the page on this machine alone, at an address that it prints (GRADIO_SERVER_NAME and
GRADIO_SERVER_PORT change it); the second publishes it as a Space, which loads the model from the Hub.
"""

import argparse
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from images import is_picture, reason

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

    from classifier import Classifier

TOP = 5  # classes
LARGEST_FILE = "64mb"
PROJECT = Path(__file__).parent
# What the page is made of, with the requirements that these need.
MODULES = (
    "app.py", "arguments.py", "classifier.py", "fetch.py", "images.py", "inference.py", "machine.py", "models.py",
    "views.py",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "timm", "pillow", "numpy")


def main(argv: list[str] | None = None) -> None:
    """Serve the page, or publish it; see `python app.py --help`."""
    parser = argparse.ArgumentParser(
        prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with a saved model, or a name on the Hub")
    parser.add_argument("--examples", type=Path, help="a folder of pictures to offer")
    parser.add_argument("--always_answer", action="store_true", help='never say "unsure"')
    parser.add_argument("--push_to_space", metavar="OWNER/NAME", help="publish the page as a Space instead")
    args = parser.parse_args(argv)
    from arguments import user_errors  # these imports take seconds: mistakes in the line are answered before

    with user_errors():
        if args.push_to_space and (args.examples or args.always_answer):
            raise ValueError("--examples and --always_answer are of the page on this machine: leave them out")
        if args.push_to_space:
            print(f"pushed   {push_to_space(args.model, args.push_to_space)}")
            return
        examples = pictures_in(args.examples) if args.examples else []
        page = build_page(args.model, args.always_answer, examples)
    page.launch(max_file_size=LARGEST_FILE, allowed_paths=examples)


def pictures_in(folder: Path) -> list[str]:
    """Return the pictures of a folder.

    Raises:
        ValueError: it has none.
    """
    found = sorted(str(path) for path in folder.glob("*") if is_picture(path.name))
    if not found:
        raise ValueError(f"--examples {folder} is no folder with pictures")
    return found


def gradio_version() -> str:
    """Return the version of Gradio.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError("the page needs Gradio: pip install -r requirements-app.txt") from error


def build_page(model_name: str, always_answer: bool, examples: list[str]) -> "gradio.Blocks":
    """Return the page of a model.

    Raises:
        ValueError: the model cannot be loaded, or Gradio is not installed.
    """
    gradio_version()
    import gradio

    from classifier import Classifier

    classifier = Classifier(model_name, always_answer)
    name = Path(model_name).name
    with gradio.Blocks(title=name, analytics_enabled=False) as page:
        gradio.Textbox(name, label="Model", interactive=False)
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type="filepath", sources=["upload", "clipboard"], label="Picture", height=320)
                # Gradio's own would open the file first, with Pillow's rules, and say no more than "Error".
                picture.preprocess = lambda file: file.path if file else None
                url = gradio.Textbox(label="or its address", placeholder="https://...", max_lines=1)
                ask = gradio.Button("Classify the address")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", interactive=False, lines=2)
                classes = gradio.Label(label="Classes", num_top_classes=TOP, show_heading=False)
        if examples:
            gradio.Examples(examples, picture)
        read = reader(classifier, [Path(picture.GRADIO_CACHE), *map(Path, examples)])
        picture.change(answerer(classifier, read), picture, [answer, classes], api_name="picture")
        gradio.on(
            [ask.click, url.submit], answerer(classifier, classifier.open_url), url, [answer, classes], api_name="url"
        )
    return page


def reader(classifier: "Classifier", allowed: list[Path]) -> Callable[[str], "Image"]:
    """Return the function that reads a picture which was given to the page: a file in or at one of the allowed paths.

    Who asks the page's server without the page may name any file of the machine.
    """
    places = [path.resolve() for path in allowed]

    def read(name: str) -> "Image":
        path = Path(name).resolve()
        if not path.is_file() or not any(path.is_relative_to(place) for place in places):
            raise OSError("only pictures that were given to this page are looked at")
        return classifier.open(str(path))

    return read


def answerer(classifier: "Classifier", read: Callable) -> Callable[[str | None], tuple[str, dict[str, float]]]:
    """Return the function from what `read` takes to the answer in words, and the classes with their probabilities."""

    def answer(source: str | None) -> tuple[str, dict[str, float]]:
        if not source or not source.strip():
            return "", {}
        try:
            found = classifier.answer(read(source.strip()), TOP)
        except Exception as error:  # Pillow raises whatever it likes on damaged data
            return f"Not answered: {reason(error)}", {}
        label, share = found.top[0]
        likely = f"{label} ({share:.0%})"
        return (f"Unsure. Likeliest is {likely}" if found.unsure else likely), dict(found.top)

    return answer


def push_to_space(model_name: str, repo_id: str) -> str:
    """Publish the page of a model on the Hub as a Space; return its address.

    Raises:
        ValueError: the model is not on the Hub, or the Hub did not take the page.
    """
    import hub

    gradio_version()
    if Path(model_name).exists() or not all(model_name.partition("/")):
        raise ValueError(
            f"a Space loads its model from the Hub, and {model_name} is a folder: push that first (hub.py)"
        )
    repo_id = hub.check_access(repo_id, private=None, repo_type="space")
    with tempfile.TemporaryDirectory() as staging:
        stage_space(model_name, repo_id, Path(staging))
        return hub.upload(Path(staging), repo_id, "space", "Page by Luthier")


def stage_space(model_name: str, repo_id: str, staging: Path) -> None:
    """Put the files of a Space into an empty folder."""
    for module in MODULES:
        shutil.copyfile(PROJECT / module, staging / module)
    (staging / "start.py").write_text(f"from app import main\n\nmain([{model_name!r}])\n", encoding="utf-8")
    requirements = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line.split("#")[0].strip() for line in requirements if line.split(">=")[0] in PACKAGES]
    (staging / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    (staging / "README.md").write_text(
        f"""---
title: {json.dumps(repo_id.split("/")[1])}
sdk: gradio
sdk_version: {gradio_version()}
app_file: start.py
models:
- {model_name}
---

Tries [{model_name}](https://huggingface.co/{model_name}). Made with Luthier. A private model needs the
secret HF_TOKEN in the Space's settings.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
