"""A trained model as what answers questions: from files and addresses to classes; predict.py and app.py ask it."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from fetch import fetch
from images import decode_rgb, reason
from inference import fold
from machine import keep_memory, quiet_libraries
from models import labels_of, load_trained, threshold_of
from views import view_size

URL_PIXELS = 50_000_000  # of a picture that somebody else serves; of a file Pillow's limit of 179 million holds


class Answer(NamedTuple):
    """The answer to one input.

    Attributes:
        name: the file or the address.
        top: (class, probability), the likeliest first; empty where there is an error.
        unsure: the likeliest class is below the model's threshold.
        error: why there is no answer.
    """

    name: str
    top: list[tuple[str, float]]
    unsure: bool = False
    error: str | None = None


class Classifier:
    """A trained model, which sees a picture as its evaluation saw it.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.
        always_answer: never be unsure.
        allow_private_urls: fetch from this machine and its network too.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, model_name: str, always_answer: bool = False, allow_private_urls: bool = False):
        quiet_libraries()
        gpu = torch.accelerator.is_available()
        self.device = torch.accelerator.current_accelerator() if gpu else torch.device("cpu")
        if not gpu:
            keep_memory()
        self.batch_size = 64 if gpu else 16
        model, self.image_processor = load_trained(model_name)
        self.model = fold(model.to(self.device), view_size(self.image_processor))
        self.labels = labels_of(model)
        self.threshold = 0.0 if always_answer else threshold_of(model)
        self.allow_private_urls = allow_private_urls

    def answers(self, inputs: Iterable[tuple[str, str | None]], top_k: int) -> Iterator[Answer]:
        """Yield the answer to each (file or address, what is wrong with it already), in order.

        While the model works on a batch the next one is read and decoded; no more than two are in memory.
        """
        waiting = deque()
        # One thread for each: what they do between them is enough for all cores, and the model wants these too.
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name, error in inputs:
                waiting.append((name, error, None if error else pool.submit(self.see, name)))
                if len(waiting) == 2 * self.batch_size:
                    yield from self._answer([waiting.popleft() for _ in range(self.batch_size)], top_k)
            while waiting:
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                yield from self._answer(batch, top_k)

    def answer(self, image: Image.Image, top_k: int, name: str = "") -> Answer:
        """Return the answer to one RGB picture."""
        return self._rank(name, self._probabilities([self.view(image)])[0], top_k)

    def see(self, name: str) -> torch.Tensor:
        """Return what the model sees of a file or an address, pixel values [3, H, W].

        Raises:
            OSError, or whatever Pillow raises on damaged data.
        """
        return self.view(self.open(name))

    def open(self, name: str) -> Image.Image:
        """Return the RGB picture of a file or an address.

        Raises:
            OSError, or whatever Pillow raises on damaged data.
        """
        if "://" in name:
            return self.open_url(name)
        return decode_rgb(Path(name).read_bytes()).image

    def open_url(self, url: str) -> Image.Image:
        """Return the RGB picture of an address; of nothing else, whoever gave it."""
        return decode_rgb(fetch(url, self.allow_private_urls), most_pixels=URL_PIXELS).image

    def view(self, image: Image.Image) -> torch.Tensor:
        """Return the evaluation view of an RGB picture, pixel values [3, H, W]."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def _answer(self, batch: list[tuple[str, str | None, Future | None]], top_k: int) -> Iterator[Answer]:
        errors, seen = {}, {}
        for number, (_, error, future) in enumerate(batch):
            failure = error or future.exception()
            if failure:
                errors[number] = error or reason(failure)
            else:
                seen[number] = future.result()
        rows = dict(zip(seen, self._probabilities(list(seen.values())), strict=True)) if seen else {}
        for number, (name, _, _) in enumerate(batch):
            yield self._rank(name, rows[number], top_k) if number in rows else Answer(name, [], error=errors[number])

    @torch.inference_mode()
    def _probabilities(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Return the probabilities [N, C] of N views."""
        pixel_values = torch.stack(views).to(self.device, memory_format=torch.channels_last)
        return self.model(pixel_values=pixel_values).logits.float().softmax(dim=-1).cpu()

    def _rank(self, name: str, probabilities: torch.Tensor, top_k: int) -> Answer:
        shares, classes = probabilities.topk(min(top_k, len(self.labels)))
        top = [(self.labels[index], share) for index, share in zip(classes.tolist(), shares.tolist(), strict=True)]
        return Answer(name, top, unsure=top[0][1] < self.threshold)
