"""A trained model that predicts: from files and addresses to classes."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from luthier.familiarity import load_familiarity, none_of
from luthier.fusion import fuse_batchnorm
from luthier.images.decode import decode_rgb, reason
from luthier.images.views import view_size
from luthier.machine import configure_logging, keep_freed_memory
from luthier.serving.fetch import fetch
from models import labels_of, load_trained, threshold_of

MAX_URL_PIXELS = 50_000_000  # of an image from a server; for files Pillow's limit of 179 million holds


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


class Classifier:
    """A trained model, which sees an image as its evaluation saw it.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.
        always_answer: never be unsure, and never answer with the class of images that show none of the others.
        allow_private_urls: fetch from this machine and its network too.

    Raises:
        ModelError: the model cannot be loaded.
        UserError: its image processor gives every image another size.
    """

    def __init__(self, model_name: str, always_answer: bool = False, allow_private_urls: bool = False):
        configure_logging()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = accelerator or torch.device("cpu")
        if accelerator is None:
            keep_freed_memory()
        self.batch_size = 64 if accelerator else 16
        model, self.image_processor = load_trained(model_name)
        model.to(self.device)  # type: ignore[arg-type]  # the library wraps torch's method
        self.model = fuse_batchnorm(model, view_size(self.image_processor))
        self.labels = labels_of(model)
        self.none, self.always_answer = none_of(model), always_answer
        self.familiarity = None if always_answer else load_familiarity(model, model_name)
        self.threshold = self.familiarity.unsure_below if self.familiarity else threshold_of(model)
        self._features: list[torch.Tensor] = []  # of the batch that the model works on
        self._turn = threading.Lock()  # the app answers several people at once
        if self.familiarity:
            self.model.get_submodule(self.familiarity.head).register_forward_pre_hook(self._keep_features)
        self.allow_private_urls = allow_private_urls

    def predict_files(self, inputs: Iterable[tuple[str, str | None]], top_k: int) -> Iterator[Prediction]:
        """Yield the prediction of each input, in order.

        While the model works on a batch the next one is read and decoded. No more than two are in memory.

        Args:
            inputs: (file or address, None), or (name, why there is no such input).
            top_k: how many classes to return.
        """
        waiting: deque[tuple[str, str | None, Future | None]] = deque()
        # Each worker has one torch thread: together they keep all cores busy, and the model needs these too.
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, error in inputs:
                waiting.append((name, error, None if error else pool.submit(self.load_view, name)))
                if len(waiting) == 2 * self.batch_size:
                    yield from self._predict_batch([waiting.popleft() for _ in range(self.batch_size)], top_k)
            while waiting:
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                yield from self._predict_batch(batch, top_k)

    def predict(self, image: Image.Image, top_k: int, name: str = "") -> Prediction:
        """Return the prediction of one RGB image."""
        (row,) = self._answers([self.view(image)])
        return self._rank(name, *row, top_k)

    def load_view(self, name: str) -> torch.Tensor:
        """Return what the model sees of a file or an address, pixel values [3, H, W].

        Raises:
            OSError, or any error that Pillow raises on damaged data.
        """
        return self.view(self.load_url(name) if "://" in name else self.load_file(name))

    def load_file(self, path: str) -> Image.Image:
        """Return the RGB image of a file.

        Raises:
            OSError, or any error that Pillow raises on damaged data.
        """
        return decode_rgb(Path(path).read_bytes()).image

    def load_url(self, url: str) -> Image.Image:
        """Return the RGB image of an address, and never that of a file.

        Raises:
            OSError, or any error that Pillow raises on damaged data.
        """
        return decode_rgb(fetch(url, self.allow_private_urls), max_pixels=MAX_URL_PIXELS).image

    def view(self, image: Image.Image) -> torch.Tensor:
        """Return the evaluation view of an RGB image, pixel values [3, H, W]."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def _predict_batch(self, batch: list[tuple[str, str | None, Future | None]], top_k: int) -> Iterator[Prediction]:
        errors, views = {}, {}
        for number, (_, error, future) in enumerate(batch):
            failure = future.exception() if future else None
            if future is None or failure:
                errors[number] = reason(failure) if failure else error
            else:
                views[number] = future.result()
        rows = dict(zip(views, self._answers(list(views.values())), strict=True)) if views else {}
        for number, (name, _, _) in enumerate(batch):
            yield (
                self._rank(name, *rows[number], top_k)
                if number in rows
                else Prediction(name, [], error=errors[number])
            )

    @torch.inference_mode()
    def rate(self, views: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for N views the probabilities [N, C], and what decides whether the model answers [N].

        That is its familiarity where it has one, and otherwise the confidence.
        """
        pixel_values = torch.stack(views).to(self.device, memory_format=torch.channels_last)
        with self._turn:
            self._features.clear()
            probabilities = self.model(pixel_values=pixel_values).logits.float().softmax(dim=-1)
            features = list(self._features)
        if self.familiarity:
            return probabilities, self.familiarity.rate(probabilities, *features)
        return probabilities, probabilities.amax(dim=-1)

    @torch.inference_mode()
    def _answers(self, views: list[torch.Tensor]) -> list[tuple[torch.Tensor, bool]]:
        """Return for each view the probabilities [C], and whether the model is unsure."""
        probabilities, sureness = self.rate(views)
        if self.always_answer and self.none is not None:
            probabilities[:, self.none] = 0
        unsure = ~(sureness >= self.threshold) | (probabilities.argmax(dim=-1) == self.none)
        return list(zip(probabilities.cpu(), (unsure & (not self.always_answer)).tolist(), strict=True))

    def _keep_features(self, head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self._features.append(inputs[0])

    def _rank(self, name: str, probabilities: torch.Tensor, unsure: bool, top_k: int) -> Prediction:
        shares, classes = probabilities.topk(min(top_k, len(self.labels)))
        top = [(self.labels[index], share) for index, share in zip(classes.tolist(), shares.tolist(), strict=True)]
        return Prediction(name, top, unsure, none=int(classes[0]) == self.none)
