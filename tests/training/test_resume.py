"""Interrupted runs: exact resumption, signals, losses that are not finite, full disks, memory."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import PROJECT, TWO_PROCESSES, flags, load_result
from safetensors.torch import load_file
from transformers import Trainer, TrainerState, TrainingArguments

import luthier.reporting.results as results
from luthier.errors import NotFinite, UserError
from luthier.machine import explain_exhausted_memory
from luthier.output_dir import has_ended
from luthier.scoring.refit import plan_refit
from luthier.training.checkpoints import find_damage, newest_whole, seal
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.signals import Stop
from train import main

SLOW = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("folder")


def assert_resumes_exactly(options: list[str], interrupted_after: tuple[int, ...]) -> None:
    main([*options, "--output_dir", "whole"])
    weights, scores = load_result("whole")
    for step in interrupted_after:
        for checkpoint in Path("whole").glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) <= step:
                shutil.copytree(checkpoint, Path(f"cut{step}", checkpoint.name))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main([*options, "--output_dir", f"cut{step}", "--resume_from_checkpoint", "auto"])
        # A run that began again would end with the same weights.
        assert f"resume   from cut{step}/checkpoint-{step}\n" in printed.getvalue()
        resumed_weights, resumed_scores = load_result(f"cut{step}")
        assert resumed_scores == scores, step
        assert all(torch.equal(tensor, resumed_weights[name]) for name, tensor in weights.items()), step


@SLOW
@pytest.mark.parametrize("augmentation", ["none", "flip_crop", "augmix", "trivial"])
def test_resumes_exactly_for_every_augmentation(timm_checkpoint, augmentation):
    options = flags(str(timm_checkpoint), "--recipe", "full", "--keep", "trained", "--augmentation", augmentation)
    assert_resumes_exactly(options, (3, 4))


@SLOW
@pytest.mark.parametrize("model", ["vit", "simple_cnn"])
def test_resumes_exactly_for_every_kind_of_model(vit_checkpoint, model):
    name = str(vit_checkpoint) if model == "vit" else model
    recipe = ["--recipe", "lp_ft", "--keep", "trained"] if model == "vit" else []
    assert_resumes_exactly(flags(name, *recipe, "--augmentation", "trivial"), (1, 6))


@SLOW
def test_resumes_exactly_with_data_workers_and_accumulated_gradients(timm_checkpoint):
    more = ["--augmentation", "trivial", "--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"]
    more += ["--dataloader_persistent_workers", "1", "--recipe", "full", "--keep", "trained"]
    assert_resumes_exactly(flags(str(timm_checkpoint), *more), (1, 3))


def test_auto_resume_starts_anew_falls_back_or_ends(timm_checkpoint, capsys, caplog):
    options = [
        *flags(str(timm_checkpoint), "--recipe", "full"),
        "--output_dir",
        "out",
        "--resume_from_checkpoint",
        "auto",
    ]
    main(options)
    assert "there is no whole checkpoint: from the start" in capsys.readouterr().out
    main(options)
    assert "done     out holds a finished run" in capsys.readouterr().out
    Path("out/README.md").unlink()  # the last file of a run: without it the run has not ended
    steps = sorted(int(path.name.split("-")[1]) for path in Path("out").glob("checkpoint-*"))
    newest = Path(f"out/checkpoint-{steps[-1]}/optimizer.pt")
    state = json.loads(newest.with_name("trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None  # or --save_total_limit 1 would leave that one alone
    newest.write_bytes(newest.read_bytes()[:-1])
    main(options)
    assert f"resume   from out/checkpoint-{steps[-2]}" in capsys.readouterr().out
    assert "optimizer.pt is not as it was written" in caplog.text


@SLOW
def test_named_checkpoint_that_cannot_be_continued_is_refused_and_nothing_is_removed(
    timm_checkpoint, vit_checkpoint, monkeypatch, capsys
):
    options = [*flags(str(timm_checkpoint), "--recipe", "full", "--keep", "trained"), "--output_dir", "out"]
    main(options)
    files = sorted(Path("out").rglob("*"))
    others = {
        "another cut into train, validation and test": ["--split_seed", "7"],
        "images in a step": ["--per_device_train_batch_size", "2"],
        "--recipe full from the model ": ["--model_name", str(vit_checkpoint)],
        "--recipe full_from_probe from the model": ["--recipe", "full_from_probe"],
    }
    for told, other in others.items():
        with pytest.raises(SystemExit) as exit_info:
            main([*options, *other, "--resume_from_checkpoint", "out/checkpoint-2"])
        message = capsys.readouterr().err
        assert exit_info.value.code == 2 and "out/checkpoint-2 " in message and told in message
    assert sorted(Path("out").rglob("*")) == files and has_ended(Path("out"))
    Path("out/checkpoint-3/scheduler.pt").unlink()
    with pytest.raises(SystemExit) as exit_info:
        main([*options, "--resume_from_checkpoint", "out/checkpoint-3"])
    assert (
        exit_info.value.code == 2 and "scheduler.pt is missing" in capsys.readouterr().err and has_ended(Path("out"))
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SafeTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        main([*options, "--resume_from_checkpoint", "out/checkpoint-2"])
    assert not has_ended(Path("out"))  # the rest is trained again, and a run that stops here can be resumed
    main([*options, "--resume_from_checkpoint", "auto"])
    assert "resume   from out/checkpoint-2" in capsys.readouterr().out and has_ended(Path("out"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_signal_saves_at_the_end_of_the_step_and_resumes_exactly(timm_checkpoint, monkeypatch, capsys, number):
    options = flags(str(timm_checkpoint), "--recipe", "full", "--keep", "trained", "--save_strategy", "epoch")
    options += ["--refit", "none"]
    main([*options, "--output_dir", "whole"])
    training_step = SafeTrainer.training_step

    def step_with_signal(self, *arguments, **rest):
        loss = training_step(self, *arguments, **rest)
        if self.state.global_step == 5:
            os.kill(os.getpid(), number)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(SafeTrainer, "training_step", step_with_signal)
        with pytest.raises(SystemExit) as exit_info:
            main([*options, "--output_dir", "cut"])
    output = capsys.readouterr().out
    assert exit_info.value.code == 128 + number and f"stopped  by {number.name}: cut/checkpoint-6" in output
    assert not Path("cut/metrics.json").exists() and not Path("cut/model.safetensors").exists()
    main([*options, "--output_dir", "cut", "--resume_from_checkpoint", "auto"])
    assert "resume   from cut/checkpoint-6\n" in capsys.readouterr().out
    (weights, scores), (resumed_weights, resumed_scores) = load_result("whole"), load_result("cut")
    assert resumed_scores == scores and all(
        torch.equal(tensor, resumed_weights[name]) for name, tensor in weights.items()
    )


@SLOW
def test_run_that_is_stopped_in_its_refit_ships_the_same_weights(timm_checkpoint, monkeypatch):
    options = flags(str(timm_checkpoint), "--recipe", "full", "--keep", "trained")
    main([*options, "--output_dir", "whole"])
    assert Path("whole/scored").exists(), "it was refit"
    training_step = SafeTrainer.training_step

    def step_with_signal(self, *arguments, **rest):
        loss = training_step(self, *arguments, **rest)
        if "refit" in Path(self.args.output_dir).parts and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(SafeTrainer, "training_step", step_with_signal)
        main([*options, "--output_dir", "cut"])
    assert list(Path("cut/refit").glob("*/checkpoint-3")) and not Path("cut/metrics.json").exists()
    steps = []

    def recorded_step(self, *arguments, **rest):
        if "refit" in Path(self.args.output_dir).parts:
            steps.append(self.state.global_step)
        return training_step(self, *arguments, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(SafeTrainer, "training_step", recorded_step)
        main([*options, "--output_dir", "cut", "--resume_from_checkpoint", "auto"])
    assert steps[0] == 3, "the refit goes on, and does not begin again"
    (weights, scores), (resumed, resumed_scores) = load_result("whole"), load_result("cut")
    assert resumed_scores == scores and all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


def test_second_ctrl_c_ends_at_once(tmp_path, capfd):
    stop = Stop(tmp_path / "of mine")
    stop.training = True
    stop._receive(signal.SIGINT, None)
    stop._receive(signal.SIGINT, None)  # the same Ctrl-C: the terminal sends it to the whole group
    stop._receive(signal.SIGTERM, None)  # from the launcher as it exits
    assert stop.received == signal.SIGINT
    stop.since -= 2
    with pytest.raises(SystemExit) as exit_info:
        stop._receive(signal.SIGINT, None)
    assert exit_info.value.code == 130 and capfd.readouterr().err.endswith("checkpoint\nstopped  by SIGINT\n")


def test_signal_between_trainings_says_how_to_resume(tmp_path, capfd):
    stop, checkpoint = Stop(tmp_path / "of mine"), tmp_path / "of mine/race/full/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    with pytest.raises(SystemExit) as exit_info:
        stop._receive(signal.SIGTERM, None)
    how = f"--output_dir '{tmp_path}/of mine' --resume_from_checkpoint auto"
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err == f"stopped  by SIGTERM; resume with {how}\n"


def test_closed_terminal_stops_a_run_unless_it_was_started_with_nohup(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.training.signals._leave_terminal", lambda: None)
    hangup, interrupt = signal.SIGHUP, signal.SIGINT  # shells start a background job with the latter ignored
    for number, there, received in (
        (hangup, signal.SIG_DFL, hangup), (hangup, signal.SIG_IGN, None), (interrupt, signal.SIG_IGN, interrupt),
    ):  # fmt: skip
        before = signal.signal(number, there)
        try:
            with Stop(tmp_path) as stop:
                stop.training = True
                signal.raise_signal(number)
            assert stop.received == received
        finally:
            signal.signal(number, before)


@SLOW
def test_line_after_a_terminal_is_gone_is_no_error():
    code = """
