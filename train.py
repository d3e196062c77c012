"""Fine-tune an image classifier: arguments -> data -> model -> probe -> Trainer -> evaluate -> report -> push."""

import contextlib
import gc
import shlex
import sys
import time

gc.disable()  # what the imports make stays: looking through it again and again for garbage takes a second
from arguments import DataArguments, ModelArguments, has_ended, parse_arguments, user_errors

START = time.perf_counter()
if __name__ == "__main__":
    with user_errors():
        parse_arguments(sys.argv[1:])  # --help and mistakes are answered before the imports below, which take seconds

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import transformers
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import audit
import hub
from checkpoints import find_checkpoint, load_weights, locked
from data import collate, describe, evaluation_rows, load_labelled, load_splits, prepare, with_views
from learning_curve import in_words, learning_curve
from machine import fit_machine, quiet_libraries, refuse_lone_processes
from metrics import (
    choose_threshold,
    fit_temperature,
    logits_of,
    reliability,
    score,
    selective,
)
from models import build_model, divide_logits, freeze, labels_of, linear_head, load_trained, threshold_of
from probe import LinearProbe, build_probe, load_features
from recipe import FROM_SCRATCH, RECIPES, Recipe, blend, choose_recipe
from report import write_model_card
from results import Test, write_results
from summary import attribution, majority_baseline, say_audit, say_data, summarise
from terminal import Stopwatch, say
from trainer import (
    SafeTrainer,
    Stop,
    StoppedInEvaluation,
    build_trainer,
    die_with_launcher,
    memory_advice,
    say_stopped,
)
from views import EvaluationView

gc.freeze()
gc.enable()

KEPT = {0.0: "the probe", 0.5: "the mean of both", 1.0: "the trained weights"}  # by recipe.Recipe.kept


def main(argv: list[str] | None = None) -> None:
    """Run one experiment, or score a finished model; see `python train.py --help`."""
    argv = sys.argv[1:] if argv is None else argv
    clock = Stopwatch(START)
    die_with_launcher()
    quiet_libraries()
    with user_errors():
        data_args, model_args, training_args = parse_arguments(argv)
        fit_machine(training_args)
        refuse_lone_processes(training_args)
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    with contextlib.ExitStack() as until_the_end:
        stop = until_the_end.enter_context(Stop())
        with user_errors():
            if training_args.process_index == 0:
                until_the_end.enter_context(locked(output_dir, continued=bool(resume)))
        if resume == "auto" and has_ended(output_dir):
            say(training_args, "done", f"{output_dir} holds a finished run: nothing is left to train")
            with user_errors():
                repo_id = open_repository(training_args)
            if repo_id:  # the push may have been what failed
                publish(training_args, repo_id)
        elif model_args.eval_only:
            evaluate_only(argv, data_args, model_args, training_args, clock)
        else:
            fine_tune(argv, data_args, model_args, training_args, clock, stop)


