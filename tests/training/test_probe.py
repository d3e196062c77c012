"""The linear probe: the right optimum, the same logits in the network, and features computed once and cached."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import draw, draw_folder, load
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression
from timm.layers import Conv2dSame
from torch.utils.data import default_collate
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from data import feature_rows, prepare
from luthier.cache import cache_key
from luthier.errors import UserError
from luthier.fusion import _with_even_padding
from luthier.images.views import EvaluationView, ImageRows
from luthier.training import probe as probe_module
from luthier.training.balance import Balance
from luthier.training.features import Pool, _parts_of_key, build_backbone, device_of_fits, feature_size, load_features
from luthier.training.probe import (
    SAMPLED,
    SOFT,
    STRENGTHS,
    LinearProbe,
    cross_fit,
    fit_path,
    fit_probes,
    fit_shared_probes,
    minimise,
    state_with_probe,
)
from models import build_model, linear_head

NAMES = {0: "blue", 1: "green", 2: "red"}


def clusters(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters of three classes in eight dimensions, of different scales."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    points = np.eye(3, 8)[labels] * 2 + generator.normal(0, 1, (n, 8))
    return torch.tensor(points * np.logspace(-0.5, 0.5, 8) + 5, dtype=torch.float32), torch.tensor(labels)


def pool_in(features: torch.Tensor, labels: torch.Tensor, classes: int) -> Pool:
    return Pool(features, labels.numpy(), np.arange(len(labels)), list("abcd"[:classes]))


def test_optimum_equals_that_of_scikit_learn():
    features, labels = clusters(300, 0)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    weight, bias = torch.zeros(1, 3, 8, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    for strength in (1.0, 0.03):  # the second fit starts from the first
        minimise(features, labels, weight, bias, strength, torch.full((300, 1), 1 / 300), torch.ones(1, 8))
        reference = LogisticRegression(C=1 / (len(labels) * strength), tol=1e-8, max_iter=1000).fit(features, labels)
        probabilities = torch.softmax(features @ weight[0].T + bias[0], dim=1).detach().numpy()
        np.testing.assert_allclose(probabilities, reference.predict_proba(features.numpy()), atol=2e-3)


def test_strength_is_chosen_on_validation_and_the_scale_is_folded_in():
    features, labels = clusters(60, 1)
    validation, validation_labels = clusters(300, 2)
    probe, _ = fit_probes(features, labels, validation, validation_labels)
    logits = probe.logits(validation)
    assert probe.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, validation_labels).item())
    assert (logits.argmax(dim=1) == validation_labels).float().mean() > 0.8
    assert STRENGTHS[0] > probe.strength > STRENGTHS[-1]


def test_constant_feature_does_no_harm():
    features, labels = clusters(60, 1)
    features[:, 3] = 7.0
    without = features[:, [0, 1, 2, 4, 5, 6, 7]]
    logits = fit_probes(features, labels, features, labels)[0].logits(features)
    expected = fit_probes(without, labels, without, labels)[0].logits(without)
    torch.testing.assert_close(logits.softmax(dim=1), expected.softmax(dim=1), atol=2e-3, rtol=0)


def test_probe_of_many_images_begins_with_that_of_a_sample(monkeypatch):
    features, labels = clusters(4000, 1)
    features[:, 3], features[:, 5] = 7.0, (torch.arange(4000) == 17).float()  # constant in all images, in the sample
    validation, validation_labels = clusters(900, 2)
    validation[:, 3], validation[:, 5] = 7.0, 0.0
    balance, fitted = Balance(np.array([0.5, 0.3, 0.2]), weighted=True), []
    whole, soft = fit_probes(features, labels, validation, validation_labels, balance)

    def record(features, labels, weight, bias, strength, counts, scale):
        fitted.append((len(features), strength))
        minimise(features, labels, weight, bias, strength, counts, scale)

    monkeypatch.setattr(probe_module, "minimise", record)
    monkeypatch.setattr(probe_module, "MANY", 4000)
    probe, of_sample = fit_probes(features, labels, validation, validation_labels, balance)
    tried = [strength for images, strength in fitted if images == 4000]
    assert {images for images, _ in fitted} == {500, 4000} and SOFT not in tried and len(tried) < len(fitted) / 2
    assert (probe.strength, of_sample.strength) == (whole.strength, SOFT)
    for one, other, tolerance in ((probe, whole, 0.01), (of_sample, soft, 0.1)):
        chances = (each.logits(validation).softmax(dim=1) for each in (one, other))
        torch.testing.assert_close(*chances, atol=tolerance, rtol=0)


def test_features_that_do_not_fit_on_a_gpu_stay_in_main_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    places = [device_of_fits(torch.empty(n, 10), torch.device("cuda")).type for n in (10, 11)]
    assert places == ["cuda", "cpu"]


def test_sample_of_many_images_has_every_class(monkeypatch):
    features, labels = clusters(400, 1)
    labels[np.random.default_rng(0).permutation(400)[-1]] = 3  # the last image that a sample would have
    seen = []
    monkeypatch.setattr(probe_module, "MANY", 400)
    monkeypatch.setattr(probe_module, "minimise", lambda features, labels, *_: seen.append(labels))
    fit_probes(features, labels, features, labels)
    assert len(seen[0]) == 400 // SAMPLED + 1 and set(seen[0].tolist()) == {0, 1, 2, 3}


def test_fit_of_many_images_ends_a_little_before_the_best_one(monkeypatch):
    features, labels = clusters(400, 1)

    def objective() -> float:
        (probe,) = fit_path(features, labels, 3, (0.001,))
        loss = torch.nn.functional.cross_entropy(probe.logits(features), labels)
        scale = features.std(dim=0)
        return float(loss + 0.001 / 2 * (probe.weight * scale.maximum(scale.median())).square().sum())

    few = objective()
    monkeypatch.setattr(probe_module, "MANY", 400)
    assert few < objective() < few + 1e-3


def test_fit_of_easy_images_does_not_end_where_that_of_another_penalty_did():
    generator, labels = np.random.default_rng(0), np.arange(240) % 3
    points = generator.normal(0, 1, (3, 256))[labels] + generator.normal(0, 1, (240, 256))
    features, truth = torch.tensor(points, dtype=torch.float32), torch.from_numpy(labels)
    *_, before, last = fit_path(features, truth, 3, (SOFT, *STRENGTHS))
    (alone,) = fit_path(features, truth, 3, STRENGTHS[-1:])
    assert last.weight.norm() > 1.03 * before.weight.norm()
    assert float(last.weight.norm()) == pytest.approx(float(alone.weight.norm()), rel=0.05)


@pytest.mark.parametrize("strength", [0.3, 0.01])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_probes_of_all_folds_are_those_of_each_fold(monkeypatch, at_once, strength):
    features, labels = clusters(200, 3)
    folds = np.random.default_rng(0).choice([0, 2, 3, 7, 9], 200, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    monkeypatch.setattr(probe_module, "MAX_WEIGHTS", at_once * 3 * 8)
    logits, seen = torch.zeros(200, 3), np.zeros(200, int)
    for part in cross_fit(pool_in(features, labels, 3), folds, strength):
        logits[part.rows] = part.logits
        seen[part.rows] += 1
        assert part.sample is None and part.learned.all()
    assert (seen == 1).all()
    for fold in np.unique(folds):
        others, own = torch.from_numpy(folds != fold), torch.from_numpy(folds == fold)
        (probe,) = fit_path(features[others], labels[others], 3, (strength,))
        expected = probe.logits(features[own]).softmax(dim=1)
        torch.testing.assert_close(logits[own].softmax(dim=1), expected, atol=3e-3, rtol=0)


def test_feature_that_is_constant_in_a_part_tells_its_probe_nothing():
    """As one that fires on few images, none of which may be in the part."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    dense = torch.relu(torch.randn(4, 40, generator=generator)[labels] + torch.randn(200, 40, generator=generator))
    rare = torch.relu(torch.randn(200, 20, generator=generator)) * (torch.rand(200, 20, generator=generator) < 0.01)
    features, folds = torch.cat([dense, rare], dim=1), np.arange(200) // 4 % 5
    for part in cross_fit(pool_in(features, labels, 4), folds, 0.03):
        others = torch.from_numpy(np.flatnonzero(folds != folds[part.rows[0]]))
        (probe,) = fit_path(features, labels, 4, (0.03,), rows=others)
        alone = probe.logits(features[part.rows]).softmax(dim=1)
        torch.testing.assert_close(part.logits.softmax(dim=1), alone, atol=1e-2, rtol=0)
        assert (features[others].std(dim=0) == 0).any()


