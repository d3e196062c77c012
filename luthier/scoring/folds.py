"""Cross-validation: images are scored once, each by a model that has seen neither it nor its duplicates."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets

from luthier.cache import list_of
from luthier.errors import UserError
from luthier.output_dir import NO_TIME
from luthier.scoring.audit import audit_images
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.experiment import Experiment, Result
from luthier.scoring.familiarity import Answers, pool_familiarity
from luthier.scoring.metrics import TestPredictions, choose_threshold, confidence_and_correct, fit_temperature
from luthier.training.features import join
from luthier.training.layers import divide_logits

# Splits of images that no fold tests: validation that the data brings; classes of one image, or of one group, and
# images that are in a group with some of that validation.
UNTESTED = {"validation": "validation", "train": "untested"}


def pool_folds(folds: Iterable[tuple[Experiment, Result]]) -> tuple[Experiment, Result]:
    """Return the folds of a run as one experiment whose test split is all images, and its result.

    What has no folds, but one part, is returned as it is. Images that are in no fold's test split stay splits of
    their own, see `UNTESTED`.

    The shipped model is of the kind that most folds kept, and of the lowest validation loss among equals. Its
    temperature and its threshold are fitted on the predictions of all folds, and written into it.

    Args:
        folds: what each fold has prepared and found; each is trained when it is asked for.

    Raises:
        UserError: the images are not the same in all folds.
    """
    parts = _of_same_images(folds)
    if len(parts) == 1:
        return parts[0]
    results = [result for _, result in parts]
    votes = Counter(result.kept.arm for result in results)

    def rank(name: str) -> tuple[int, float]:
        return votes[name], -mean(result.kept.loss for result in results if result.kept.arm == name)

    arm = max(votes, key=rank)
    experiment, leader = min((part for part in parts if part[1].kept.arm == arm), key=lambda part: part[1].kept.loss)
    own = [result.answers for result in results]
    logits = np.concatenate([each.answers.logits * each.kept.temperature for each in results])  # before calibration
    references = np.concatenate([each.references for each in own])
    shares, calibrates = leader.kept.class_shares, leader.course.judge.calibrates
    temperature = fit_temperature(logits, references, shares) if calibrates else 1.0
    calibrated = logits / temperature
    confidence, correct = confidence_and_correct(calibrated, references)
    known = references != leader.none
    correct &= known
    threshold = choose_threshold(confidence, correct)
    kept = leader.kept._replace(temperature=temperature, threshold=threshold)
    sureness, familiarity = pool_familiarity(own, leader.answers.familiarity, calibrated, known, correct)

    splits, prepared, untested = _pool_splits([each for each, _ in parts], experiment)
    outcome = leader.outcome
    if any(result.outcome.ended == NO_TIME for result in results):  # with more time, the run has something left to do
        outcome = outcome._replace(ended=NO_TIME)
    findings = audit_images(splits, [])
    findings["unreadable"] = experiment.findings["unreadable"]
    findings["learned_from"] = sum(each.findings["learned_in_test"] for each, _ in parts)
    if "validation" in experiment.own_splits:  # the same in all folds; another one is of images that others test
        findings["learned_from"] += experiment.findings["learned_from"] - experiment.findings["learned_in_test"]
    findings |= leader.probe.findings
    findings["suspect_labels"] = _in_pool(leader.probe.suspect_labels, experiment.splits, splits)
    probe = _pool_probes(leader, [each.probe for each in results], splits, untested)
    divide_logits(leader.model, temperature / leader.kept.temperature)
    leader.model.config.unsure_below = threshold
    answers = Answers(calibrated, references, sureness, familiarity)
    result = leader._replace(probe=probe, outcome=outcome, kept=kept, answers=answers)
    return experiment._replace(splits=splits, prepared=prepared, findings=findings), result


def _of_same_images(folds: Iterable[tuple[Experiment, Result]]) -> list[tuple[Experiment, Result]]:
    """Train the folds of `pool_folds` one after the other; return them, without the weights that trainings began from.

    Raises:
        UserError: the images are not the same in all folds.
    """
    parts: list[tuple[Experiment, Result]] = []
    for experiment, result in folds:
        if parts and _images_of(experiment) != _images_of(parts[0][0]):
            raise UserError(
                "the images, or their labels, have changed since the first fold was trained: each would not be scored "
                "once. Put them back and repeat the command with --output_dir and --resume_from_checkpoint auto, or "
                "begin again in another --output_dir"
            )
        # Without the weights that trainings began from, which would fill the memory of the next fold. By the same
        # name, or the loop would hold them.
        winner = result.outcome.winner
        outcome = result.outcome._replace(winner=winner and winner._replace(arm=winner.arm._replace(start=None)))
        result = result._replace(probe=result.probe._replace(starts={}), outcome=outcome)
        parts.append((experiment, result))
    return parts


def _images_of(experiment: Experiment) -> tuple[ClassLabel, Counter]:
    """Return the classes of an experiment, and how often each image has which class in all splits together."""
    splits = experiment.splits.values()
    images = Counter(pair for rows in splits for pair in _pairs_of(rows))
    return next(iter(splits)).features["label"], images


def _pairs_of(rows: Dataset) -> Iterator[tuple[str, int]]:
    """Return the digest and the class of each image."""
    return zip(list_of(rows, "digest"), list_of(rows, "label"), strict=True)


def _pool_splits(
    experiments: Sequence[Experiment], leader: Experiment
) -> tuple[DatasetDict, DatasetDict, dict[str, list[int]]]:
    """Return all images as a split "test", loaded and prepared, and those that no fold tests as in `UNTESTED`.

    The last value has the rows of the latter in each split of the fold whose model is shipped. An image of the data's
    own validation split of which there is a copy in a test split is one of them: it has chosen, and was not tested.
    """
    splits, prepared = (
        DatasetDict(test=concatenate_datasets([dataset["test"] for dataset in datasets]))
        for datasets in ([each.splits for each in experiments], [each.prepared for each in experiments])
    )
    left, untested = _images_of(leader)[1] - Counter(_pairs_of(splits["test"])), {}
    for split, name in UNTESTED.items():
        rows = []
        for row, pair in enumerate(_pairs_of(leader.splits[split])):
            if left[pair] > 0:
                left[pair] -= 1
                rows.append(row)
        if rows:
            untested[split] = rows
            splits[name], prepared[name] = (
                datasets[split].select(rows) for datasets in (leader.splits, leader.prepared)
            )
    return splits, prepared, untested


def _pool_probes(
    result: Result, probes: Sequence[ProbeResults], splits: DatasetDict, untested: Mapping[str, list[int]]
) -> ProbeResults:
    """Return the shipped model's probe, with the features of all images, and the score of all folds' probes."""
    leader = result.probe
    if leader.logits is None or leader.scores is None:
        return leader
    logits = np.concatenate([probe.logits for probe in probes if probe.logits is not None])
    references = np.array(list_of(splits["test"], "label"))
    scored = TestPredictions(splits, logits, references, result.kept.class_shares, none=result.none).score()
    features = {"test": join([probe.features["test"] for probe in probes])}
    features |= {UNTESTED[split]: leader.features[split][rows] for split, rows in untested.items()}
    return leader._replace(scores=leader.scores | {"test": scored}, features=features)


def _in_pool(suspects: list[dict] | None, own: DatasetDict, splits: DatasetDict) -> list[dict] | None:
    """Return the images of a finding with their places in the pool, instead of those in a fold's own splits."""
    if suspects is None:
        return None
    # Names may occur twice, and one image with two labels.
    before, after = ({split: list(_pairs_of(rows)) for split, rows in datasets.items()} for datasets in (own, splits))
    places = {image: (split, row) for split, images in after.items() for row, image in enumerate(images)}
    found = [(image, places[before[image["split"]][image["row"]]]) for image in suspects]
    return [image | {"split": split, "row": row} for image, (split, row) in found]
