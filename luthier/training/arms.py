"""Arms: ways to fine-tune one model, each with its start, its heats and its folder of checkpoints."""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate
from transformers import EvalPrediction, PreTrainedModel, SchedulerType, TrainerCallback, TrainingArguments

from luthier.errors import NoSpace, UserError
from luthier.fusion import fuse_for_training
from luthier.machine import explain_exhausted_memory
from luthier.processes import from_main_process
from luthier.training.balance import Balance
from luthier.training.callbacks import EpochTable, SetEpoch
from luthier.training.checkpoints import Origin, lacking_space
from luthier.training.heats import Schedule, first_heat, heat_ends, most_steps
from luthier.training.layers import freeze, freeze_unused, parameter_groups
from luthier.training.recipe import Recipe
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.trainer import build_predictor, check_scheduler, choose_optimizer, replace_progress
from luthier.training.workers import SeededAugmentation

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workshop:
    """What all Trainers of a run are built from.

    Attributes:
        model: as it was built; every Trainer gets a copy.
        training_args: of the run.
        compute_metrics: of an evaluation.
        callbacks: of every training.
        balance: how rare classes count as much as frequent ones; None counts all images alike.
        scale: from 8-bit levels to pixel values, see `EvaluationView.scale`.
        data: hash of the splits, see `splits.hash_splits`.
        seen: in words, how large the model sees images.
    """

    model: PreTrainedModel
    training_args: TrainingArguments
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    callbacks: Sequence[TrainerCallback] = ()
    balance: Balance | None = None
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None
    data: str = ""
    seen: str = ""

    @property
    def model_name(self) -> str:
        """Where the model was loaded from, without the folders above, which tell of a machine; or its kind."""
        return Path(self.model.config.name_or_path or self.model.config.model_type).name

    @property
    def folder(self) -> Path:
        """The directory of the run, or of its fold."""
        return Path(str(self.training_args.output_dir))

    def predictor(self, state: State | None = None) -> SafeTrainer:
        """Return a Trainer that only predicts, with the model in a state, or as it was built."""
        return build_predictor(self.copy(state), self.training_args)

    def copy(self, state: State | None = None) -> PreTrainedModel:
        """Return a copy of the model in a state, or as it was built."""
        model = copy.deepcopy(self.model)
        if state is not None:
            model.load_state_dict(state)
        return model


