"""How a model sees an image: the evaluation view, and the augmented training views."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from luthier.errors import UserError
from luthier.images.decode import decode_rgb, reason
from luthier.machine import one_thread

if TYPE_CHECKING:  # predict.py needs no `datasets`, which takes a second to import
    from datasets import Dataset

ELONGATED = 2.0  # aspect ratio above which a random crop hardly reaches the ends of an image
AUGMENTATIONS = ("none", "crop", "flip_crop", "trivial", "augmix")


def view_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Return (height, width) in pixels of what a model sees.

    Raises:
        UserError: it differs from image to image, or the processor gives no images, or has settings that it cannot
            work with.
    """
    try:
        shown = [image_processor(Image.new("RGB", size), return_tensors="pt") for size in ((96, 64), (64, 96))]
    except Exception as error:  # settings that make no sense raise errors of any kind
        raise UserError(
            f"this model's image processor cannot process an image ({reason(error)}): mend its settings in "
            "preprocessor_config.json"
        ) from error
    shapes = [tuple(each["pixel_values"].shape) if "pixel_values" in each else () for each in shown]
    if any(len(shape) != 4 for shape in shapes):  # as those of patches, or of tokens
        raise UserError("this model's image processor gives no images [N, 3, H, W]: use another model")
    wide, tall = (shape[2:] for shape in shapes)
    if wide != tall:
        raise UserError(
            f"this model's image processor gives every image another size ({wide} and {tall}), and such images form "
            "no batch: give it a crop (do_center_crop, crop_size) in preprocessor_config.json"
        )
    return wide[0], wide[1]


