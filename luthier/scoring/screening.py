"""What a probe on a few images tells before anything is trained: which view suits them, and which backbone."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import BaseImageProcessor, PreTrainedModel, Trainer

from luthier.cache import list_of
from luthier.images.splits import draw_order, stratified_folds
from luthier.images.views import EvaluationView, view_size
from luthier.machine import choose_memory_format
from luthier.processes import from_main_process
from luthier.run_files import BACKBONE
from luthier.scoring.intervals import standard_error
from luthier.terminal import say
from luthier.training.features import build_backbone, compute_features
from luthier.training.probe import fit_parts
from models import EFFICIENTNETS, HubUnreachable, ModelError, change_view, check_view, linear_head, takes_size

IMAGES, CLASSES = 192, 24  # of train that are looked at, at most: eight images of a class, where classes are even
FOLDS = 4
STRENGTHS = (1.0, 0.03)
GUESS = 0.05  # share of a prediction that is a guess at random, so that no single surprise decides
LEAST_SIDE = 32  # pixels; what a model sees is a multiple of it
COARSE = 0.5  # side at which fits are compared, in sides of the model's own view
TINY = 0.25  # side of images for which smaller sides are tried, likewise
# Besides the built-in ones, where the Hub can be reached; all of them under the Apache License 2.0 (docs/usage.md).
HUB_BACKBONES = (
    "timm/mobilenetv4_conv_medium.e500_r256_in1k",
    "timm/convnext_nano.in12k_ft_in1k",
    "timm/convnext_tiny.in12k_ft_in1k",
    "timm/tiny_vit_21m_224.dist_in22k_ft_in1k",
    "timm/vit_small_patch14_dinov2.lvd142m",
)
SQUARE = 1.05  # aspect ratio up to which an image counts as square


class View(NamedTuple):
    """A way to show images to a model.

    Attributes:
        fit: see `models.change_view`.
        side: in pixels.
        losses: float64 [N], of a probe, see `cross_fitted_losses`; None where it was not tried at this side.
    """

    fit: str
    side: int
    losses: np.ndarray | None

    @property
    def loss(self) -> float:
        """The mean loss; NaN where there is none."""
        return math.nan if self.losses is None else float(self.losses.mean())

    def is_better(self, other: "View", groups: np.ndarray) -> bool:
        """Tell whether the mean loss is lower by more than the standard error of the difference, image by image.

        Args:
            other: likewise tried.
            groups: int [N]; images of one group are no independent evidence.
        """
        assert self.losses is not None and other.losses is not None
        return self.loss < other.loss - standard_error(other.losses - self.losses, groups)


def choose_view(
    model: PreTrainedModel, image_processor: BaseImageProcessor, sample: "Sample", enabled: bool, any_side: bool
) -> tuple[EvaluationView, list[View]]:
    """Return how a model is to see the images, and a list of views: the chosen one, and then all that were tried.

    The model's own crop gives way to the whole image, and its own side to a smaller one, only where the loss is then
    lower by more than a standard error. Smaller sides are tried for tiny images: their own size, twice that, and
    so on. The list is empty where nothing is tried.

    Args:
        model: the config of a timm model is changed with the view.
        image_processor: of the model.
        sample: a few images.
        enabled: False, a model without a linear head, or a view that is no square leaves the model's own view.
        any_side: False leaves the model's own side.

    Raises:
        ModelError: see `models.check_view`.
        UserError: see `view_size`; or the features are not finite.
    """
    side, wide = view_size(image_processor)
    check_view(model, (side, wide), advice="Use another model")
    if not enabled or linear_head(model) is None or side != wide:
        return EvaluationView(image_processor), []
    trials = _Trials(model, image_processor, side, sample)
    coarse = LEAST_SIDE * round(COARSE * side / LEAST_SIDE)  # enough to compare the fits, in a quarter of the time
    coarse = coarse if takes_size(model, coarse) else side
    fits = trials.try_fits(("own", "squeeze") if sample.is_square else ("own", "squeeze", "pad"), coarse)
    best = min(fits, key=lambda view: view.loss)
    fit = best.fit if best.is_better(fits[0], sample.groups) else "own"
    chosen = View(fit, side, None)
    smaller = [pixels for pixels in _smaller_sides(sample.shorter_side, side) if takes_size(model, pixels)]
    if any_side and smaller:
        large = trials.view(fit, side)
        small = min([trials.view(fit, pixels) for pixels in smaller], key=lambda view: view.loss)
        chosen = small if small.is_better(large, sample.groups) else large
    return EvaluationView(trials.processor(chosen.fit, chosen.side)), [chosen, *trials.views.values()]


class _Trials:
    """The views of a sample that were tried.

    Args:
        model: its config is that of its own view while views are tried.
        own: the image processor of the model's own view.
        own_side: of that view, in pixels.
        sample: a few images.

    Attributes:
        views: by fit and side, in the order in which they were tried.
    """

    def __init__(self, model: PreTrainedModel, own: BaseImageProcessor, own_side: int, sample: "Sample"):
        self.model, self.own, self.own_side, self.sample = model, own, own_side, sample
        self.views: dict[tuple[str, int], View] = {}

    def view(self, fit: str, side: int) -> View:
        """Return a view with its losses; try it where that was not done before."""
        if (fit, side) not in self.views:
            self.try_fits([fit], side)
        return self.views[fit, side]

    def try_fits(self, fits: Sequence[str], side: int) -> list[View]:
        """Try views of one side; leave out those that the image processor cannot show."""
        config = getattr(self.model.config, "pretrained_cfg", None)
        processors: dict[str, BaseImageProcessor] = {}
        for fit in fits:
            with contextlib.suppress(ModelError):
                processors[fit] = self.processor(fit, side)
        if config is not None:
            self.model.config.pretrained_cfg = config  # where `change_view` notes the last view
        all_losses, _ = self.sample.losses(self.model, *processors.values())
        views = [View(fit, side, losses) for fit, losses in zip(processors, all_losses, strict=True)]
        self.views.update({(view.fit, view.side): view for view in views})
        return views

    def processor(self, fit: str, side: int) -> BaseImageProcessor:
        """Return the image processor of a view; that of another view than the model's own changes the config."""
        return self.own if (fit, side) == ("own", self.own_side) else change_view(self.model, self.own, side, fit)


