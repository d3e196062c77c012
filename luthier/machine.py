"""What the machine decides so that the user need not: workers, batch size, precision, threads, memory."""

import contextlib
import ctypes
import functools
import gc
import logging
import multiprocessing
import os
import platform
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
import transformers
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from luthier.errors import UserError, first_line
from luthier.escape import escape_lines
from luthier.processes import (
    available_cores,
    check_processes,
    die_with_launcher,
    is_launched,
    processes_here,
    processes_started,
)
from luthier.terminal import has_terminal, is_first_process, plural, say

LONG_RUN = 20_000  # images for which channels_last pays on a GPU
SHARED = 2**28  # bytes of shared memory for a data worker: two batches of 64 images of 512 px, and one that is read
DRIVER = Path("/proc/driver/nvidia/version")
DEAD_WORKER = "DataLoader worker (pid"  # in torch's errors where the system has ended a data worker
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED",
    "Invalid buffer size",  # of a Mac's GPU, where one tensor alone is too large
)  # fmt: skip


class OneGPUTrainingArguments(TrainingArguments):
    """`TrainingArguments` that use one GPU a process, and wait as long on CPUs as on GPUs.

    The Trainer would put `nn.DataParallel` over all GPUs of a lone process. Its replicas ignore which layers are
    frozen and which keep their statistics; `accelerate launch` starts a process for each GPU instead.
    """

    # Read in transformers 5.23. At an upgrade, check: does the Trainer still take the number of GPUs from `_n_gpu`,
    # and is that still set in this property alone? Does it give gloo no timeout?
    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        started = "RANK" in os.environ and processes_started() > 1
        if started and self.use_cpu and self.ddp_backend == "gloo" and not torch.distributed.is_initialized():
            os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or "29500"  # accelerate's default
            # The library gives `ddp_timeout` to the processes of GPUs alone; on CPUs torch's 30 minutes would count.
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        device = super()._setup_devices
        self._n_gpu = min(1, self._n_gpu)
        # accelerate calls it cpu:0 where there are several processes: transformers before 5.18 cannot load to that.
        return torch.device("cpu") if device.type == "cpu" else device


