"""How a model learns that rare classes count as much as frequent ones."""

from typing import NamedTuple

import numpy as np


class Balance(NamedTuple):
    """How a model learns that rare classes count as much as frequent ones.

    While it trains and where its loss is measured, a model's logits tell the probabilities in data like its own. Its
    answers are those that would be likeliest if all classes were equally frequent: the highest logit minus the
    logarithm of the class's share. That is how Menon et al. (2021) adjust logits. A trained model has this difference
    in the bias of its head, so that whoever loads it gets these answers.

    Attributes:
        shares: of each class among the training images, float64 [C].
        weighted: each image's loss is divided by its class's share, too.
    """

    shares: np.ndarray
    weighted: bool = False

    @property
    def log_shares(self) -> np.ndarray:
        """The logarithms of the shares, float64 [C]."""
        return np.log(self.shares)

    @property
    def class_weights(self) -> list[float] | None:
        """The weight of an image of each class, 1 on average over the images; None where all have the same."""
        return (1 / (len(self.shares) * self.shares)).tolist() if self.weighted else None
