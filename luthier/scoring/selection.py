"""Which weights a run ends with, those that are best on validation, calibrated; and all scores of a model."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from luthier.scoring.baselines import ProbeResults
from luthier.scoring.criterion import Judge
from luthier.scoring.intervals import TINY, standard_error
from luthier.scoring.metrics import (
    TestPredictions,
    calibration_scores,
    choose_threshold,
    confidence_and_correct,
    reliability,
    selective,
)
from luthier.training.arms import State, Workshop
from luthier.training.layers import divide_logits, shift_logits
from luthier.training.recipe import PROBE, Recipe, blend
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.trainer import model_of, predict, predict_best

# How many standard errors of the paired difference the probe must be ahead of fine-tuned weights on validation. With
# 90 images this error is a quarter of the loss, and on most kinds of images fine-tuning ends ahead: so a draw goes to
# it. See "Which recipe goes on, and until when" in docs/experiments.md.
LEAD = 0.5


class Candidate(NamedTuple):
    """Weights that a run may end with, and how they do on validation.

    Attributes:
        share: how far they are from the arm's start (0) to the trained ones (1).
        temperature: that calibrates them; 1 where the head is not one linear layer.
        threshold: the confidence below which they are unsure.
        validation: their score once calibrated, see `metrics.score`.
        uncalibrated: their log loss and calibration error before.
        losses: float64 [N], of each validation image, calibrated, see `criterion.Judge.losses`.
        arm: name of the recipe that trained them.
        class_shares: float64 [C], where their answers make up for rare classes, see `balance.Balance`.
        groups: int [N], of the validation images; None where each stands alone.
        seconds: that the prediction of an image took; 0 where that is not known, see `score_probe`.
    """

    share: float
    temperature: float
    threshold: float
    validation: dict
    uncalibrated: dict
    losses: np.ndarray
    arm: str
    class_shares: np.ndarray | None = None
    groups: np.ndarray | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """What is compared: the mean of the corrected losses, 0 at least; infinite where that is no number."""
        mean = float(self.losses.mean())
        return max(mean, 0.0) if math.isfinite(mean) else math.inf

    @property
    def is_probe(self) -> bool:
        """Whether these are the pretrained weights with the probe as the head."""
        return self.arm == PROBE


def score_candidates(
    trainer: SafeTrainer,
    rows: Any,
    start: State | None,
    shares: tuple[float, ...],
    judge: Judge,
    arm: str,
) -> list[Candidate]:
    """Score the weights on the way from an arm's start to the trained ones, each calibrated.

    They are calibrated first, so that what they know is compared, and not how sure they are.

    Args:
        trainer: holds the trained model, and is left as it was.
        rows: of validation.
        start: the state that training began with; None where only share 1 makes sense.
        shares: the candidates, see `recipe.Recipe`.
        judge: scores them.
        arm: name of the recipe.
    """
    model, criterion = model_of(trainer), judge.criterion
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    candidates = []
    for share in shares if start else (1.0,):
        model.load_state_dict(blend(start or end, end, share))
        logits, references = predict_best(trainer, rows) if share == 1 else predict(trainer, rows)
        known = references != criterion.none
        temperature = judge.temperature(logits, references)
        adjusted = criterion.adjust(logits) / temperature
        candidates.append(
            Candidate(
                share=share,
                temperature=temperature,
                threshold=choose_threshold(*confidence_and_correct(adjusted[known], references[known])),
                validation=judge.score(adjusted, references),
                uncalibrated=calibration_scores(logits[known], references[known]),
                losses=judge.losses(adjusted, references),
                arm=arm,
                class_shares=criterion.class_shares,
                groups=judge.groups,
            )
        )
    model.load_state_dict(end)
    return candidates


def score_probe(workshop: Workshop, probe: ProbeResults, rows: Any, judge: Judge) -> Candidate | None:
    """Score the probe as the head of the model, on the rows of validation; None where there is no probe."""
    if "probe" not in probe.starts:
        return None
    trainer = workshop.predictor(probe.starts["probe"])
    begin = time.perf_counter()
    (candidate,) = score_candidates(trainer, rows, None, (1.0,), judge, PROBE)
    if trainer.args.device.type != "cpu":  # a GPU's first predictions are slow, and tell nothing of the others
        return candidate
    return candidate._replace(seconds=(time.perf_counter() - begin) / len(candidate.losses))


def is_enough(probe: Candidate | None, judge: Judge, recipes: Iterable[Recipe]) -> bool:
    """Tell whether the probe leaves so little to gain that the recipes are not raced; a single one is trained."""
    if probe is None or sum(not recipe.is_probe for recipe in recipes) < 2:
        return False
    return judge.criterion.leaves_little(probe.loss, probe.validation["log_loss"])


def choose(probe: Candidate | None, trained: Sequence[Candidate]) -> Candidate:
    """Return the trained candidate with the lowest validation loss, or the probe where it is clearly ahead.

    Validation images are few. So the probe's mean loss must be lower by `LEAD` standard errors of the difference,
    image by image; a draw goes to the trained candidate.

    Args:
        probe: None where there is none.
        trained: none where nothing was trained.
    """
    best = min(trained, key=lambda candidate: candidate.loss, default=probe)
    assert best is not None  # there is at least one candidate
    if probe is None or best is probe:
        return best
    lead = best.losses - probe.losses
    error = standard_error(lead, probe.groups)
    return best if lead.mean() < LEAD * error or error < TINY else probe  # one image, or group, tells nothing


def load_candidate(model: PreTrainedModel, start: State | None, kept: Candidate) -> None:
    """Give a model a candidate's weights and what goes with them.

    The temperature is divided out of the head, so that whoever loads the model gets calibrated probabilities. Where
    its answers make up for rare classes, the head's bias does it. The confidence below which it is unsure, and the
    shares of the classes, go into the config.

    Args:
        model: as trained.
        start: the state that its training began with; None where share 1 is kept.
        kept: the candidate.
    """
    if start is not None:
        model.load_state_dict(blend(start, model.state_dict(), kept.share))
    if kept.class_shares is not None:
        shift_logits(model, -np.log(kept.class_shares))
        model.config.class_shares = kept.class_shares.tolist()
    divide_logits(model, kept.temperature)
    model.config.unsure_below = kept.threshold


def score_test(test: TestPredictions, threshold: float) -> dict:
    """Return all scores of a model on test: `test`, `unsure` and `calibration`.

    Args:
        test: what it predicts.
        threshold: the sureness, or else the confidence, below which the model is unsure.
    """
    confidence, correct = confidence_and_correct(test.logits, test.references)
    by, sureness = ("confidence", confidence) if test.sureness is None else ("familiarity", test.sureness)
    sureness = np.where(test.logits.argmax(axis=-1) == test.none, -np.inf, sureness)
    known = test.known
    unsure = {"by": by, **selective(sureness[known], correct[known], threshold, test.known_groups)}
    if not known.all():
        unsure["none_answered"] = float((sureness[~known] >= threshold).mean())
    return {
        "test": test.score(),
        "unsure": unsure,
        "calibration": {"reliability": reliability(test.logits_with_shares[known], test.references[known])},
    }


def score_run(kept: Candidate, test: TestPredictions, threshold: float) -> dict:
    """Return all scores of a run: those of `score_test`, validation, and what calibration changed."""
    scores, before = score_test(test, threshold), replace(test, logits=test.logits * kept.temperature)
    uncalibrated = calibration_scores(before.logits_with_shares[test.known], test.references[test.known])
    scores["calibration"] |= {
        "temperature": kept.temperature,
        "before": {"validation": kept.uncalibrated, "test": uncalibrated},
    }
    return {"validation": kept.validation, **scores}
