"""Find what is wrong with a dataset: unreadable, duplicate, mislabelled images.

    python audit.py my_photos
    python audit.py my_photos --output_dir audits/my_photos

DATA is a folder of images, or the name of a dataset. The first command prints
what it finds. With --output_dir it also writes audit.json, and audit.html, a
page with the images. The features of --model_name tell which labels are likely
wrong. Every run of train.py does the same.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import UserError, exit_on_user_error
from luthier.options import OF_DATA
from luthier.output_dir import create_output_dir
from luthier.run_files import AUDIT
from luthier.terminal import ignore_closed, say

if TYPE_CHECKING:
    from datasets import DatasetDict

    from luthier.arguments import Arguments
    from luthier.parsing import Parser

FILES = (AUDIT, "audit.html")  # in the output directory; an earlier audit is replaced
# Options of train.py that have a meaning here too, and that people use.
SHOWN = (
    *OF_DATA, "validation_fraction", "test_fraction", "split_seed", "model_name", "image_size", "milliseconds",
    "on_bad_image", "output_dir",
)  # fmt: skip


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Audit a dataset; see `python audit.py --help`."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        build_parser().print_help()
        return
    if not argv or argv[0].startswith("-"):
        raise UserError("name the data first: python audit.py FOLDER (or a dataset's name) [options of train.py]")
    from luthier.arguments import option_of_data, parse_arguments, refuse_others
    from luthier.parsing import option_names_in

    # Validation chooses the penalty of the probe that checks labels, and nothing else: a tenth is enough.
    line = [*option_of_data(argv[0]), "--validation_fraction", "0.1", *argv[1:], "--eval_strategy", "no"]
    refuse_others("audit.py", option_names_in(argv[1:]), SHOWN)
    arguments = parse_arguments(line, replaced=FILES, parser=build_parser())

    from data import cut_splits, load_images
    from luthier.cache import list_of
    from luthier.machine import set_up_process
    from luthier.reporting import console
    from luthier.reporting.page import write_audit_page
    from luthier.reporting.results import write_audit
    from luthier.scoring.audit import audit_images

    data_args, _, training_args, run_args = arguments
    set_up_process(training_args)
    splits, unreadable = load_images(**data_args.for_images(), max_unreadable=1.0)
    try:
        splits = cut_splits(splits, **data_args.for_cut())
    except UserError as error:  # it cannot be trained on as it is, but what is wrong with it can still be found
        say("careful", f"{error}\n")
    findings = audit_images(splits, unreadable)
    train = splits["train"]
    # A probe has the classes up to the highest label in train, and all images of the last one may be unreadable.
    if "validation" in splits and max(list_of(train, "label")) + 1 == len(train.features["label"].names):
        findings |= ask_probe(splits, arguments)
    with ignore_closed("stdout"):  # as with `| head`: the files are written all the same
        print(console.list_findings(findings), flush=True)
    if "output_dir" in run_args.given:
        folder = Path(str(training_args.output_dir))
        create_output_dir(folder)
        record, page = (folder / name for name in FILES)
        write_audit(record, findings)
        write_audit_page(page, data_args.name, findings, splits)
        last = f"written: {page}"
    else:
        last = "A page with these images, and a record: --output_dir FOLDER"
    with ignore_closed("stdout"):
        print(f"\n{last}", flush=True)


def build_parser() -> "Parser":
    """Return the parser of train.py, with this command's help."""
    from luthier.arguments import build_parser

    parser = build_parser("audit.py", "python audit.py DATA [--option value ...]", str(__doc__), SHOWN)
    own = {
        "output_dir": "Where audit.json and audit.html are written; nothing is written if not given.",
        "validation_fraction": "Share of each class for a missing validation split; a tenth if not given.",
        "image_size": "Side of the images that the model sees, in pixels; the model's own if not given.",
    }
    for action in parser._actions:
        action.help = own.get(action.dest, action.help)
    return parser


def ask_probe(splits: "DatasetDict", arguments: "Arguments") -> dict:
    """Return what a linear probe finds, and `inflation`, see `baselines.ProbeResults`; nothing of an untrained model.

    Raises:
        ModelError: the model cannot be built.
        UserError: its image processor is of no use, images have changed, or the features are not finite.
    """
    from dataclasses import replace
    from functools import partial

    from data import feature_rows, prepare, sample_rows
    from luthier.images.views import EvaluationView
    from luthier.scoring.baselines import measure_probe
    from luthier.scoring.screening import choose_backbone, draw_sample
    from luthier.training.recipe import choose_recipes
    from luthier.training.trainer import build_predictor
    from models import build_model

    _, model_args, training_args, _ = arguments
    labels = dict(enumerate(splits["train"].features["label"].names))
    build = partial(build_model, id2label=labels, image_size=model_args.image_size)
    with tempfile.TemporaryDirectory() as folder:  # the Trainer creates its output directory
        predictor = partial(build_predictor, training_args=replace(training_args, output_dir=folder))
        sample = draw_sample(splits["train"], sample_rows, predictor)
        name = choose_backbone(model_args.model_name, build, sample, model_args.milliseconds)
        model, image_processor = build(name)
        if not choose_recipes(None, name, model)[0].is_pretrained:
            return {}
        view, trainer = EvaluationView(image_processor), predictor(model)
        rows = feature_rows(prepare(splits, view), view)
        probe = measure_probe(trainer, splits, rows)
    return probe.findings | {"inflation": probe.inflation}


if __name__ == "__main__":
    main()