def fine_tune(
    argv: list[str],
    data_args: DataArguments,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    clock: Stopwatch,
    stop: Stop,
) -> None:
    """Train a model, score it, write and publish it."""
    with user_errors():
        repo_id = open_repository(training_args)
        with training_args.main_process_first(desc="looking through the pictures"):
            pictures, bad = load_splits(**data_args.for_loading())
        labels = pictures["train"].features["label"].names
        set_seed(training_args.seed)  # decides the new head's first weights
        model, image_processor = build_model(model_args.model_name, dict(enumerate(labels)), model_args.image_size)
        name, recipe = settle_recipe(model_args, training_args, model, len(pictures["train"]))
        view = EvaluationView(image_processor)
        clock.stop("load")

        splits, data = prepare_all(training_args, pictures, view, clock)
        views = with_views(splits, view, data_args.augmentation, data_args.test_view)
        trainer = build_trainer(model, recipe, training_args, views, labels)
    for callback in (clock, stop):
        trainer.add_callback(callback)
    summary = summarise(data_args, model_args, trainer, name or "from scratch", view)
    say_data(training_args, data_args.name, data)
    for line in ("model", "device"):
        say(training_args, line, summary[line])

    found = audit.audit(pictures, bad)
    counts = data["splits"]
    baselines = {"majority": majority_baseline(counts["train"], counts["test"])}
    start = curve = None
    if name and linear_head(model):
        start, probe, features = start_from_probe(trainer, splits, view, labels)
        if trainer.is_world_process_zero():
            scored = {s: score_probe(probe, features, splits, s, labels) for s in ("validation", "test")}
            baselines["linear_probe"] = scored | {"strength": probe.strength}
            found["suspect_labels"] = audit.suspect_labels(
                pictures, torch.cat(list(features.values())), probe.strength
            )
            if data_args.learning_curve:
                with user_errors():
                    curve = measure_learning_curve(pictures, features, probe, labels, training_args.device)
                say(training_args, "curve", in_words(curve))
        clock.stop("features")
    elif data_args.learning_curve:
        say(training_args, "curve", "not estimated: this model has no linear probe")
    say_audit(training_args, found)
    if name in ("probe", "lp_ft"):
        model.load_state_dict(start)
    say(training_args, "recipe", summary["recipe"])
    if name != "probe":
        set_seed(training_args.seed)  # whether the features came from the cache or not
        train(trainer, stop, training_args.resume_from_checkpoint)
    kept = keep_best(trainer, start, recipe.kept if model_args.keep == "best" else recipe.kept[-1:], labels)
    logits, references = predict(trainer, views["test"])
    clock.stop("evaluate")

    if trainer.is_world_process_zero():
        before = {"validation": kept.uncalibrated, "test": score(logits * kept.temperature, references, labels)}
        metrics = {
            "validation": kept.validation,
            "test": score(logits, references, labels),
            "unsure": selective(logits, references, kept.threshold),
            "calibration": {
                "temperature": kept.temperature,
                "before": {s: {key: scored[key] for key in ("log_loss", "ece")} for s, scored in before.items()},
                "reliability": reliability(logits, references),
            },
            "baselines": baselines,
            "learning_curve": curve,
            "data": {"name": data_args.name, "attribution": attribution(data_args), **data},
            "recipe": {**summary, "kept": kept.words},
            "history": trainer.state.log_history,
            "seeds": {"seed": training_args.seed, "split_seed": data_args.split_seed, "fold": data_args.fold},
        }
        custom_code = save_model(trainer, image_processor)
        metrics = write_results(trainer, argv, metrics, Test(pictures, logits, references), found, clock)
        write_model_card(Path(training_args.output_dir, "README.md"), metrics, custom_code)
        trust = ", trust_remote_code=True" if custom_code else ""
        say(training_args, "next", f'pipeline("image-classification", "{training_args.output_dir}"{trust})')
        if repo_id:
            publish(training_args, repo_id)


def evaluate_only(
    argv: list[str],
    data_args: DataArguments,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    clock: Stopwatch,
) -> None:
    """Score a finished model on labelled pictures, and report it as a run does."""
    with user_errors():
        model, image_processor = load_trained(model_args.model_name)
        labels = labels_of(model)
        with training_args.main_process_first(desc="looking through the pictures"):
            pictures, bad = load_labelled(labels, **data_args.for_pictures())
        view = EvaluationView(image_processor)
        clock.stop("load")
        splits, data = prepare_all(training_args, pictures, view, clock)
        test = evaluation_rows(splits["test"], view, ["label"])
        training_args.eval_strategy = "no"
        trainer = Trainer(model, training_args, collate)
    say(training_args, "data", f"{data_args.name}: {len(pictures['test']):,} pictures")
    summary = summarise(data_args, model_args, trainer, None, view)
    for line in ("model", "device"):
        say(training_args, line, summary[line])
    found = audit.audit(pictures, bad)
    say_audit(training_args, found)
    logits, references = predict(trainer, test)
    clock.stop("evaluate")
    if trainer.is_world_process_zero():
        counts = data["splits"]
        metrics = {
            "test": score(logits, references, labels),
            "unsure": selective(logits, references, threshold_of(model)),
            "calibration": {"reliability": reliability(logits, references)},
            "baselines": {"majority": majority_baseline(counts["test"], counts["test"])},
            "learning_curve": None,
            "data": {"name": data_args.name, "attribution": attribution(data_args), **data},
            "recipe": summary,
            "history": [],
        }
        write_results(trainer, argv, metrics, Test(pictures, logits, references), found, clock)