class EvaluationView:
    """The one view of evaluation: the image processor's own, and a compact form of it that loses nothing.

    A processor resizes 8-bit images to 8-bit images and then scales the values, so that a view holds at most 256
    different values in each channel. `pack` stores the levels, a quarter of the size; `unpack` looks them up. The
    values are measured, by giving the processor images of one colour, because every family of processors names its
    settings differently.

    Attributes:
        size: (height, width) of the view, in pixels.

    Raises:
        UserError: see `view_size`.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor
        self.size = view_size(image_processor)
        self._scales: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def measure(self) -> "EvaluationView":
        """Measure the values now, before several threads ask for them at once; return the view."""
        len(self.values)
        return self

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """The pixel value of each level in each channel, float32 [3, 256]."""
        with one_thread():
            return torch.stack([self._middle((level,) * 3) for level in range(256)], dim=1)

    @functools.cached_property
    def reversed(self) -> bool:
        """Whether the channels are blue, green, red, as MobileViT has them."""
        red = self._middle((255, 0, 0))
        return bool((red[2] - self.black[2]) * self.contrast[2] > (red[0] - self.black[0]) * self.contrast[0])

    @functools.cached_property
    def ends(self) -> str:
        """What becomes of the ends of a wide image: `cropped`, `squeezed` or `padded`; measured, as the values are."""
        image = Image.new("RGB", (256, 64), "black")
        image.paste("white", (64, 0, 192, 64))
        with one_thread():
            shown = self.levels(self(image)).float().mean(dim=0)
        middle, (height, width) = shown[shown.shape[0] // 2], shown.shape
        if middle[width // 16] > 128:
            return "cropped"
        return "squeezed" if shown[height // 16, width // 2] > 250 else "padded"

    @functools.cached_property
    def padding(self) -> list[int]:
        """The 8-bit RGB levels of the border where images are padded."""
        with one_thread():
            border = self.levels(self(Image.new("RGB", (256, 64), "white")))[:, 0, self.size[1] // 2].tolist()
        return border[::-1] if self.reversed else border

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the pixel values [3, H, W] of an RGB image."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def _middle(self, colour: tuple[int, int, int]) -> torch.Tensor:
        """Return the pixel values [3] in the middle of an image of one colour; at the border there may be padding."""
        return self(Image.new("RGB", (16, 16), colour))[:, self.size[0] // 2, self.size[1] // 2]

    @property
    def black(self) -> torch.Tensor:
        """The pixel value of black [3]."""
        return self.values[:, 0]

    @property
    def contrast(self) -> torch.Tensor:
        """The difference of white and black [3]."""
        return self.values[:, -1] - self.values[:, 0]

    def levels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the nearest 8-bit levels, uint8 [3, H, W]."""
        unit = (pixel_values - self.black[:, None, None]) / self.contrast[:, None, None]
        return (unit * 255).round().clamp(0, 255).to(torch.uint8)

    def scale(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the pixel values float32 [..., 3, H, W] of 8-bit levels, on their device."""
        if levels.device not in self._scales:  # copied to a GPU once, because it would wait for each copy
            line = (self.contrast / 255, self.black)
            self._scales[levels.device] = tuple(part[:, None, None].to(levels.device) for part in line)
        step, black = self._scales[levels.device]
        return levels.float().mul_(step).add_(black)

    def pack(self, pixel_values: torch.Tensor) -> bytes:
        """Return the view [3, H, W] as bytes: its levels, or the values themselves where levels would be inexact."""
        levels = self.levels(pixel_values).numpy()
        exact = np.array_equal(self._look_up(levels), pixel_values.numpy())
        return levels.tobytes() if exact else pixel_values.float().numpy().tobytes()

    def unpack(self, packed: bytes) -> torch.Tensor:
        """Return the view [3, H, W] that was packed, bit for bit; or that of an image file in its place.

        The size tells them apart, so an image file must have fewer bytes than a packed view.
        """
        shape = (3, *self.size)
        if len(packed) == np.prod(shape):
            return torch.from_numpy(self._look_up(np.frombuffer(packed, np.uint8).reshape(shape)))
        if len(packed) < np.prod(shape):
            return self(decode_rgb(packed).image)
        return torch.from_numpy(np.frombuffer(packed, np.float32).reshape(shape).copy())

    def _look_up(self, levels: np.ndarray) -> np.ndarray:
        values = self.values.numpy()
        return np.stack([np.take(values[channel], levels[channel]) for channel in range(3)])


class ImageRows(NamedTuple):
    """The images of a split as a model sees them, and what their features are kept under.

    Attributes:
        rows: a dataset whose rows have `pixel_values` [3, H, W], all of one size.
        key: of all that the `pixel_values` depend on besides the images.
        digests: SHA-256 of each image.
    """

    rows: "Dataset"
    key: str
    digests: list[str]


def training_transform(
    view: EvaluationView, augmentation: str, size: tuple[int, int] | None = None
) -> Callable[[Image.Image], torch.Tensor]:
    """Return the function from an RGB image to what training sees: 8-bit levels, uint8 [3, H, W].

    The Trainer scales them to pixel values on its device: a batch of levels is a fourth of the size. With `none` the
    function gives the pixel values themselves, float32 [3, H, W].

    Args:
        view: gives the size, the order of the channels, and the view that is augmented.
        augmentation: `none`, the evaluation view; `crop`, a random crop; `flip_crop`, that, mirrored half of the
            time; `trivial`, flip_crop and one random operation of TrivialAugmentWide (Müller and Hutter 2021);
            `augmix`, AugMix (Hendrycks et al. 2020) on the evaluation view, as in the original experiment.
        size: (height, width) of the random crops in pixels, if not the view's own.

    Raises:
        ValueError: there is no such augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {augmentation!r}")
    if augmentation == "none":
        return view
    if augmentation == "augmix":
        augmix = v2.AugMix()
        return lambda image: augmix(view.levels(view(image)))
    # At least 35% of the image, where torchvision's default is 8%: small crops lose the object. torchvision resizes a
    # tensor in a fifth of the time that Pillow takes, and to the same levels but for rounding.
    crop = v2.RandomResizedCrop(size or view.size, scale=(0.35, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    steps = [v2.PILToTensor(), Whole(view), crop] + ([v2.RandomHorizontalFlip()] if augmentation != "crop" else [])
    if augmentation == "trivial":  # whose operations are faster on Pillow's images
        steps += [v2.ToPILImage(), v2.TrivialAugmentWide(), v2.PILToTensor()]
    if view.reversed:
        steps.append(v2.Lambda(lambda levels: levels.flip(0)))
    return v2.Compose(steps)


class Whole:
    """Makes elongated images square where the view shows the whole of them, or training would see their middle alone.

    A random crop has an aspect ratio of 4:3 at most. torchvision tries ten times, and then takes the middle.

    Args:
        view: whose `ends` are followed.
    """

    def __init__(self, view: EvaluationView):
        self.ends, self.side = view.ends, max(view.size)
        self.padding = view.padding if self.ends == "padded" else [0, 0, 0]

    def __call__(self, levels: torch.Tensor) -> torch.Tensor:
        """Return 8-bit levels [3, H, W] as they are, or as a square."""
        height, width = levels.shape[-2:]
        short, long = sorted((height, width))
        if self.ends == "cropped" or long <= ELONGATED * short:
            return levels
        most, bicubic = 2 * self.side, v2.InterpolationMode.BICUBIC  # as large as training images are stored
        if self.ends == "squeezed":
            side = min(max(short, self.side), most)
            return v2.functional.resize(levels, [side, side], bicubic)
        if long > most:
            height, width = (max(1, round(each * most / long)) for each in (height, width))
            levels, long = v2.functional.resize(levels, [height, width], bicubic), most
        top, left = (long - height) // 2, (long - width) // 2
        border = [left, top, long - width - left, long - height - top]
        return v2.functional.pad(levels, border, fill=self.padding)


def random_crop_transform(view: EvaluationView) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from an evaluation view [3, H, W] to a random crop of it, of at least 8%, at its size.

    Not a way to evaluate: it shows how testing on random crops, as in the original experiment, distorts the score.
    """
    crop = v2.RandomResizedCrop(view.size, antialias=True)
    return lambda pixel_values: view.scale(crop(view.levels(pixel_values)))
