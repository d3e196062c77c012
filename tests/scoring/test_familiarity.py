"""Familiarity: an image far from all training images, or of which the model is unsure, is not answered."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn

import luthier.scoring.familiarity as module
from luthier.familiarity import Familiarity, log_odds, similarity
from luthier.scoring.familiarity import Answers, choose_bank, pool_familiarity
from luthier.scoring.metrics import choose_threshold

CLASSES, D = 3, 16


def draw_features(n, seed, spread=0.3):
    """Return features around a direction for each class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return 5 * nn.functional.one_hot(labels, D) + 5 * spread * torch.randn(n, D, generator=generator), labels


def test_similarity_is_that_of_the_third_nearest():
    references = torch.eye(4)[:, :4].half()
    features = torch.tensor([[2.0, 1.0, 0.5, 0.0]])
    assert similarity(references, features).item() == pytest.approx(0.5 / features.norm().item(), abs=1e-3)
    assert similarity(references[:2], features).item() == pytest.approx(1 / features.norm().item(), abs=1e-3)


def test_odds_of_a_certain_answer_are_finite():
    odds = log_odds(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert torch.isfinite(odds).all() and odds[1].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("figure", ["far away", "between two classes"])
def test_unknown_images_have_a_lower_familiarity(figure):
    train, _ = draw_features(90, 0)
    known, labels = draw_features(60, 1)
    weight = torch.eye(D)[:CLASSES]
    familiarity = Familiarity(nn.functional.normalize(train).half(), "head", (2.0, 1.0), (0.8, 0.1), 0.0)
    unknown, _ = draw_features(60, 2)
    unknown = unknown.roll(CLASSES, dims=1) if figure == "far away" else (unknown + unknown.roll(1, dims=0)) / 2

    def rate(features):
        return familiarity.rate((features @ weight.T).softmax(dim=1), features)

    assert rate(known).median() > rate(unknown).quantile(0.9)
    assert (known @ weight.T).argmax(dim=1).eq(labels).all(), "nothing else tells them apart"


def test_references_are_the_same_number_of_each_class_and_change_little(monkeypatch):
    monkeypatch.setattr("luthier.scoring.familiarity.BANK", 60)
    labels, digests = [0] * 500 + [1] * 50 + [2] * 4, [f"{row:064x}" for row in range(554)]
    rows = choose_bank(labels, digests)
    assert np.bincount(np.array(labels)[rows]).tolist() == [20, 20, 4] and len({*rows}) == 44
    more = choose_bank([*labels, 0], [*digests, "f" * 64])
    assert len({*rows} - {*more}) <= 1
    many = choose_bank(list(range(100)) * 9, [f"{row:064x}" for row in range(900)])
    assert np.bincount(np.arange(900)[many] % 100).tolist() == [5] * 100


@pytest.mark.parametrize("none", [None, 0, 3])
def test_references_are_the_first_of_each_class_in_a_random_order(none, monkeypatch):
    monkeypatch.setattr(module, "BANK", 18)
    labels, digests = (np.arange(200) ** 2 % 7).tolist(), [f"{row:064x}" for row in range(200)]
    order, truth = module.draw_order(digests, seed=1), np.array(labels)
    each = [order[truth[order] == label][: max(5, 18 // (truth.max() + 1))] for label in set(labels) - {none}]
    assert choose_bank(labels, digests, none).tolist() == sorted(np.concatenate(each))


def test_copies_of_an_image_take_no_place_of_others(monkeypatch):
    monkeypatch.setattr("luthier.scoring.familiarity.BANK", 5)
    digests = [f"{row // 5:064x}" for row in range(100)]  # 20 images, five copies of each
    rows = choose_bank([0] * 100, digests)
    assert len({digests[row] for row in rows}) == len(rows) == 5
    assert len(choose_bank([0] * 4, ["a" * 64] * 4)) == 4


def test_pooled_sureness_is_that_of_the_model_that_is_shipped():
    """Each fold has its own temperature; the shipped model has another one."""
    weight, own, pooled = torch.eye(D)[:CLASSES], [], []
    for fold, temperature in enumerate((0.5, 3.0)):
        features, labels = draw_features(30, 10 + fold, spread=1.0)
        references = nn.functional.normalize(draw_features(60, 20 + fold)[0]).half()
        familiarity = Familiarity(references, "head", (1.0 + fold, 2.0), (0.7, 0.1 + fold), 0.0)
        logits = features @ weight.T / temperature
        sureness = familiarity.rate(logits.softmax(dim=1), features).numpy()
        own.append(Answers(logits.numpy(), labels.numpy(), sureness, familiarity))
        pooled.append((features, features @ weight.T / 2.0))
    logits = torch.cat([logits for _, logits in pooled])
    correct = np.concatenate([answers.logits.argmax(axis=1) == answers.references for answers in own])
    known = np.ones(len(correct), dtype=bool)
    sureness, shipped = pool_familiarity(own, own[1].familiarity, logits.numpy(), known, correct)
    assert np.allclose(sureness[30:], shipped.rate(pooled[1][1].softmax(dim=1), pooled[1][0]).numpy(), atol=1e-4)
    assert shipped.unsure_below == choose_threshold(sureness, correct)
    one_less = [own[0]._replace(sureness=None, familiarity=None), own[1]]
    assert pool_familiarity(one_less, own[1].familiarity, logits.numpy(), known, correct) == (None, None)


def test_scale_of_folds_is_that_of_images_of_the_classes():
    features, labels = draw_features(60, 0, spread=1.0)
    familiarity = Familiarity(nn.functional.normalize(features).half(), "head", (1.0, 2.0), (0.7, 0.1), 0.0)
    known, scales = labels.numpy() != 2, []
    for factor in (1.0, 9.0):  # images of none of the classes may be as certain as they like
        logits = features @ torch.eye(D)[:CLASSES].T
        logits[labels == 2] *= factor
        sureness = familiarity.rate(logits.softmax(dim=1), features).numpy()
        own = [Answers(logits.numpy(), labels.numpy(), sureness, familiarity)]
        correct = (logits.numpy().argmax(axis=1) == labels.numpy()) & known
        scales.append(pool_familiarity(own, familiarity, logits.numpy(), known, correct)[1].log_odds)
    assert scales[0] == pytest.approx(scales[1])


def test_scale_is_that_of_images_of_the_classes(monkeypatch):
    monkeypatch.setattr(module, "linear_head", lambda model: "head")
    trainer = SimpleNamespace(model=nn.ModuleDict({"head": nn.Linear(4, 3)}), is_world_process_zero=lambda: True)
    labels = np.arange(30) % 3
    rows = Dataset.from_dict({"label": labels, "digest": [f"{row:064x}" for row in range(30)]})
    splits = DatasetDict(train=rows, validation=rows)
    known = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    other = known.clone()
    other[torch.from_numpy(labels) == 2] *= -9  # images of none of the classes, which may look like anything
    one, same = (
        module.learn_familiarity(trainer, {}, splits, {"train": known, "validation": validation}, none=2)
        for validation in (known, other)
    )
    assert (one.log_odds, one.similarity, one.unsure_below) == (same.log_odds, same.similarity, same.unsure_below)


def test_bank_scale_and_threshold_are_worked_out_from_the_features(monkeypatch):
    monkeypatch.setattr(module, "linear_head", lambda model: "head")
    head = nn.Linear(4, 3)
    trainer = SimpleNamespace(model=nn.ModuleDict({"head": head}), is_world_process_zero=lambda: True)
    labels, digests = np.arange(300) % 3, [f"{row:064x}" for row in range(300)]
    rows = Dataset.from_dict({"label": labels, "digest": digests})
    generator = torch.Generator().manual_seed(0)
    known = {split: 3 * torch.randn(300, 4, generator=generator) for split in ("train", "validation")}
    found = module.learn_familiarity(trainer, {}, DatasetDict(train=rows, validation=rows), known, none=2)
    bank = nn.functional.normalize(known["train"][choose_bank(labels.tolist(), digests, 2)]).half()
    assert torch.equal(found.bank, bank) and found.head == "head"
    shown = known["validation"][torch.from_numpy(labels != 2)]
    with torch.no_grad():
        probabilities = head(shown).softmax(dim=1)
    scales = (found.log_odds, log_odds(probabilities)), (found.similarity, similarity(bank, shown))
    for (mean, spread), values in scales:
        assert mean == pytest.approx(float(values.mean()), abs=1e-4)
        assert spread == pytest.approx(float(values.std(correction=0)), abs=1e-4)
    correct = probabilities.argmax(dim=1).numpy() == labels[labels != 2]
    threshold = choose_threshold(found.rate(probabilities, shown).numpy(), correct)
    assert found.unsure_below == pytest.approx(threshold, abs=1e-4)


def test_validation_images_that_are_alike_still_give_a_scale(monkeypatch):
    monkeypatch.setattr(module, "linear_head", lambda model: "head")
    trainer = SimpleNamespace(model=nn.ModuleDict({"head": nn.Linear(4, 3)}), is_world_process_zero=lambda: True)
    rows = Dataset.from_dict({"label": [0, 1, 2] * 3, "digest": [f"{row:064x}" for row in range(9)]})
    known = {"train": torch.randn(9, 4), "validation": torch.ones(9, 4)}
    found = module.learn_familiarity(trainer, {}, DatasetDict(train=rows, validation=rows), known, none=None)
    assert found.log_odds[1] == found.similarity[1] == 1e-3 and np.isfinite(found.unsure_below)


def test_refit_model_has_a_bank_of_its_own_and_the_scale_of_the_scored_one(monkeypatch):
    monkeypatch.setattr(module, "linear_head", lambda model: "head")
    trainer = SimpleNamespace(model=nn.ModuleDict({"head": nn.Linear(4, 3)}), is_world_process_zero=lambda: True)
    labels, digests = (np.arange(30) % 3).tolist(), [f"{row:064x}" for row in range(30)]
    rows = Dataset.from_dict({"label": labels, "digest": digests})
    splits = DatasetDict(train=rows.select(range(18)), validation=rows.select(range(18, 30)))
    features = 5 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    known = {"validation": features[18:], "train": features[:18]}
    scored = Familiarity(torch.zeros(1, 4).half(), "head", (1.0, 2.0), (0.3, 0.4), 0.5)
    used = ("train", "validation")
    found = module.refit_familiarity(trainer, scored, used, {}, splits, known, none=2)
    assert torch.equal(found.bank, nn.functional.normalize(features[choose_bank(labels, digests, 2)]).half())
    assert found[1:] == scored[1:]
    assert module.refit_familiarity(trainer, None, used, {}, splits, known) is None


def test_answers_in_parts_are_those_to_all_images_at_once(monkeypatch):
    features, labels = draw_features(10, 0)
    head = nn.Linear(D, CLASSES)
    rows = Dataset.from_dict({"row": list(range(10)), "label": labels.tolist()})
    trainer = SimpleNamespace(model=nn.ModuleDict({"head": head}), args=SimpleNamespace(device=torch.device("cpu")))
    replaced = {
        "linear_head": lambda model: "head",
        "build_backbone": lambda *_: "backbone",
        "rows_at_once": lambda device: 4,
        "run_backbone": lambda trainer, backbone, part: features[part["row"][:]],
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)
    familiarity = Familiarity(nn.functional.normalize(features).half(), "head", (1.0, 2.0), (0.5, 0.1), 0.0)
    found = module.answer(trainer, rows, DatasetDict(test=rows), familiarity)
    with torch.no_grad():
        logits = head(features)
    assert np.allclose(found.logits, logits.numpy(), atol=1e-5) and found.references.tolist() == labels.tolist()
    assert np.allclose(found.sureness, familiarity.rate(logits.softmax(dim=1), features).numpy(), atol=1e-3)
    for name in ("build_backbone", "run_backbone"):
        monkeypatch.delattr(module, name)
    known = module.answer(trainer, rows, DatasetDict(test=rows), familiarity, {"test": features})
    assert np.array_equal(known.logits, found.logits) and np.array_equal(known.sureness, found.sureness)


def test_features_that_are_not_known_yet_are_those_of_the_same_images(monkeypatch):
    """As of fine-tuned weights; those of the probe are known."""
    labels, digests = (np.arange(90) % 3).tolist(), [f"{row:064x}" for row in range(90)]
    rows = Dataset.from_dict({"label": labels, "digest": digests, "row": list(range(90))})
    splits = DatasetDict(train=rows.select(range(50)), validation=rows.select(range(50, 90)))
    features = 3 * torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    known = {"train": features[:50], "validation": features[50:]}
    images = {split: SimpleNamespace(rows=part) for split, part in splits.items()}
    trainer = SimpleNamespace(model=nn.ModuleDict({"head": nn.Linear(4, 3)}), is_world_process_zero=lambda: True)
    replaced = {
        "BANK": 24,
        "linear_head": lambda model: "head",
        "build_backbone": lambda model, *_: model,
        "run_backbone": lambda trainer, backbone, part: features[part["row"][:]] * (backbone is trainer.model),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)
    expected, found = (module.learn_familiarity(trainer, images, splits, each, none=2) for each in (known, None))
    assert torch.equal(found.bank, expected.bank) and found[1:] == expected[1:] and len(found.bank) == 16
    used = ("validation", "train")
    refit, again = (module.refit_familiarity(trainer, found, used, images, splits, each, 2) for each in (known, None))
    assert torch.equal(again.bank, refit.bank) and not torch.equal(again.bank, found.bank)