from luthier.training.signals import _leave_terminal
print("ready", flush=True)
input()
_leave_terminal()
print("more", flush=True)
"""
    here, there = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdin=subprocess.PIPE, stdout=there, stderr=there
    ) as process:
        os.close(there)
        said = b""
        while not said.endswith(b"\n"):  # which comes by itself; a terminal that goes before ends the process
            said += os.read(here, 100)
        os.close(here)
        assert b"ready" in said
        process.communicate(b"\n")
    assert process.returncode == 0


def test_signal_after_a_training_that_failed_ends_the_run(tmp_path):
    stop = Stop(tmp_path)
    with pytest.raises(NotFinite), stop.in_training():
        stop.on_train_begin(SimpleNamespace(world_size=1), None, None)
        raise NotFinite
    with pytest.raises(SystemExit) as exit_info:
        stop._receive(signal.SIGTERM, None)
    assert exit_info.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("recipe", ["full", "head"])
def test_loss_that_is_not_finite_stops_the_run(timm_checkpoint, monkeypatch, capsys, recipe):
    training_step = SafeTrainer.training_step

    def step_with_nan_weights(self, model, *arguments, **rest):
        if self.state.global_step == 5:
            with torch.no_grad():
                list(model.parameters())[-1].fill_(float("nan"))
        return training_step(self, model, *arguments, **rest)

    monkeypatch.setattr(SafeTrainer, "training_step", step_with_nan_weights)
    with pytest.raises(SystemExit) as exit_info:
        main([*flags(str(timm_checkpoint), "--recipe", recipe), "--output_dir", "out"])
    errors = capsys.readouterr().err
    assert exit_info.value.code == 2 and "not a finite number at step 6" in errors and "Traceback" not in errors
    assert "out/checkpoint-5 is from before and whole" in errors
    assert newest_whole(Path("out")) == Path("out/checkpoint-5")
    assert all(torch.isfinite(tensor).all() for tensor in load_file("out/checkpoint-5/model.safetensors").values())


@pytest.mark.parametrize(("processes", "kind"), [(1, NotFinite), (2, UserError)])
def test_several_processes_end_where_one_would_go_on(processes, kind):
    """Another process may not know of the loss, and would wait."""
    args = SimpleNamespace(world_size=processes, output_dir="out", learning_rate=1.0)
    trainer = SimpleNamespace(not_finite_at=torch.tensor(3), args=args)
    with pytest.raises(UserError, match="not a finite number at step 3") as found:
        SafeTrainer.stop_if_not_finite(trainer)
    assert found.type is kind


@SLOW
def test_refit_that_diverges_leaves_the_scored_weights(timm_checkpoint, monkeypatch, capsys):
    training_step = SafeTrainer.training_step

    def step_with_nan_weights(self, model, *arguments, **rest):
        if self.args.output_dir.startswith(str(Path("out/refit"))):
            with torch.no_grad():
                list(model.parameters())[-1].fill_(float("nan"))
        return training_step(self, model, *arguments, **rest)

    monkeypatch.setattr(SafeTrainer, "training_step", step_with_nan_weights)
    options = ["--recipe", "full", "--keep", "trained", "--refit", "auto", "--output_dir", "out"]
    main(flags(str(timm_checkpoint), *options))
    assert "the weights from before the refit are shipped, because it fails: the loss" in capsys.readouterr().out
    assert has_ended(Path("out")) and not Path("out/scored").exists()
    assert all(torch.isfinite(tensor).all() for tensor in load_file("out/model.safetensors").values())
    assert json.loads(Path("out/metrics.json").read_text())["refit"]["refusal"] == "its loss is not finite"


@SLOW
def test_images_that_vanish_before_the_refit_leave_the_scored_weights(timm_checkpoint, monkeypatch, capsys):
    def plan_late(*arguments):
        for path in Path("images/red").iterdir():
            path.unlink()
        return plan_refit(*arguments)

    monkeypatch.setattr("luthier.scoring.refit.plan_refit", plan_late)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("cache").absolute())  # no other test has filled it
    options = ["--recipe", "full", "--keep", "trained", "--refit", "auto", "--output_dir", "out"]
    main(flags(str(timm_checkpoint), *options))
    told = capsys.readouterr().out
    assert "the weights from before the refit are shipped, because it fails: images that were read before" in told
    assert has_ended(Path("out")) and not Path("out/scored").exists()
    assert "changed during the run" in json.loads(Path("out/metrics.json").read_text())["refit"]["refusal"]


def test_full_disk_keeps_the_last_whole_checkpoint(timm_checkpoint, monkeypatch, capsys):
    def seal_on_full_disk(partial, folder):
        if folder.name == "checkpoint-3":
            raise OSError(errno.ENOSPC, "No space left on device")
        return seal(partial, folder)

    monkeypatch.setattr("luthier.training.safe_trainer.seal", seal_on_full_disk)
    monkeypatch.setattr("luthier.training.arms.lacking_space", lambda *_: "")
    with pytest.raises(SystemExit) as exit_info:
        main([*flags(str(timm_checkpoint), "--recipe", "full"), "--output_dir", "out"])
    errors = capsys.readouterr().err
    assert (
        exit_info.value.code == 2
        and "the disk is full: no checkpoint of step 3" in errors
        and "checkpoint-2 is whole" in errors
    )
    assert find_damage(Path("out/checkpoint-2")) is None and not Path("out/.partial").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_checkpoint_that_torch_cannot_write_gives_advice(tmp_path, monkeypatch, size):
    """As where a quota is used up: the disk has space, and torch's error does not say why it fails."""

    def save(*_) -> None:
        torch.save(torch.zeros(size), "/dev/full")

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    trainer = SafeTrainer.__new__(SafeTrainer)
    trainer.args, trainer.state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3)
    trainer.model = torch.nn.Linear(1, 1)
    (tmp_path / "checkpoint-2").mkdir()
    advice = "no checkpoint of step 3 in .*checkpoint-2 is whole: check the disk, and whether your quota is used up"
    with pytest.raises(UserError, match=f"{advice}, and resume with --output_dir and --resume_from_checkpoint auto"):
        trainer._save_checkpoint(None, None)


