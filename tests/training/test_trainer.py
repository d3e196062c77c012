"""The Trainer of a run: what is refused before it trains, and its losses, whatever the architecture."""

import copy
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_folder
from torch.nn.functional import cross_entropy
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

import luthier.scoring.race as race
import luthier.training.trainer as module
import train
from luthier.errors import NoSpace, UserError
from luthier.machine import LONG_RUN, choose_memory_format
from luthier.training.arms import Arm, Workshop, plan_arm
from luthier.training.balance import Balance
from luthier.training.callbacks import EpochTable, ProgressBar, StageTimes
from luthier.training.checkpoints import load_weights
from luthier.training.heats import Schedule
from luthier.training.layers import freeze, freeze_unused
from luthier.training.recipe import RECIPES
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.trainer import choose_optimizer
from models import build_model, linear_head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr_scheduler_kwargs", '{"nonsense": 1}'], "--lr_scheduler_type cosine with --lr_scheduler_kwargs"),
        (["--lr_scheduler_kwargs", '{"num_cycles": "two"}'], "{'num_cycles': 'two'} cannot be used"),
        (["--optim_args", "nonsense"], "--optim adamw_torch_fused with --optim_args nonsense cannot be used"),
        (["--report_to", "nonsense"], "nonsense is not supported"),
    ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=4)
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--data_dir", "images", "--model_name", "simple_cnn", *options])
    errors = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in errors and "Traceback" not in errors
    assert not Path("outputs").exists()


def test_checkpoint_of_another_model_is_refused(timm_checkpoint, vit_checkpoint, tmp_path):
    two, three = {0: "a", 1: "b"}, {0: "a", 1: "b", 2: "c"}
    build_model(str(timm_checkpoint), two)[0].save_pretrained(tmp_path / "checkpoint-1")
    load_weights(build_model(str(timm_checkpoint), two)[0], tmp_path / "checkpoint-1")
    for name, labels in ((timm_checkpoint, three), (vit_checkpoint, two)):
        with pytest.raises(UserError, match="of another model, or of other classes"):
            load_weights(build_model(str(name), labels)[0], tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"no json"),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),  # no tensors
    ],
)
def test_checkpoint_that_is_not_whole_is_refused(timm_checkpoint, tmp_path, name, content):
    model = build_model(str(timm_checkpoint), {0: "a", 1: "b"})[0]
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize(
    ("device", "images", "last"),
    [("cuda", 100, False), ("cuda", LONG_RUN, True), ("cpu", 100, True), ("mps", LONG_RUN, False)],
)
def test_weights_of_a_short_run_on_a_gpu_are_in_the_default_memory_format(timm_checkpoint, device, images, last):
    model, _ = build_model(str(timm_checkpoint), {0: "a", 1: "b"})
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose_memory_format(model, torch.device(device), images)
    kernels = [tensor for tensor in model.parameters() if tensor.dim() == 4 and min(tensor.shape[1:]) > 1]
    assert kernels and all(each.is_contiguous(memory_format=torch.channels_last) == last for each in kernels)
    assert all(each.is_contiguous() != last for each in kernels)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def run(checkpoint: Path, *options: str) -> list[dict]:
    """Train all layers for an epoch at a rate that changes next to nothing; return the Trainer's log."""
    folder = Path(f"out{len(list(Path().glob('out*')))}")
    args = ["--data_dir", "images", "--model_name", str(checkpoint), "--recipe", "full", "--num_train_epochs", "1"]
    args += ["--learning_rate", "1e-9", "--keep", "trained", "--refit", "none", "--augmentation", "none"]
    train.main([*args, "--output_dir", str(folder), "--disable_tqdm", "1", *options])
    return json.loads((folder / "metrics.json").read_text())["history"]


@pytest.mark.parametrize(
    "options",
    [
        ["4", "--gradient_accumulation_steps", "4"],
        pytest.param(["16", "--label_smoothing_factor", "0.2"], marks=pytest.mark.slow),
    ],
)
def test_loss_is_the_mean_of_the_images_of_a_step(resnet_checkpoint, tmp_path, monkeypatch, options):
    """Some architectures have a loss that is multiplied by the batches that are accumulated."""
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=16)
    whole, other = (run(resnet_checkpoint, "--per_device_train_batch_size", *words) for words in (["16"], options))
    for key, tolerance in (("loss", 0.2), ("grad_norm", 0.5), ("train_accuracy", 1e-9)):  # smoothing changes the loss
        before, after = ([entry[key] for entry in log if key in entry] for log in (whole, other))
        assert before and after == pytest.approx(before, rel=0.02 if "accumulation" in options[1] else tolerance)