def prepare_all(
    training_args: TrainingArguments, pictures: DatasetDict, view: EvaluationView, clock: Stopwatch
) -> tuple[DatasetDict, dict]:
    """Return the prepared splits, and what is said of them; the main process prepares, the others find it cached."""
    with training_args.main_process_first(desc="preparing the pictures"):
        splits = prepare(pictures, view)
    data = describe(splits)
    clock.stop("prepare")
    return splits, data


def open_repository(training_args: TrainingArguments) -> str | None:
    """Return the name of the Hub repository to push to, which is there and may be written to; None for no push.

    Raises:
        ValueError: it cannot be pushed to.
    """
    if not training_args.push_to_hub:
        return None
    training_args.push_to_hub = False  # of the Trainer's own, which uploads the whole folder while it trains
    if training_args.process_index != 0:
        return None
    name = training_args.hub_model_id or Path(training_args.output_dir).name
    return hub.check_access(name, training_args.hub_private_repo)


def publish(training_args: TrainingArguments, repo_id: str) -> None:
    """Push the finished run; where that fails, say how to repeat only that, and exit with 1."""
    output_dir, private = training_args.output_dir, training_args.hub_private_repo
    try:
        say(training_args, "pushed", hub.push(Path(output_dir), repo_id))
    except ValueError as error:
        again = shlex.join(["python", "hub.py", output_dir, repo_id, *(["--private"] if private else [])])
        sys.exit(f"error: not pushed: {error}\nThe run is complete, in {output_dir}. To push it again:\n  {again}")


def settle_recipe(
    model_args: ModelArguments, training_args: TrainingArguments, model: PreTrainedModel, images: int
) -> tuple[str | None, Recipe]:
    """Return the recipe's name, None from scratch, and what it fixes; freeze, and fill in what the user left open."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    probed = linear_head(model) is not None
    name = choose_recipe(model_args.recipe, model_args.model_name, probed, parameters, images)
    recipe = RECIPES[name] if name else FROM_SCRATCH
    freeze(model, recipe.frozen)
    if training_args.learning_rate is None:
        training_args.learning_rate = recipe.learning_rate
    if training_args.num_train_epochs is None:
        training_args.num_train_epochs = recipe.num_train_epochs
    return name, recipe


def start_from_probe(
    trainer: Trainer, splits: DatasetDict, view: EvaluationView, labels: list[str]
) -> tuple[dict[str, torch.Tensor], LinearProbe, dict[str, torch.Tensor | None]]:
    """Fit the linear probe; return the model's state with the probe as its head, the probe, and all features."""
    model, head = trainer.model, linear_head(trainer.model)
    with user_errors():
        probe, features = build_probe(trainer, head, splits, view)
        if trainer.is_world_process_zero():
            found = score_probe(probe, features, splits, "validation", labels)
            line = f"validation {found['accuracy']:.1%}, loss {found['log_loss']:.3f}"
            say(trainer.args, "probe", f"{line}: a logistic regression on frozen features")
        features["test"] = load_features(trainer, head, splits["test"], view)  # for the audit, and the baseline
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start |= {name: tensor.to(model.device) for name, tensor in probe.as_head(head).items()}
    return start, probe, features


def score_probe(
    probe: LinearProbe, features: dict[str, torch.Tensor], splits: DatasetDict, split: str, labels: list[str]
) -> dict:
    """Return the probe's score on a split, calibrated on validation as every model is."""
    truth = {name: np.array(splits[name]["label"][:]) for name in ("validation", split)}
    temperature = fit_temperature(probe.logits(features["validation"]).numpy(), truth["validation"])
    return score(probe.logits(features[split]).numpy() / temperature, truth[split], labels)


