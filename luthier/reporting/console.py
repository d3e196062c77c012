"""Everything that is said in words: the lines of a run, findings, verdicts, and the sentences of page and card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import SchedulerType, Trainer
from transformers.training_args import OptimizerNames

from luthier.escape import escape_terminal
from luthier.output_dir import NO_TIME, has_weights
from luthier.run_files import CODE
from luthier.scoring.audit import KINDS, TINY, leaks_in_words
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.criterion import ASKS_FOR_BALANCE, LOG_LOSS, Criterion, Judge
from luthier.scoring.experiment import Result
from luthier.scoring.race import Outcome
from luthier.scoring.refit import Plan
from luthier.scoring.screening import View
from luthier.scoring.selection import Candidate
from luthier.terminal import fraction, of_project, percent, plural, points, quote, say, shorten
from luthier.training.recipe import Recipe
from luthier.training.trainer import model_of

KIND_NAMES = {  # of findings
    "unreadable": "unreadable, left out",
    "between_splits": "duplicates across splits",
    "groups_between_splits": "groups across splits",
    "between_classes": "duplicates across classes",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates",
    "suspect_labels": "labels to check",
    "wrong_extension": "wrong extension",
    "tiny": f"smaller than {TINY} px",
}
FITS = {"own": "cropped", "squeeze": "squeezed", "pad": "padded"}  # by screening.View.fit
MAX_NAMED = 3  # images of a kind that a run names
MAX_LISTED = 20  # findings of a kind that the audit lists
MAX_CLASSES = 10  # that a run names at its beginning


# --- a run


def describe_setup(
    trainer: Trainer,
    model_name: str,
    size: tuple[int, int],
    views: Sequence[View] = (),
    criterion: Criterion = LOG_LOSS,
) -> dict[str, str]:
    """Return what is used, and where, each in a line: `model` and `device`, and if any `view`, `metric`, `none`.

    Args:
        trainer: has the model and the device.
        model_name: as it was asked for.
        size: (height, width) of what the model sees, in pixels.
        views: of `screening.choose_view`.
        criterion: what validation chooses by; the default where a model is scored alone.
    """
    args = trainer.args
    parameters = sum(parameter.numel() for parameter in model_of(trainer).parameters())
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    mixed = trainer.accelerator.mixed_precision
    threads = f", {plural(torch.get_num_threads(), 'thread')}" if args.device.type == "cpu" else ""
    workers = f", {plural(args.dataloader_num_workers, 'data worker')}" if args.dataloader_num_workers else ""
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    none = getattr(model_of(trainer).config, "none_class", None)
    otherwise = "" if criterion.none is None else '; if not, give --none_class ""'  # which score.py does not take
    losses = ", ".join(f"{view.side} px {FITS[view.fit]} {view.loss:.3f}" for view in views[1:])
    return {
        "model": f"{Path(model_name).name} at {size[0]} x {size[1]} px, {parameters:,} parameters",
        **({"view": f"{FITS[views[0].fit]}; loss of a probe: {losses}"} if views else {}),
        **({} if criterion[:2] == LOG_LOSS[:2] else {"metric": criterion_in_words(criterion)}),
        **({"none": f"{none!r} is of images of anything else, and not scored{otherwise}"} if none else {}),
        "device": f"{device}{threads}{processes}{workers}, {'float32' if mixed == 'no' else mixed}",
    }


def criterion_in_words(criterion: Criterion) -> str:
    """Return what validation chooses by, and how answers make up for rare classes."""
    metric, balance = metric_in_words(criterion.metric), criterion.balance
    if balance is None:
        return f"{metric}; answers do not make up for rare classes" if criterion.metric in ASKS_FOR_BALANCE else metric
    low, high = min(balance.shares), max(balance.shares)
    weights = ", and rare classes count more in training" if balance.weighted else ""
    return f"{metric}; answers as if all classes were equally frequent ({percent(low)} to {percent(high)}){weights}"


def metric_in_words(metric: str) -> str:
    """Return a metric as sentences have it."""
    return metric.replace("_", " ").replace("f1", "F1")


def describe_recipe(result: Result) -> dict[str, str]:
    """Return how the model was trained, and which weights were kept, each in a line."""
    winner, heats, how = result.outcome.winner, result.outcome.heats, "probe: the logistic regression is the head"
    if winner is not None:
        arm, args = winner.arm, winner.arm.training_args
        epochs = heats.epochs(arm.recipe.name)
        steps = f"{_epochs(epochs)}, batch {arm.batch}, {result.augmentation}, {OptimizerNames(args.optim).value}"
        schedule = SchedulerType(args.lr_scheduler_type).value
        parts = f" in {plural(len(heats.of(arm.recipe.name)), 'heat')}" if arm.schedule else ""
        how = f"{arm.recipe.name}: {steps} {rates_in_words(arm.recipe, args.learning_rate)}, {schedule}{parts}"
    return {"recipe": how, "kept": kept_in_words(result.kept)}


def describe_test_view(test_view: str) -> dict[str, str]:
    """Return in a line that test was seen in another view than that of evaluation; nothing where it was not."""
    return {"test view": "random crops, which distort the score"} if test_view == "random_crop" else {}


def rates_in_words(recipe: Recipe, rate: float) -> str:
    """Return the learning rate of the head, and those of the layers below it where they are others."""
    if recipe.frozen == 1 or (recipe.backbone_rate, recipe.layer_decay) == (1, 1):
        return f"{rate:g}"
    decay = "" if recipe.layer_decay == 1 else f", times {recipe.layer_decay:g} for each layer before it"
    return f"{rate:g} (last layer of the backbone {rate * recipe.backbone_rate:g}{decay})"


def kept_in_words(kept: Candidate) -> str:
    """Return which weights these are."""
    if kept.is_probe:
        return "the probe"
    return "the trained weights" if kept.share == 1 else "the mean of the trained weights and those at the start"


def say_setup(splits: Mapping[str, Dataset], name: str, setup: Mapping[str, str], fold: str | None = None) -> None:
    """Say what is learned from, and what learns.

    Args:
        splits: the images.
        name: of the dataset.
        setup: of `describe_setup`.
        fold: such as 2/5; None where there are no folds.
    """
    if fold:
        say("fold", fold.replace("/", " of "))
    names = next(iter(splits.values())).features["label"].names
    classes = plural(len(names), "class", "classes")
    if len(names) <= MAX_CLASSES:
        classes += f" ({', '.join(map(shorten, names))})"
    counts = ", ".join(f"{split} {len(dataset):,}" for split, dataset in splits.items())
    say("data", f"{name}: {classes}; images: {counts}")
    for topic, text in setup.items():
        say(topic, text)


def say_probe(scored: Mapping) -> None:
    """Say how the linear probe does on validation."""
    accuracy, loss = percent(scored["accuracy"]), scored["log_loss"]
    say("probe", f"validation accuracy {accuracy}, loss {loss:.3f} (on frozen features)")


def say_estimates(probe: ProbeResults, curve: bool) -> None:
    """Say what ignoring the groups would add to a score, and what more images would bring, if that was asked for."""
    if probe.inflation:
        say("groups", inflation_in_words(probe.inflation))
    if curve:
        say("curve", learning_curve_in_words(probe.learning_curve))


def say_recipe(recipes: Sequence[Recipe], asked: str | None) -> None:
    """Say why a model is trained by one recipe that nobody asked for."""
    if asked is None and [recipe.name for recipe in recipes] == ["full"]:
        say("recipe", "full alone: the head of this model is not one linear layer, which a probe could replace")


def say_race(outcome: Outcome, kept: Candidate, judge: Judge) -> None:
    """Say what was tried, how it did, why the race ended, and what is kept."""
    loss = loss_in_words(judge)
    tried = [f"the probe {outcome.probe.loss:.3f}"] if outcome.probe else []
    last_heats = {heat.arm: heat for heat in outcome.heats}  # in the order of the first ones
    for arm, last in last_heats.items():
        tried.append(f"{arm} {last.loss:.3f} ({_epochs(last.epochs)}, {outcome.heats.seconds(arm):.0f} s)")
    if len(tried) > 1:
        say("race", f"{loss}: {', '.join(tried)}")
    elif tried:
        say("trained", f"{loss}: {tried[0]}")
    if outcome.ended:
        more = "; with a larger one it goes on (--output_dir and --resume_from_checkpoint auto)"
        say("", f"it ended with {outcome.ended}{more if outcome.ended == NO_TIME else ''}")
    what = "the probe" if kept.is_probe else f"{kept.arm}, {kept_in_words(kept)}"
    if kept.is_probe and last_heats:
        what += f", which {'no recipe has' if len(last_heats) > 1 else f'{min(last_heats)} has not'} beaten"
    elif outcome.probe and outcome.probe.loss < kept.loss:
        what += ", because the probe is not clearly ahead"
    say("kept", f"{what}: {kept.loss:.3f}")


def loss_in_words(judge: Judge) -> str:
    """Return what the losses are that validation chooses by."""
    metric = judge.criterion.metric
    of = "validation loss" if metric == LOG_LOSS.metric else f"1 - {metric_in_words(metric)} on validation"
    return of if judge.yardstick is None else f"{of}, corrected"


def say_refit(plan: Plan) -> None:
    """Say what the shipped weights learn from."""
    if plan.done:
        say("refit", f"on {plan.images:,} images instead of {plan.scored_on:,}")
    else:
        say("refit", f"not done: {plan.refusal}")


def refit_in_words(refit: Mapping) -> str:
    """Return what the scored weights and the shipped ones have learned from."""
    if not refit["done"]:
        which = "those of one of the folds that were scored" if refit.get("of_fold") else "the scored ones"
        return f"The shipped weights are {which}; they have learned from {refit['scored_on']:,} images"
    how = "are the mean of the scored ones and those of a refit" if refit.get("averaged") else "were then refit"
    on = f"all {refit['images']:,}{', those of test too' if 'test' in refit.get('splits', ()) else ''}"
    return f"Scored as trained on {refit['scored_on']:,} images; the shipped weights {how} on {on}"


def count_epochs(epochs: float) -> str:
    """Return a number of epochs, to three digits at least: `0.998`, `1,200`."""
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"


def _epochs(epochs: float) -> str:
    count = count_epochs(epochs)
    return f"{count} epoch{'' if count == '1' else 's'}"


def say_results(output_dir: Path, metrics: Mapping) -> None:
    """Say the score, what it is compared with, and where everything is.

    Args:
        output_dir: of the run; it may hold the model.
        metrics: what `metrics.json` holds.
    """
    test, majority = metrics["test"], metrics["baselines"]["majority"]
    probe, before = metrics["baselines"].get("linear_probe"), metrics["calibration"].get("before")
    baselines = [f"linear probe {percent(probe['test']['accuracy'])}"] if probe else []
    baselines.append(f"always {majority['label']!r} {percent(majority['accuracy'])}")
    say("test", f"accuracy {percent_with_interval(test)}")
    say("", balance_with_intervals(test))
    if leaks := leaks_in_words(metrics):
        say("careful", leaks)
    if view := metrics["recipe"].get("test view"):
        say("careful", f"The model has seen test in {view}")
    say("", f"compare: {'; '.join(baselines)}")
    if "none" in test:
        for sentence in none_in_words(test["none"], metrics["unsure"]):
            say("", sentence)
    is_calibrated = before and metrics["calibration"]["temperature"] != 1
    uncalibrated = f", before calibration {percent(before['test']['ece'])}" if is_calibrated else ""
    chance = percent(test["ece_by_chance"])
    say("", f"calibration error {percent(test['ece'])}{uncalibrated}; by chance alone about {chance}")
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items() if stage != "total")
    say("time", f"{metrics['seconds']['total']:.0f} s: {stages}")
    say("saved", f"{output_dir}; open report.html in it")
    if metrics.get("refit"):
        say("", refit_in_words(metrics["refit"]))
    if has_weights(output_dir):
        say("next", quote("python", of_project("predict.py"), str(output_dir), "photo.jpg"))
        path = json.dumps(str(output_dir), ensure_ascii=False)
        say("", f'pipeline("image-classification", {path}{trust_remote_code(output_dir)})')


def percent_with_interval(scored: Mapping) -> str:
    """Return an accuracy with its interval and n: `71.8% (95% interval 65.3% to 77.4%, n = 209)`."""
    low, high = scored["accuracy_ci95"]
    groups = f" in {plural(scored['groups'], 'group')}" if "groups" in scored else ""
    interval = f"95% interval {percent(low)} to {percent(high)}"
    return f"{percent(scored['accuracy'])} ({interval}, n = {scored['n']:,}{groups})"


def balance_with_intervals(scored: Mapping) -> str:
    """Return balanced accuracy and macro F1: `balanced accuracy 70.9% (64.2% to 76.8%), macro F1 0.702 (...)`."""
    if "balanced_accuracy" not in scored:  # in metrics.json of an earlier version
        return f"macro F1 {fraction(scored['macro_f1'])}"
    (low, high), (lowest, highest) = scored["balanced_accuracy_ci95"], scored["macro_f1_ci95"]
    return (
        f"balanced accuracy {percent(scored['balanced_accuracy'])} ({percent(low)} to {percent(high)}), "
        f"macro F1 {fraction(scored['macro_f1'])} ({fraction(lowest)} to {fraction(highest)})"
    )


def none_in_words(none: Mapping, unsure: Mapping) -> tuple[str, str]:
    """Return how many images of none of the classes are refused, and how many of the others, a sentence each."""
    low, high = none["refused_ci95"]
    refused, known = 1 - unsure["none_answered"], 1 - unsure["answered"]
    return (
        f"{plural(none['n'], 'image')} of none of the classes: {percent(none['refused'])} refused (95% interval "
        f"{percent(low)} to {percent(high)}), {percent(refused)} refused or unsure",
        f"of the others: {percent(none['known_refused'])} refused, which is wrong, {percent(known)} refused or unsure",
    )


def trust_remote_code(folder: Path) -> str:
    """Return the argument that loading a folder's model takes where it brings its own code."""
    return ", trust_remote_code=True" if (folder / CODE).exists() else ""