def test_smoothed_loss_of_an_image_has_the_weight_of_its_class_alone():
    answers, labels = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 0])
    counted = []

    def loss_with(weights: list[float]) -> torch.Tensor:
        logits = answers - (3 * torch.tensor(weights)).log()  # so that the answers stay
        trainer = SimpleNamespace(
            watch_adjusted=lambda answers, _: counted.append(answers),
            log_shares=-(3 * torch.tensor(weights)).log(),
            class_weights=torch.tensor(weights),
            args=SimpleNamespace(label_smoothing_factor=0.1),
        )
        model = type("Model", (), {"training": True, "__call__": lambda self, **_: SimpleNamespace(logits=logits)})()
        return SafeTrainer.compute_loss(trainer, model, {"labels": labels})

    assert loss_with([0.5, 0.5, 9.0]) == pytest.approx(loss_with([0.5, 0.9, 0.4]))
    assert loss_with([1.0, 0.5, 9.0]) == pytest.approx(2 * loss_with([0.5, 0.5, 9.0]))
    assert all(torch.allclose(each, answers) for each in counted), "train accuracy is of what the model answers"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_has_no_part_in_the_answers_is_frozen(device):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=28, patch_size=14,
        num_labels=3,
    )  # fmt: skip
    model = Dinov2ForImageClassification(config).to(device)
    freeze_unused(model, (3, 28, 28))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"dinov2.embeddings.mask_token"} and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rate_grows_with_the_images_that_a_step_has(tmp_path):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=512, use_cpu=True)
    shop = Workshop(torch.nn.Module(), args, compute_metrics=None)
    recipe = RECIPES["full"]._replace(batch=512)
    rates = [plan_arm(recipe, shop, {"train": range(n)}, tmp_path, None).training_args.learning_rate for n in (9, 128)]
    assert rates == pytest.approx([recipe.learning_rate, 2 * recipe.learning_rate])