class Arm(NamedTuple):
    """A recipe, and what it needs to train.

    Attributes:
        recipe: how it learns.
        workshop: for its Trainers.
        training_args: its own: learning rate, epochs, output directory.
        rows: "train", and "validation" if it is evaluated.
        ends: the step at which each heat ends.
        schedule: of the learning rate; None leaves it to the training arguments.
        start: the model's state at the start; None is the model as it was built.
    """

    recipe: Recipe
    workshop: Workshop
    training_args: TrainingArguments
    rows: Mapping[str, Any]
    ends: tuple[int, ...]
    schedule: Schedule | None
    start: State | None

    @property
    def folder(self) -> Path:
        """Where its checkpoints are."""
        return Path(str(self.training_args.output_dir))

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes."""
        return self.training_args.process_index == 0

    @property
    def batch(self) -> int:
        """The images of an optimizer step, of all processes together."""
        args = self.training_args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    @property
    def steps_per_epoch(self) -> int:
        """The optimizer steps of an epoch."""
        return count_steps(self.training_args, len(self.rows["train"]))

    @property
    def origin(self) -> Origin:
        """What its checkpoints keep of the data; see `Origin`."""
        settings = f"{self.workshop.seen} and a learning rate of {self.training_args.learning_rate:.3g}"
        order = getattr(self.rows["train"], "order", "")
        processes = self.training_args.world_size if order else 0  # each takes a part of a stream's epoch
        own_batch = self.training_args.train_batch_size if order else 0  # a stream's places take turns by batches
        recipe = f"--recipe {self.recipe.name} from the model {self.workshop.model_name}"
        if self.recipe.is_lowered:
            recipe += ", at the rates of a backbone without BatchNorm"
        return Origin(self.workshop.data, self.batch, order, settings, recipe, processes, own_batch)

    def trainer(self) -> SafeTrainer:
        """Return a Trainer with a copy of the model, at the arm's start.

        Raises:
            UserError: see `build_trainer`.
        """
        model = self.workshop.copy(self.start)
        freeze(model, self.recipe.frozen)
        shape = self.rows["train"][0]["pixel_values"].shape
        if self.training_args.device.type == "cpu":  # on a GPU the default network would take half as long again
            height, width = shape[-2:]
            model = fuse_for_training(model, (height, width))
        freeze_unused(model, shape)
        return build_trainer(model, self)


def plan_arm(recipe: Recipe, workshop: Workshop, rows: Mapping[str, Any], folder: Path, start: State | None) -> Arm:
    """Return an arm, with its heats.

    Args:
        recipe: with the user's learning rate, epochs and batch.
        workshop: for its Trainers.
        rows: "train" and "validation".
        folder: for its checkpoints.
        start: see `Arm`.
    """
    args, images = workshop.training_args, len(rows["train"])
    batches = args.world_size * args.gradient_accumulation_steps
    args = replace(args, per_device_train_batch_size=recipe.batch_of_device(images, batches))
    batch, per_epoch = args.train_batch_size * batches, count_steps(args, images)
    first = first_heat(per_epoch, batch)
    if args.max_steps > 0:
        total = args.max_steps
    elif recipe.num_train_epochs is not None:
        total = math.ceil(recipe.num_train_epochs * per_epoch)
    else:
        total = most_steps(recipe.heats, first, per_epoch, batch, args.device.type == "cuda")
    # Heats have a schedule of their own: another one, or one with settings, trains in one.
    in_heats = recipe.heats > 1 and args.lr_scheduler_type == SchedulerType.COSINE and not args.lr_scheduler_kwargs
    ends = heat_ends(first, total) if in_heats else (total,)
    schedule = Schedule(ends, args.warmup_steps) if in_heats else None
    rate = recipe.rate_of_batch(min(batch, images))  # a step has no more images than there are
    # The steps too: the library would round 7 times 29 / 7 epochs up to 30 steps.
    own = replace(
        args, learning_rate=rate, num_train_epochs=total / per_epoch, max_steps=total, output_dir=str(folder)
    )
    return Arm(recipe, workshop, own, rows, ends, schedule, start)


def build_trainer(model: PreTrainedModel, arm: Arm) -> SafeTrainer:
    """Return the Trainer of an arm, with the learning rates of the recipe's layers.

    Args:
        model: as it is trained, with its frozen layers.
        arm: its rows are as transforms make them.

    Raises:
        UserError: a tracker, an optimizer or a scheduler is not available, or memory does not suffice. NoSpace: the
            checkpoints do not fit on the disk.
    """
    recipe, shop, args, rows = arm.recipe, arm.workshop, arm.training_args, arm.rows
    rate, balance = args.learning_rate, shop.balance
    train_dataset = SeededAugmentation(rows["train"], args.seed, args.dataloader_num_workers)
    groups = parameter_groups(model, rate, rate * recipe.backbone_rate, recipe.layer_decay, args.weight_decay)
    optimizer_class, optimizer_kwargs = choose_optimizer(args, model)
    check_scheduler(args)
    try:
        with explain_exhausted_memory(args):
            trainer = SafeTrainer(
                model=model,
                args=args,
                data_collator=default_collate,
                train_dataset=train_dataset,
                eval_dataset=rows.get("validation"),
                compute_metrics=shop.compute_metrics,
                optimizer_cls_and_kwargs=(optimizer_class, {**optimizer_kwargs, "params": groups}),
            )
    except (ImportError, RuntimeError, ValueError) as error:  # of trackers
        raise UserError(str(error)) from error
    trainer.schedule, trainer.scale, trainer.origin = arm.schedule, shop.scale, arm.origin
    if balance:
        as_tensor = functools.partial(torch.tensor, dtype=torch.float32, device=args.device)
        trainer.log_shares = as_tensor(balance.log_shares)
        trainer.class_weights = None if balance.class_weights is None else as_tensor(balance.class_weights)
    if args.save_strategy != "no" or arm.schedule:
        limit = args.save_total_limit or round(args.num_train_epochs)
        lacking = lacking_space(arm.folder, trainer.checkpoint_size(), limit) if arm.is_main_process else ""
        if lacking := from_main_process(lacking):
            raise NoSpace(lacking)
    replace_progress(trainer)
    table = EpochTable(recipe.name)
    trainer.watch_adjusted = table.count
    for callback in (SetEpoch(train_dataset.set_epoch), table, *shop.callbacks):
        trainer.add_callback(callback)
    return trainer


def count_steps(training_args: TrainingArguments, images: int) -> int:
    """Return the optimizer steps of an epoch, as the Trainer counts them."""
    batches = math.ceil(images / (training_args.train_batch_size * training_args.world_size))
    return math.ceil(batches / training_args.gradient_accumulation_steps)
