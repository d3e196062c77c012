"""Fixtures and helpers: drawn images and tiny models; no test uses the network or the user's caches."""

import json
import os
import shutil
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="luthier-tests-")  # before the libraries read it
os.environ.pop("HF_DATASETS_CACHE", None)  # these would lead out of it again
os.environ.pop("HF_MODULES_CACHE", None)
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("HUGGINGFACE_HUB_CACHE", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # one process of the tests runs on each core

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from data import load_splits
from luthier.images import shards, streams
from luthier.images.streams import Stream
from luthier.images.views import EvaluationView
from models import build_model

PROJECT = Path(__file__).parent.parent
TWO_PROCESSES = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1,
    "num_processes": 2, "mixed_precision": "no",
}  # fmt: skip

COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (210, 50, 40)}


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def draw(colour: str, seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Draw a noisy image of one colour; each seed gives another image."""
    noise = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
    return Image.fromarray((noise + COLOURS[colour]).clip(0, 255).astype(np.uint8))


def draw_folder(root: Path, per_class: int = 8, classes: tuple[str, ...] = tuple(COLOURS), first: int = 0) -> Path:
    """Draw images into one folder per class; `first` is the seed of the first image."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for seed in range(first, first + per_class):
            draw(name, 1000 * number + seed).save(root / name / f"{seed:03}.png")
    return root


def encoded(image: Image.Image, tmp_path: Path, suffix: str = "png", **options) -> bytes:
    """Save an image, and return the bytes of the file."""
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    return path.read_bytes()


def encode(name: str, seed: int) -> bytes:
    """Return a drawn image as a PNG file."""
    file = io.BytesIO()
    draw(name, seed).save(file, "PNG")
    return file.getvalue()


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def write_archive(path: Path, n: int, seed: int) -> None:
    """Write images in one archive, with the number of the class beside each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row in range(n):
            for extension, data in (
                ("png", encode(sorted(COLOURS)[row % 3], seed + row)),
                ("cls", str(row % 3).encode()),
            ):
                add_file(archive, f"{path.stem}{row:04}.{extension}", data)


@pytest.fixture
def small_blocks(tmp_path, monkeypatch):
    """A stream of blocks of four rows, and a sample of a few of them; a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "BLOCK", 4)
    monkeypatch.setattr(streams, "SAMPLE", 12)


def mixed(n: int, seed: int = 0) -> list[int]:
    """Return n labels of three classes in random order."""
    return np.random.default_rng(seed).permutation(np.arange(n) % 3).tolist()


def digest_of(data: bytes) -> torch.Tensor:
    """Return the SHA-256 of an image file as `pixel_values`, by which a test knows the image."""
    return torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.uint8)


def learned(stream: Stream) -> dict[str, int]:
    """Return the labels that training gets from a stream, by the digests of the images."""
    rows = stream.rows(digest_of)
    all_rows = [rows[row] for row in range(len(rows))]
    return {bytes(row["pixel_values"].tolist()).hex(): row["labels"] for row in all_rows}


def load(**options) -> DatasetDict:
    """Load the splits, a tenth for validation unless told otherwise, without the list of unreadable images."""
    return load_splits(**{"validation_fraction": 0.1} | options)[0]


def save_dataset(folder: Path, label_feature, values: dict[str, list], columns=("image", "label")) -> str:
    """Save drawn images as a Hub dataset in Parquet files; `values` holds the labels of each split."""
    (folder / "data").mkdir(parents=True)
    for split, labels in values.items():
        images = [draw("red", index) for index in range(len(labels))]
        features = Features({columns[0]: ImageFeature(), columns[1]: label_feature})
        dataset = Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def split_of(references, labels, groups) -> DatasetDict:
    """Return a test split of images in groups of near-duplicates."""
    columns = {"label": list(references), "group": list(groups)}
    return DatasetDict(test=Dataset.from_dict(columns).cast_column("label", ClassLabel(names=labels)))


def labels_of(splits: DatasetDict) -> list[str]:
    """Return the class names."""
    return splits["train"].features["label"].names


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether every tensor of one state dict equals that of the other bit for bit."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="session")
def view() -> EvaluationView:
    """The evaluation view of simple_cnn: 32 x 32 pixels."""
    return EvaluationView(build_model("simple_cnn", {0: "a", 1: "b"})[1])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of three class folders with eight images each."""
    return draw_folder(tmp_path / "images")


@pytest.fixture(autouse=True)
def random_seed() -> None:
    """Every test gets the same random numbers, whether it runs alone or with others."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def timm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny timm model with BatchNorm and 5 classes, in the layout of timm's repositories on the Hub."""
    folder = tmp_path_factory.mktemp("hub") / "test_resnet.tiny"
    cfg = {"input_size": [3, 32, 32], "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
    cfg |= {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 5,
        "architecture": "test_resnet",
    }
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="test_resnet", num_labels=5, pretrained_cfg=dict(cfg))
    )
    folder.mkdir()
    save_file(model.timm_model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": cfg})
    )
    return folder


@pytest.fixture(scope="session")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with the classes red, green and blue, as transformers saves it."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-vit"
    names = {0: "red", 1: "green", 2: "blue"}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def resnet_checkpoint(tmp_path_factory):
    """A tiny transformers ResNet with 5 classes, whose head is a Sequential."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-resnet"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875}
        )
    )
    return folder


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The working directory: an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with drawn images: 15 training images, which makes 4 steps per epoch of `flags`."""
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=8)
    return tmp_path


def flags(model: str, *more: str) -> list[str]:
    """Return the options of a short training on drawn images, with a checkpoint at each step."""
    fixed = ["--data_dir", "images", "--model_name", model, "--num_train_epochs", "2", "--disable_tqdm", "1"]
    steps = ["--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "1"]
    return [*fixed, *steps, "--save_total_limit", "99", *more]


def run(folder: Path, checkpoint: Path, *more: str, out: str = "out") -> dict:
    """Run train.py on the images of a folder, all quiet; return its metrics."""
    import train  # of which most tests need nothing

    args = ["--data_dir", str(folder / "images"), "--model_name", str(checkpoint), "--disable_tqdm", "1"]
    train.main([*args, "--num_train_epochs", "9", "--output_dir", str(folder / out), *more])
    return json.loads((folder / out / "metrics.json").read_text())


def load_result(folder: str) -> tuple[dict, dict]:
    """Return the weights of a run, and its scores."""
    metrics = json.loads(Path(folder, "metrics.json").read_text())
    return load_file(f"{folder}/model.safetensors"), {key: metrics[key] for key in ("validation", "test", "unsure")}


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs a command of the project in the folder `cwd`, as a user would."""

    def run(*arguments: str | Path, cwd: Path, launcher: tuple[str, ...] = ("python",)) -> subprocess.CompletedProcess:
        script, *rest = arguments
        program = [sys.executable] if launcher == ("python",) else [str(Path(sys.executable).parent / launcher[0])]
        command = [*program, *launcher[1:], str(PROJECT / script), *map(str, rest)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)

    return run
