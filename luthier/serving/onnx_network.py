"""A trained model that ONNX Runtime or OpenVINO runs, a file of export.py: no import of torch nor transformers."""

import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from luthier.cores import count_cores
from luthier.errors import UserError, first_line, require
from luthier.images.resizing import ResizeRule
from luthier.serving.network import Rated

logger = logging.getLogger(__name__)

INPUT = "pixel_values"
OUTPUTS = ("logits", "probabilities", "sureness")
FORMAT = 1  # of the metadata


class Facts(NamedTuple):
    """What a program must know to use an exported model; its file holds it as metadata.

    Attributes:
        labels: names of the classes.
        resize: how an image becomes the model's input.
        unsure_below: the sureness below which there is no answer.
        none: the class of images that show none of the others, if any.
        precision: of the weights, `fp32`, `fp16` or `int8`.
    """

    labels: list[str]
    resize: ResizeRule
    unsure_below: float
    none: int | None
    precision: str = "fp32"

    def describe(self) -> dict[str, Any]:
        """Return the facts as values of JSON."""
        return {"format": FORMAT, **self._asdict(), "resize": self.resize._asdict()}

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> "Facts":
        """Return the facts that the metadata of a file hold, each as JSON.

        Raises:
            KeyError, TypeError, ValueError: they hold none.
        """
        values = {name: json.loads(metadata[name]) for name in ("format", *cls._fields)}
        if values.pop("format") != FORMAT:
            raise ValueError("it is of another version of Luthier")
        values["resize"] = ResizeRule.read(values["resize"])
        return cls(**values)


class OnnxNetwork:
    """An exported model on the CPU. See `network.Network`.

    Args:
        path: of the file.
        backend: what runs it, `onnxruntime` or `openvino`.

    Raises:
        UserError: there is no such file, it is damaged or not of this version's export.py, or the backend is not
            installed.
    """

    batch_size = 16

    def __init__(self, path: Path, backend: str = "onnxruntime"):
        if not path.is_file():
            raise UserError(f"there is no file {path}: python export.py MODEL writes one from a trained model")
        require("a .onnx file", ["onnxruntime"], "requirements-export.txt")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised too
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores decode images meanwhile
        if count_cores() < (os.cpu_count() or 1):  # by default it binds a thread to each core of the machine
            options.intra_op_num_threads = count_cores()
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has no error of its own
            raise UserError(
                f"{path} is not a model that ONNX Runtime can load ({first_line(error)[:200]}): export it again"
            ) from error
        try:
            self.facts = Facts.read(session.get_modelmeta().custom_metadata_map)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} does not say how it is used ({error}): it is not of this version's export.py. Export it again"
            ) from error
        self.labels, self.none = self.facts.labels, self.facts.none
        self.unsure_below = self.facts.unsure_below
        if backend == "openvino" and self.facts.precision == "int8":  # see docs/export.md
            logger.warning(f"careful  export.py compared {path.name} in ONNX Runtime; OpenVINO may answer otherwise")
        self._run = _run_openvino(path) if backend == "openvino" else functools.partial(session.run, OUTPUTS[1:])

    def start_worker(self) -> None:
        """Do nothing: Pillow works in the thread that calls it."""

    def view(self, image: Image.Image) -> np.ndarray:
        """Return what the model sees of an RGB image, uint8 [H, W, 3]."""
        return self.facts.resize.apply(image)

    def rate(self, views: list[np.ndarray]) -> Rated:
        """Return what the model says of N views."""
        return Rated(*self._run({INPUT: np.stack(views)}))


def _run_openvino(path: Path) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """Return the function that runs an exported model with OpenVINO, one thread at a time."""
    require("--backend openvino", ["openvino"], "requirements-export.txt")
    import openvino

    # Its default is bfloat16 where the processor has it, whose logits differ in the second decimal place.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": count_cores()}
    compiled, turn = openvino.Core().compile_model(path, "CPU", settings), threading.Lock()

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        with turn:
            outputs = compiled(inputs)
            return [outputs[name].copy() for name in OUTPUTS[1:]]

    return run