def inflation_in_words(inflation: Mapping) -> str:
    """Return what a score would be that ignores the groups."""
    low, high = map(points, inflation["ci95"])
    return (
        f"{inflation['images']:,} images of train and validation in {plural(inflation['groups'], 'group')}. A linear "
        f"probe scores {percent(inflation['accuracy'])} on groups that it has not seen. With splits that ignore the "
        f"groups it would seem to score {percent(inflation['ignoring'])}: {points(inflation['inflation'])} points "
        f"(95% interval {low} to {high})"
    )


def learning_curve_in_words(curve: Mapping | None) -> str:
    """Return what twice the images would bring."""
    if curve is None:
        return "not estimated: this model has no linear probe"
    now, twice, last = curve["now"], curve["twice"], curve["points"][-1]
    if last["accuracy"] == 1:
        right = f"A linear probe that learns from {last['n']:,} images is right about all others"
        return f"{right}, so that nobody can tell what more images would bring"
    low, high = map(points, curve["gain_ci95"])
    return (
        f"With twice the training images ({twice['n']:,} instead of {now['n']:,}) a linear probe would score about "
        f"{percent(twice['accuracy'])} instead of {percent(now['accuracy'])}: {points(curve['gain'])} points "
        f"(95% interval {low} to {high})"
    )


