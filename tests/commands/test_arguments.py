"""Configs and command lines: which setting wins, and one clear message for every mistake."""

import functools
import importlib.util
import multiprocessing
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from data import load_images
from luthier.arguments import (
    ARGUMENTS,
    COMMON,
    DataArguments,
    ModelArguments,
    build_parser,
    option_of_data,
    parse_arguments,
)
from luthier.errors import UserError
from luthier.machine import OneGPUTrainingArguments, fill_in_machine_defaults
from luthier.parsing import MEANT, MEANT_BY, NOT_NEEDED

pytestmark = pytest.mark.usefixtures("empty_folder")
ALL_NAMES = {option.name for group in ARGUMENTS for option in fields(group) if option.init}


def write_config(text: str, name: str = "some.yaml") -> str:
    Path(name).write_text(text)
    return name


def defaults_on_a_gpu(monkeypatch, capability: tuple[int, int] = (9, 0), **given) -> dict:
    """Return the options that the machine decides, those that are given among them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    names = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "accelerator_config")
    names += ("per_device_eval_batch_size", "bf16", "ddp_backend")
    options = dict.fromkeys(names) | {"use_cpu": False, "fp16": False} | given
    fill_in_machine_defaults(options)
    return options


def test_on_a_gpu_workers_load_and_copies_do_not_wait(monkeypatch):
    options = defaults_on_a_gpu(monkeypatch)
    assert options["dataloader_num_workers"] >= 1 and options["bf16"] and options["dataloader_pin_memory"]
    assert options["accelerator_config"] == {"non_blocking": True}
    assert defaults_on_a_gpu(monkeypatch, dataloader_pin_memory=False)["accelerator_config"] is None


def test_bfloat16_is_refused_where_no_gpu_supports_it(monkeypatch):
    monkeypatch.setattr("luthier.machine.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(UserError, match="--bf16 needs a GPU that supports bfloat16: leave it out, or add --use_cpu"):
        parse_arguments(["--bf16"])
    assert parse_arguments(["--bf16", "--use_cpu", "True"]).training_args.bf16
    assert parse_arguments(["--bf16", "False"]).training_args.bf16 is False


@pytest.mark.parametrize(("megabytes", "workers"), [(64, 0), (600, 2), (10**5, 8)])
def test_data_workers_have_shared_memory(monkeypatch, capsys, megabytes, workers):
    """Docker gives a container 64 MB of it, in which batches do not fit: PyTorch would end the run."""
    monkeypatch.setattr("luthier.machine.available_cores", lambda: 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, megabytes * 10**6))
    options = defaults_on_a_gpu(monkeypatch)
    assert options["dataloader_num_workers"] == workers
    assert options["dataloader_persistent_workers"] == (workers > 0)  # without workers PyTorch refuses it
    assert (f"shared memory for {workers} of 8 data workers" in capsys.readouterr().out) == (workers < 8)


def test_gpu_that_torch_cannot_use_is_pointed_out(monkeypatch, capsys):
    monkeypatch.setattr("luthier.machine.DRIVER", Path(__file__))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parse_arguments(["--use_cpu", "1"])
    assert not capsys.readouterr().out
    parse_arguments([])
    assert "torch cannot use the NVIDIA GPU of this machine, and uses the CPU" in capsys.readouterr().out


def test_defaults_are_the_built_in_dataset_and_model():
    data_args, model_args, training_args, _ = parse_arguments([])
    assert data_args.dataset_name == "openmoji" and data_args.data_dir is None and data_args.split_seed == 1
    assert model_args.model_name == "efficientnet_lite0"
    assert training_args.output_dir == str(Path("outputs", "efficientnet_lite0_openmoji"))
    assert training_args.report_to == []


def test_command_line_overrides_config_and_config_overrides_defaults():
    path = write_config("learning_rate: 1e-4\nnum_train_epochs: 7\nrecipe: head\naugmentation: augmix\n")
    data_args, model_args, training_args, _ = parse_arguments([path, "--num_train_epochs", "3"])
    assert training_args.learning_rate == 1e-4  # YAML alone would read this as a string
    assert training_args.num_train_epochs == 3
    assert model_args.recipe == "head" and data_args.augmentation == "augmix"
    assert training_args.output_dir == str(Path("outputs", "some"))


def test_values_that_yaml_and_the_command_line_write_differently():
    path = write_config('label_names: [a b, c, 3]\nfp16: false\nlr_scheduler_kwargs: {"num_cycles": 2}\nseed: null\n')
    data_args, _, training_args, _ = parse_arguments([path])
    assert data_args.label_names == ["a b", "c", "3"]
    assert training_args.fp16 is False and training_args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training_args.seed == 42 and training_args.label_names is None


def test_data_on_the_command_line_replaces_all_data_settings_of_the_config():
    path = write_config(
        "dataset_name: someone/set\nlabel_names: [a, b]\nimage_column: photo\nmodel_name: simple_cnn\n"
    )
    data_args, model_args, *_ = parse_arguments([path, "--data_dir", "images"])
    assert (data_args.data_dir, data_args.dataset_name) == ("images", None)
    assert data_args.label_names is None and data_args.image_column is None
    assert model_args.model_name == "simple_cnn"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"some.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("learning_rate: fast", r"some.yaml: argument --learning_rate.*'fast'"),
        ("augmentation: flip", r"some.yaml: argument --augmentation.*'flip'"),
        ("num_train_epochs: [1, 2]", "some.yaml: num_train_epochs takes one value, not 2"),
        ("- just\n- a list", "must hold settings"),
        ("a: [", "not valid YAML"),
        ("", "must hold settings"),
        ("recipe: full\nseed: 2\nrecipe: probe", "gives recipe twice: leave one out"),
        ("<<: {seed: 1}\nseed: 2\nrecipes: probe", "unknown key 'recipes'"),
        ("hub_token: hf_secret", "hf auth login"),
    ],
)
def test_mistake_in_a_config(text, message):
    with pytest.raises(UserError, match=message):
        parse_arguments([write_config(text)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning-rat", "1"], "unknown option --learning-rat; did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "argument --learning_rate.*'fast'"),
        (["--learning_rate"], "expected one argument"),
        (["--epochs", "3"], "unknown option --epochs; did you mean 'num_train_epochs'"),
        (["--metric_for_best_model", "f1"], "--metric_for_best_model f1 is not measured: give one of loss"),
        (["--label_smoothing_factor", "1.5"], "--label_smoothing_factor is 1.5"),
        (["--seed", "-1"], "--seed is -1, but must be a number from 0 to 4,294,967,295"),
        (["--weight_decay", "nan"], "--weight_decay is nan"),
        (["--folds", "1000000"], "--folds is 1000000, but must be a number from 2 to 1,000"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers is -1"),
        (["settings.json"], "a config is a YAML file"),
        (["--data_dir", ".", "--output_dir", "runs/x"], "the results would be in runs/x, among the images of .: give"),
        (["--recipe", "probe", "#", "a", "minute"], "# begins a comment, which this shell does not skip"),
        (
            ["my_photos"],
            "cannot place the argument 'my_photos': train.py, score.py and compare.py take images as --data_dir",
        ),
        (["--seed", "1", "some.yaml"], "some.yaml must be the first argument"),
        (["missing.yaml"], "cannot read the config missing.yaml"),
        (["--data_dir", "a", "--dataset_name", "b"], "give one of them"),
        (["--data_dir", "a", "--data-dir=b"], "--data_dir is given twice: give one, such as a folder"),
        (["--labels", "a.csv", "--labels=b.csv"], "--labels is given twice: give one$"),
        (["--test_dir", "x"], "name folders in --data_dir test and validation"),
        (["--num_classes", "3"], "the classes are those of the folders"),
        (["--split", "test"], "or a value of --split_column; score.py scores the one called test"),
        (["--image_folder", "x"], "did you mean 'data_dir'"),
        (["--class_weights", "x"], "did you mean 'balance'"),
        (["--push_to_hub", "me/x"], "me/x is neither true nor false: write one of these. .*--hub_model_id"),
        (["--hub_token", "hf_secret"], "hf auth login"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--num_train_epochs", "-1"], "--num_train_epochs is -1.0, but must be a number above 0"),
        (["--dataloader_drop_last", "1"], "leave images out of every score"),
        (["--bf16_full_eval", "1"], "--bf16_full_eval would round"),
        (["--learning_rate", "nan"], "--learning_rate is nan"),
        (["--fold", "0/5"], "--fold 0/5 is not a fold"),
        (["--fold", "6/5"], "--fold 6/5 is none of 5"),
        (["--fold", "1/1"], "--fold 1/1 is none of 1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size is 0"),
        (["--image_size", "1"], "--image_size is 1, but must be a number from 8 to 100,000"),
        (["--image_size", "-5"], "--image_size is -5"),
        (["--time_limit", "0"], "--time_limit is 0.0, but must be a number above 0"),
        (["--time_limit", "inf"], "--time_limit is inf, but must be a number above 0"),
        (["--data_dir", ""], "--data_dir is empty: give a value, or leave the option out"),
        (["--hub_model_id", ""], "--hub_model_id is empty: give a value, or leave the option out"),
        (["--group_by="], "--group_by is empty"),
        (["--prediction_loss_only", "1"], "--prediction_loss_only leaves no predictions"),
        (["--batch_eval_metrics", "1"], "--batch_eval_metrics scores each batch alone"),
        (["--fp16_full_eval", "1"], "--fp16_full_eval would round"),
        (["--hub_revision", "x"], "--hub_revision has no effect"),
        (["--lr_scheduler_type", "greedy"], "--lr_scheduler_type greedy follows the evaluations"),
        (["--recipe", "probe", "--resume_from_checkpoint", "x"], "--recipe probe trains nothing"),
        (["--max_grad_norm", "-1"], "--max_grad_norm is -1"),
        (["--eval_accumulation_steps", "0"], "--eval_accumulation_steps is 0"),
        (["--dataloader_prefetch_factor", "0"], "--dataloader_prefetch_factor is 0"),
        (["--adam_beta2", "1"], "--adam_beta2 is 1"),
        (["--split_seed", "-1"], "--split_seed is -1"),
        (["--lr", "1"], "did you mean 'learning_rate'"),
        (["--batch-size", "8"], "did you mean 'per_device_train_batch_size'"),
        (["--dataset", "x"], "did you mean 'data_dir'"),
        (["--device", "cuda"], "a GPU is used where there is one"),
        (["--config", "a.yaml"], "a config is the first argument"),
        (["--config=a.yaml"], "a config is the first argument"),
        (["\u2014data_dir", "x"], "a dash or a quote of a word processor"),
        (["--data_dir", "\u201cmy", "photos\u201d"], "a dash or a quote of a word processor"),
        (["--time_limit", "10min"], "argument --time_limit: invalid float value: '10min'; give a number such as 10"),
        (["--test_fraction", "20"], "--test_fraction is 20.0, but must lie between 0 and 1; 20% is 0.2"),
        (["--validation_fraction", "0"], "--validation_fraction is 0.0, but must lie between 0 and 1"),
        (["--report_to", "tensorbord"], "--report_to tensorbord is not supported"),
        (["--resume_from_checkpoint", "True"], "True is not a checkpoint: give auto"),
        (["--enable_jit_checkpoint", "1"], "--enable_jit_checkpoint would take SIGTERM"),
        (["--save_strategy", "best"], "--save_strategy best leaves no checkpoint"),
        (["--fsdp", "full_shard"], "--fsdp divides the model among GPUs"),
        (["--train_sampling_strategy", "group_by_length"], "group_by_length is for texts"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha is for models of text"),
        (["--use_liger_kernel", "1"], "--use_liger_kernel is for models of text"),
        (["--dataloader_persistent_workers", "1", "--dataloader_num_workers", "0"], "needs data workers"),
        (["--use_cpu", "1", "--fp16", "1"], "--fp16 needs a GPU"),
        (["--dataloader_in_order", "False"], "--dataloader_in_order False would give images the answers of others"),
        (["--no_dataloader_in_order"], "would give images the answers of others"),
        (["--greater_is_better", "True"], "--greater_is_better True would keep the worst weights by calibrated_loss"),
        (["--metric_for_best_model", "accuracy", "--greater_is_better", "0"], "the worst weights by accuracy"),
        (["--lr_scheduler_kwargs", "num_cycles=2"], "--lr_scheduler_kwargs num_cycles=2 is not an object of JSON"),
        (["--lr_scheduler_kwargs", "{'num_cycles': 2}"], "is not an object of JSON"),
        (["--activation_checkpointing_kwargs", "x"], "--activation_checkpointing_kwargs x is not an object"),
        (["--accelerator_config", "missing.json"], "as accelerator_config: {split_batches: false}"),
        (["--accelerator_config", ' {"split_batches": false}'], "is not an object of JSON"),
        (["--lr_scheduler_kwargs", ' {"num_cycles": 2}'], "is not an object of JSON"),
        (["--accelerator_config", '{"bogus": 1}'], "unexpected keyword argument 'bogus'"),
        (["--remove_unused_columns", "1"], "--remove_unused_columns would remove the images"),
        (["--max_steps", "0"], "--max_steps is 0, but must be above 0"),
        (["--optim_target_modules", "all"], "--optim_target_modules has no effect"),
        (["--hub_strategy", "checkpoint"], "--hub_strategy has no effect"),
        (["--include_for_metrics", "inputs"], "--include_for_metrics has no effect"),
    ],
)
def test_mistake_on_the_command_line(args, message):
    newer = {"dataloader_in_order", "activation_checkpointing_kwargs"} - ALL_NAMES
    if any(args[0].endswith(f"_{name}") or args[0] == f"--{name}" for name in newer):
        pytest.skip("this version of transformers has no such option")
    with pytest.raises(UserError, match=message) as error_info:
        parse_arguments(args)
    assert "hf_secret" not in str(error_info.value)


def test_config_of_accelerate_that_divides_the_model_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="configured for FSDP, which divides the model among GPUs"):
        parse_arguments([])


def test_precision_that_is_switched_off_is_not_taken_from_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as of a saved config of accelerate
    assert parse_arguments(["--bf16", "False"]).training_args.mixed_precision == "no"


def test_launcher_that_asks_for_the_cpu_gets_its_defaults(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = dict.fromkeys(("use_cpu", "fp16", "ddp_backend", "dataloader_pin_memory", "dataloader_num_workers"))
    options |= dict.fromkeys(("dataloader_persistent_workers", "accelerator_config", "bf16"))
    options |= {"per_device_eval_batch_size": None}
    fill_in_machine_defaults(options)
    assert options["use_cpu"] is True and not options["bf16"] and options["dataloader_num_workers"] == 0


def test_folder_that_begins_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert option_of_data("~nosuch") == ["--dataset_name", "~nosuch"]
    Path("~nosuch").mkdir()
    assert option_of_data("~nosuch") == ["--data_dir", "~nosuch"]
    with pytest.raises(UserError, match="~nosuch2/photos is not a folder"):
        load_images(data_dir="~nosuch2/photos")


def test_race_does_not_go_on_from_a_single_checkpoint(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="a race of recipes resumes with --resume_from_checkpoint auto"):
        parse_arguments(["--resume_from_checkpoint", str(tmp_path)])


def test_key_of_another_tool_is_explained(tmp_path):
    for line, meant in (
        ("lr: 1", "'lr'; did you mean 'learning_rate'"),
        ("device: cuda", "'device': a GPU is used where"),
    ):
        (tmp_path / "a.yaml").write_text(line)
        with pytest.raises(UserError, match=f"unknown key {meant}"):
            parse_arguments([str(tmp_path / "a.yaml")])


def test_package_of_a_tracker_must_be_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb needs wandb: pip install wandb"):
        parse_arguments(["--report_to", "wandb"])


def test_options_that_other_tools_have_are_none_of_these():
    """A name in these lists that became an option would no longer be taken for it."""
    options = {action.dest for action in build_parser()._actions}
    assert set(MEANT) <= options and not options & {*MEANT_BY, *NOT_NEEDED}


def test_message_about_an_unknown_option_is_two_sentences():
    with pytest.raises(UserError) as error_info:
        parse_arguments(["--zzz", "1"])
    assert str(error_info.value) == "unknown option --zzz. All options: python train.py --help-all"


def test_abbreviations_are_not_guessed():
    with pytest.raises(UserError, match="unknown option --learning"):
        parse_arguments(["--learning", "1"])


# --- output_dir


def test_output_dir_is_the_next_free_name():
    for expected in ("x_y", "x_y-2", "x_y-3"):
        output_dir = parse_arguments(["--model_name", "who/x", "--dataset_name", "who/y"])[2].output_dir
        assert Path(output_dir) == Path("outputs", expected)
        Path(output_dir).mkdir(parents=True)


def test_output_dir_that_is_not_empty_is_refused():
    Path("mine").mkdir()
    assert parse_arguments(["--output_dir", "mine"])[2].output_dir == "mine"
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine already holds something"):
        parse_arguments(["--output_dir", "mine"])
    with pytest.raises(UserError, match="already holds something"):
        parse_arguments(["--output_dir", "mine/thesis.txt"])
    Path("mine/checkpoint-5").mkdir()
    line = ["--recipe", "full", "--output_dir", "mine", "--resume_from_checkpoint", "mine/checkpoint-5"]
    with pytest.raises(UserError, match="checkpoint-5 is not a checkpoint"):
        parse_arguments(line)
    Path("mine/checkpoint-5/trainer_state.json").write_text("{}")
    resumed = parse_arguments(line)
    assert resumed[2].output_dir == "mine"


# --- what the machine and the recipe decide


def test_training_arguments_are_complete_and_never_ask_the_trainer_to_push():
    *_, training_args, run_args = parse_arguments(["--push_to_hub", "--hub_model_id", "me/x"])
    assert run_args.push_to_hub and training_args.push_to_hub is False
    assert training_args.learning_rate is not None and training_args.num_train_epochs is not None
    none = {"learning_rate": None, "num_train_epochs": None, "batch": None}
    assert run_args.pace == none
    assert parse_arguments(["--learning_rate", "1e-2"]).run_args.pace == none | {"learning_rate": 1e-2}


def test_what_a_config_says_of_other_data_is_left_out_and_named(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("data_dir: mine\ngroup_by: folder\nnone_class: empty\nrecipe: full\n")
    assert parse_arguments([str(config)]).data_args.group_by == "folder" and capsys.readouterr().out == ""
    arguments = parse_arguments([str(config), "--data_dir", "other", "--none_class", "other"])
    assert arguments.data_args.group_by is None and arguments.model_args.recipe == "full"
    assert capsys.readouterr().out.endswith(f"names other data than {config}: its group_by is left out\n")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
        ["--optim", "sgd", "--optim_args", "momentum=0.9"],
        ["--report_to", "tensorboard", "--logging_strategy", "steps", "--logging_steps", "0.1"],
        ["--accelerator_config", '{"split_batches": false}', "--warmup_steps", "0.2"],
    ],
)
def test_the_recipes_learning_rate_is_all_that_replace_changes(options):
    """Building them a second time must not change what the first time made of the options."""
    before = parse_arguments(options).training_args
    after = replace(before, learning_rate=0.5)
    changed = {o.name for o in fields(before) if str(getattr(before, o.name)) != str(getattr(after, o.name))}
    assert changed == {"learning_rate"} and type(after) is type(before)


@pytest.mark.parametrize("value", ["True", "False"])
def test_requested_persistent_workers_are_kept(value):
    args = ["--dataloader_num_workers", "2", "--dataloader_persistent_workers", value]
    assert parse_arguments(args).training_args.dataloader_persistent_workers is (value == "True")
    assert parse_arguments([]).training_args.dataloader_persistent_workers is False


def test_each_process_uses_one_gpu(monkeypatch):
    """With several GPUs and one process, the Trainer would use nn.DataParallel."""

    def two_gpus(self):
        self._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", functools.cached_property(two_gpus))
    TrainingArguments._setup_devices.__set_name__(TrainingArguments, "_setup_devices")
    assert TrainingArguments(output_dir="x", report_to="none").n_gpu == 2
    assert OneGPUTrainingArguments(output_dir="x", report_to="none").n_gpu == 1


# --- settings


def test_settings_digest_depends_on_what_a_run_computes_and_not_on_where_it_writes():
    def digest(*args: str) -> str:
        return parse_arguments(list(args)).run_args.settings

    assert digest() == digest("--output_dir", "x", "--disable_tqdm", "1", "--resume_from_checkpoint", "auto")
    assert digest() == digest("--push_to_hub", "1", "--hub_model_id", "me/x", "--hub_private_repo", "1")
    assert digest() != digest("--seed", "7") and digest("--seed", "7") == digest("--seed=7")


# --- help


def test_help_is_short_and_help_all_has_every_option():
    short, full = build_parser().format_help(), build_parser(shown=ALL_NAMES).format_help()
    assert len(short.splitlines()) < 130 and max(map(len, short.splitlines())) <= 80
    assert short.index("\ndata:") < short.index("\nmodel:") < short.index("\ntraining")
    for option in COMMON:
        assert f"--{option} " in short
    assert "--adam_beta1" not in short
    for option in ALL_NAMES - {"label_names"}:
        assert f"--{option}" in full, option


def test_help_all_prints_and_exits(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--help-all"])
    assert not exit_info.value.code and "--adam_beta1" in capsys.readouterr().out


def test_help_has_groups_and_shows_defaults():
    text = build_parser().format_help()
    unwrapped = " ".join(text.split())
    for group in ("\ndata:", "\nmodel:", "\ntraining (transformers.TrainingArguments"):
        assert group in text
    for option in (*fields(DataArguments), *fields(ModelArguments)):
        assert f"--{option.name}" in text and option.metadata["help"].split()[0] in text
    assert "(default: auto)" in unwrapped and "(default: cosine)" in unwrapped


def test_only_label_names_replaces_an_option_of_the_trainer():
    own = {option.name for option in (*fields(DataArguments), *fields(ModelArguments))}
    assert own & {option.name for option in fields(TrainingArguments)} == {"label_names"}


def test_empty_none_class_is_an_answer():
    assert parse_arguments(["--none_class", ""]).data_args.none_class == ""


def test_each_fold_has_a_folder_and_a_share_of_the_time():
    arguments = parse_arguments(["--folds", "3", "--time_limit", "8", "--output_dir", "out"])
    folds = arguments.folds()
    times = [(each.data_args.fold, each.model_args.time_limit) for each in folds]
    assert times == [("1/3", 2), ("2/3", 4), ("3/3", 6)], "the refit has the last share"
    assert [Path(each.training_args.output_dir) for each in folds] == [Path("out", f"fold-{i}") for i in (1, 2, 3)]
    assert {each.run_dir for each in (arguments, *folds)} == {Path("out")}
    alone = parse_arguments(["--fold", "1/3", "--output_dir", "out"])
    assert alone.run_dir == Path("out") and alone.folds() == [alone]


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("luthier.machine.available_cores", lambda: 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1200 * 10**6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert defaults_on_a_gpu(monkeypatch)["dataloader_num_workers"] == 2


def test_words_of_a_config_are_what_is_written():
    text = "label_names: [no, yes, 01, null]\ndata_dir: 2024_01\nnone_class: no\nsave_strategy: no\nbf16: no\n"
    data_args, _, training_args, _ = parse_arguments([write_config(text)])
    assert data_args.label_names == ["no", "yes", "01", "null"] and data_args.none_class == "no"
    assert data_args.data_dir == "2024_01" and training_args.save_strategy == "no" and not training_args.bf16
    assert parse_arguments([write_config("data_dir: 2024-31-01\n")]).data_args.data_dir == "2024-31-01"
    line = [write_config("lr_scheduler_kwargs: {a: 2024-01-01}\n")]
    assert parse_arguments(line).training_args.lr_scheduler_kwargs == {"a": "2024-01-01"}


@pytest.mark.parametrize(
    "text",
    ["label_names: &x [a, *x]\n", "lr_scheduler_kwargs: {2024-01-01: a}\n", "bf16: on\n", "max_grad_norm: .inf\n"],
)
def test_value_that_is_none_is_no_traceback(text):
    with pytest.raises(UserError, match=r"some\.yaml"):
        parse_arguments([write_config(text)])


@pytest.mark.parametrize(("capability", "usable"), [((6, 1), False), ((7, 0), False), ((7, 5), True), ((12, 0), True)])
def test_gpu_that_is_too_old_for_torch_is_not_used(monkeypatch, capsys, capability, usable):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    options = defaults_on_a_gpu(monkeypatch, capability)
    assert options["use_cpu"] is not usable and options["dataloader_pin_memory"] is usable
    assert ("too old for this build of torch" in capsys.readouterr().out) is not usable


def test_without_fork_there_are_no_data_workers(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    options = defaults_on_a_gpu(monkeypatch)
    assert options["dataloader_num_workers"] == 0 and options["dataloader_persistent_workers"] is False
