"""Fine-tune an image classifier: data -> model -> probe -> train -> evaluate -> refit -> report.

accelerate launch train.py --data_dir my_photos
"""

import functools
import sys
from typing import TYPE_CHECKING

from luthier.errors import exit_on_user_error, exit_with
from luthier.terminal import Stopwatch, say

if TYPE_CHECKING:  # slow imports are inside the functions, so that wrong arguments are reported first
    from luthier.arguments import Arguments
    from luthier.scoring.experiment import Experiment, Result
    from luthier.training.signals import Stop


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run one experiment, and publish it if asked to; see `python train.py --help`."""
    stopwatch = Stopwatch()
    from luthier.arguments import parse_arguments

    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    from export import export_run
    from luthier.machine import set_up_process
    from luthier.output_dir import claim_output_dir
    from luthier.scoring.folds import pool_folds
    from luthier.serving import hub
    from luthier.training.signals import Stop

    _, model_args, training_args, run_args = arguments
    set_up_process(training_args)
    output_dir, is_main_process = arguments.run_dir, training_args.process_index == 0
    resume = training_args.resume_from_checkpoint
    with Stop(output_dir) as stop, claim_output_dir(output_dir, continues=bool(resume), enabled=is_main_process):
        asked, private = run_args.push_to_hub and is_main_process, training_args.hub_private_repo
        repo_id = hub.check_access(training_args.hub_model_id or output_dir.name, private) if asked else None
        if ended := arguments.describe_if_ended():
            say("done", ended)
        else:
            finish(*pool_folds(fine_tune(part, stop, stopwatch) for part in arguments.folds()), arguments, stopwatch)
        failures = [export_run(output_dir)] if model_args.export and is_main_process else []
        failures += [hub.publish(output_dir, repo_id, private)] if repo_id else []  # of a finished run too
        exit_with(failures)


def set_up(arguments: "Arguments", stopwatch: Stopwatch) -> "Experiment":
    """Load the images, build the model, and prepare the images for it."""
    from transformers import set_seed

    from data import cut_splits, load_images, prepare, sample_rows
    from luthier.images.splits import check_same_images
    from luthier.images.streams import open_stream
    from luthier.reporting import console, results
    from luthier.scoring.audit import audit_images
    from luthier.scoring.criterion import build_judge
    from luthier.scoring.experiment import Experiment
    from luthier.scoring.screening import choose_backbone, choose_view, draw_sample
    from luthier.training.recipe import choose_recipes
    from luthier.training.trainer import build_predictor
    from models import build_model

    data_args, model_args, training_args, run_args = arguments
    stopwatch.end("start")

    # Data
    with training_args.main_process_first(desc="loading the images"):
        stream = open_stream(**data_args.for_stream()) if data_args.streaming else None
        images, unreadable = load_images(**data_args.for_images(), stream=stream)
    splits = cut_splits(images, **data_args.for_cut())
    check_same_images(splits, stream.fingerprint if stream else "")
    id2label = dict(enumerate(splits["train"].features["label"].names))
    findings = audit_images(splits, unreadable)

    # Model
    drawn_from = images["train"] if data_args.folds else splits["train"]  # the same view for all folds
    sample = draw_sample(drawn_from, sample_rows, lambda model: build_predictor(model, training_args))
    build = functools.partial(build_model, id2label=id2label, image_size=model_args.image_size)
    name = choose_backbone(model_args.model_name, build, sample, model_args.milliseconds, arguments.run_dir)
    set_seed(training_args.seed)  # decides the first weights of a new head
    model, processor = build(name)
    recipes = choose_recipes(model_args.recipe, name, model, **run_args.pace)
    console.say_recipe(recipes, model_args.recipe)
    judge = build_judge(model_args.metric, model_args.balance, model, splits, data_args.none_class, stream)
    stopwatch.end("load")
    view, views = choose_view(model, processor, sample, recipes[0].is_pretrained, not model_args.image_size)
    setup = console.describe_setup(sample.predictor(model), name, view.size, views, judge.criterion)
    console.say_setup(splits, data_args.name, setup, data_args.fold)
    findings |= results.warn_if_learned(name, splits)
    with training_args.main_process_first(desc="preparing the images"):
        prepared = prepare(splits, view)
    stopwatch.end("prepare")
    return Experiment(splits, frozenset(images), prepared, findings, model, view, recipes, judge, setup, stream)


def fine_tune(arguments: "Arguments", stop: "Stop", stopwatch: Stopwatch) -> tuple["Experiment", "Result"]:
    """Race the recipes, keep the weights that are best on validation, and predict test with them, once."""
    from data import evaluation_rows, feature_rows, with_transforms
    from luthier.reporting import console
    from luthier.scoring.baselines import ProbeResults, measure_probe, with_yardstick
    from luthier.scoring.experiment import Result
    from luthier.scoring.familiarity import answer, learn_familiarity
    from luthier.scoring.mirror import choose_augmentation
    from luthier.scoring.race import Course, keep_best, plan_arms, race
    from luthier.scoring.selection import is_enough, score_probe
    from luthier.training.trainer import model_of

    data_args, model_args, training_args, run_args = arguments
    experiment, resume = set_up(arguments, stopwatch), training_args.resume_from_checkpoint
    splits, prepared, view, recipes = experiment.splits, experiment.prepared, experiment.view, experiment.recipes
    workshop, images = experiment.workshop(training_args, stopwatch, stop), feature_rows(prepared, view)

    # Probe
    probe, judge, curve = ProbeResults(), experiment.judge, data_args.learning_curve
    if recipes[0].is_pretrained:
        probe = measure_probe(workshop.predictor(), splits, images, judge.criterion, curve, console.say_probe)
        judge = with_yardstick(judge, probe, splits, recipes, training_args.device, experiment.own_splits)
    only_trained = model_args.keep == "trained" and not recipes[0].is_probe
    held_out = evaluation_rows(prepared["validation"], view, ["label"])
    candidate = None if only_trained else score_probe(workshop, probe, held_out, judge)
    to_train = [] if is_enough(candidate, judge, recipes) else recipes
    augmentation = choose_augmentation(data_args.augmentation, workshop.predictor, splits, images, probe, to_train)
    rows = with_transforms(prepared, view, augmentation, data_args.test_view, experiment.size, experiment.stream)
    stopwatch.end("features")
    console.say_estimates(probe, curve)
    experiment.findings.update(probe.findings)
    console.say_audit(experiment.findings)

    # Train
    course = Course(judge, stop, workshop.folder, stopwatch, model_args.time_limit, only_trained, run_args.of_training)
    outcome, trained = race(plan_arms(recipes, workshop, rows, probe.starts), candidate, course, resume)

    # Evaluate
    kept, trainer = keep_best(outcome, trained, workshop, probe.starts)
    console.say_race(outcome, kept, judge)
    known = probe.known_of(kept.is_probe and data_args.test_view == "evaluation")  # other views differ each time
    familiarity = learn_familiarity(trainer, images, splits, known, judge.criterion.none)
    answers, model = answer(trainer, rows["test"], splits, familiarity, known), model_of(trainer).cpu()
    stopwatch.end("evaluate")
    return experiment, Result(workshop, course, *experiment.used, probe, outcome, kept, model, answers, augmentation)


def finish(experiment: "Experiment", result: "Result", arguments: "Arguments", stopwatch: Stopwatch) -> None:
    """Refit the model on all images that may be learned from, and write the results."""
    from data import feature_rows, join_for_training
    from luthier.reporting import console, results
    from luthier.scoring.refit import plan_refit, refit

    data_args, model_args, training_args, _ = arguments

    # Refit
    plan, refitted = plan_refit(experiment, result, model_args.refit, model_args.time_limit, data_args.folds), None
    console.say_refit(plan)
    if plan.done:
        view, size = experiment.view, experiment.size
        rows_of = functools.partial(join_for_training, view=view, augmentation=result.augmentation, size=size)
        plan, refitted = refit(plan, result, experiment.splits, feature_rows(experiment.prepared, view), rows_of)
        stopwatch.end("refit")

    # Report
    if training_args.process_index == 0:
        metrics = results.collect_run(experiment, result, plan, data_args, arguments.for_record())
        results.write_run(arguments.run_dir, experiment, result, refitted, metrics, data_args, stopwatch)


if __name__ == "__main__":
    main()
