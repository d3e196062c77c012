"""What several commands share: folders that must be there, and caches of a run's own."""

import argparse
from pathlib import Path


def directory(text: str) -> Path:
    """Return the path of a folder, as a type of `argparse`.

    Raises:
        ArgumentTypeError: there is none.
    """
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path


def own_caches(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose caches are below a folder, wherever the user has others."""
    return {"HF_HOME": str(folder), "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