def test_model_without_a_loss_of_its_own_is_trained(tmp_path, monkeypatch):
    """DeiT with a distillation token, whose `forward` takes no labels, and which has three outputs."""
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=8)
    config = DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    DeiTForImageClassificationWithTeacher(config).save_pretrained("deit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("deit")
    log = run(Path("deit"))
    assert [entry["loss"] for entry in log if "loss" in entry] and [True for entry in log if "eval_loss" in entry]


def test_bars_have_names_and_are_cleared(capsys):
    bars, state = ProgressBar(), SimpleNamespace(is_world_process_zero=True, max_steps=100, global_step=3)
    bars.on_train_begin(None, state, None)
    bars.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    bars.on_predict(None, state, None, metrics=None)
    bars.on_train_end(None, state, None)  # at the end of a heat
    printed = capsys.readouterr().err
    assert "train:" in printed and "predict:" in printed and not printed.rpartition("\r")[2].strip()


def test_training_accuracy_is_that_of_the_epoch():
    table, answers = EpochTable("full"), torch.eye(2)[[0, 0, 1, 1]]
    args = SimpleNamespace(device=torch.device("cpu"))
    table.on_train_begin(args, None, None)
    for labels, expected in (([0, 0, 1, 1], 1.0), ([0, 1, 0, 1], 0.5)):
        table.count(answers, torch.tensor(labels))
        state = SimpleNamespace(log_history=[{}])
        table.on_log(args, state, None, logs={"loss": 1.0})
        assert state.log_history[-1]["train_accuracy"] == expected


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
def test_loss_is_of_the_logits_and_only_that_of_weighted_training_of_the_answers(weights):
    logits, labels = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
    log_shares, seen = torch.tensor([0.7, 0.2, 0.1]).log(), []
    trainer = SimpleNamespace(
        watch_adjusted=lambda answers, _: seen.append(answers),
        log_shares=log_shares,
        class_weights=None if weights is None else torch.tensor(weights),
        args=SimpleNamespace(label_smoothing_factor=0.0),
    )

    def loss_of(training: bool) -> float:
        call = {"training": training, "__call__": lambda self, **_: SimpleNamespace(logits=logits)}
        return float(SafeTrainer.compute_loss(trainer, type("Model", (), call)(), {"labels": labels}))

    plain = float(cross_entropy(logits, labels))
    answers = cross_entropy(logits - log_shares, labels, reduction="none")
    expected = plain if weights is None else float((answers * torch.tensor(weights)[labels]).mean())
    assert loss_of(training=False) == pytest.approx(plain) and not seen
    assert loss_of(training=True) == pytest.approx(expected)
    assert torch.allclose(seen[0], logits - log_shares), "train accuracy is of what the model answers"


@pytest.mark.parametrize(
    ("options", "epochs", "ends", "in_heats"),
    [
        ({}, None, (12, 36, 84, 180), True),
        ({}, 2.4, (15,), True),
        ({"max_steps": 50}, 2.4, (12, 50), True),
        ({"lr_scheduler_type": "linear"}, None, (180,), False),
        ({"lr_scheduler_kwargs": {"num_cycles": 1}}, None, (180,), False),
    ],
)
def test_heats_of_an_arm_follow_from_its_epochs_and_the_users_schedule(tmp_path, options, epochs, ends, in_heats):
    """11 batches of 105 images, two in a step: 6 steps an epoch."""
    given = {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "use_cpu": True, "warmup_steps": 3}
    given |= options
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=10, report_to="none", **given)
    shop = Workshop(torch.nn.Module(), args, compute_metrics=None)
    recipe = RECIPES["full"]._replace(batch=10, num_train_epochs=epochs)
    arm = plan_arm(recipe, shop, {"train": range(105)}, tmp_path, None)
    assert (arm.ends, arm.schedule is not None, arm.batch, arm.steps_per_epoch) == (ends, in_heats, 20, 6)
    assert arm.training_args.num_train_epochs == pytest.approx(ends[-1] / 6)
    assert arm.schedule is None or arm.schedule.warmup == 3


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (32, 2), (33, 3)])
def test_steps_of_an_epoch_are_those_of_all_processes(images, steps):
    """Two processes with four images each, and two batches in a step; in the third step one is missing."""
    args = SimpleNamespace(train_batch_size=4, world_size=2, gradient_accumulation_steps=2)
    arm = Arm(RECIPES["full"], None, args, {"train": range(images)}, (1,), None, None)
    assert (arm.batch, arm.steps_per_epoch) == (16, steps)


@pytest.mark.parametrize(
    ("name", "weighted", "rates"),
    [("lp_ft", True, [0.7, 1.0]), ("full_from_probe", False, [0.1, 1.0]), ("head", False, [1.0])],
)
def test_trainer_of_an_arm_has_its_start_its_layers_their_rates_and_its_balance(
    timm_checkpoint, tmp_path, monkeypatch, name, weighted, rates
):
    model, _ = build_model(str(timm_checkpoint), {0: "a", 1: "b"})
    head, recipe, balance = linear_head(model), RECIPES[name], Balance(np.array([0.8, 0.2]), weighted)
    start = {key: value + 1 if key == f"{head}.weight" else value for key, value in model.state_dict().items()}
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, lr_scheduler_type="cosine")
    rows = {"train": [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}] * 40}
    shop = Workshop(model, args, compute_metrics=None, balance=balance)
    arm = plan_arm(recipe, shop, rows, tmp_path, start)
    trainer = arm.trainer()
    assert torch.equal(trainer.model.get_submodule(head).weight, start[f"{head}.weight"])
    expected = copy.deepcopy(model)
    freeze(expected, recipe.frozen)
    learning, planned = (
        {key for key, parameter in each.named_parameters() if parameter.requires_grad}
        for each in (trainer.model, expected)
    )
    assert learning == planned and (len(learning) == len(list(model.parameters()))) == (recipe.frozen == 0)
    groups = trainer.optimizer_cls_and_kwargs[1]["params"]
    assert sorted({round(group["lr"] / recipe.learning_rate, 6) for group in groups})[-2:] == rates
    assert trainer.log_shares.tolist() == pytest.approx(np.log([0.8, 0.2]).tolist())
    weights = [] if trainer.class_weights is None else trainer.class_weights.tolist()
    assert weights == pytest.approx([0.625, 2.5] if weighted else [])
    monkeypatch.setattr("luthier.training.arms.lacking_space", lambda *_: "9 MB left")
    with pytest.raises(NoSpace, match="9 MB left"):
        arm.trainer()