def _smaller_sides(shorter_side: int, side: int) -> list[int]:
    """Return the sides below a model's own to try: of tiny images their own size in pixels, twice that, and so on."""
    if shorter_side > TINY * side:
        return []
    sides, pixels = [], LEAST_SIDE * math.ceil(shorter_side / LEAST_SIDE)
    while pixels <= side / 2:
        sides.append(pixels)
        pixels *= 2
    return sides


class Sample:
    """A few training images, for probes of many kinds.

    Args:
        rows: returns the rows of an image processor, which give `pixel_values`.
        labels: class indices [N].
        groups: int [N]; images of one group are in one fold.
        sizes: (width, height) of each image in pixels.
        predictor: returns a Trainer that only predicts with a model.
    """

    def __init__(
        self,
        rows: Callable[[BaseImageProcessor], Any],
        labels: Sequence[int],
        groups: np.ndarray,
        sizes: Sequence[tuple[int, int]],
        predictor: Callable[[PreTrainedModel], Trainer],
    ):
        self.rows, self.groups, self.predictor = rows, groups, predictor
        _, self.labels = np.unique(labels, return_inverse=True)  # without gaps
        self.folds = stratified_folds(self.labels, groups, FOLDS, seed=1)
        self.shorter_side = int(np.median([min(size) for size in sizes]))
        self.is_square = bool(np.mean([max(size) <= SQUARE * min(size) for size in sizes]) > 0.9)

    def losses(self, model: PreTrainedModel, *image_processors: BaseImageProcessor) -> tuple[list[np.ndarray], float]:
        """Return for each image processor the cross-fitted loss of each image, float64 [N], on every process.

        All show the images at one size. Also return the seconds that the features took, for each of them.
        """
        head = linear_head(model)
        assert head is not None  # asked for before
        each_rows, begin = [self.rows(each) for each in image_processors], time.perf_counter()
        trainer, backbone = self.predictor(model), build_backbone(model, head, each_rows[0])
        choose_memory_format(backbone, trainer.args.device, len(self.labels))
        features = [compute_features(trainer, backbone, rows) for rows in each_rows]
        seconds = (time.perf_counter() - begin) / len(features)
        labels = torch.from_numpy(self.labels)
        losses = [cross_fitted_losses(each, labels, self.folds) for each in features if each is not None]
        return from_main_process(losses), seconds