# --- the audit


def say_audit(findings: Mapping) -> None:
    """Say how much was found of each kind, and name what costs images or distorts the score."""
    say("audit", findings_in_words(findings))
    distorting = ("between_splits", "groups_between_splits")
    for kind, topic in (("unreadable", "left out"), *((kind, "careful") for kind in distorting)):
        for finding in findings[kind][:MAX_NAMED]:
            say(topic, finding_in_words(finding))
        if len(findings[kind]) > MAX_NAMED:
            say("", f"and {len(findings[kind]) - MAX_NAMED:,} more: see report.html")
    if findings["grouping"]:
        say("groups?", grouping_in_words(findings["grouping"]))


def grouping_in_words(pattern: str) -> str:
    """Return that folders or file names look like groups, and what to do; see `groups.propose_grouping`."""
    if pattern == "folder":
        return (
            "the class folders hold folders of several images each. If each of these folders shows one subject, such "
            "as a patient, the score is too high: use --group_by folder, or --group_column for a table"
        )
    return (
        "the names of the files look as if several images belonged together. If those show the same subject, the "
        f"score is too high: use --group_by {quote(pattern)}, or --group_column for a dataset without image files"
    )


def findings_in_words(findings: Mapping) -> str:
    """Return in a line how much was found of each kind."""
    sampled = ["suspect_labels"] if findings.get("checked_by") else []
    counts = [count_in_words(findings, kind) for kind in KINDS if findings[kind] or kind in sampled]
    unchecked = ["labels not checked"] if findings["suspect_labels"] is None else []
    return ", ".join(counts + unchecked) or "nothing found"


