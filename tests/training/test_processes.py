"""Several processes of one run: what is refused, what they share, and the same result as of one."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import PROJECT, TWO_PROCESSES, draw_folder, flags, load_result
from transformers import Trainer

from luthier.arguments import parse_arguments
from luthier.errors import UserError
from luthier.processes import RANKS, check_processes, wait_for_all
from luthier.training import safe_trainer
from luthier.training.recipe import BATCH, FROM_SCRATCH
from luthier.training.signals import Stop, StoppedInEvaluation
from train import main

SLOW = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("folder")


@SLOW
def test_processes_on_cpus_wait_as_long_as_is_asked_for():
    Path("accelerate.yaml").write_text(yaml.safe_dump(TWO_PROCESSES))
    Path("wait.py").write_text(
        "import torch\n"
        "from luthier.arguments import parse_arguments\n"
        "parse_arguments(['--data_dir', 'images', '--ddp_timeout', '7777'])\n"
        "group = torch.distributed.distributed_c10d._get_default_group()\n"
        "assert group._get_backend(torch.device('cpu')).options._timeout.total_seconds() == 7777\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml", "wait.py"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_processes_stop_after_the_same_step_whenever_the_signal_comes(monkeypatch, tmp_path):
    stop = Stop(tmp_path)
    stop.training, stop.group = True, object()
    in_between, of_others = [lambda: stop._receive(signal.SIGTERM, None)], [0]

    def all_reduce(number, *_, **__):  # during which the signal comes, too late for the others to know
        number.fill_(max(int(number), *of_others))
        if in_between:
            in_between.pop()()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    state = SimpleNamespace(epoch=0.5, global_step=4, max_steps=8)
    control = SimpleNamespace(should_training_stop=False)
    stop.on_step_end(None, state, control)
    stop.on_epoch_end(None, state, control)
    assert stop.received == signal.SIGTERM and vars(control) == {"should_training_stop": False}
    stop.on_step_end(None, state, control)
    assert control.should_training_stop and control.should_save
    stop.received, of_others[:] = None, [int(signal.SIGINT)]
    assert stop.agree() == signal.SIGINT
    with pytest.raises(StoppedInEvaluation):  # another process has waited long enough
        stop.on_prediction_step(None, state, control)
    of_others[:] = [0]
    stop._receive(signal.SIGTERM, None)
    stop.on_prediction_step(None, state, control)
    stop.since -= 7
    with pytest.raises(StoppedInEvaluation):
        stop.on_prediction_step(None, state, control)


def run_together(commands: list[list[str]], folders: list[Path], environments: list[dict]) -> list[tuple[int, str]]:
    """Run commands at the same time, each in its own folder; return exit codes and outputs."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen(command, cwd=folder, env=os.environ | variables, **streams)
        for command, folder, variables in zip(commands, folders, environments, strict=True)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in running]
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


@pytest.mark.slow
def test_two_processes_score_every_image_once_and_write_one_set_of_files(timm_checkpoint, launch, folder):
    """The probe, the splits and the scores are those of a single process."""
    Path("accelerate.yaml").write_text(yaml.safe_dump(TWO_PROCESSES))
    options = ["--data_dir", "images", "--model_name", timm_checkpoint, "--recipe", "probe", "--disable_tqdm", "1"]
    launcher = ("accelerate", "launch", "--config_file", "accelerate.yaml")
    result = launch("train.py", *options, "--output_dir", "two", cwd=folder, launcher=launcher)
    assert result.returncode == 0 and result.stdout.count("probe    validation") == 1, result.stdout + result.stderr
    assert "2 processes" in result.stdout and result.stdout.count("saved    two") == 1
    main([*map(str, options), "--output_dir", "one"])
    (weights, scores), (two_weights, two_scores) = load_result("one"), load_result("two")
    assert (
        two_scores["test"]["n"] == 6 and two_scores["test"]["confusion_matrix"] == scores["test"]["confusion_matrix"]
    )
    assert two_scores["validation"]["log_loss"] == pytest.approx(scores["validation"]["log_loss"], rel=1e-4)
    assert all(torch.allclose(tensor, two_weights[name], atol=1e-5) for name, tensor in weights.items())


@pytest.mark.slow
def test_two_processes_resume_exactly(timm_checkpoint, launch, folder):
    Path("accelerate.yaml").write_text(yaml.safe_dump(TWO_PROCESSES))
    options = flags(str(timm_checkpoint), "--recipe", "full", "--keep", "trained", "--refit", "none")
    launcher = ("accelerate", "launch", "--config_file", "accelerate.yaml")
    whole = launch("train.py", *options, "--output_dir", "whole", cwd=folder, launcher=launcher)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    shutil.copytree("whole/checkpoint-2", "cut/checkpoint-2")
    more = ("--output_dir", "cut", "--resume_from_checkpoint", "auto")
    cut = launch("train.py", *options, *more, cwd=folder, launcher=launcher)
    assert cut.returncode == 0 and "resume   from cut/checkpoint-2" in cut.stdout, cut.stdout + cut.stderr
    (weights, scores), (resumed, resumed_scores) = load_result("whole"), load_result("cut")
    assert resumed_scores == scores and all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_two_processes_take_a_larger_batch_and_learn_faster_where_epochs_are_long(launch, folder):
    draw_folder(Path("many"), per_class=3_600)
    Path("accelerate.yaml").write_text(yaml.safe_dump(TWO_PROCESSES))
    options = ["--data_dir", "many", "--model_name", "simple_cnn", "--max_steps", "2", "--disable_tqdm", "1"]
    launcher = ("accelerate", "launch", "--config_file", "accelerate.yaml")
    result = launch("train.py", *options, "--output_dir", "two", cwd=folder, launcher=launcher)
    assert result.returncode == 0, result.stdout + result.stderr
    batch, rate = re.search(r"batch +images in a step .*: from scratch (\d+) at (.*)", result.stdout).groups()
    assert int(batch) == 2 * BATCH and float(rate) == pytest.approx(
        math.sqrt(2) * FROM_SCRATCH.learning_rate, rel=2e-3
    )


