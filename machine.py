"""What the machine decides and the user need not: threads, workers, memory, precision, what the libraries print."""

import ctypes
import logging
import os
import platform

import torch
import transformers
from transformers import TrainingArguments


def suit_machine(options: dict) -> None:
    """Fill in what depends on the machine, where the user has not: data workers, evaluation batch, bfloat16."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (options["use_cpu"] or not torch.cuda.is_available()):
        # Without these the Trainer takes no notice of the other processes, and each trains alone.
        options["use_cpu"], options["ddp_backend"] = True, options["ddp_backend"] or "gloo"
    gpu = torch.cuda.is_available() and not options["use_cpu"]
    if options["dataloader_num_workers"] is None:
        # A GPU starves where the process that feeds it decodes too; on a CPU the cores are the model's.
        options["dataloader_num_workers"] = min(cores_of_process(), 8) if gpu else 0
        options["dataloader_persistent_workers"] = gpu
    if options["per_device_eval_batch_size"] is None:
        options["per_device_eval_batch_size"] = 64 if gpu else 16  # on a CPU larger ones leave the caches
    if options["bf16"] is None:  # NVIDIA's from Ampere on
        options["bf16"] = gpu and not options["fp16"] and torch.cuda.is_bf16_supported(including_emulation=False)


def refuse_lone_processes(training_args: TrainingArguments) -> None:
    """Refuse what accelerate does in silence: fewer processes than were asked for, or several that train alone.

    Raises:
        ValueError: that is so.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one: in its config, take distributed_type "
            "MULTI_GPU (on CPUs too, with use_cpu: true) in the place of MULTI_CPU"
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != training_args.world_size:
        raise ValueError(
            f"{asked} processes were started, and each would train alone, into one directory: give each a GPU, or "
            "take --use_cpu True"
        )


def fit_machine(training_args: TrainingArguments) -> None:
    """Use one GPU for each process; without one use all cores, and let the process keep its memory."""
    # The Trainer would put nn.DataParallel over all GPUs of a lone process, whose copies know nothing of layers that
    # are frozen or keep their statistics. `accelerate launch` starts a process for each.
    training_args._n_gpu = min(1, training_args.n_gpu)
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # serves copies to a GPU
        # `accelerate launch` sets OMP_NUM_THREADS=1 where nobody told it that this is a CPU machine.
        if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(cores_of_process())
        keep_memory()


def keep_memory() -> None:
    """Let the process keep the memory that it frees.

    glibc gives every large tensor back to the system when it is freed, and gets the next one page by page: with these
    two settings (as mallopt(3) numbers them) it keeps them, and inference on a CPU is up to twice as fast.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        if libc.mallopt(m_mmap_threshold, 2**30) or libc.mallopt(m_mmap_threshold, 2**25):  # before 2.35 no more
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def quiet_libraries() -> None:
    """Let the libraries report what a user can act on, and nothing of their own housekeeping."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # of loading and writing single files
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry of a connection; the last one is told
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # checkpoints less than a second apart


def cores_of_process() -> int:
    """Return how many of the cores that this job may use are this process's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