def count_in_words(findings: Mapping, kind: str) -> str:
    """Return how much was found of a kind, and how it was searched where that was not the usual way."""
    sample = findings.get("checked_by") if kind == "suspect_labels" else None
    by = f" (by probes that have learned from about {plural(sample, 'image')} each)" if sample else ""
    return f"{KIND_NAMES[kind]}: {len(findings[kind]):,}{by}"


def list_findings(findings: Mapping) -> str:
    """Return everything that was found, for the terminal: a line for each image or set of images."""
    classes = sorted(findings["classes"].items(), key=lambda item: -item[1])
    (largest, most), (smallest, fewest) = classes[0], classes[-1]
    sizes = f"from {fewest:,} ({escape_terminal(smallest)}) to {most:,} ({escape_terminal(largest)}) each"
    lines = [f"{plural(findings['images'], 'image')} of {plural(len(classes), 'class', 'classes')}, {sizes}"]
    lines += [f"\ngroups: {grouping_in_words(findings['grouping'])}"] if findings["grouping"] else []
    lines += [f"\ngroups: {inflation_in_words(findings['inflation'])}"] if findings.get("inflation") else []
    for kind in KINDS:
        if findings[kind] is None:
            lines.append("\nlabels: not checked")
        if not findings[kind]:
            continue
        lines.append(f"\n{count_in_words(findings, kind)}")
        lines += [f"  {finding_in_words(finding)}" for finding in findings[kind][:MAX_LISTED]]
        if len(findings[kind]) > MAX_LISTED:
            lines.append(f"  ... and {len(findings[kind]) - MAX_LISTED:,} more")
    if not findings["grouping"] and not any(findings[kind] or findings[kind] is None for kind in KINDS):
        lines.append("\nnothing found")
    return "\n".join(lines)


def finding_in_words(finding: dict | list[dict]) -> str:
    """Return a finding in a line: an image and what is wrong with it, or the images that belong together."""
    if isinstance(finding, dict):
        return escape_terminal(f"{finding['name']} ({finding['label']}): {finding['why']}")
    more = f" and {len(finding) - 4} more" if len(finding) > 4 else ""
    images = " = ".join(f"{image['name']} ({image['label']}, {image['split']})" for image in finding[:4])
    return escape_terminal(images + more)
