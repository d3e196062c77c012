"""What Trainers share: those that only predict, the parts of those that train, training up to a step, and answers."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    SchedulerType,
    Trainer,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.training_args import OptimizerNames

from luthier.errors import UserError
from luthier.machine import explain_exhausted_memory
from luthier.processes import from_main_process, share_tensors
from luthier.terminal import has_terminal, say
from luthier.training.callbacks import ProgressBar, ProgressLines
from luthier.training.checkpoints import HASHES, bring_best, check_origin, find_damage, load_weights, step_of
from luthier.training.heats import EndHeat
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.signals import Stop, StoppedInEvaluation


def build_predictor(model: PreTrainedModel, training_args: TrainingArguments) -> SafeTrainer:
    """Return a Trainer that only predicts, on rows as transforms make them."""
    # With evaluations the Trainer would ask for their rows. Trackers follow the training alone.
    trainer = SafeTrainer(model, replace(training_args, eval_strategy="no", report_to="none"), default_collate)
    replace_progress(trainer)
    return trainer


def replace_progress(trainer: Trainer) -> None:
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
    name = OptimizerNames(training_args.optim).value
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
        if {"params", "model", "optimizer_dict"} & settings.keys():
            raise ValueError("it groups the layers by itself, where recipes give each its learning rate. Use another")
        if 0 < settings.get("warmup_steps", 0) < 1:  # a share, which schedule-free optimizers would take for steps
            settings["warmup_steps"] = 0  # the schedule of the learning rate has the warmup
        return kind, settings
    except (ImportError, RuntimeError, ValueError) as error:
        given = f" with --optim_args {training_args.optim_args}" if training_args.optim_args else ""
        raise UserError(f"--optim {name}{given} cannot be used: {error}") from error


def check_scheduler(training_args: TrainingArguments) -> None:
    """Try the learning rate scheduler, which the Trainer builds only when it begins to train.

    Raises:
        UserError: its settings are wrong.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, kwargs = SchedulerType(training_args.lr_scheduler_type), training_args.lr_scheduler_kwargs
    assert not isinstance(kwargs, str)  # TrainingArguments have parsed it
    try:
        scheduler = get_scheduler(
            schedule, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=kwargs
        )
        for _ in range(10):  # a value of the wrong type is noticed only where it is used
            optimizer.step()
            scheduler.step()
    except (ArithmeticError, TypeError, ValueError) as error:
        settings = f" with --lr_scheduler_kwargs {kwargs}" if kwargs else ""
        raise UserError(f"--lr_scheduler_type {schedule.value}{settings} cannot be used: {error}") from error


def train(trainer: SafeTrainer, end: int | None, checkpoint: Path | None, stop: Stop) -> None:
    """Train up to a step, and leave the model as it was after its best evaluation so far.

    Args:
        trainer: of `arms.build_trainer`; its model is where training starts without a checkpoint.
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
    _free_memory(trainer)
    _load_best(trainer)


def _free_memory(trainer: SafeTrainer) -> None:
    """Let go of what only a training needs: the optimizer, the loaders, and their data workers."""
    for owner in (trainer, trainer.callback_handler):  # or two moments of all weights would stay
        owner.optimizer = owner.lr_scheduler = None
    trainer.callback_handler.train_dataloader = trainer.callback_handler.eval_dataloader = None
    vars(trainer).pop("_eval_dataloaders", None)
    trainer.accelerator.free_memory()  # and its data workers, with the batches that they have ready


def _load_best(trainer: SafeTrainer) -> None:
    """Load the weights of the best evaluation on every process; without their checkpoint the last ones stay."""
    model = model_of(trainer)
    # The best step was chosen on validation. With other strategies than Luthier's it may have no checkpoint.
    best = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.best_global_step}"
    # `newest_whole` has looked at the newest one, and at older ones only where that is damaged.
    looks = trainer.args.process_index == 0 and (best / HASHES).exists()
    if damage := find_damage(best, of_model=True) if looks else None:
        say("careful", f"{best} is not used, because {damage}: the last weights take its place")
    found = from_main_process(best if best.exists() and not damage else None)
    if found is None:
        step = trainer.state.best_global_step
        if not damage and step not in (None, trainer.state.global_step):
            remedy = (
                "the last weights take its place. The best ones are kept where a checkpoint follows each evaluation, "
                "as by default (--eval_strategy epoch, --save_strategy epoch)"
            )
            say("careful", f"step {step} is the best on validation, but it has no checkpoint: {remedy}")
        trainer.state.best_global_step = None
    elif trainer.args.process_index == 0:
        load_weights(model, found)
    if trainer.args.world_size > 1:  # the checkpoint may be on that process's machine alone, or arrive late elsewhere
        share_tensors(model.state_dict().values())


def model_of(trainer: Trainer) -> PreTrainedModel:
    """Return a Trainer's model; the library's annotation allows other kinds too, and none."""
    return cast(PreTrainedModel, trainer.model)


def predict(trainer: Trainer, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's logits [N, C] on transformed rows, and their true classes [N]."""
    return _arrays_of(trainer.predict(rows))


def predict_best(trainer: SafeTrainer, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return what `predict` does, once `train` has loaded the best weights.

    Where this training has evaluated them on these rows, its answers are returned, and nothing is predicted again.
    """
    best = trainer.state.best_global_step  # None: the last weights stay. 0: the first ones, by `eval_on_start`
    kept = trainer.evaluations.get(best) if best is not None and rows is trainer.eval_dataset else None
    return predict(trainer, rows) if kept is None else _arrays_of(kept)


def _arrays_of(output: EvalLoopOutput | PredictionOutput) -> tuple[np.ndarray, np.ndarray]:
    return concatenate_batches(output.predictions), concatenate_batches(output.label_ids)


def concatenate_batches(outputs: Any) -> np.ndarray:
    """Return one array of what a Trainer gives, which may be a list of batches; of a tuple the first, the logits."""
    batches = outputs if isinstance(outputs, list) else [outputs]
    arrays = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