def test_data_worker_that_dies_gives_advice():
    arguments = TrainingArguments(output_dir="x", dataloader_num_workers=4, use_cpu=True)
    cause = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
    advice = r"killed by signal: Killed\.\).*--dataloader_num_workers 2"
    for training in (True, False):
        with pytest.raises(UserError, match=advice), explain_exhausted_memory(arguments, training):
            raise RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly") from cause
    with pytest.raises(RuntimeError, match="Caught"), explain_exhausted_memory(arguments):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")  # an error of the project's own


def test_exhausted_memory_gives_advice():
    arguments = TrainingArguments(output_dir="x", per_device_train_batch_size=32, use_cpu=True)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("can't allocate memory: 1"),
        RuntimeError("Invalid buffer size: 19.45 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        advice = "--per_device_train_batch_size 16 --gradient_accumulation_steps 2"
        with pytest.raises(UserError, match=advice), explain_exhausted_memory(arguments):
            raise error
    for batch, advice in ((9, "train_batch_size 3 .*_steps 3"), (11, "train_batch_size 1 .*_steps 11")):
        arguments.per_device_train_batch_size = batch
        with pytest.raises(UserError, match=advice), explain_exhausted_memory(arguments):
            raise MemoryError
    arguments.per_device_train_batch_size = 1
    with pytest.raises(UserError, match="batches of 1: use fewer pixels"), explain_exhausted_memory(arguments):
        raise MemoryError
    with (
        pytest.raises(UserError, match=r"use smaller ones \(--per_device_eval_batch_size 4\)"),
        explain_exhausted_memory(arguments, training=False),
    ):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), explain_exhausted_memory(arguments):
        raise RuntimeError("something else")


