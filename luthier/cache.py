"""Costly results, kept on disk in the cache directory of `datasets` under a key of all that they depend on."""

import hashlib
import importlib.metadata
import logging
import tempfile
from pathlib import Path

import datasets
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)


def cache_key(*parts: object) -> str:
    """Return 40 hex digits of SHA-256 over the parts: bytes and views of bytes as they are, anything else as text."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, (bytes, memoryview)) else str(part).encode()
        digest.update(f"{len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()[:40]


def library_versions(*packages: str) -> str:
    """Return the installed versions of packages, as a part of a key."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def read_cached(kind: str, key: str) -> torch.Tensor | None:
    """Return the tensor that was kept under a key; None where there is none, or the file is damaged."""
    try:
        return load_file(_path(kind, key))["tensor"]
    except (OSError, SafetensorError, KeyError):
        return None


def write_cached(kind: str, key: str, tensor: torch.Tensor) -> None:
    """Keep a tensor under a key, whole or not at all.

    Args:
        kind: what it is, such as `features`; it names the folder.
        key: of `cache_key`.
        tensor: of any shape; where there is no space or no right to write, it is computed again next time.
    """
    path = _path(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file({"tensor": tensor.contiguous()}, Path(folder, path.name))
            Path(folder, path.name).replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning(f"The {kind} are not cached for the next run: {error}")


def _path(kind: str, key: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, f"luthier_{kind}", f"{key}.safetensors")