def test_probes_of_folds_learn_from_a_sample_of_many_images(monkeypatch):
    features, labels = clusters(240, 3)
    folds = np.arange(240) % 4
    monkeypatch.setattr(probe_module, "MAX_LEARNED", 60)
    parts = list(cross_fit(pool_in(features, labels, 3), folds, 0.01))
    samples = {int(part.rows[0]) % 4: part.sample for part in parts}
    assert (
        sum(samples.values()) == 3 * 80
        and 50 < min(samples.values()) < 70
        and sum(len(part.rows) for part in parts) == 240
    )
    right = [(part.logits.argmax(dim=1) == labels[part.rows]).float().mean() for part in parts]
    assert np.mean(right) > 0.7


def test_fold_without_others_to_learn_from_has_no_opinion():
    features, labels = clusters(7, 3)
    for folds in (np.zeros(7, int), np.array([0, 0, 0, 0, 0, 0, 1])):
        parts = {len(part.rows): part for part in cross_fit(pool_in(features, labels, 3), folds, 0.01)}
        largest = parts[max(parts)]  # the others are one image, or none
        assert torch.equal(largest.logits, torch.zeros_like(largest.logits)) and largest.learned.sum() <= 1
    assert parts[1].logits.abs().sum() > 0 and parts[1].logits.isfinite().all()