def start_training(config: dict | None, *more: str) -> subprocess.Popen:
    """Start a long run under `accelerate launch`, and wait until it trains."""
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    if config:
        Path("accelerate.yaml").write_text(yaml.safe_dump(config))
        launcher += ["--config_file", "accelerate.yaml"]
    command = [*launcher, str(PROJECT / "train.py"), *flags("simple_cnn", "--num_train_epochs", "100000", *more)]
    command += ["--output_dir", "out", "--save_strategy", "epoch", "--save_total_limit", "2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **streams)
    for text in process.stdout:
        if re.match(r"\s+3 ", text):
            return process
    raise AssertionError("it never trained")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_saves_one_checkpoint(processes):
    process = start_training(TWO_PROCESSES if processes == 2 else None)
    start = time.monotonic()
    process.terminate()
    output = process.stdout.read()  # until the last process that writes there has ended
    assert time.monotonic() - start < 10 and process.wait() != 0
    assert output.count("stopped  by SIGTERM: out/checkpoint-") == 1, output
    assert newest_whole(Path("out")) is not None and not Path("out/metrics.json").exists()


@SLOW
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)], ids=str)
def test_signal_to_the_whole_group_saves_a_checkpoint(number, workers):
    process = start_training(None, "--dataloader_num_workers", str(workers))
    start = time.monotonic()
    os.killpg(process.pid, number)
    output = process.stdout.read()
    assert time.monotonic() - start < 10 and "stopped  by SIG" in output and newest_whole(Path("out")) is not None
    assert "DataLoader" not in output and process.wait() != 0