def of_some_classes(order: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """Return those rows of an order, int [n], that are of some classes: an image of each of many would tell nothing.

    Args:
        order: rows, int [N].
        labels: int [N], by row.
        most: how many classes, at most.
    """
    some = np.random.default_rng(1).permutation(np.unique(labels))[:most]
    return order[np.isin(labels[order], some)]


def draw_sample(
    train: Dataset,
    rows: Callable[[Dataset, BaseImageProcessor], Any],
    predictor: Callable[[PreTrainedModel], Trainer],
) -> Sample:
    """Return a sample of the training images, the same in every run, and nearly the same when images are added.

    Args:
        train: as loaded.
        rows: see `data.sample_rows`.
        predictor: returns a Trainer that only predicts with a model.
    """
    labels = np.array(list_of(train, "label"))
    order = of_some_classes(draw_order(list_of(train, "digest"), seed=1), labels, CLASSES)
    # Without two of a class, nothing learned from the sample could be wrong about it.
    firsts = np.concatenate([np.flatnonzero(labels[order] == label)[:2] for label in np.unique(labels[order])])
    order = np.concatenate([order[firsts], np.delete(order, firsts)])
    drawn = train.select(np.sort(order[:IMAGES]))
    sizes = list(zip(drawn["width"][:], drawn["height"][:], strict=True))
    groups = np.array(drawn["group"][:])
    return Sample(lambda processor: rows(drawn, processor), drawn["label"][:], groups, sizes, predictor)


class Backbone(NamedTuple):
    """A candidate for the backbone.

    Attributes:
        name: as `--model_name` takes it.
        loss: cross-fitted, of a probe.
        milliseconds: that an image takes, with its preparation.
    """

    name: str
    loss: float
    milliseconds: float


def choose_backbone(
    name: str,
    build: Callable[[str], tuple[PreTrainedModel, BaseImageProcessor]],
    sample: Sample,
    milliseconds: float,
    run_dir: Path | None = None,
) -> str:
    """Return the name that is given, or for `auto` that of the backbone with the lowest loss within a budget of time.

    Candidates of the Hub are left out where it cannot be reached. The first candidate may exceed the budget.

    Args:
        name: `--model_name`.
        build: as `models.build_model`, by name.
        sample: a few images.
        milliseconds: the budget for an image.
        run_dir: keeps the choice, which depends on the clock, for the other folds and for a resumed run.
    """
    if name != "auto":
        return name
    record = run_dir / BACKBONE if run_dir else None
    recorded = from_main_process(record.read_text(encoding="utf-8") if record and record.exists() else None)
    if recorded:
        return recorded
    tried: list[Backbone] = []
    for candidate in (*EFFICIENTNETS, *HUB_BACKBONES):
        built, failure = None, None
        try:
            built = build(candidate)
        except ModelError as error:
            failure = (isinstance(error, HubUnreachable), str(error))
        failures = [each for each in gather_object([failure]) if each]  # all processes go on alike
        if any(unreachable for unreachable, _ in failures):
            say("backbone", "the Hub cannot be reached: only the built-in ones are compared")
            break
        if failures or built is None:
            say("backbone", f"{candidate} is left out: {failures[0][1]}")
            continue
        model, image_processor = built
        (losses,), seconds = sample.losses(model, image_processor)
        tried.append(Backbone(candidate, float(losses.mean()), 1000 * seconds / len(sample.labels)))
    affordable = [backbone for backbone in tried if backbone.milliseconds <= milliseconds] or tried[:1]
    best = min(affordable, key=lambda backbone: backbone.loss)
    chosen = from_main_process(best.name)  # seconds differ between processes
    listed = (f"{each.name} {each.loss:.3f}, {each.milliseconds:.0f} ms" for each in tried)
    if record and PartialState().is_main_process:
        record.write_text(chosen, encoding="utf-8")
    say("backbone", f"{chosen}; loss of a probe, time an image: {'; '.join(listed)}")
    return chosen


def cross_fitted_losses(features: torch.Tensor, labels: torch.Tensor, folds: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each image, float64 [N]; see `losses_of_views`."""
    return losses_of_views([features], labels, folds)[0]


def losses_of_views(views: Sequence[torch.Tensor], labels: torch.Tensor, folds: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each image in each view, float64 [V, N], by probes that have not seen its fold.

    The probes learn from the first view. Of several penalties the one with the lowest mean there counts. A probability
    is mixed with a guess, or a few images of which a probe is wrongly sure would outweigh all others. An image whose
    class is not in the other folds counts as a guess in every view: how wrong a probe is that does not know the class
    tells nothing. Where each class has one image or group in train, all views are then alike.

    Args:
        views: features, float32 [N, D] each.
        labels: int64 [N].
        folds: int [N].
    """
    classes, names = int(labels.max()) + 1, np.unique(folds)
    true = torch.full((len(STRENGTHS), len(views), len(labels)), 1 / classes, dtype=torch.float64)
    paths = fit_parts(views[0], labels, classes, STRENGTHS, folds[:, None] != names)
    for fold, path in zip(names, paths, strict=True):
        held_out, truth = folds == fold, labels.numpy()
        rows = torch.from_numpy(np.flatnonzero(held_out & np.isin(truth, truth[~held_out])))
        for number, probe in enumerate(path):
            for view, features in enumerate(views):
                probabilities = probe.logits(features[rows]).double().softmax(dim=-1)
                true[number, view, rows] = probabilities[torch.arange(len(rows)), labels[rows]]
    losses = -torch.log((1 - GUESS) * true + GUESS / classes)
    return losses[losses[:, 0].mean(dim=1).argmin()].numpy()