def fill_in_machine_defaults(options: dict) -> None:
    """Replace the options that are None because they depend on the machine, before `TrainingArguments` are built.

    Args:
        options: `use_cpu`, `ddp_backend`, `fp16`, and those that are filled in: `dataloader_num_workers`,
            `dataloader_persistent_workers`, `dataloader_pin_memory`, `accelerator_config`,
            `per_device_eval_batch_size`, `bf16`.

    Raises:
        UserError: the machine lacks what is asked for.
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU"):  # by `accelerate launch --cpu`, or its config
        options["use_cpu"] = True
    if not options["use_cpu"] and DRIVER.is_file() and torch.version.cuda and not torch.cuda.is_available():
        hint = "is its driver too old, or is it hidden (CUDA_VISIBLE_DEVICES, a container without --gpus)?"
        say("careful", f"torch cannot use the NVIDIA GPU of this machine, and uses the CPU: {hint}")
    if not options["use_cpu"] and (needed := lacking_capability()):
        say(
            "careful",
            f"this NVIDIA GPU is too old for this build of torch, which needs {needed}: the CPU is used. A build for "
            "an older CUDA may support it (https://pytorch.org/get-started/previous-versions)",
        )
        options["use_cpu"] = True
    if processes_started() > 1 and (options["use_cpu"] or not torch.cuda.is_available()):
        # Without these the Trainer ignores the other processes, and each trains alone.
        options["use_cpu"], options["ddp_backend"] = True, options["ddp_backend"] or "gloo"
    if options["fp16"] and (options["use_cpu"] or not torch.accelerator.is_available()):
        raise UserError("--fp16 needs a GPU, and the CPU is used: leave it out")
    if options["bf16"] and not options["use_cpu"] and not is_torch_bf16_gpu_available():
        raise UserError("--bf16 needs a GPU that supports bfloat16: leave it out, or add --use_cpu True")
    if options["bf16"] is False and not options["fp16"] and is_launched():
        # The library would take the precision of accelerate's config, whatever the options say.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if options["dataloader_num_workers"] and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("--dataloader_num_workers needs a system that can fork, which Windows cannot: leave it out")
    gpu = torch.cuda.is_available() and not options["use_cpu"]
    pinned = gpu if options["dataloader_pin_memory"] is None else options["dataloader_pin_memory"]
    # A GPU starves where the process that feeds it decodes too; on a CPU the model needs the cores.
    workers = _data_workers() if gpu and options["dataloader_num_workers"] is None else 0
    defaults = {
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "dataloader_pin_memory": gpu,  # it speeds up copies to a GPU
        # Otherwise the host waits for the GPU at every step, to copy the next batch.
        "accelerator_config": {"non_blocking": True} if gpu and pinned else None,
        "per_device_eval_batch_size": 64 if gpu else 16,  # larger batches do not fit into a CPU's caches
        # NVIDIA GPUs from Ampere on.
        "bf16": gpu and not options["fp16"] and torch.cuda.is_bf16_supported(including_emulation=False),
    }
    for name, value in defaults.items():
        if options[name] is None:
            options[name] = value


def lacking_capability() -> str:
    """Return the compute capability that torch is built for, if the GPU's is lower; otherwise an empty text.

    Such a GPU is there for torch, which fails at the first computation.
    """
    if not torch.cuda.is_available():
        return ""
    built = [
        int(found[1]) for name in torch.cuda.get_arch_list() if (found := re.match(r"(?:sm|compute)_(\d+)", name))
    ]
    major, minor = torch.cuda.get_device_capability()
    if not torch.version.cuda or not built or 10 * major + minor >= min(built):  # AMD's have other names
        return ""
    return f"compute capability {min(built) / 10:.1f} or higher"


def _data_workers() -> int:
    """Return how many data workers a process gets: as many as there is shared memory for, to hand over batches in."""
    if "fork" not in multiprocessing.get_all_start_methods():  # Windows would pickle the rows, which hold functions
        return 0
    workers, shared = min(available_cores(), 8), Path("/dev/shm")
    if not shared.is_dir():
        return workers
    room = shutil.disk_usage(shared).free // processes_here()
    fitting = min(workers, room // SHARED)
    if fitting < workers:
        advice = "images load slowly. Start the container with --shm-size 4g"
        say("careful", f"shared memory for {fitting} of {plural(workers, 'data worker')} ({shared}): {advice}")
    return fitting


def choose_memory_format(model: nn.Module, device: torch.device, images: int) -> None:
    """Put the weights of a model into the memory format in which a run is over sooner.

    A convolution in channels_last is faster, but on a GPU its first batch of each shape is slower: cuDNN makes a plan
    for it, which takes seconds (docs/benchmarks.md, "On a GPU"). A short run does not get them back. On a Mac's GPU
    the gradients of BatchNorm are wrong in channels_last, or cannot be computed (pytorch issue 175189).

    Args:
        model: its weights are in channels_last.
        device: that it runs on.
        images: that it trains on.
    """
    if device.type == "mps" or (device.type == "cuda" and images < LONG_RUN):
        model.to(memory_format=torch.contiguous_format)


def set_up_process(training_args: TrainingArguments) -> None:
    """Prepare this process for a run: logging, processes, threads and memory.

    Raises:
        UserError: the processes are not what was asked for, or `--torch_compile` has no compiler.
    """
    die_with_launcher()
    configure_logging()
    configure_bars()
    check_processes(training_args)
    check_compiler(training_args)
    configure_cpu(training_args.device)
    gc.freeze()  # of the libraries' half a million objects none will be garbage; a collection took a third of a second


def configure_bars() -> None:
    """Let `datasets` draw bars on a terminal alone: in a file each refresh adds to one endless line."""
    import datasets

    if not has_terminal():
        datasets.disable_progress_bars()  # see terminal.Tenths


def check_compiler(training_args: TrainingArguments) -> None:
    """Check that `--torch_compile` has a compiler.

    Raises:
        UserError: there is none.
    """
    given = [name.split()[0] for variable in ("CXX", "CC") if (name := os.environ.get(variable, "").strip())]
    names = (*given, "g++", "gcc", "cc", "clang++", "clang", "cl")
    needed = training_args.torch_compile and training_args.torch_compile_backend in (None, "inductor")
    if needed and not any(map(shutil.which, names)):
        raise UserError(
            "--torch_compile needs a C++ compiler, and there is none: install one such as g++, or leave the option out"
        )


def configure_cpu(device: torch.device) -> None:
    """On a CPU, use all cores of this process and let it keep its memory; on other devices change nothing."""
    if device.type != "cpu":
        return
    # `accelerate launch` sets OMP_NUM_THREADS=1 where its config does not say that this is a CPU machine. Where it
    # does, accelerate divides the cores of the whole machine, of which a container may get the time of a few.
    too_few = is_launched() and os.environ.get("OMP_NUM_THREADS") == "1"
    if too_few or torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())
    keep_freed_memory()


def pool_of_single_threads(threads: int) -> ThreadPoolExecutor:
    """Return a pool of so many threads, in each of which torch computes with a single thread.

    If torch used as many threads in each of them as there are cores, they would wait for one another. A new thread
    takes over the number that was set last, in whatever thread. The calling thread asks for its own number first, and
    so keeps it.
    """
    torch.get_num_threads()
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for small work, for which a machine with many cores takes longer with all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, where glibc manages it.

    glibc gives every large tensor back to the system when it is freed, and gets the next one page by page. With these
    two settings (numbered as in mallopt(3)) it keeps them, and inference on a CPU is up to twice as fast.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        # Before glibc 2.35 the second value is the largest one allowed.
        if libc.mallopt(m_mmap_threshold, 2**30) or libc.mallopt(m_mmap_threshold, 2**25):
            libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def explain_exhausted_memory(training_args: TrainingArguments, training: bool = True) -> Iterator[None]:
    """Turn the errors of exhausted memory into advice, and those of data workers that have died, mostly of it.

    Args:
        training_args: for the batch size and the data workers in the advice.
        training: False is an evaluation, whose batches do not change the result.

    Raises:
        UserError: there was not enough memory, or a data worker has died.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if DEAD_WORKER in str(error):
            told = error.__cause__ if error.__cause__ and DEAD_WORKER in str(error.__cause__) else error
            raise UserError(
                f"a data worker has died ({first_line(told)}). Mostly memory, or the shared memory of a "
                "container, does not suffice: use fewer (--dataloader_num_workers "
                f"{training_args.dataloader_num_workers // 2}), or start the container with --shm-size 4g. An "
                "interrupted run of train.py goes on with --output_dir and --resume_from_checkpoint auto"
            ) from error
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        if not training:
            batch = training_args.per_device_eval_batch_size
            smaller = f"smaller ones (--per_device_eval_batch_size {batch // 2}), or " if batch > 1 else ""
            advice = f"use {smaller}fewer pixels (train.py: --image_size)"
            raise UserError(f"not enough memory to evaluate batches of {batch}: {advice}") from error
        batch = training_args.per_device_train_batch_size
        parts = next((parts for parts in range(2, batch) if batch % parts == 0), batch)
        smaller = (
            f"smaller ones, with as many images as before in a step (--per_device_train_batch_size {batch // parts} "
            f"--gradient_accumulation_steps {parts * training_args.gradient_accumulation_steps}), or "
        )
        raise UserError(
            f"not enough memory for batches of {batch}: use {smaller if batch > 1 else ''}fewer pixels (--image_size)"
        ) from error


def configure_logging() -> None:
    """Let the libraries report what a user can act on, and nothing of their own housekeeping."""
    level = logging.WARNING if is_first_process() else logging.ERROR  # the others would repeat each warning
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler], level=level)
    logging.getLogger("luthier.images.shards").setLevel(logging.WARNING)  # of rows that no other process reads
    transformers.utils.logging.disable_progress_bar()  # of loading and writing single files
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry of a connection; Luthier says the last
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # checkpoints less than a second apart


class _Printable(logging.Formatter):
    """Leaves out what a terminal would obey: names of files and classes are in many warnings."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_lines(super().format(record))
