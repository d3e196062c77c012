"""Whether an exported model answers as the trained one does: both on the same images, and the differences."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from luthier.errors import UserError
from luthier.images.decode import decode_rgb, reason
from luthier.scoring.intervals import interval_of_difference
from luthier.serving.network import Network, Rated
from luthier.terminal import Tenths, percent, plural, points

MAX_LOSS = 0.01  # of accuracy that a smaller model may cost, beyond what chance explains
PROVEN = -0.05  # a lower end of the interval below this says that there were too few images
ROUNDING = 0.02  # of the sureness: closer to the threshold, either answer is right


class Images(NamedTuple):
    """What an exported model is compared on.

    Attributes:
        names: of the images.
        read: returns the file of an image, by its number.
        labels: the class of each; None where they are not known, and the trained model's answers take their place.
        groups: int [N], the same for images that belong together; None where each stands alone.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None

    def views(self, network: Network, topic: str, most: int | None = None) -> Iterator:
        """Yield what a network sees of each image, or of some from all over, and say how far this is.

        Args:
            network: whose views they are.
            topic: of the lines that say how far it is.
            most: how many images, at most; None is all.

        Raises:
            UserError: an image cannot be read.
        """
        n = len(self.names)
        count = min(n, most or n)
        progress = Tenths(topic, count, "images", quiet_seconds=10)
        for done, number in enumerate((part * n // count for part in range(count)), 1):
            try:
                image = decode_rgb(self.read(number)).image
            except Exception as error:  # Pillow raises errors of any kind on damaged data
                raise UserError(f"{self.names[number]} cannot be read ({reason(error)}): mend or remove it") from error
            yield network.view(image)
            progress.reach(done)

    def rate(self, network: Network, topic: str) -> Rated:
        """Return what a network says of all images; arguments and errors as in `views`."""
        views = self.views(network, topic)
        batches = iter(lambda: list(islice(views, network.batch_size)), [])
        rated = [network.rate(batch) for batch in batches]
        probabilities, sureness = zip(*rated, strict=True)
        return Rated(np.concatenate(probabilities), np.concatenate(sureness))


class Parity(NamedTuple):
    """How an exported model's answers differ from the trained one's.

    Attributes:
        precision: of the exported weights.
        n: how many images both have answered.
        same: for how many of them the likeliest class is the same.
        not_finite: for how many the exported model's answer is no finite number, and the trained one's is.
        other_answers: how many are unsure by one and not by the other, by more than rounding.
        largest_difference: of a probability; 1 where one of the two is not a number.
        labelled: their classes are known; otherwise the trained model's answers count as correct.
        accuracy: of the trained and of the exported model.
        difference_ci95: 95% interval of the exported model's accuracy less the trained one's, paired.
        overflows: for how many a value inside the model is too large for float16, see `export.count_overflows`.
    """

    precision: str
    n: int
    same: int
    not_finite: int
    other_answers: int
    largest_difference: float
    labelled: bool
    accuracy: tuple[float, float]
    difference_ci95: tuple[float, float]
    overflows: int = 0

    @property
    def refusal(self) -> str | None:
        """Why nobody should use the exported model; None where there is no reason."""
        if self.not_finite:
            return f"the answers to {plural(self.not_finite, 'image')} are no finite numbers"
        if self.overflows:
            return f"values inside it are too large for float16, for {plural(self.overflows, 'image')}"
        if self.precision == "fp32" and self.same < self.n:
            return f"{plural(self.n - self.same, 'image gets', 'images get')} another class than by the trained model"
        if self.precision == "fp32" and self.other_answers:
            return f"{plural(self.other_answers, 'image is', 'images are')} unsure by one of the two alone"
        if self.difference_ci95[1] < -MAX_LOSS:
            return f"it loses more than {MAX_LOSS * 100:.0f} point of accuracy, even at the upper end of the interval"
        return None

    @property
    def doubt(self) -> str | None:
        """Why the figures do not say whether the exported model is as good; None where they do."""
        if self.difference_ci95[0] >= PROVEN or self.precision == "fp32":
            return None
        return f"{plural(self.n, 'image')} cannot show whether it is as good as the model: compare on more (--check)"

    def __str__(self) -> str:
        """The figures in a sentence."""
        same = f"the same class for {self.same:,} of {plural(self.n, 'image')}"
        if self.other_answers:
            same += f", unsure by one alone for {self.other_answers:,}"
        if self.precision == "fp32" or not self.labelled:
            return f"{same}; largest difference of a probability {self.largest_difference:.2g}"
        before, after = self.accuracy
        low, high = map(points, self.difference_ci95)
        return (
            f"{same}; accuracy {percent(after)} instead of {percent(before)} ({points(after - before)} points, "
            f"95% interval {low} to {high})"
        )


def compare(exported: Network, rated: Rated, images: Images, precision: str) -> Parity:
    """Return how the answers of an exported model differ from the trained one's.

    Args:
        exported: the exported model.
        rated: what the trained model says of the images.
        images: that are compared.
        precision: of the exported weights.

    Raises:
        UserError: an image cannot be read.
    """
    other = images.rate(exported, precision)
    before, after = rated.probabilities.argmax(axis=1), other.probabilities.argmax(axis=1)
    truth = before if images.labels is None else images.labels
    correct = [(answers == truth).astype(int) for answers in (before, after)]
    sure = [each.sureness >= exported.unsure_below for each in (rated, other)]
    apart = ~(np.abs(rated.sureness - other.sureness) <= ROUNDING)  # so of what is no number, too
    finite = [np.isfinite(each.probabilities).all(axis=1) & ~np.isnan(each.sureness) for each in (rated, other)]
    pairs = zip(rated.probabilities, other.probabilities, strict=True)  # by row: there may be many classes
    largest = max(float(np.nan_to_num(np.abs(one - two), nan=1.0).max()) for one, two in pairs)
    return Parity(
        precision=precision,
        n=len(truth),
        same=int((before == after).sum()),
        not_finite=int((finite[0] & ~finite[1]).sum()),
        other_answers=int(((sure[0] != sure[1]) & apart).sum()),
        largest_difference=largest,
        labelled=images.labels is not None,
        accuracy=(float(correct[0].mean()), float(correct[1].mean())),
        difference_ci95=interval_of_difference(correct[1] - correct[0], images.groups),
    )
