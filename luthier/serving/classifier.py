"""A trained model that predicts: from files and addresses to classes, by torch or by ONNX Runtime."""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from luthier.cores import count_cores
from luthier.errors import UserError
from luthier.images.decode import decode_rgb, read_file, reason
from luthier.serving.fetch import fetch
from luthier.serving.network import Network

FETCHES = 8  # addresses at a time: they wait for servers, and not for cores
PAUSE = 0.2  # seconds without another input after which those that are there are answered
# Of an image from a server or a visitor; of the user's own files Pillow opens those of up to 179 million. Cameras of
# 50 megapixels give a little more than 50 million: 8,688 x 5,792.
MAX_FOREIGN_PIXELS = 51_000_000


class Prediction(NamedTuple):
    """What the model says about one input.

    Attributes:
        name: the file or the address.
        top: (class, probability), the likeliest first; empty where there is an error.
        unsure: the image is too unfamiliar, or the model too unsure, for an answer.
        error: why there is no prediction.
        none: the likeliest class is that of images which show none of the others; the prediction is unsure too.
    """

    name: str
    top: list[tuple[str, float]]
    unsure: bool = False
    error: str | None = None
    none: bool = False


Input = tuple[str, str | None]  # a file or an address, and why there is none
Waiting = tuple[str, str | None, Future | None]  # the same, and its view


def _take(waiting: deque[Waiting], most: int) -> list[Waiting]:
    return [waiting.popleft() for _ in range(min(most, len(waiting)))]


def _with_pauses(inputs: Iterable[Input], seconds: float) -> Iterator[Input | None]:
    """Yield the inputs in order, and None whenever the next one takes longer than some seconds, as from a pipe."""
    iterator, asked, given = iter(inputs), queue.SimpleQueue[bool](), queue.SimpleQueue[Any]()

    def read() -> None:
        while asked.get():  # one at a time: no more is read than is asked for
            try:
                given.put((next(iterator, None), None))
            except BaseException as error:
                given.put((None, error))

    # A daemon, as Python waits at its end for the thread of a pool, which may wait for a line that never comes.
    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            asked.put(True)
            while True:
                try:
                    entry, error = given.get(timeout=seconds)
                    break
                except queue.Empty:
                    yield None
            if error is not None:
                raise error
            if entry is None:
                return
            yield entry
    finally:
        asked.put(False)


def open_network(model_name: str, backend: str | None = None) -> Network:
    """Return a trained model, ready to predict.

    Args:
        model_name: a folder with a saved model, a name on the Hub, or a file that export.py has written.
        backend: what runs such a file, `onnxruntime` (if None) or `openvino`.

    Raises:
        ModelError, UserError: the model cannot be loaded, a backend is given for one that is no such file, or a folder
            of such files is given.
    """
    # Each is imported where it is needed: ONNX Runtime starts in a fifth of the time of torch and transformers.
    if model_name.endswith(".onnx"):
        from luthier.serving.onnx_network import OnnxNetwork

        return OnnxNetwork(Path(model_name), backend or "onnxruntime")
    if backend:
        raise UserError(
            f"--backend {backend} is for a .onnx file, and {model_name} is none: export it first (export.py)"
        )
    exported = sorted(Path(model_name).glob("*.onnx"))
    if exported and not Path(model_name, "config.json").exists():
        raise UserError(f"{model_name} is a folder of exported models: give one of its files, such as {exported[0]}")
    from luthier.serving.torch_network import TorchNetwork

    return TorchNetwork(model_name)


