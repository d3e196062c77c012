"""Which weights a run ends with: those that are best on validation, calibrated."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import Trainer

from luthier.scoring.metrics import choose_threshold, fit_temperature, reliability, score, selective
from luthier.training.layers import divide_logits
from luthier.training.recipe import blend
from luthier.training.trainer import model_of, predict
from models import linear_head


class Candidate(NamedTuple):
    """Weights that a run may end with, and how they do on validation.

    Attributes:
        share: how far they are from the probe's weights (0) to the trained ones (1).
        temperature: that calibrates them; 1 where the head is not one linear layer.
        threshold: the confidence below which they are unsure.
        validation: their score once calibrated, see `metrics.score`.
        uncalibrated: their score before.
    """

    share: float
    temperature: float
    threshold: float
    validation: dict
    uncalibrated: dict


def keep_best(
    trainer: Trainer, start: dict[str, torch.Tensor] | None, shares: tuple[float, ...], labels: list[str]
) -> tuple[Candidate, list[Candidate]]:
    """Give the model the weights, from the probe's to the trained ones, with the lowest validation loss.

    Each candidate is calibrated first, so that what it knows is compared, and not how sure it is. The temperature of
    the best is then divided out of its head, so that whoever loads the model gets calibrated probabilities. The
    confidence below which it is unsure goes into its config.

    Args:
        trainer: holds the trained model, and the validation split.
        start: the state with the probe as the head; None where there is no probe to compare with.
        shares: the candidates, see `recipe.Recipe`.
        labels: the classes' names.

    Returns the best candidate, and all of them.
    """
    model = model_of(trainer)
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    candidates = []
    for share in shares if start else (1.0,):
        model.load_state_dict(blend(start or end, end, share))
        logits, references = predict(trainer, trainer.eval_dataset)
        temperature = fit_temperature(logits, references) if linear_head(model) else 1.0
        validation, uncalibrated = (score(logits / divisor, references, labels) for divisor in (temperature, 1.0))
        threshold = round(choose_threshold(logits / temperature, references), 4)
        candidates.append(Candidate(share, temperature, threshold, validation, uncalibrated))
    best = min(candidates, key=lambda candidate: candidate.validation["log_loss"])
    model.load_state_dict(blend(start or end, end, best.share))
    divide_logits(model, best.temperature)
    model.config.unsure_below = best.threshold
    return best, candidates


def score_test(logits: np.ndarray, references: np.ndarray, labels: list[str], threshold: float) -> dict:
    """Return all scores of a model on test: `test`, `unsure` and `calibration`.

    Args:
        logits: float [N, C], calibrated.
        references: int [N], the true classes.
        labels: the classes' names.
        threshold: the confidence below which the model is unsure.
    """
    return {
        "test": score(logits, references, labels),
        "unsure": selective(logits, references, threshold),
        "calibration": {"reliability": reliability(logits, references)},
    }


def score_run(kept: Candidate, logits: np.ndarray, references: np.ndarray, labels: list[str]) -> dict:
    """Return all scores of a run: those of `score_test`, validation, and what calibration changed."""
    scores = score_test(logits, references, labels, kept.threshold)
    before = {"validation": kept.uncalibrated, "test": score(logits * kept.temperature, references, labels)}
    scores["calibration"] |= {
        "temperature": kept.temperature,
        "before": {split: {key: scored[key] for key in ("log_loss", "ece")} for split, scored in before.items()},
    }
    return {"validation": kept.validation, **scores}
