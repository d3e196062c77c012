"""What runs a trained model, and what it says of images: the same for torch and for ONNX Runtime."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image


class Rated(NamedTuple):
    """What a model says of N images.

    Attributes:
        probabilities: of the classes, float32 [N, C].
        sureness: what decides whether there is an answer, float32 [N]: the familiarity of the image where the model
            knows it, and otherwise the confidence.
    """

    probabilities: np.ndarray
    sureness: np.ndarray


class Network(Protocol):
    """A model and the library that runs it.

    Attributes:
        labels: names of the classes.
        unsure_below: the sureness below which there is no answer.
        none: the class of images that show none of the others, if any.
        batch_size: how many images it works on at a time.
    """

    labels: list[str]
    unsure_below: float
    none: int | None
    batch_size: int

    def view(self, image: Image.Image) -> Any:
        """Return what the model sees of an RGB image."""

    def rate(self, views: list[Any]) -> Rated:
        """Return what the model says of several views; several threads may call it at once."""

    def start_worker(self) -> None:
        """Prepare a thread that calls `view`."""