class Classifier:
    """A trained model, which sees an image as its evaluation saw it.

    Args:
        network: of `open_network`.
        always_answer: never be unsure, and never answer with the class of images that show none of the others.
        allow_private_urls: fetch from this machine and its network too.
    """

    def __init__(self, network: Network, always_answer: bool = False, allow_private_urls: bool = False):
        self.network, self.labels, self.batch_size = network, network.labels, network.batch_size
        self.always_answer, self.allow_private_urls = always_answer, allow_private_urls

    def predict_files(self, inputs: Iterable[Input], top_k: int) -> Iterator[Prediction]:
        """Yield the prediction of each input, in order.

        While the model works on a batch the next one is read and decoded. No more than two are in memory. Where the
        next input is late, as from a program that writes a list and waits for answers, a batch is not filled.

        Args:
            inputs: (file or address, None), or (name, why there is no such input).
            top_k: how many classes to return.
        """
        waiting: deque[Waiting] = deque()
        files, addresses = (
            ThreadPoolExecutor(threads, initializer=self.network.start_worker) for threads in (count_cores(), FETCHES)
        )
        try:
            for entry in _with_pauses(inputs, PAUSE):
                if entry is not None:
                    name, error = entry
                    pool = addresses if "://" in name else files
                    waiting.append((name, error, None if error else pool.submit(self.load_view, name)))
                while len(waiting) >= (1 if entry is None else 2 * self.batch_size):
                    yield from self._predict_batch(_take(waiting, self.batch_size), top_k)
            while waiting:
                yield from self._predict_batch(_take(waiting, self.batch_size), top_k)
        except BaseException:
            for pool in (files, addresses):  # after Ctrl-C they would wait for all that is being fetched
                pool.shutdown(wait=False, cancel_futures=True)
            raise
        for pool in (files, addresses):
            pool.shutdown()

    def predict(self, image: Image.Image, top_k: int) -> Prediction:
        """Return the prediction of one RGB image, without a name."""
        (row,) = self._answers([self.network.view(image)])
        return self._rank("", *row, top_k)

    def load_view(self, name: str) -> Any:
        """Return what the model sees of a file or an address.

        Raises:
            OSError, or any error that Pillow raises on damaged data.
        """
        return self.network.view(self.load_url(name) if "://" in name else self.load_file(name))

    def load_file(self, path: str, max_pixels: int | None = None) -> Image.Image:
        """Return the RGB image of a file.

        Args:
            path: of the file.
            max_pixels: see `decode_rgb`.

        Raises:
            OSError, or any error that Pillow raises on damaged data.
        """
        return decode_rgb(read_file(path), max_pixels=max_pixels).image

    def load_url(self, url: str) -> Image.Image:
        """Return the RGB image of an address, and never that of a file.

        Raises:
            OSError, or any error that Pillow raises on damaged data.
        """
        return decode_rgb(fetch(url, self.allow_private_urls), max_pixels=MAX_FOREIGN_PIXELS).image

    def _predict_batch(self, batch: list[Waiting], top_k: int) -> Iterator[Prediction]:
        views = [future.result() for _, _, future in batch if future and not future.exception()]
        answers = iter(self._answers(views) if views else [])
        for name, error, future in batch:
            if future and (failure := future.exception()):
                error = reason(failure)
            yield Prediction(name, [], error=error) if error else self._rank(name, *next(answers), top_k)

    def _answers(self, views: list[Any]) -> list[tuple[np.ndarray, bool]]:
        """Return for each view the probabilities [C], and whether the model is unsure."""
        none, (probabilities, sureness) = self.network.none, self.network.rate(views)
        if self.always_answer:
            if none is not None:
                probabilities = probabilities.copy()
                probabilities[:, none] = 0
            return [(row, False) for row in probabilities]
        unsure = ~(sureness >= self.network.unsure_below) | (probabilities.argmax(axis=1) == none)
        return list(zip(probabilities, unsure.tolist(), strict=True))

    def _rank(self, name: str, probabilities: np.ndarray, unsure: bool, top_k: int) -> Prediction:
        if not np.isfinite(probabilities).all():
            return Prediction(
                name, [], error="the model's answer is not a number: its weights or its export are damaged"
            )
        classes = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
        top = [(self.labels[index], float(probabilities[index])) for index in classes]
        return Prediction(name, top, unsure, none=classes[0] == self.network.none)