def test_signal_in_the_last_step_of_an_epoch_leaves_its_evaluation_and_its_checkpoint(tmp_path):
    stop, control = Stop(tmp_path), SimpleNamespace(should_training_stop=False)
    stop.received = signal.SIGTERM
    stop.on_step_end(None, SimpleNamespace(epoch=2.0), control)
    assert control.should_training_stop and not control.should_save, "the evaluation comes first"
    for epoch, step, kept in ((2.0, 8, True), (1.5, 6, False), (2.25, 9, True)):  # the last one ends the training
        control.should_save = control.should_evaluate = control.should_log = True  # as the strategies want it
        stop.on_epoch_end(None, SimpleNamespace(epoch=epoch, global_step=step, max_steps=9), control)
        assert control.should_save == control.should_evaluate == control.should_log == kept


def test_signal_in_the_last_step_of_all_leaves_its_evaluation(tmp_path):
    """With `--max_steps` the last epoch may be cut short."""
    stop, control = Stop(tmp_path), SimpleNamespace(should_training_stop=True)
    stop.received = signal.SIGTERM
    stop.on_step_end(None, SimpleNamespace(epoch=2.25, global_step=9, max_steps=9), control)
    assert not control.should_save, "the evaluation comes first"


def test_signal_leaves_the_evaluation_of_a_step(tmp_path):
    """As with `--eval_strategy steps`: a run that is resumed from the checkpoint does not make it."""
    stop, control = Stop(tmp_path), SimpleNamespace(should_evaluate=True, should_log=True, should_save=False)
    stop.received = signal.SIGTERM
    stop.on_step_end(None, SimpleNamespace(epoch=1.5, global_step=6, max_steps=9), control)
    assert control.should_training_stop and control.should_evaluate and control.should_log and control.should_save


