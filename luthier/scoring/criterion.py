"""What validation chooses by, what corrects its losses, and how answers make up for rare classes."""

from typing import NamedTuple

import numpy as np
from datasets import DatasetDict
from transformers import EvalPrediction, PreTrainedModel

from luthier.cache import list_of
from luthier.errors import UserError
from luthier.images.groups import groups_of
from luthier.images.streams import Stream
from luthier.options import BalanceOption, Metric
from luthier.scoring.metrics import classify, fit_temperature, log_losses, score
from luthier.training.balance import Balance
from luthier.training.layers import shift_logits
from luthier.training.trainer import concatenate_batches
from models import linear_head

ASKS_FOR_BALANCE = ("balanced_accuracy", "macro_f1")
# The loss below which nothing else is tried, of the probe or after a first heat: the log loss, then about one error in
# a hundred images, or, of the probe alone, the share that is missing of another metric.
ENOUGH, ENOUGH_ERRORS = 0.04, 0.01
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1")  # of an evaluation
TIE = 1e-3  # weight of the log loss beside counts of errors, which are often equal

NONE = "none"  # the name, in any case, of a class whose images show none of the others


class Criterion(NamedTuple):
    """What is compared on validation.

    Attributes:
        metric: what is to be good.
        balance: None where the likeliest class is the answer.
        none: the class of images that show none of the others, see `metrics.score`.
        uncertainty: see `uncertainty_of`.
    """

    metric: Metric = "log_loss"
    balance: Balance | None = None
    none: int | None = None
    uncertainty: float = 1.0

    @property
    def class_shares(self) -> np.ndarray | None:
        """The shares of the classes, float64 [C], where answers make up for them."""
        return self.balance.shares if self.balance else None

    @property
    def enough(self) -> float:
        """The loss below which there is little to gain; lower where nearly all images are of one class."""
        return self.uncertainty * (ENOUGH if self.metric == "log_loss" else ENOUGH_ERRORS)

    def leaves_little(self, loss: float, log_loss: float) -> bool:
        """Tell whether there is little to gain on a probe, or on what a first heat has trained.

        A count of errors on a few images is often 0 by chance. So the log loss must be low too: calibration adds an
        imaginary image, and keeps it above `ENOUGH` on fewer than a dozen images, even if all are right.

        Args:
            loss: of the weights, in the metric.
            log_loss: their calibrated one; infinite where it is not known.
        """
        return loss < self.enough and (self.metric == "log_loss" or log_loss < ENOUGH)

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits [N, C] whose highest is the answer (logit adjustment, Menon et al. 2021)."""
        return logits - self.balance.log_shares if self.balance else logits

    def temperature(self, logits: np.ndarray, references: np.ndarray) -> float:
        """Return what logits [N, C] must be divided by to be calibrated, once adjusted; see `adjust`."""
        return fit_temperature(self.adjust(logits), references, self.class_shares)

    def losses(self, adjusted: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Return a loss for each image, float64 [N], whose mean is what is to be low.

        For `log_loss` the log loss; for another metric what is missing of it, plus a thousandth of the log loss, which
        decides between equals.

        Args:
            adjusted: logits, float [N, C], see `adjust`, calibrated.
            references: int [N], the true classes.
        """
        cross_entropies = self.log_losses(adjusted, references)
        return self.weigh(adjusted.argmax(axis=-1), cross_entropies, references, adjusted.shape[1])

    def log_losses(self, adjusted: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Return the log loss of each image, float64 [N]; see `losses`."""
        return log_losses(adjusted, references, self.balance.log_shares if self.balance else 0.0)

    def weigh(
        self, predictions: np.ndarray, cross_entropies: np.ndarray, references: np.ndarray, classes: int
    ) -> np.ndarray:
        """Return the losses of all images that are compared, see `losses`; what one counts depends on the others.

        Args:
            predictions: int [N].
            cross_entropies: of `log_losses`.
            references: int [N].
            classes: how many there are.
        """
        if self.metric == "log_loss":
            return cross_entropies
        worth = np.ones(len(references))  # of a correct answer: these add up to the metric's highest value
        if self.metric != "accuracy":
            support, predicted = (np.bincount(of, minlength=classes) for of in (references, predictions))
            size = support if self.metric == "balanced_accuracy" else (support + predicted) / 2
            occurs = support > 0 if self.metric == "balanced_accuracy" else size > 0
            worth = len(references) / (occurs.sum() * size[references])
        return 1 - worth * (predictions == references) + TIE * cross_entropies


LOG_LOSS = Criterion()


class Yardstick(NamedTuple):
    """What corrects the losses of validation images that happen to be easier or harder than others.

    It is a control variate: the losses of linear probes that have learned neither from an image nor from its
    duplicates, which are known for the images of train too.

    Attributes:
        losses: float64 [N], of the validation images.
        mean: over the images of train and validation.
    """

    losses: np.ndarray
    mean: float

    def correct(self, losses: np.ndarray) -> np.ndarray:
        """Return losses [N] with the mean to expect of images as hard as those of train and validation together."""
        deviations = self.losses - self.losses.mean()
        spread = (deviations**2).mean()
        slope = ((losses - losses.mean()) * deviations).mean() / spread if spread > 0 else 0.0
        return losses + np.clip(slope, 0, 1) * (self.mean - self.losses)


class Judge(NamedTuple):
    """Scores weights on validation.

    Attributes:
        labels: the classes' names.
        criterion: what is compared.
        groups: int [N], what the images of validation belong to; None where each stands alone.
        yardstick: corrects the losses; None corrects nothing.
        calibrates: weights are compared, and shipped, with the temperature that calibrates them; a head that is not
            one linear layer stays as it is.
    """

    labels: list[str]
    criterion: Criterion = LOG_LOSS
    groups: np.ndarray | None = None
    yardstick: Yardstick | None = None
    calibrates: bool = True

    def losses(self, adjusted: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Return the loss of each image, float64 [N], corrected by the yardstick; see `Criterion.losses`."""
        losses = self.criterion.losses(adjusted, references)
        return self.yardstick.correct(losses) if self.yardstick else losses

    def temperature(self, logits: np.ndarray, references: np.ndarray) -> float:
        """Return what logits [N, C] are divided by, once they have been adjusted; see `calibrates`."""
        return self.criterion.temperature(logits, references) if self.calibrates else 1.0

    def score(self, adjusted: np.ndarray, references: np.ndarray) -> dict:
        """Return the scores of adjusted logits [N, C], see `metrics.score`."""
        criterion = self.criterion
        return score(adjusted, references, self.labels, self.groups, criterion.class_shares, criterion.none)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return what the Trainer's log has of an evaluation: accuracy, balanced accuracy, macro F1, and two losses.

        The Trainer's own `loss` is replaced: with several processes it is a mean of batches that are filled up with
        images of others. The calibrated loss is that of the criterion at the best temperature: long training makes a
        model too sure of itself, which a temperature mends, before it makes it worse.
        """
        logits, references = (concatenate_batches(p) for p in (prediction.predictions, prediction.label_ids))
        adjusted, known = self.criterion.adjust(logits), references != self.criterion.none
        predictions = adjusted.argmax(axis=-1)[known]
        result = classify(predictions, references[known], len(self.labels), self.criterion.none)
        calibrated = adjusted / self.temperature(logits, references)
        losses = {
            "loss": log_losses(logits, references),
            "calibrated_loss": self.criterion.losses(calibrated, references),
        }
        return {name: result[name] for name in SHOWN} | {name: float(each.mean()) for name, each in losses.items()}


def build_judge(
    metric: Metric,
    option: BalanceOption,
    model: PreTrainedModel,
    splits: DatasetDict,
    none_class: str | None = None,
    stream: Stream | None = None,
) -> Judge:
    """Return what scores weights on validation, without a yardstick; the model's config is told the `none_class`.

    Where answers are to make up for rare classes, the model's new head is given the shares of the classes, which it
    would otherwise have to learn.

    Args:
        metric: what is to be good.
        option: how answers make up for rare classes; `auto` is `logit_adjusted` where the metric asks for it.
        model: as built.
        splits: as loaded; train has at least one image of each class.
        none_class: see `find_none`.
        stream: what train is a sample of; None where it is all of train.

    Raises:
        UserError: there is no such class, or all images of a split are of it; or `option` is `logit_adjusted` or
            `weighted`, and the head is not one linear layer, whose bias it could change.
    """
    train, balance = splits["train"], None
    linear = linear_head(model) is not None
    labels = train.features["label"].names
    none = find_none(labels, none_class)
    check_known(splits, none)
    if none is not None:
        model.config.none_class = labels[none]
    if option in ("logit_adjusted", "weighted") and not linear:
        raise UserError(
            f"--balance {option} changes the bias of the last layer, and this model's head is not one linear layer: "
            "use --balance none, or another model"
        )
    learned = stream.labels if stream else np.array(list_of(train, "label"))
    shares = np.bincount(learned, minlength=len(labels)) / len(learned)
    if option != "none" and linear and (option != "auto" or metric in ASKS_FOR_BALANCE):
        balance = Balance(shares, weighted=option == "weighted")
        shift_logits(model, balance.log_shares)
    criterion = Criterion(metric, balance, none, uncertainty_of(metric, shares))
    return Judge(labels, criterion, groups_of(splits["validation"]), calibrates=linear)


def uncertainty_of(metric: Metric, shares: np.ndarray) -> float:
    """Return the loss of knowing the shares of the classes [C] alone, relative to that of two equally frequent ones.

    It is 1 at most, and always 1 where each class counts alike.
    """
    if metric == "log_loss":
        present = shares[shares > 0]
        return min(1.0, -float((present * np.log2(present)).sum()))
    return min(1.0, 2 * (1 - float(shares.max()))) if metric == "accuracy" else 1.0


def find_none(labels: list[str], name: str | None) -> int | None:
    """Return which class is that of images which show none of the others, if any.

    Args:
        labels: the classes' names.
        name: of the class; None is `none`, in any case, where there is such a class beside several others; an empty
            one is no class.

    Raises:
        UserError: there is no class of this name.
    """
    if name is None and len(labels) == 2:  # as `defect` and `none`: always answering `defect` would score 100%
        return None
    names = [label.lower() for label in labels] if name is None else labels
    wanted = NONE if name is None else name
    if wanted not in names:
        if name:
            raise UserError(f"there is no class {name!r} (--none_class): the classes are {', '.join(labels)}")
        return None
    return names.index(wanted)


def check_known(splits: DatasetDict, none: int | None) -> None:
    """Refuse splits in which all images show none of the classes.

    Raises:
        UserError: one is such a split.
    """
    for split, dataset in splits.items():
        if none is not None and set(list_of(dataset, "label")) == {none}:
            raise UserError(
                f"all images of the {split} split are of the class {dataset.features['label'].names[none]!r}, which "
                'is that of images of anything else: add some of the other classes (train.py: or give --none_class "")'
            )