@pytest.mark.slow
def test_two_machines_with_separate_disks(timm_checkpoint, folder):
    """Two launches on loopback addresses: only the first writes outputs."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    settings = TWO_PROCESSES | {
        "num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": port, "rdzv_backend": "static",
        "same_network": True,
    }  # fmt: skip
    commands, folders = [], []
    for rank in range(2):
        machine = folder / f"machine{rank}"
        shutil.copytree("images", machine / "images")
        (machine / "accelerate.yaml").write_text(yaml.safe_dump(settings | {"machine_rank": rank}))
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", "accelerate.yaml"]
        more = ["--recipe", "full", "--keep", "trained", "--save_strategy", "epoch", "--output_dir", "out"]
        commands.append([*launcher, str(PROJECT / "train.py"), *flags(str(timm_checkpoint), *more)])
        folders.append(machine)
    environments = [{"HF_HOME": str(machine / "home"), "GLOO_SOCKET_IFNAME": "lo"} for machine in folders]
    (first_code, first_output), (second_code, second_output) = run_together(commands, folders, environments)
    assert first_code == 0 and second_code == 0, first_output + second_output
    assert "2 processes" in first_output and first_output.count("saved    out") == 1 and "saved" not in second_output
    assert (folders[0] / "out/model.safetensors").exists()
    assert not [path for path in folders[1].glob("out/**/*") if path.is_file()]


@pytest.mark.slow
def test_single_process_that_accelerate_starts_silently_is_refused(launch, folder):
    Path("accelerate.yaml").write_text(yaml.safe_dump(TWO_PROCESSES | {"distributed_type": "MULTI_CPU"}))
    launcher = ("accelerate", "launch", "--config_file", "accelerate.yaml")
    result = launch("train.py", "--data_dir", "images", cwd=folder, launcher=launcher)
    assert result.returncode != 0 and "asked for several processes and started one" in result.stderr
    assert not Path("outputs").exists()


@pytest.mark.parametrize("count", ["4", ""])
def test_number_of_processes_that_another_tool_has_left_behind_is_refused(monkeypatch, count):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UserError, match="unset WORLD_SIZE"):
        parse_arguments([])


def test_processes_wait_for_each_other_before_one_writes(monkeypatch):
    waited = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waited.append(True))
    check_processes(SimpleNamespace(world_size=2, device=torch.device("cpu")))
    assert waited == [True]


@pytest.mark.parametrize(
    ("index", "backend", "launched", "refused"),
    [
        (2, None, True, True),
        (2, "nccl", True, True),
        (1, None, True, False),
        (2, "gloo", True, False),
        (2, None, False, False),  # as of Slurm, where each process may see its own GPU alone
    ],
)
def test_process_without_a_gpu_of_its_own_is_refused(monkeypatch, index, backend, launched, refused):
    waited, device = [], torch.device("cuda", index % 2)
    args = SimpleNamespace(world_size=4, device=device, ddp_backend=backend, local_process_index=index)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": str(index)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waited.append(True))
    if refused:
        with pytest.raises(UserError, match="4 processes were started on this machine, which has 2 GPUs"):
            check_processes(args)
    else:
        check_processes(args)
    assert bool(waited) is not refused


def test_processes_wait_on_no_gpu_of_their_own(monkeypatch):
    """Where they use CPUs, the machine may have a GPU for the first one alone."""
    waited = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda **options: waited.append(options))
    for count in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", count)
        wait_for_all()
    assert waited == [{}]


def test_checkpoint_gets_its_name_when_all_processes_have_written_their_part(monkeypatch, tmp_path):
    events = []
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_: events.append("write"))
    for name in ("wait_for_all", "seal", "prune_checkpoints"):
        monkeypatch.setattr(safe_trainer, name, lambda *_, name=name: events.append(name))
    trainer = safe_trainer.SafeTrainer.__new__(safe_trainer.SafeTrainer)
    trainer.state = SimpleNamespace(global_step=4, best_global_step=None, save_to_json=lambda path: None)
    trainer.args = SimpleNamespace(
        output_dir=str(tmp_path), should_save=True, save_total_limit=None, local_process_index=0
    )
    trainer._save_checkpoint(None, None)
    assert events == ["write", "wait_for_all", "seal", "prune_checkpoints", "wait_for_all"]


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and each would train alone"):
        check_processes(SimpleNamespace(world_size=1))


@pytest.mark.parametrize("path", sorted((PROJECT / "cloud").glob("accelerate_*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_of_the_cloud_are_valid(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and config.distributed_type.value == "MULTI_GPU"
