"""Score a finished model on labelled images, with the report of a run.

    accelerate launch score.py outputs/my_run --data_dir other_photos
    accelerate launch score.py me/instruments --dataset_name someone/their-set

MODEL is a folder with a saved model, or a name on the Hub. The split "test" is
scored where the data has one, otherwise all images are. Classes are matched by
name.
"""

import sys
from typing import TYPE_CHECKING

from luthier.errors import UserError, exit_on_user_error
from luthier.options import OF_DATA
from luthier.terminal import Stopwatch

if TYPE_CHECKING:
    from luthier.arguments import Arguments
    from luthier.parsing import Parser

# Options of train.py that have a meaning here too, and that people use.
SHOWN = (
    "data_dir", "dataset_name", *OF_DATA, "on_bad_image", "output_dir", "bf16", "dataloader_num_workers",
    "disable_tqdm",
)  # fmt: skip


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Score a model; see `python score.py --help`."""
    stopwatch = Stopwatch()
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        build_parser().print_help()
        return
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first: accelerate launch score.py MODEL --data_dir FOLDER")
    from luthier.arguments import parse_arguments, refuse_others
    from luthier.checks import check_outside
    from luthier.parsing import describe_command, option_names_in

    if "model_name" in option_names_in(argv[1:]):
        raise UserError(f"score.py scores the model that is named first, {argv[0]}: leave --model_name out")
    config = len(argv) > 1 and argv[1].endswith((".yaml", ".yml"))  # which may name the images
    if not config and not {"data_dir", "dataset_name"} & option_names_in(argv[1:]):
        raise UserError("name the images to score on: --data_dir FOLDER, or --dataset_name NAME")

    # The model's name comes last, so that it counts. Without "no" the Trainer would ask for a validation split.
    line = [*argv[1:], "--eval_strategy", "no", "--model_name", argv[0]]
    arguments = parse_arguments(line, describe_command("score.py", argv), parser=build_parser())
    refuse_others("score.py", arguments.run_args.given, (*SHOWN, "model_name"))
    if not arguments.data_args.labels:  # here too, because `parse_arguments` checks a folder that is given
        check_outside(arguments.run_dir, arguments.data_args.data_dir or str(arguments.data_args.dataset_name))

    from luthier.machine import set_up_process
    from luthier.output_dir import claim_output_dir
    from luthier.training.signals import Stop

    training_args = arguments.training_args
    set_up_process(training_args)
    output_dir, is_main_process = arguments.run_dir, training_args.process_index == 0
    with Stop(output_dir), claim_output_dir(output_dir, continues=False, enabled=is_main_process):
        score_model(arguments, stopwatch)


def build_parser() -> "Parser":
    """Return the parser of train.py, with this command's help."""
    from luthier.arguments import build_parser

    usage = "accelerate launch score.py MODEL [--option value ...]"
    return build_parser("score.py", usage, str(__doc__), SHOWN)


def score_model(arguments: "Arguments", stopwatch: Stopwatch) -> None:
    """Load the images and the model, predict, and write the results.

    Raises:
        ModelError: the model cannot be loaded, or its files are damaged.
        UserError: the images cannot be loaded, are not of the model's classes, or all show none of them.
    """
    from data import evaluation_rows, load_labelled, prepare
    from luthier.familiarity import class_shares_of, load_familiarity, none_of, threshold_of
    from luthier.images.description import describe
    from luthier.images.splits import check_same_images
    from luthier.images.views import EvaluationView
    from luthier.reporting import console
    from luthier.reporting.results import collect_metrics, warn_if_learned, write_results
    from luthier.scoring.audit import audit_images
    from luthier.scoring.criterion import check_known
    from luthier.scoring.familiarity import answer
    from luthier.scoring.metrics import TestPredictions
    from luthier.scoring.selection import score_test
    from luthier.training.trainer import build_predictor
    from models import check_view, labels_of, load_trained

    data_args, model_args, training_args, run_args = arguments
    stopwatch.end("start")
    model, image_processor = load_trained(model_args.model_name)
    labels, view = labels_of(model), EvaluationView(image_processor)
    check_view(model, view.size)
    none, shares, familiarity = none_of(model), class_shares_of(model), load_familiarity(model, model_args.model_name)
    threshold = threshold_of(model, familiarity)
    with training_args.main_process_first(desc="loading the images"):
        splits, unreadable = load_labelled(labels, **data_args.for_images())
    check_same_images(splits)
    stopwatch.end("load")
    with training_args.main_process_first(desc="preparing the images"):
        prepared = prepare(splits, view)
    stopwatch.end("prepare")
    check_known(splits, none)
    trainer = build_predictor(model, training_args)
    data = describe(prepared, data_args.name, data_args.is_built_in)
    setup = console.describe_setup(trainer, model_args.model_name, view.size)
    findings = audit_images(splits, unreadable)
    console.say_setup(splits, data_args.name, setup)
    console.say_audit(findings)
    findings |= warn_if_learned(model_args.model_name, splits)
    answers = answer(trainer, evaluation_rows(prepared["test"], view, ["label"]), splits, familiarity)
    stopwatch.end("evaluate")
    if trainer.is_world_process_zero():
        test = TestPredictions(splits, *answers[:2], shares, answers.sureness, none)
        recipe = {**setup, "recipe": "nothing trained"}
        record = {"command": run_args.command, "settings": run_args.settings}
        metrics = collect_metrics(test, score_test(test, threshold), data, recipe, findings, record)
        write_results(arguments.run_dir, metrics, test, findings, stopwatch)
        console.say_results(arguments.run_dir, metrics)


if __name__ == "__main__":
    main()