def test_training_of_a_part_of_an_epoch_has_no_step_too_many(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, lr_scheduler_type="linear")
    recipe, model = RECIPES["full"]._replace(batch=15, num_train_epochs=4.1), torch.nn.Linear(1, 1)
    arm = plan_arm(recipe, Workshop(model, args, compute_metrics=None), {"train": range(105)}, tmp_path, None)
    trainer = Trainer(model, arm.training_args, train_dataset=range(105))
    planned = trainer.set_initial_training_values(arm.training_args, trainer.get_train_dataloader())
    assert arm.ends == (29,) and 29 in planned and 30 not in planned


def test_first_step_that_is_not_finite_is_remembered_until_it_is_read():
    state, args = SimpleNamespace(global_step=0), SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(not_finite_at=None, state=state, args=args, stop_if_not_finite=lambda: None)
    found = []
    for step, loss in enumerate([1.0, float("nan"), 1.0, float("inf")]):
        state.global_step = step
        SafeTrainer._watch(trainer, loss)
        found.append(int(trainer.not_finite_at))
    assert found == [-1, 2, 2, 2]


def test_answers_of_an_evaluation_before_training_are_not_those_of_the_trained_weights(monkeypatch):
    monkeypatch.setattr(module, "predict", lambda trainer, rows: "anew")
    rows, first = [], SimpleNamespace(predictions=torch.zeros(2, 3).numpy(), label_ids=torch.zeros(2).numpy())
    state = SimpleNamespace(best_global_step=None)  # of `--eval_strategy no --eval_on_start`
    trainer = SimpleNamespace(evaluations={0: first}, state=state, eval_dataset=rows)
    assert module.predict_best(trainer, rows) == "anew"


def test_seconds_of_the_training_loop_go_to_their_stages():
    told, events = [], ("train_begin", "step_begin", "step_end", "evaluate", "save")
    times = StageTimes(SimpleNamespace(end=told.append))
    for event in events:
        getattr(times, f"on_{event}")(None, None, None)
    assert told == ["train", "data", "train", "evaluate", "save"]


def test_learning_rate_follows_the_heats_where_float16_skips_steps():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = Schedule((8, 24))
    trainer = SimpleNamespace(schedule=schedule, lr_scheduler=None, state=SimpleNamespace(global_step=0))
    scheduler = SafeTrainer.create_scheduler(trainer, 24, optimizer)
    for skipped in [True] * 3 + [False] * 5:
        if not skipped:
            optimizer.step()
            scheduler.step()
        trainer.state.global_step += 1
    assert scheduler.get_last_lr() == [schedule(8)] == [1.0]  # the next heat begins at the full rate


@pytest.mark.slow
def test_workers_end_with_the_training(timm_checkpoint, tmp_path, monkeypatch):
    """Idle ones would hold their batches while candidates, familiarity and test are predicted."""
    alive, learn = [], race.train

    def watched(*arguments) -> None:
        learn(*arguments)
        alive.append(multiprocessing.active_children())

    monkeypatch.setattr(race, "train", watched)
    draw_folder(tmp_path / "images", per_class=20)
    args = ["--data_dir", str(tmp_path / "images"), "--model_name", str(timm_checkpoint), "--recipe", "full"]
    args += ["--num_train_epochs", "1", "--dataloader_num_workers", "1", "--dataloader_persistent_workers", "1"]
    train.main([*args, "--refit", "none", "--disable_tqdm", "1", "--output_dir", str(tmp_path / "out")])
    assert alive and not any(alive)


@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_optimizer_with_layers_of_its_own_is_refused(monkeypatch, tmp_path, key):
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"lr": 1.0, key: []}))
    with pytest.raises(UserError, match="groups the layers by itself"):
        choose_optimizer(TrainingArguments(str(tmp_path), use_cpu=True), torch.nn.Linear(1, 1))


def test_share_of_warmup_is_no_number_of_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"warmup_steps": 0.1}))
    _, settings = choose_optimizer(TrainingArguments(str(tmp_path), use_cpu=True), torch.nn.Linear(1, 1))
    assert settings["warmup_steps"] == 0
