"""Trainers that train and Trainers that only predict: built, run up to a step, and what they answer."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.training_args import OptimizerNames

from luthier.errors import UserError
from luthier.machine import explain_exhausted_memory
from luthier.terminal import has_terminal
from luthier.training.balance import Balance
from luthier.training.callbacks import EpochTable, ProgressBar, ProgressLines, SetEpoch
from luthier.training.checkpoints import (
    bring_best,
    check_disk_space,
    check_origin,
    load_weights,
    step_of,
)
from luthier.training.heats import EndHeat, Schedule
from luthier.training.layers import parameter_groups
from luthier.training.recipe import Recipe
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.signals import Stop, StoppedInEvaluation
from luthier.training.workers import SeededAugmentation


def build_trainer(
    model: PreTrainedModel,
    recipe: Recipe,
    training_args: TrainingArguments,
    rows: Mapping[str, Any],
    collate: Callable[[list[dict]], dict],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    callbacks: Sequence[TrainerCallback] = (),
    schedule: Schedule | None = None,
    balance: Balance | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> SafeTrainer:
    """Return the Trainer of a run, with the learning rates of the recipe's layers.

    Args:
        model: with its frozen layers, see `layers.freeze`.
        recipe: decides how fast each layer learns.
        training_args: complete; its learning rate is the head's.
        rows: "train" and, if anything is evaluated, "validation"; `collate` takes their rows.
        collate: stacks rows to a batch.
        compute_metrics: of an evaluation.
        callbacks: besides the epoch table and the progress.
        schedule: of the learning rate; None leaves it to the training arguments.
        balance: how rare classes count as much as frequent ones; None counts all images alike.
        scale: see `EvaluationView.scale`; of rows that have 8-bit levels for `pixel_values`.

    Raises:
        UserError: a tracker, an optimizer or a scheduler is not available, or the checkpoints do not fit on the disk.
    """
    rate = training_args.learning_rate
    train_dataset = SeededAugmentation(rows["train"], training_args.seed, training_args.dataloader_num_workers)
    groups = parameter_groups(model, rate, rate * recipe.backbone_rate, recipe.layer_decay, training_args.weight_decay)
    optimizer_class, optimizer_kwargs = choose_optimizer(training_args, model)
    check_scheduler(training_args)
    try:
        trainer = SafeTrainer(
            model=model,
            args=training_args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=rows.get("validation"),
            compute_metrics=compute_metrics,
            optimizer_cls_and_kwargs=(optimizer_class, {**optimizer_kwargs, "params": groups}),
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    trainer.schedule, trainer.scale = schedule, scale
    if balance:
        as_tensor = functools.partial(torch.tensor, dtype=torch.float32, device=training_args.device)
        trainer.log_shares = as_tensor(balance.log_shares)
        trainer.class_weights = None if balance.class_weights is None else as_tensor(balance.class_weights)
    if (training_args.save_strategy != "no" or schedule) and trainer.is_world_process_zero():
        limit = training_args.save_total_limit or round(training_args.num_train_epochs)
        check_disk_space(Path(str(training_args.output_dir)), trainer.checkpoint_size(), limit)
    _replace_progress(trainer)
    table = EpochTable(recipe.name)
    trainer.watch_answers = table.count
    for callback in (SetEpoch(train_dataset.set_epoch), table, *callbacks):
        trainer.add_callback(callback)
    return trainer


def build_predictor(
    model: PreTrainedModel, training_args: TrainingArguments, collate: Callable[[list[dict]], dict]
) -> Trainer:
    """Return a Trainer that only predicts."""
    # With evaluations the Trainer would ask for their rows. Trackers follow the training alone.
    trainer = SafeTrainer(model, replace(training_args, eval_strategy="no", report_to="none"), collate)
    _replace_progress(trainer)
    return trainer


def _replace_progress(trainer: Trainer) -> None:
    """Show bars on a terminal and lines elsewhere, and leave out the library's log."""
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar() if has_terminal() else ProgressLines())


