"""Networks with random weights, saved as trained ones are: they take as much time as those."""

from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

from models import build_model, save_model

NAMES = [f"class {number}" for number in range(10)]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Of timm: the side in pixels and the share of the image that the published weights are evaluated with.
TIMM = {"resnet18": (224, 0.95), "vit_small_patch16_224": (224, 0.9), "convnext_tiny": (224, 0.875)}


def save_network(name: str, folder: Path) -> Path:
    """Write a network into a folder, with weights that depend on nothing but its name; return the folder.

    Args:
        name: `efficientnet_lite0`, which has pretrained weights below its head, or one of `TIMM`.
        folder: to write to.
    """
    torch.manual_seed(0)
    id2label = dict(enumerate(NAMES))
    if name not in TIMM:
        model, image_processor = build_model(name, id2label)
    else:
        side, share = TIMM[name]
        cfg = {"input_size": [3, side, side], "interpolation": "bicubic", "crop_pct": share, **IMAGENET}
        labels = {"id2label": id2label, "label2id": {label: number for number, label in id2label.items()}}
        config = TimmWrapperConfig(architecture=name, pretrained_cfg=cfg, **labels)
        model = TimmWrapperForImageClassification(config)
        image_processor = TimmWrapperImageProcessor(config.pretrained_cfg, architecture=name)
    save_model(model, image_processor, folder)
    return folder
