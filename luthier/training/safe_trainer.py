"""The Trainer with what the library's own lacks: exact resume, whole checkpoints, and an end to broken losses."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import EvalLoopOutput

from luthier.errors import NotFinite, UserError
from luthier.machine import explain_exhausted_memory
from luthier.processes import share_tensors, wait_for_all
from luthier.training.checkpoints import PARTIAL, Origin, newest, prune_checkpoints, seal, write_origin
from luthier.training.heats import Schedule, ends_epoch
from luthier.training.workers import WorkerTrainer

# In errors of torch where a file cannot be written, as where a quota is used up; it does not say why.
NOT_WRITTEN = ("inline_container", "iostream")


class SafeTrainer(WorkerTrainer):
    """The Trainer whose checkpoints are whole, and which stops where nothing can be learned any more.

    It overrides private methods, read in transformers 5.23. At an upgrade, check: does `_get_output_dir` still name
    the folder that `_save_checkpoint` writes into; does `_maybe_log_save_evaluate` still evaluate before it saves;
    is `_get_grad_norm` still called at every step, and `_determine_best_metric` after every evaluation? Does
    `_eval_dataloaders` still hold the loaders (`trainer._free_memory`)?
    """

    schedule: Schedule | None = None  # of the learning rate, instead of `lr_scheduler_type`
    log_shares: torch.Tensor | None = None  # [C], where there is a `Balance`
    class_weights: torch.Tensor | None = None  # [C], likewise, where it is weighted
    watch_adjusted: Callable[[torch.Tensor, torch.Tensor], None] | None = None  # of training, with the labels
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None  # 8-bit levels to pixel values
    origin: Origin | None = None  # which checkpoints keep
    writing_to: str | None = None
    save_postponed = False
    not_finite_at: torch.Tensor | None = None  # step of the first loss or gradient that was not finite, or -1

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # The library derives both from what the model's `forward` takes. Here each loss is the mean of a batch.
        self.label_names, self.model_accepts_loss_kwargs = ["labels"], False
        self.evaluations: dict[int, EvalLoopOutput] = {}  # of this training, by step: the best and the last

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Create the scheduler of the heats, or the one that the training arguments name."""
        schedule = self.schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            # A function, because the state of any other callable would be saved and loaded. The scheduler is not told
            # of steps that float16 skips. They count towards the end of a heat, so they count here.
            def rate(step: int) -> float:
                return schedule(max(step, self.state.global_step + 1) if step else 0)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_output_dir(self, trial) -> str:
        return self.writing_to or super()._get_output_dir(trial)

    def _maybe_log_save_evaluate(self, *arguments, **options) -> None:
        # A checkpoint of an epoch's last step waits for the epoch's evaluation, which a resume from it would not make.
        epoch = float(self.state.epoch or 0)
        last_step = self.args.eval_strategy == "epoch" and ends_epoch(self.state) and self.args.eval_delay <= epoch
        if self.control.should_evaluate:
            self.control.should_save |= self.save_postponed
            self.save_postponed = False
        elif last_step and self.control.should_save:
            self.control.should_save, self.save_postponed = False, True
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _determine_best_metric(self, *arguments, **options) -> bool:
        is_best = super()._determine_best_metric(*arguments, **options)
        if is_best:  # the library notes no step with `--save_strategy no`; the end of a heat has a checkpoint even so
            self.state.best_global_step = self.state.global_step
        return is_best

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint into a temporary folder, hash it, sync it to the disk, and only then give it its name."""
        self.stop_if_not_finite()
        output_dir, step = Path(str(self.args.output_dir)), self.state.global_step
        self.writing_to = str(output_dir / PARTIAL)
        written, checkpoint = output_dir / PARTIAL / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            wait_for_all()
            if self.args.should_save:
                # Or the library would remove all others at the end with --save_total_limit 1, the newest too.
                self.state.best_model_checkpoint = None
                self.state.save_to_json(str(written / "trainer_state.json"))
                if self.origin:
                    write_origin(written, self.origin)
                seal(written, checkpoint)
                prune_checkpoints(output_dir, self.args.save_total_limit, self.state.best_global_step)
        except Exception as error:  # safetensors and torch have errors of their own for a full disk
            full = "No space left" in str(error) or shutil.disk_usage(output_dir).free < self.checkpoint_size()
            shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
            if not full and not any(words in str(error) for words in NOT_WRITTEN):
                raise
            raise _explain_failed_save(output_dir, step, full) from error
        finally:
            self.writing_to = None
        wait_for_all()
        if self.args.local_process_index == 0:  # on every machine, each of which may have a disk of its own
            shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)

    def _load_from_checkpoint(self, *_, **__) -> None:
        """Do nothing: `train` has loaded the weights, and the library's own way leaves some of them as they were."""

    def checkpoint_size(self) -> int:
        """Return about how many bytes a checkpoint takes: all weights, and two moments of those that are trained."""
        model = self.model
        assert model is not None
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return weights + 2 * trained

    def floating_point_ops(self, inputs: dict) -> int:
        """Return 0: the library's estimate is one of tokens, and it counts all parameters at every step."""
        return 0

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Move a batch to the device, and scale it there where it is of 8-bit levels."""
        inputs = super()._prepare_inputs(inputs)
        if self.scale and inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self.scale(inputs["pixel_values"])
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy of a batch, and with `return_outputs` the logits by name.

        Some architectures have no loss of their own, and that of others is multiplied by the number of processes and
        of accumulated batches. With class weights training has the weighted losses of the adjusted logits, which
        lack the shares of the classes; see `Balance`.
        """
        labels = inputs["labels"]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        if not model.training:
            loss = cross_entropy(logits, labels)
        else:
            adjusted = logits if self.log_shares is None else logits - self.log_shares
            if self.watch_adjusted:
                self.watch_adjusted(adjusted.detach(), labels)
            weights, smoothing = self.class_weights, self.args.label_smoothing_factor
            learned = logits if weights is None else adjusted
            losses = cross_entropy(learned, labels, reduction="none", label_smoothing=smoothing)
            # Not with the weights of `cross_entropy`: its mean divides by them, and they weigh the smoothed part of
            # all other classes too, so that a rare class would attract all images.
            loss = (losses if weights is None else losses * weights[labels]).mean()
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluation_loop(self, *arguments, **options):
        """Evaluate or predict, with advice where memory does not suffice; fill `evaluations` while training."""
        if self.is_in_train and self.args.world_size > 1:
            # In a step each process counts BatchNorm's statistics of its own images; those of the main one are saved.
            share_tensors(self.model_wrapped.buffers())
        best = self.state.best_global_step
        self.evaluations = {step: kept for step, kept in self.evaluations.items() if step == best}
        with explain_exhausted_memory(self.args, training=False):
            output = super().evaluation_loop(*arguments, **options)
        if self.is_in_train:
            self.evaluations[self.state.global_step] = output
        return output

    def training_step(self, *arguments, **options) -> torch.Tensor:
        """Do a step, and check that its loss is finite."""
        loss = super().training_step(*arguments, **options)
        self._watch(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # which skips such steps by itself
            self._watch(norm)
        return norm

    def _watch(self, value: torch.Tensor | float) -> None:
        value = torch.as_tensor(value, device=self.args.device).detach()
        if self.not_finite_at is None:
            self.not_finite_at = torch.full((), -1, device=self.args.device)
        broken = (self.not_finite_at < 0) & ~torch.isfinite(value).all()
        self.not_finite_at = torch.where(broken, self.state.global_step + 1, self.not_finite_at)
        if self.args.device.type == "cpu":  # elsewhere reading it would make the device wait at every step
            self.stop_if_not_finite()

    def log(self, *arguments, **options) -> None:
        """Log, unless a loss since the last time was not finite."""
        self.stop_if_not_finite()
        super().log(*arguments, **options)

    def stop_if_not_finite(self) -> None:
        """Raise NotFinite if a loss or a gradient was not finite; with several processes a plain UserError.

        The others may not know of it. They would wait for this one if it went on with something else.
        """
        step = -1 if self.not_finite_at is None else int(self.not_finite_at)
        if step >= 0:
            self.not_finite_at = None
            last = newest(Path(str(self.args.output_dir)))
            kept = f" {last} is from before and whole." if last else ""
            kind = NotFinite if self.args.world_size == 1 else UserError
            raise kind(
                f"the loss or its gradient is not a finite number at step {step}. Likely causes: a learning rate "
                f"that is too high (it is {self.args.learning_rate:g}: try a tenth), half precision (--bf16 False, "
                f"--fp16 False), or damaged weights.{kept}"
            )


def _explain_failed_save(output_dir: Path, step: int, full: bool) -> UserError:
    """Return the error of a checkpoint that could not be written, with what to do.

    Args:
        output_dir: of the checkpoint.
        step: of the checkpoint.
        full: the disk has no space for it; otherwise the cause is not known.
    """
    last, why = newest(output_dir), "the disk is full" if full else "a file could not be written"
    remedy = "free some space" if full else "check the disk, and whether your quota is used up"
    resume = f"{last} is whole: {remedy}, and resume with" if last else f"{remedy}, and start with"
    return UserError(
        f"{why}: no checkpoint of step {step} in {output_dir}. {resume} --output_dir and --resume_from_checkpoint auto"
    )
