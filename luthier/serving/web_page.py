"""A static page that classifies images in the browser: an exported model, and the files of `page/`."""

import base64
import hashlib
import json
import math
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import PIL

from luthier.errors import UserError
from luthier.files import atomic_copy
from luthier.serving import hub
from luthier.serving.onnx_network import OnnxNetwork

SOURCE = Path(__file__).parent / "page"
ASSETS = ("icon.svg", "index.html", "manifest.webmanifest", "page.js", "resize.js", "style.css")
WORKER = "sw.js"  # which the browser keeps by itself
CONFIG, MANIFEST, MODEL = "model.json", "manifest.webmanifest", "model.onnx"
PACKAGE = "onnxruntime-web@1.30.0"  # index.html allows the address of this version alone
NPM_SECONDS = 600
CDN = f"https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/"
HUB = "https://huggingface.co https://*.huggingface.co https://*.hf.co"  # a Space may send the model from there
VENDOR = "onnxruntime-web/"  # folder of the page with the runtime's files, where these do not come from the CDN
# Of the package's files: bytes, and what the browser checks before it runs them.
RUNTIME = {
    "script": (
        "ort.wasm.bundle.min.mjs",
        73054,
        "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    ),
    "wasm": (
        "ort-wasm-simd-threaded.wasm",
        14239897,
        "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    ),
}


def check_folder(folder: Path) -> None:
    """Check that a page may be written into a folder.

    Raises:
        UserError: it holds something that is no page, nor a part of one that was interrupted.
    """
    try:
        page = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        earlier = {"version", "resize", "runtime", "labels"} <= set(page)
    except (OSError, ValueError, TypeError):
        earlier = False
    first = folder / ASSETS[0]  # is written before the others
    begun = first.is_file() and first.read_bytes() == (SOURCE / ASSETS[0]).read_bytes()
    if folder.exists() and not (earlier or begun or (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"--web {folder} already holds something else, which is not overwritten: give another folder")


def write_page(model: Path, folder: Path, name: str, vendor: bool) -> None:
    """Write the page of a model into a folder, ready for any web server.

    Args:
        model: an exported file.
        folder: new, empty, or with an earlier page, whose files are replaced; others stay.
        name: of the model, for people.
        vendor: copy ONNX Runtime into the folder, from its npm package; otherwise browsers fetch it from a CDN.

    Raises:
        UserError: the folder holds something else, or the package cannot be had.
    """
    check_folder(folder)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch)
        for asset in (*ASSETS, WORKER):
            shutil.copyfile(SOURCE / asset, page / asset)
        shutil.copyfile(model, page / MODEL)
        if vendor:
            _fetch_runtime(page / VENDOR)
        manifest = json.loads((page / MANIFEST).read_text(encoding="utf-8"))
        _write_json(page / MANIFEST, {**manifest, "name": name, "short_name": name})
        config = _describe(model, page, name, VENDOR if vendor else CDN)
        for path in sorted(path for path in page.rglob("*") if path.is_file()):
            atomic_copy(path, folder / path.relative_to(page))
        _write_json(page / CONFIG, config)  # last: it says that the rest is whole
        atomic_copy(page / CONFIG, folder / CONFIG)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def push_page(model: Path, repo_id: str, name: str, vendor: bool, private: bool | None) -> str:
    """Publish the page of a model on the Hub as a static Space; return its address.

    Args:
        model, name, vendor: see `write_page`.
        repo_id: of the Space, `owner/name`; created if there is none.
        private: whether a new Space is hidden from others; None is the owner's default.

    Raises:
        UserError: the Hub does not accept the Space, or the runtime's package cannot be had.
    """
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "page")
        write_page(model, page, name, vendor)
        repo_id = hub.check_access(repo_id, private, sdk="static")
        index = (page / "index.html").read_text(encoding="utf-8")
        (page / "index.html").write_text(
            index.replace("connect-src 'self'", f"connect-src 'self' {HUB}"), encoding="utf-8"
        )
        (page / "README.md").write_text(
            f"---\ntitle: {json.dumps(repo_id.split('/')[1])}\nsdk: static\n---\n\n"
            "An image classifier that runs in the browser: images stay on the device. Made with Luthier.\n",
            encoding="utf-8",
        )
        return hub.upload(page, repo_id, "space", "Page by Luthier")


def _describe(model: Path, page: Path, name: str, runtime: str) -> dict[str, Any]:
    """Return what page.js must know."""
    facts = OnnxNetwork(model).facts
    content = [hashlib.sha256((page / file).read_bytes()).hexdigest() for file in (*ASSETS, WORKER, MODEL)]
    sure = math.isfinite(facts.unsure_below)  # JSON has no infinity
    config = {
        "name": name,
        "labels": facts.labels,
        # Pillow 13 resizes in another order of rows and columns, and the page does as Pillow does here.
        "resize": {**facts.resize._asdict(), "pillow": int(PIL.__version__.partition(".")[0])},
        "unsure_below": facts.unsure_below if sure else None,
        "none_class": facts.none,
        "model": {"url": MODEL, "bytes": model.stat().st_size, "hash": _integrity(model.read_bytes())},
        "runtime": {
            part: {"url": runtime + file, "bytes": size, "integrity": integrity}
            for part, (file, size, integrity) in RUNTIME.items()
        },
        "files": list(ASSETS),
    }
    version = hashlib.sha256(json.dumps([config, content], sort_keys=True).encode()).hexdigest()[:16]
    return {**config, "version": version}


def find_npm() -> str:
    """Return the path of npm.

    Raises:
        UserError: it is not installed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("--vendor fetches ONNX Runtime with npm, which is not installed: leave it out")
    return npm


def _fetch_runtime(folder: Path) -> None:
    """Write the runtime's files into a folder, from its npm package.

    Raises:
        UserError: npm is not installed or does not get it, or a file is not the one that is expected.
    """
    npm = find_npm()
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", PACKAGE, "--loglevel", "error", "--pack-destination", scratch]
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"npm does not get {PACKAGE} in {NPM_SECONDS} seconds: leave --vendor out") from error
        except subprocess.CalledProcessError as error:
            lines = str(error.stderr).strip().splitlines() or ["it does not say why"]
            raise UserError(f"npm does not get {PACKAGE} ({lines[0]}): leave --vendor out, or try again") from error
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as package:
            for file, _, integrity in RUNTIME.values():
                member = package.extractfile(f"package/dist/{file}")
                content = member.read() if member else b""
                if _integrity(content) != integrity:
                    raise UserError(f"{file} of {PACKAGE} is not the file that was checked: it is not used")
                (folder / file).write_bytes(content)


def _integrity(content: bytes) -> str:
    """Return what browsers check a file with (Subresource Integrity)."""
    return f"sha384-{base64.b64encode(hashlib.sha384(content).digest()).decode()}"
