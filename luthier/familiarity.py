"""Whether a model should answer at all: how sure it is, and how near an image is to those that it has learned from.

A probability compares the known classes with each other, and says little of an image of none of them. So two figures
count together: the logarithm of the odds of the likeliest class, and the cosine similarity of the image's features to
those of the third nearest training image (Sun et al. 2022). `benchmarks.unknown` has what else was measured.
"""

import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import httpx  # or httpx2, by its version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedModel

from luthier.errors import REFUSED_BY_SYSTEM
from models import ModelError, labels_of

logger = logging.getLogger(__name__)

FILE = "familiarity.safetensors"  # beside the weights: the bank
NEIGHBOUR = 3  # whose similarity counts: the nearest ones may be wrongly labelled, or odd
SURE = 1e-6  # a probability counts as at most 1 - SURE
ROWS = 4096  # images at a time


class Familiarity(NamedTuple):
    """What a model compares an image with before it answers.

    Attributes:
        bank: float16 [R, D], features of training images that new ones are compared with, scaled to length 1.
        head: name of the model's head; features are what enters it.
        log_odds, similarity: mean and standard deviation of both figures over the validation images.
        unsure_below: the familiarity below which the answer is "unsure".
    """

    bank: torch.Tensor
    head: str
    log_odds: tuple[float, float]
    similarity: tuple[float, float]
    unsure_below: float

    def rate(self, probabilities: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the familiarity of images, float32 [N]: the sum of both figures, in standard deviations.

        Args:
            probabilities: of the classes [N, C], calibrated.
            features: what enters the model's head [N, D].
        """
        odds = (log_odds(probabilities) - self.log_odds[0]) / self.log_odds[1]
        return odds + (similarity(self.bank, features) - self.similarity[0]) / self.similarity[1]


def log_odds(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the odds of the likeliest class, float32 [N], from probabilities [N, C]."""
    return torch.logit(probabilities.amax(dim=1).float(), eps=SURE)


def similarity(bank: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of features [N, D] to the `NEIGHBOUR`-th nearest of a bank [R, D], float32 [N].

    The features of the bank have length 1.
    """
    bank, nearest = bank.to(features.device, torch.float32), min(NEIGHBOUR, len(bank))
    # An exported model is given a batch, and a split is a loop there, which not all programs can run.
    parts = [features] if torch.compiler.is_compiling() else features.split(ROWS)
    similarities = (functional.normalize(part.float()) @ bank.T for part in parts)
    return torch.cat([part.topk(nearest).values[:, -1] for part in similarities])


def none_of(model: PreTrainedModel) -> int | None:
    """Return which class of a model is that of images which show none of the others, if any.

    Raises:
        ModelError: its config names one that is no class, as after a class was renamed.
    """
    name, labels = getattr(model.config, "none_class", None), labels_of(model)
    if name and name not in labels:
        raise ModelError(
            f"`none_class` in the model's config.json is {name!r}, which is none of its classes "
            f"({', '.join(labels)}): write the name that this class has now, or remove the line"
        )
    return labels.index(name) if name else None


def threshold_of(model: PreTrainedModel, familiarity: Familiarity | None = None) -> float:
    """Return the familiarity below which a model is unsure; without one the confidence, 0 where its config has none.

    Raises:
        ModelError: it is not a number.
    """
    if familiarity is not None:
        return familiarity.unsure_below
    value = getattr(model.config, "unsure_below", None)
    if value is not None and (not isinstance(value, (int, float)) or math.isnan(value)):
        raise ModelError(f"`unsure_below` in the model's config.json is {value!r}: write a number, without quotes")
    return float(value or 0)


def class_shares_of(model: PreTrainedModel) -> list[float] | None:
    """Return the share of each class in the training images, where a model's answers make up for them; or None.

    Raises:
        ModelError: there is not one number above 0, and at most 1, for each class.
    """
    shares = getattr(model.config, "class_shares", None)
    if shares is None:
        return None
    classes = len(labels_of(model))
    is_list = isinstance(shares, list) and len(shares) == classes
    if not is_list or not all(isinstance(share, (int, float)) and 0 < share <= 1 for share in shares):
        raise ModelError(
            f"`class_shares` in the model's config.json must be {classes} numbers above 0, one for each class: "
            "copy the file again, or remove the line"
        )
    return [float(share) for share in shares]


def describe_in_config(model: PreTrainedModel, familiarity: Familiarity | None) -> None:
    """Write into the config of a model how its familiarity is computed; the bank is for `save_bank`."""
    if familiarity is None:
        model.config.__dict__.pop("familiarity", None)
    else:
        model.config.familiarity = {name: value for name, value in familiarity._asdict().items() if name != "bank"}


def save_bank(folder: Path, familiarity: Familiarity | None) -> None:
    """Write the bank of a model into its folder."""
    if familiarity is not None:
        save_file({"references": familiarity.bank.contiguous()}, folder / FILE)


def load_familiarity(model: PreTrainedModel, model_name: str) -> Familiarity | None:
    """Return the familiarity of a finished model; None where it has none.

    Args:
        model: as loaded.
        model_name: a folder, or a name on the Hub.

    Raises:
        ModelError: its file is damaged, belongs to another model, or cannot be fetched from the Hub.
    """
    numbers = getattr(model.config, "familiarity", None)
    if not isinstance(numbers, dict):
        return None
    path = Path(model_name) / FILE if Path(model_name).is_dir() else _fetch(model_name)
    if path is None or not path.exists():  # a copy of the model without it
        return None
    try:
        odds, near = ((float(mean), float(spread)) for mean, spread in (numbers["log_odds"], numbers["similarity"]))
        bank, unsure_below = load_file(path)["references"], float(numbers["unsure_below"])
        known = Familiarity(bank, str(numbers["head"]), odds, near, unsure_below)
        if known.bank.shape[1] != model.get_submodule(known.head).in_features:
            raise ValueError(f"its references have {known.bank.shape[1]} features")
        return known
    except (OSError, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"{FILE} of {model_name} is damaged or of another model ({error}): copy it again, or delete it, and the "
            "confidence alone decides what is unsure"
        ) from error


def _fetch(model_name: str) -> Path | None:
    """Return the file of a model on the Hub, in the cache; None where the model has none.

    Raises:
        ModelError: it cannot be fetched. Without it the model would be unsure of other images than when it was scored.
    """
    try:
        return Path(hf_hub_download(model_name, FILE))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, httpx.TransportError) as error:
        if getattr(error, "errno", None) in REFUSED_BY_SYSTEM:
            raise
        if is_offline_mode():
            logger.warning(f"{model_name} is cached without its {FILE}: the confidence alone decides what is unsure")
            return None
        why = str(error).partition("\n")[0]
        raise ModelError(
            f"{FILE} of {model_name} cannot be fetched from the Hub ({why}): try again. With "
            "HF_HUB_OFFLINE=1 the confidence alone decides what is unsure"
        ) from error
