"""Several processes of one run: how many there are, and what one of them tells the others."""

import os
import signal
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from luthier.cores import count_cores
from luthier.errors import UserError
from luthier.terminal import plural

T = TypeVar("T")

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # by which launchers number processes


def is_launched() -> bool:
    """Tell whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def processes_started() -> int:
    """Return how many processes were started, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Return how many processes were started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_environment() -> None:
    """Refuse a number of processes that another tool has left behind: the run would wait for the others.

    Raises:
        UserError: no launcher has numbered this process as one of several.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or (int(count) > 1 and not any(name in os.environ for name in RANKS)):
        raise UserError(
            f"the environment variable WORLD_SIZE is {count!r}, but no launcher has started this process as one of "
            "several: unset WORLD_SIZE, or start with accelerate launch --multi_gpu"
        )


def available_cores() -> int:
    """Return how many cores this process may use: its share where several processes run on this machine."""
    return max(1, count_cores() // processes_here())


def check_processes(training_args: TrainingArguments) -> None:
    """Refuse what accelerate does silently: fewer processes than were asked for, or several alone or on one GPU.

    All processes wait for each other, so that none writes before all have parsed their options: a late one would find
    the output directory of the first, and choose another for itself.

    Raises:
        UserError: it is so.
    """
    if is_launched() and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UserError(
            "accelerate was asked for several processes and started one: on CPUs too, use accelerate launch "
            "--multi_gpu without --cpu, or distributed_type MULTI_GPU in its config. If the machine has GPUs, add "
            "--use_cpu True after train.py or score.py"
        )
    if processes_started() != training_args.world_size:
        raise UserError(
            f"{processes_started()} processes were started, and each would train alone, into one directory: give "
            "each process a GPU, or use --use_cpu True"
        )
    if training_args.world_size > 1:
        _check_gpus(training_args)
        wait_for_all()


def _check_gpus(training_args: TrainingArguments) -> None:
    """Check that this process has a GPU of its own, if it uses one: accelerate would let it share that of another.

    Raises:
        UserError: the machine has fewer GPUs than processes, and NCCL does not let them share one.
    """
    by_nccl = training_args.device.type == "cuda" and training_args.ddp_backend in (None, "nccl")
    # Other launchers may show each process its own GPU alone.
    if is_launched() and by_nccl and training_args.local_process_index >= torch.cuda.device_count():
        raise UserError(
            f"{processes_here()} processes were started on this machine, which has "
            f"{plural(torch.cuda.device_count(), 'GPU')}, and each needs one of its own: start fewer (num_processes "
            "in the config of accelerate, or accelerate launch --num_processes), or use --use_cpu True"
        )


def wait_for_all() -> None:
    """Wait until all processes have come here.

    `wait_for_everyone` of accelerate 1.15 waits on the GPU with the number of the process, even where processes use
    CPUs by gloo: it fails on a machine that has a GPU, but fewer than processes.
    """
    if processes_started() > 1:
        torch.distributed.barrier()


def from_main_process(value: T) -> T:
    """Return to all processes what the main one gives: all must do the same."""
    (shared,) = broadcast_object_list([value])
    return shared


def share_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors the values that they have on the main process; only where there are several processes."""
    for tensor in tensors:
        whole = tensor.contiguous()
        torch.distributed.broadcast(whole, src=0)
        tensor.copy_(whole)


def are_alike(value: str) -> bool:
    """Return, on every process, whether all of them passed the same value."""
    return len(set(gather_object([value]))) == 1


def die_with_launcher() -> None:
    """Receive SIGTERM when `accelerate launch` dies (Linux): it passes none on to its process, which would go on."""
    if is_launched() and sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
