"""Fine-tune an image classifier: data -> model -> probe -> train -> evaluate -> report.

accelerate launch train.py --data_dir my_photos
accelerate launch train.py configs/simple_cnn_openmoji.yaml --num_train_epochs 3
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from luthier.errors import exit_on_user_error
from luthier.terminal import Stopwatch, say

# Slow imports are inside the functions, so that wrong arguments are reported first.
if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import BaseImageProcessor

    from luthier.arguments import Arguments
    from luthier.images.views import EvaluationView
    from luthier.training.recipe import Recipe
    from luthier.training.signals import Stop
    from luthier.training.trainer import SafeTrainer


class Experiment(NamedTuple):
    """What `set_up` prepares for `fine_tune`."""

    splits: "DatasetDict"  # as loaded
    prepared: "DatasetDict"  # decoded and stored
    rows: "DatasetDict"  # transformed when they are accessed
    findings: dict  # of the audit
    image_processor: "BaseImageProcessor"
    view: "EvaluationView"
    recipe: "Recipe"
    trainer: "SafeTrainer"  # holds the model


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run one experiment, and publish it if asked to; see `python train.py --help`."""
    stopwatch = Stopwatch()
    from luthier.arguments import parse_arguments

    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)

    from luthier.machine import set_up_process
    from luthier.output_dir import claim_output_dir, has_ended
    from luthier.serving import hub
    from luthier.training.signals import Stop, die_with_launcher

    _, _, training_args, run_args = arguments
    die_with_launcher()
    set_up_process(training_args)
    output_dir, resume = Path(str(training_args.output_dir)), training_args.resume_from_checkpoint
    is_main_process = training_args.process_index == 0
    with Stop() as stop, claim_output_dir(output_dir, continues=bool(resume), enabled=is_main_process):
        repo_id, private = None, training_args.hub_private_repo
        if run_args.push_to_hub and is_main_process:  # rights are checked before the training, not after it
            repo_id = hub.check_access(training_args.hub_model_id or output_dir.name, private)
        if resume == "auto" and has_ended(output_dir):
            say("done", f"{output_dir} holds a finished run: nothing is left to train")
        else:
            fine_tune(set_up(arguments, stop, stopwatch), arguments, stop, stopwatch)
        if repo_id:  # of a finished run too: the push may have been what failed
            hub.publish(output_dir, repo_id, private)


def set_up(arguments: "Arguments", stop: "Stop", stopwatch: Stopwatch) -> Experiment:
    """Load the images, build the model, and bring them together in a Trainer."""
    from transformers import set_seed

    from data import collate, load_splits, prepare, with_transforms
    from luthier.images.views import EvaluationView
    from luthier.scoring.audit import audit_images
    from luthier.scoring.metrics import build_compute_metrics
    from luthier.training.callbacks import StageTimes
    from luthier.training.layers import freeze
    from luthier.training.recipe import settle_recipe
    from luthier.training.trainer import build_trainer
    from models import build_model, linear_head

    data_args, model_args, training_args, run_args = arguments
    stopwatch.stop("start")

    # Data
    with training_args.main_process_first(desc="loading the images"):
        splits, unreadable = load_splits(**data_args.for_splits())
    labels = splits["train"].features["label"].names

    # Model
    set_seed(training_args.seed)  # decides the first weights of a new head
    model, image_processor = build_model(model_args.model_name, dict(enumerate(labels)), model_args.image_size)
    recipe = settle_recipe(
        model_args.recipe, model_args.model_name, linear_head(model) is not None, model.num_parameters(),
        len(splits["train"]), run_args.learning_rate, run_args.num_train_epochs,
    )  # fmt: skip
    rate, epochs = recipe.learning_rate, recipe.num_train_epochs
    training_args = replace(training_args, learning_rate=rate, num_train_epochs=epochs)
    freeze(model, recipe.frozen)
    view = EvaluationView(image_processor)
    stopwatch.stop("load")
    with training_args.main_process_first(desc="preparing the images"):
        prepared = prepare(splits, view)
    stopwatch.stop("prepare")
    rows = with_transforms(prepared, view, data_args.augmentation, data_args.test_view)
    callbacks = [StageTimes(stopwatch), stop]
    trainer = build_trainer(model, recipe, training_args, rows, collate, build_compute_metrics(labels), callbacks)
    findings = audit_images(splits, unreadable)
    return Experiment(splits, prepared, rows, findings, image_processor, view, recipe, trainer)


def fine_tune(experiment: Experiment, arguments: "Arguments", stop: "Stop", stopwatch: Stopwatch) -> None:
    """Train, keep the weights that are best on validation, score them once on test, and write the results."""
    from data import describe, feature_rows
    from luthier.reporting import console
    from luthier.reporting.card import write_model_card
    from luthier.reporting.results import collect_metrics, write_results
    from luthier.scoring.baselines import majority_baseline, measure_probe
    from luthier.scoring.metrics import TestPredictions
    from luthier.scoring.selection import keep_best, score_run
    from luthier.training.trainer import model_of, predict, train
    from models import save_model

    data_args, model_args, _, run_args = arguments  # the complete training arguments are the trainer's
    splits, prepared, rows, findings, image_processor, view, recipe, trainer = experiment
    output_dir, labels = Path(str(trainer.args.output_dir)), splits["train"].features["label"].names
    data = describe(prepared, data_args.name, data_args.is_built_in)
    setup = console.describe_setup(trainer, view.size, model_args.model_name, recipe, data_args.augmentation)
    console.say_setup(data, setup)

    # Probe
    probe = measure_probe(trainer, recipe, splits, feature_rows(prepared, view), data_args.learning_curve)
    findings["suspect_labels"] = probe.suspect_labels
    if probe.start:
        stopwatch.stop("features")
    console.say_probe(probe, data_args.learning_curve)
    console.say_audit(findings)
    say("recipe", setup["recipe"])

    # Train
    train(trainer, recipe, probe.start, stop)

    # Evaluate
    shares = recipe.candidates if model_args.keep == "best" else recipe.candidates[-1:]
    kept, candidates = keep_best(trainer, probe.start, shares, labels)
    console.say_selection(kept, candidates)
    logits, references = predict(trainer, rows["test"])
    stopwatch.stop("evaluate")

    # Report
    if trainer.is_world_process_zero():
        custom_code = save_model(model_of(trainer), image_processor, output_dir)
        metrics = collect_metrics(
            scores=score_run(kept, logits, references, labels), majority=majority_baseline(data),
            linear_probe=probe.baseline, learning_curve=probe.learning_curve, data=data, recipe=setup, kept=kept,
            history=trainer.state.log_history, seeds=run_args.seeds, findings=findings,
            command=run_args.command, settings=run_args.settings,
        )  # fmt: skip
        write_results(output_dir, metrics, TestPredictions(splits, logits, references), findings, stopwatch)
        write_model_card(output_dir / "README.md", metrics, custom_code)
        console.say_results(output_dir, metrics, custom_code)


if __name__ == "__main__":
    main()