def test_signal_in_the_last_step_of_an_epoch_saves_whatever_the_strategy(tmp_path):
    stop, control = Stop(tmp_path), SimpleNamespace(should_training_stop=False)
    stop.received = signal.SIGTERM
    stop.on_step_end(None, SimpleNamespace(epoch=2.0), control)
    stop.on_epoch_end(None, SimpleNamespace(epoch=2.0), control)  # as with --save_strategy steps
    assert control.should_save


@pytest.mark.parametrize(
    ("delay", "epoch", "step", "expected"),
    [(0, 2.0, 8, False), (5, 2.0, 8, True), (0, 2.25, 9, False), (0, 1.5, 6, True)],
)
def test_checkpoint_waits_only_for_an_evaluation_that_comes(monkeypatch, delay, epoch, step, expected):
    saved, trainer = [], SafeTrainer.__new__(SafeTrainer)
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", lambda self: saved.append(self.control.should_save))
    trainer.args = SimpleNamespace(eval_strategy="epoch", eval_delay=delay)
    trainer.state = SimpleNamespace(epoch=epoch, global_step=step, max_steps=9)
    trainer.control = SimpleNamespace(should_save=True, should_evaluate=False)
    trainer._maybe_log_save_evaluate()
    assert saved == [expected]


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_best_step_is_known_whether_or_not_it_has_a_checkpoint(strategy):
    """Or a run with `--save_strategy no` would not say that it keeps the last weights, and not the best."""
    trainer = SafeTrainer.__new__(SafeTrainer)
    trainer.args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False, save_strategy=strategy)
    trainer.state = TrainerState()
    for step, loss in ((2, 0.5), (4, 0.4), (6, 0.6)):
        trainer.state.global_step = step
        trainer._determine_best_metric(metrics={"eval_loss": loss}, trial=None)
    assert trainer.state.best_global_step == 4


def test_gradient_is_watched_where_it_is_not_clipped():
    seen, trainer = [], SafeTrainer.__new__(SafeTrainer)
    nan = torch.tensor(float("nan"))
    trainer.accelerator = SimpleNamespace(scaler=None, clip_grad_norm_=lambda *_: nan, distributed_type="NO")
    trainer._has_mixed_mesh_grads, trainer._watch = lambda _: False, seen.append
    trainer._get_grad_norm(torch.nn.Linear(1, 1))  # as with --max_grad_norm 0
    assert len(seen) == 1 and seen[0].isnan()


def test_all_files_are_on_the_disk_before_the_card(timm_checkpoint, monkeypatch):
    done, write_card = [], results.write_model_card
    monkeypatch.setattr(results, "sync", lambda path: done.append(path.as_posix()))
    monkeypatch.setattr(results, "write_model_card", lambda *given: (done.append("card"), write_card(*given)))
    main([*flags(str(timm_checkpoint), "--recipe", "probe"), "--output_dir", "out"])
    before = done[: done.index("card")]
    assert {"out/model.safetensors", "out/scored/model.safetensors", "out/metrics.json"} <= set(before)