def choose_optimizer(training_args: TrainingArguments, model: PreTrainedModel) -> tuple[type, dict]:
    """Return the class of the optimizer, and its arguments.

    Raises:
        UserError: it is not available, or its settings are wrong.
    """
    try:
        return Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    except (ImportError, RuntimeError, ValueError) as error:
        settings = f" with --optim_args {training_args.optim_args}" if training_args.optim_args else ""
        name = OptimizerNames(training_args.optim).value
        raise UserError(f"--optim {name}{settings} cannot be used: {error}") from error


def check_scheduler(training_args: TrainingArguments) -> None:
    """Try the learning rate scheduler, which the Trainer builds only when it begins to train.

    Raises:
        UserError: its settings are wrong.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, kwargs = SchedulerType(training_args.lr_scheduler_type), training_args.lr_scheduler_kwargs
    assert not isinstance(kwargs, str)  # TrainingArguments have parsed it
    try:
        get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        settings = f" with --lr_scheduler_kwargs {kwargs}" if kwargs else ""
        raise UserError(f"--lr_scheduler_type {schedule.value}{settings} cannot be used: {error}") from error


def train(trainer: SafeTrainer, end: int | None, checkpoint: Path | None, stop: Stop) -> None:
    """Train up to a step, and leave the model as it was after its best evaluation so far.

    Args:
        trainer: of `build_trainer`; its model is where training starts without a checkpoint.
        end: the last step; None is the end of the training arguments.
        checkpoint: to continue from. One of the last step itself needs no more training.
        stop: the signal handler; after a signal the process ends here, with a checkpoint.

    Raises:
        UserError: the checkpoint is damaged or of other data, memory does not suffice, the disk is full, or the loss
            is not finite, see `SafeTrainer.stop_if_not_finite`.
    """
    model, output_dir = model_of(trainer), Path(str(trainer.args.output_dir))
    set_seed(trainer.args.seed)  # the features may have come from the cache, which draws no random numbers
    if checkpoint:
        if trainer.origin:
            check_origin(checkpoint, trainer.origin)
        if trainer.is_world_process_zero():
            bring_best(checkpoint, output_dir)
        load_weights(model, checkpoint)
    if checkpoint and end is not None and step_of(checkpoint) >= end:
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        if end is not None:
            trainer.add_callback(EndHeat(end, evaluate=trainer.eval_dataset is not None))
        with explain_exhausted_memory(trainer.args), contextlib.suppress(StoppedInEvaluation), stop.in_training():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        received = stop.agree()
        if received:
            stop.exit_with(received, output_dir)
    trainer.accelerator.free_memory()  # its data workers too
    for owner in (trainer, trainer.callback_handler):  # or two moments of all weights would stay
        owner.optimizer = owner.lr_scheduler = None
    # The best step was chosen on validation. With other strategies than Luthier's it may have no checkpoint.
    best = output_dir / f"checkpoint-{trainer.state.best_global_step}"
    (found,) = broadcast_object_list([best if best.exists() else None])
    if found is None:
        trainer.state.best_global_step = None
    elif trainer.args.process_index == 0:
        load_weights(model, found)
    if trainer.args.world_size > 1:  # the checkpoint may be on that process's machine alone, or arrive late elsewhere
        for tensor in model.state_dict().values():
            whole = tensor.contiguous()
            torch.distributed.broadcast(whole, src=0)
            tensor.copy_(whole)


def model_of(trainer: Trainer) -> PreTrainedModel:
    """Return a Trainer's model; the library's annotation allows other kinds too, and none."""
    return cast(PreTrainedModel, trainer.model)


def predict(trainer: Trainer, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's logits [N, C] on transformed rows, and their true classes [N]."""
    prediction = trainer.predict(rows)
    return concatenate_batches(prediction.predictions), concatenate_batches(prediction.label_ids)


def concatenate_batches(outputs: Any) -> np.ndarray:
    """Return one array of what a Trainer gives, which may be a list of batches; of a tuple the first, the logits."""
    batches = outputs if isinstance(outputs, list) else [outputs]
    arrays = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
