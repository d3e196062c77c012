"""From an image to the pixels of its evaluation view with Pillow alone, for models that run without torch.

An image processor's settings become a `ResizeRule`, which an exported model carries along. `find_rule` applies it to
images of several shapes and compares: a processor that does anything else is refused, not approximated.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from luthier.errors import UserError

if TYPE_CHECKING:  # a model that runs without torch needs neither
    from luthier.images.views import EvaluationView

FILTERS = {resampling.name.lower(): resampling for resampling in Image.Resampling}
# Of 256. transformers resizes with torchvision, which rounds more coarsely than Pillow; the mean is over an image.
MAX_LEVELS, MAX_MEAN_LEVELS = 4, 0.3
SHAPES = ((64, 96), (97, 64), (301, 200), (333, 777), (500, 500), (40, 41))  # (height, width) of test images


class ResizeRule(NamedTuple):
    """How an image becomes the pixels that a model takes: resized, and then cropped or padded at its centre.

    Attributes:
        fit: `crop`, the shorter side becomes that of `to`; `pad`, the image fits into `to`; `stretch`, it fills `to`.
        to: (height, width) in pixels to which the fit refers.
        size: (height, width) in pixels of the result.
        filter: of Pillow's resampling, one of `FILTERS`.
        fill: (red, green, blue) of the border, 0 to 255, where there is one.
        centre: how half a pixel in the crop's position is rounded, `half_even` as torchvision or `floor`.
    """

    fit: str
    to: tuple[int, int]
    size: tuple[int, int]
    filter: str
    fill: tuple[int, int, int] = (0, 0, 0)
    centre: str = "half_even"

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ResizeRule":
        """Return the rule that `_asdict` and JSON have made these values of.

        Raises:
            KeyError, TypeError, ValueError: they are of no rule.
        """
        (height, width), (rows, columns), (red, green, blue) = values["to"], values["size"], values["fill"]
        rule = cls(
            str(values["fit"]), (int(height), int(width)), (int(rows), int(columns)), str(values["filter"]),
            (int(red), int(green), int(blue)), str(values["centre"]),
        )  # fmt: skip
        if rule.fit not in ("crop", "pad", "stretch") or rule.filter not in FILTERS or min(*rule.to, *rule.size) < 1:
            raise ValueError(f"{values} is no rule for resizing")
        return rule

    def apply(self, image: Image.Image) -> np.ndarray:
        """Return the pixels that a model takes of an RGB image, uint8 [H, W, 3]."""
        resized = image.resize(self._resized_size(image.width, image.height), FILTERS[self.filter])
        (height, width), have = self.size, resized.size
        left, top = self._before(width, have[0]), self._before(height, have[1])
        if (left, top) == (0, 0) and have == (width, height):
            return np.asarray(resized)
        if have[0] >= width and have[1] >= height:
            return np.asarray(resized.crop((-left, -top, width - left, height - top)))
        canvas = Image.new("RGB", (width, height), self.fill)
        canvas.paste(resized, (left, top))
        return np.asarray(canvas)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        if self.fit == "crop":
            side, shorter = self.to[0], min(width, height)
            return (side if width == shorter else int(side * width / height),
                    side if height == shorter else int(side * height / width))  # fmt: skip
        if self.fit == "pad":
            ratio = max(height / self.to[0], width / self.to[1])
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        return self.to[1], self.to[0]

    def _before(self, want: int, have: int) -> int:
        """Return how many pixels of border come before the image, on one axis; negative where it is cropped."""
        if have < want:
            return (want - have) // 2
        return -((have - want) // 2 if self.centre == "floor" else round((have - want) / 2))


def find_rule(view: "EvaluationView") -> ResizeRule:
    """Return the rule that gives the same pixels as an image processor.

    Raises:
        UserError: there is none, because the processor does something else with images.
    """
    name = type(view.image_processor).__name__
    try:
        rule = _read_settings(view)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name} has settings that are not known here ({error}): it cannot be exported") from None
    noise = np.random.default_rng(0)
    for shape in SHAPES:
        # Large patches and fine noise: both would show another crop or filter.
        patches = Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).resize(shape[::-1])
        pixels = np.asarray(patches) * 0.8 + noise.integers(0, 51, (*shape, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        expected = view.levels(view(image)).numpy().transpose(1, 2, 0)
        found = rule.apply(image)[..., ::-1] if view.reversed else rule.apply(image)
        difference = np.abs(found.astype(int) - expected)
        if difference.max() > MAX_LEVELS or difference.mean() > MAX_MEAN_LEVELS:
            raise UserError(
                f"{name} does more with an image than resize, crop and pad it (an image of {shape[1]} x {shape[0]} px "
                f"differs by up to {difference.max()} of 255 levels): this model cannot be exported"
            )
    return rule


def _read_settings(view: "EvaluationView") -> ResizeRule:
    """Return the rule that the settings of an image processor describe."""
    settings: dict[str, Any] = view.image_processor.to_dict()
    if "data_config" in settings:
        return _read_timm(settings["data_config"], view.size)
    filter_name = Image.Resampling(settings["resample"]).name.lower()
    size = settings["size"]
    if "crop_pct" in settings:  # ConvNeXt's own rule
        side = size["shortest_edge"]
        to = int(side / settings["crop_pct"]) if side < 384 else side
        return ResizeRule("crop" if side < 384 else "stretch", (to, to), view.size, filter_name, centre="floor")
    if size.get("shortest_edge"):
        to = (size["shortest_edge"], size["shortest_edge"])
        return ResizeRule("crop", to, view.size, filter_name, centre="floor")
    to = (size["height"], size["width"])
    is_cropped = settings.get("do_center_crop") and settings.get("crop_size") is not None
    return ResizeRule("stretch", to, view.size if is_cropped else to, filter_name, centre="floor")


def _read_timm(cfg: Mapping[str, Any], size: tuple[int, int]) -> ResizeRule:
    share = cfg.get("crop_pct") or 0.875
    to = (int(size[0] / share), int(size[1] / share))
    fit = {"squash": "stretch", "border": "pad"}.get(cfg.get("crop_mode") or "center", "crop")
    red, green, blue = (round(255 * value) for value in cfg["mean"])
    return ResizeRule(fit, to, size, cfg.get("interpolation") or "bilinear", (red, green, blue))