def measure_learning_curve(
    pictures: DatasetDict,
    features: dict[str, torch.Tensor],
    probe: LinearProbe,
    labels: list[str],
    device: torch.device,
) -> dict:
    """Return the learning curve of the probe on train and validation; test is not looked at."""
    both = ("train", "validation")
    truth, groups = (np.concatenate([pictures[split][key][:] for split in both]) for key in ("label", "group"))
    pool = torch.cat([features[split] for split in both]).to(device)
    return learning_curve(pool, truth, labels, groups, probe.strength, len(pictures["train"]))


def train(trainer: SafeTrainer, stop: Stop, resume: str | None) -> None:
    """Train, from a checkpoint on if one is asked for, and leave the model as it was after its best epoch."""
    with user_errors():
        checkpoint = find_checkpoint(trainer.args, resume)
        if checkpoint:
            load_weights(trainer.model, checkpoint)
        with memory_advice(trainer.args), contextlib.suppress(StoppedInEvaluation):
            trainer.train(resume_from_checkpoint=checkpoint)
    if stop.received:
        say_stopped(trainer.args, stop.received)
    trainer.accelerator.free_memory()  # its data workers too
    best = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.best_global_step}")
    if best.exists():  # chosen on validation
        load_weights(trainer.model, best)
    if trainer.args.world_size > 1:  # the checkpoint may stand on the main process's machine alone
        for tensor in trainer.model.state_dict().values():
            whole = tensor.contiguous()
            torch.distributed.broadcast(whole, src=0)
            tensor.copy_(whole)


class Kept(NamedTuple):
    """The weights that a run ends with: what they are in words, and how they do on validation."""

    words: str
    temperature: float
    threshold: float
    validation: dict
    uncalibrated: dict


def keep_best(
    trainer: Trainer, start: dict[str, torch.Tensor] | None, shares: tuple[float, ...], labels: list[str]
) -> Kept:
    """Leave the model with the weights, from the probe's to the trained ones, that are best on validation.

    Each is calibrated first, so that what is compared is what it tells and not how sure of it it is; the temperature
    is then folded into the head, and whoever loads the model gets calibrated probabilities. The confidence below which
    it is unsure goes into its config.

    Args:
        trainer: holds the trained model, and the validation split.
        start: the state with the probe's weights; None where there is no probe to compare with.
        shares: the candidates; see `recipe.Recipe`.
        labels: the classes' names.
    """
    model = trainer.model
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {}
    for share in shares if start else (1.0,):
        model.load_state_dict(blend(start or end, end, share))
        logits, references = predict(trainer, trainer.eval_dataset)
        # Of another head than a linear one the probabilities stay as they are.
        temperature = fit_temperature(logits, references) if linear_head(model) else 1.0
        scores = (score(logits / divisor, references, labels) for divisor in (temperature, 1.0))
        threshold = round(choose_threshold(logits / temperature, references), 4)
        found[share] = Kept(KEPT[share], temperature, threshold, *scores)
    best = min(found, key=lambda share: found[share].validation["log_loss"])
    model.load_state_dict(blend(start or end, end, best))
    divide_logits(model, found[best].temperature)
    model.config.unsure_below = found[best].threshold
    if len(found) > 1:
        losses = ", ".join(f"{kept.words} {kept.validation['log_loss']:.3f}" for kept in found.values())
        say(trainer.args, "kept", f"{found[best].words}; validation loss: {losses}")
    return found[best]


def predict(trainer: Trainer, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's logits [N, C] on a split, and the true classes [N]."""
    prediction = trainer.predict(dataset)
    return logits_of(prediction), prediction.label_ids


def save_model(trainer: Trainer, image_processor: transformers.BaseImageProcessor) -> bool:
    """Write the model and its image processor into the output directory; return whether it brings code of its own."""
    output_dir = Path(trainer.args.output_dir)
    trainer.model.save_pretrained(output_dir)
    # Not save_pretrained, which does nothing for a timm model and would leave the folder without this file.
    image_processor.to_json_file(output_dir / "preprocessor_config.json")
    return (output_dir / "models.py").exists()


if __name__ == "__main__":
    main()