def build_trainer(model: PreTrainedModel, folder: Path) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", remove_unused_columns=False, use_cpu=True)
    return Trainer(model=model, args=arguments, data_collator=default_collate)


def build_probe(
    trainer: Trainer, head: str, splits: DatasetDict, view: EvaluationView
) -> tuple[LinearProbe, dict[str, torch.Tensor]]:
    """Fit the probe on train and validation as a run does; return the probe and the features."""
    rows = feature_rows(splits, view)
    features = {split: load_features(trainer, head, rows[split]) for split in ("train", "validation")}
    labels = {split: splits[split]["label"][:] for split in features}
    probe, _ = fit_shared_probes(trainer.args.device, features, labels)
    return probe, features


@pytest.fixture(params=["timm_checkpoint", "vit_checkpoint", "resnet_checkpoint"])
def probe_setup(request, images, tmp_path):
    model, image_processor = build_model(str(request.getfixturevalue(request.param)), NAMES)
    view, trainer = EvaluationView(image_processor), build_trainer(model, tmp_path)
    return trainer, prepare(load(data_dir=str(images)), view), view


def test_network_with_the_probe_as_head_has_the_logits_of_the_probe(probe_setup):
    trainer, splits, view = probe_setup
    model = trainer.model
    head = linear_head(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe, features = build_probe(trainer, head, splits, view)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # unchanged
    model.load_state_dict(state_with_probe(model, head, probe))
    pixel_values = torch.stack([view.unpack(row["view"]) for row in splits["validation"]])
    with torch.no_grad():
        logits = model.eval()(pixel_values).logits
    torch.testing.assert_close(logits, probe.logits(features["validation"]), atol=1e-4, rtol=1e-4)


def test_features_are_cached_for_images_weights_and_view(timm_checkpoint, tmp_path, monkeypatch):
    def count_passes(model_name: str, folder: str, image_size: int | None = None) -> tuple[int, torch.Tensor]:
        model, image_processor = build_model(model_name, NAMES, image_size)
        view, trainer = EvaluationView(image_processor), build_trainer(model, tmp_path)
        calls, predict = [], trainer.predict
        monkeypatch.setattr(trainer, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
        probe, _ = build_probe(trainer, linear_head(model), prepare(load(data_dir=folder), view), view)
        return len(calls), probe.weight

    # Images of this test alone: features of those of other tests may be known.
    folder, name = str(draw_folder(tmp_path / "p", 9, first=700)), str(timm_checkpoint)
    passes, weight = count_passes(name, folder)
    assert passes == 2
    repeated_passes, repeated_weight = count_passes(name, folder)  # the new head is another one
    assert repeated_passes == 0 and torch.equal(weight, repeated_weight)
    assert count_passes(name, folder, 64)[0] == 2
    model, image_processor = build_model(name, NAMES)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(tmp_path / "moved")
    image_processor.to_json_file(tmp_path / "moved/preprocessor_config.json")
    assert count_passes(str(tmp_path / "moved"), folder)[0] == 2
    draw("red", 999).save(next((tmp_path / "p/red").iterdir()))
    assert count_passes(name, folder)[0] >= 1


def test_config_of_a_model_is_a_part_of_the_key_of_its_features(timm_checkpoint):
    def key(**changes) -> str:
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", **changes)
        return cache_key(*_parts_of_key(ResNetForImageClassification(config), "classifier.1"))

    assert key() == key(id2label={0: "x", 1: "y", 2: "z"}) != key(hidden_act="gelu")
    parts = []
    for names in (NAMES, {0: "x", 1: "y", 2: "z", 3: "w"}):
        model, _ = build_model(str(timm_checkpoint), names)
        parts.append(_parts_of_key(model, linear_head(model))[0])
    assert parts[0] == parts[1]  # a class that is added changes no feature


def test_features_of_new_images_alone_are_computed(probe_setup, monkeypatch, capsys):
    trainer, splits, view = probe_setup
    head, images = linear_head(trainer.model), feature_rows(splits, view)["train"]
    images = images._replace(key=f"{images.key} of this test")
    computed, predict = [], trainer.predict
    monkeypatch.setattr(trainer, "predict", lambda rows, **rest: computed.append(len(rows)) or predict(rows, **rest))

    def first(n, rows):
        return rows._replace(rows=rows.rows.select(range(n)), digests=rows.digests[:n])

    some = load_features(trainer, head, first(5, images))
    everything = load_features(trainer, head, images)
    n = len(images.digests)
    assert computed == [5, n - 5] and f"reuse    features of 5 of {n} images" in capsys.readouterr().out
    backwards = images._replace(rows=images.rows.select(range(n)[::-1]), digests=images.digests[::-1])
    assert torch.equal(load_features(trainer, head, backwards), everything.flip(0)) and len(computed) == 2
    assert torch.equal(everything[:5], some)
    fresh = load_features(trainer, head, images._replace(key=f"{images.key}, again"))
    assert torch.allclose(fresh, everything, atol=1e-5) and computed[2:] == [n]


def test_features_of_copies_are_those_of_their_images(probe_setup):
    """The same image twice in both parts: what follows must not get the features of another image."""
    trainer, splits, view = probe_setup
    head, images = linear_head(trainer.model), feature_rows(splits, view)["train"]
    images = images._replace(key=f"{images.key} of copies")
    fresh = load_features(trainer, head, images._replace(key=f"{images.key}, one by one"))

    def load(rows):
        chosen = images._replace(rows=images.rows.select(rows), digests=[images.digests[row] for row in rows])
        return load_features(trainer, head, chosen)

    for rows in ([0, 0, 1], [0, 1, 0, 2, 2, 3, 4], [4, 3, 2, 1, 0, 0, 5, 5, 6], [6, 0, 5, 2]):
        assert torch.allclose(load(rows), fresh[rows], atol=1e-5), rows


def test_model_is_prepared_again_for_training_after_the_probe(probe_setup):
    """Otherwise Accelerate would train the model as it was prepared for evaluation."""
    trainer, splits, view = probe_setup
    model = trainer.model
    build_probe(trainer, linear_head(model), splits, view)
    assert not getattr(model, "_is_accelerate_prepared", False)
    assert trainer.model_wrapped is trainer.model is model and trainer.args.eval_do_concat_batches


class UsedTwice(torch.nn.Module):
    """A network whose convolution feeds a BatchNorm layer and a shortcut around it: nothing may be fused."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, pixel_values):
        feature_map = self.convolution(pixel_values)
        return SimpleNamespace(logits=self.head((feature_map + self.norm(feature_map)).mean(dim=(2, 3))))


@pytest.mark.parametrize("kind", ["timm_checkpoint", "resnet_checkpoint", "efficientnet_lite0", "used twice"])
def test_fused_backbone_has_the_same_outputs(kind, request):
    if kind == "used twice":
        model, head = UsedTwice(), "head"
    else:
        name = kind if kind == "efficientnet_lite0" else str(request.getfixturevalue(kind))
        model = build_model(name, NAMES)[0]
        head = linear_head(model)
    for layer in model.modules():  # as if trained
        if isinstance(layer, torch.nn.BatchNorm2d) and kind != "efficientnet_lite0":
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
    pixel_values = torch.randn(3, 3, 64, 64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = build_backbone(model, head, [{"pixel_values": torch.zeros(3, 64, 64)}])
    with torch.no_grad():
        logits = model.get_submodule(head)(backbone(pixel_values).logits)
        torch.testing.assert_close(logits, model.eval()(pixel_values).logits, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    assert norms == (1 if kind == "used twice" else 0)
    assert not any(isinstance(module, Conv2dSame) for module in backbone.modules())


@pytest.mark.parametrize("side", [31, 64])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 2), (2, 3)])
def test_convolution_with_tensorflow_padding_keeps_its_outputs(side, kernel, stride):
    convolution = Conv2dSame(4, 6, kernel, stride, groups=2)
    inputs = torch.randn(2, 4, side, side + 3)
    torch.testing.assert_close(_with_even_padding(convolution, inputs.shape[-2:])(inputs), convolution(inputs))


def test_damaged_cache_is_computed_again_and_weights_that_are_not_finite_are_reported(
    probe_setup, monkeypatch, tmp_path
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # other tests' stays whole
    trainer, splits, view = probe_setup
    head = linear_head(trainer.model)
    probe, _ = build_probe(trainer, head, splits, view)
    stored = list(Path(datasets.config.HF_DATASETS_CACHE, "luthier_features").rglob("*.safetensors"))
    assert stored
    for path in stored:
        path.write_bytes(path.read_bytes()[:-7])
    repeated, _ = build_probe(trainer, head, splits, view)
    assert torch.equal(probe.weight, repeated.weight)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite numbers"):
        build_probe(trainer, head, splits, view)


def test_features_of_another_precision_are_not_reused(timm_checkpoint, monkeypatch):
    model, _ = build_model(str(timm_checkpoint), NAMES)
    head, computed = linear_head(model), []

    def compute(trainer, backbone, rows):
        computed.append(trainer.accelerator.mixed_precision)
        return torch.ones(len(rows), feature_size(model, head))

    replaced = {"build_backbone": lambda *_: None, "compute_features": compute}
    for name, value in replaced.items():
        monkeypatch.setattr(f"luthier.training.features.{name}", value)
    digests = [f"{row:064x}" for row in range(2)]
    images = ImageRows(Dataset.from_dict({"row": [0, 1]}), "of the test of precisions", digests)
    exact, rounded, cpu = ("no", "cuda", False), ("no", "cuda", None), ("no", "cpu", None)
    for precision, device, tf32 in (cpu, ("bf16", "cpu", None), cpu, rounded, exact, cpu, rounded, exact):
        args = SimpleNamespace(device=torch.device(device), tf32=tf32)
        accelerator = SimpleNamespace(mixed_precision=precision)
        trainer = SimpleNamespace(model=model, accelerator=accelerator, args=args, is_world_process_zero=lambda: True)
        load_features(trainer, head, images)
    assert computed == ["no", "bf16", "no", "no"]


def test_feature_that_hardly_ever_responds_does_not_decide():
    features, labels = clusters(60, 1)
    validation, validation_labels = clusters(300, 2)
    rare, seen = torch.zeros(60, 1), torch.zeros(300, 1)
    rare[0], seen[1] = 1e-4, 1.0
    without, _ = fit_probes(features, labels, validation, validation_labels)
    probe, _ = fit_probes(torch.cat([features, rare], 1), labels, torch.cat([validation, seen], 1), validation_labels)
    assert probe.strength == without.strength and probe.loss == pytest.approx(without.loss, abs=0.01)
