"""Heats: training in parts, each about twice as long as the one before, with a learning rate that decays in each.

These are warm restarts (SGDR, Loshchilov and Hutter 2017). At the end of every heat the weights are as good as the
steps so far allow. So arms can be compared there, and training can end there, without a schedule that was cut off.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from transformers import TrainerCallback, TrainerState

# Optimizer steps of the first heat, and images: it is one epoch where that lies between them.
MIN_STEPS, MAX_IMAGES = 8, 12_800
MAX_ON_GPU = 1_500_000  # images of all heats of an arm: half an hour of an H100, where a CPU takes half a day


class Schedule(NamedTuple):
    """When heats end, and how the learning rate changes in them.

    Attributes:
        ends: the optimizer step at which each heat ends.
        warmup: steps in which the rate rises at the beginning of a heat, half of it at most; or their share of the
            heat if below 1.
    """

    ends: tuple[int, ...]
    warmup: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, from 0 on, as a share of the highest: a rise, then half a cosine."""
        begin = 0
        for end in self.ends:
            if step < end:
                length = end - begin
                warmup = self.warmup * length if self.warmup < 1 else min(self.warmup, length / 2)
                rise = (step - begin + 1) / max(1.0, warmup)
                return min(rise, (1 + math.cos(math.pi * (step - begin) / length)) / 2)
            begin = end
        return 0.0


def first_heat(steps_per_epoch: int, batch: int) -> int:
    """Return the steps of the first heat: an epoch, several of a small data set, or a part of a large one's.

    Args:
        steps_per_epoch: optimizer steps of an epoch.
        batch: images in a step.
    """
    epochs = math.ceil(MIN_STEPS / steps_per_epoch)
    return min(epochs * steps_per_epoch, max(MAX_IMAGES // batch, MIN_STEPS))


def most_steps(heats: int, first: int, steps_per_epoch: int, batch: int, on_gpu: bool) -> int:
    """Return the steps of all heats of an arm, at most.

    A GPU is 30 times as fast as a few cores of a CPU. So there many images are seen in as many epochs as few images
    are, up to `MAX_ON_GPU`. The first heats, in which arms are compared, stay as short.

    Args:
        heats: of the recipe.
        first: steps of the first heat.
        steps_per_epoch: optimizer steps of an epoch.
        batch: images in a step.
        on_gpu: an NVIDIA GPU trains.
    """
    units = 2**heats - 1  # of the first heat's length: 1 + 2 + 4 ...
    if on_gpu:
        return max(units * first, min(units * steps_per_epoch, MAX_ON_GPU // batch))
    return units * first


def heat_ends(first: int, total: int) -> tuple[int, ...]:
    """Return the step at which each heat ends: each is twice as long as the one before, the last one up to `total`.

    Args:
        first: steps of the first heat.
        total: steps of all.
    """
    ends, length = [min(first, total)], first
    while ends[-1] + 2 * length <= total:
        length *= 2
        ends.append(ends[-1] + length)
    if total - ends[-1] >= 1.5 * length:
        ends.append(total)
    ends[-1] = total  # what is left is too short for a heat of its own
    return tuple(ends)


def ends_epoch(state: TrainerState) -> bool:
    """Tell whether a step is the last of an epoch, or of all: an evaluation by epochs comes after it."""
    return float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps


class EndHeat(TrainerCallback):
    """Ends the training at a step, with a checkpoint and, if asked to, an evaluation, whatever the strategies are."""

    def __init__(self, step: int, evaluate: bool):
        self.step, self.evaluate = step, evaluate

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = False  # it is saved after its evaluation, which a run resumed from here would skip

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_log = control.should_save = True
            control.should_evaluate = self.evaluate


class EndInTime(TrainerCallback):
    """Ends a training without heats before the epoch that would end too late.

    Args:
        ends_in_time: tells whether something that takes so many seconds from now on would end in time.
    """

    def __init__(self, ends_in_time: Callable[[float], bool]):
        self.ends_in_time, self.begin, self.evaluation = ends_in_time, 0.0, 0.0
        self.epochs = 0.0  # that were trained when this one began; a resumed run may begin within an epoch
        self.end: float | None = None  # of the epoch, until it has been evaluated

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.begin, self.end, self.epochs = time.perf_counter(), None, state.epoch or 0.0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.end = time.perf_counter()
        seconds = (self.end - self.begin) / ((state.epoch - self.epochs) or 1)
        needed = seconds + 2 * self.evaluation  # this epoch's, which comes now, and the next one's
        if not self.ends_in_time(needed):
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        if self.end is not None:  # there may be evaluations within an epoch too
            self.evaluation, self.end = time.perf_counter() - self.end, None
