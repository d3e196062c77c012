"""What a run prepares before it trains, and what it has found before it is written."""

from typing import NamedTuple

from datasets import DatasetDict
from transformers import PreTrainedModel, TrainingArguments

from luthier.cache import list_of
from luthier.errors import UserError
from luthier.images.splits import hash_splits
from luthier.images.streams import Stream
from luthier.images.views import EvaluationView
from luthier.machine import choose_memory_format
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.criterion import Judge
from luthier.scoring.familiarity import Answers
from luthier.scoring.metrics import TestPredictions
from luthier.scoring.race import Outcome
from luthier.scoring.race_record import Course
from luthier.scoring.selection import Candidate
from luthier.terminal import Stopwatch
from luthier.training.arms import Workshop
from luthier.training.callbacks import StageTimes
from luthier.training.layers import training_size
from luthier.training.recipe import Recipe
from luthier.training.signals import Stop


class Experiment(NamedTuple):
    """What a run prepares before it trains.

    Attributes:
        splits: as loaded.
        own_splits: names of the splits that the data brings.
        prepared: the splits, decoded and stored.
        findings: of the audit.
        model: as built.
        view: that evaluation uses.
        recipes: that are raced.
        judge: scores weights on validation, without a yardstick.
        setup: model, view and device, in words.
        stream: what the split "train" is a sample of; None where it is all of train.
    """

    splits: DatasetDict
    own_splits: frozenset[str]
    prepared: DatasetDict
    findings: dict
    model: PreTrainedModel
    view: EvaluationView
    recipes: list[Recipe]
    judge: Judge
    setup: dict[str, str]
    stream: Stream | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the random crops of training, in pixels."""
        return training_size(self.model, self.view.size)

    @property
    def used(self) -> tuple[list[str], list[str]]:
        """The digests of train, which the scored weights learn from, and of validation, which chooses them."""
        return list_of(self.splits["train"], "digest"), list_of(self.splits["validation"], "digest")

    def workshop(self, training_args: TrainingArguments, stopwatch: Stopwatch, stop: Stop) -> Workshop:
        """Return what builds the Trainers of this run, see `Workshop`; the model gets its memory format.

        Args:
            training_args: of the run.
            stopwatch: measures the stages of every training.
            stop: the signal handler.

        Raises:
            UserError: the model cannot save memory in the way that is asked for.
        """
        if training_args.gradient_checkpointing and not self.model.supports_gradient_checkpointing:
            raise UserError(f"{type(self.model).__name__} has no --gradient_checkpointing: leave it out")
        measure, balance = self.judge.compute_metrics, self.judge.criterion.balance
        count = len(self.stream.labels if self.stream else self.splits["train"])
        choose_memory_format(self.model, training_args.device, count)
        data, (height, width) = hash_splits(self.splits), self.view.size
        seen = f"images of {height} x {width} px"
        callbacks = (StageTimes(stopwatch), stop)
        return Workshop(self.model, training_args, measure, callbacks, balance, self.view.scale, data, seen)


class Result(NamedTuple):
    """What a run has found before it is written.

    Attributes:
        workshop, course: for the refit.
        learned_from: digests of the images that the scored weights have learned from.
        chosen_by: digests of the images that have chosen these weights.
        probe: of `baselines.measure_probe`.
        outcome: of the race.
        kept: the weights that are scored.
        model: with these weights, in main memory, so that a GPU's is free for the refit and for other folds.
        answers: what it says of test.
        augmentation: of the training images.
    """

    workshop: Workshop
    course: Course
    learned_from: list[str]
    chosen_by: list[str]
    probe: ProbeResults
    outcome: Outcome
    kept: Candidate
    model: PreTrainedModel
    answers: Answers
    augmentation: str

    @property
    def none(self) -> int | None:
        """The class of images that show none of the others, see `metrics.score`."""
        return self.course.judge.criterion.none

    @property
    def threshold(self) -> float:
        """The sureness on test below which the model is unsure; where there is none, the confidence."""
        familiarity = self.answers.familiarity
        return self.kept.threshold if familiarity is None else familiarity.unsure_below

    def predictions(self, splits: DatasetDict) -> TestPredictions:
        """Return what the scored model predicts on the test split of loaded splits."""
        logits, references, sureness, _ = self.answers
        return TestPredictions(splits, logits, references, self.kept.class_shares, sureness, self.none)
