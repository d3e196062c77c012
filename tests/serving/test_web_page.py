"""The static page: its files, its resizing, and in a real browser the answers of predict.py, also offline."""

import base64
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
import yaml
from conftest import PROJECT, add_file, draw
from hub_server import Hub
from PIL import Image

import export
from luthier.errors import UserError
from luthier.images.resizing import FILTERS, ResizeRule
from luthier.serving import web_page
from luthier.serving.classifier import Classifier
from luthier.serving.export import export_model
from luthier.serving.onnx_network import OnnxNetwork
from luthier.serving.torch_network import TorchNetwork
from luthier.serving.web_page import PACKAGE, RUNTIME, write_page
from models import build_model, head_parameters, save_model

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, and its network")
RESIZE = """
async ({ pixels, height, width, rule }) => {
  const { prepare } = await import("./resize.js");
  const rgb = Uint8Array.from(atob(pixels), (letter) => letter.charCodeAt(0));
  return Array.from(prepare(rgb, height, width, rule));
}
"""
NOISE = """
OffscreenCanvasRenderingContext2D.prototype.getImageData = (x, y, width, height) => new ImageData(
  Uint8ClampedArray.from({ length: width * height * 4 }, (_, i) => (i % 4 === 3 ? 255 : 256 * Math.random())),
  width, height);
"""
CLASSIFY = """
async (file) => {
  const blob = new Blob([Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0))]);
  return window.luthier.classify(blob);
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model with a random head, which is unsure of some images."""
    folder = tmp_path_factory.mktemp("page") / "colours"
    model, image_processor = build_model("efficientnet_lite0", {0: "blue", 1: "green", 2: "red"}, image_size=96)
    model.config.unsure_below = 0.6
    torch.manual_seed(0)
    with torch.no_grad():  # so that classes differ, and other pixels would show
        model.get_parameter(head_parameters(model)[0]).normal_(0, 0.3)
    save_model(model.eval(), image_processor, folder)
    return folder


@pytest.fixture(scope="module")
def exported(model):
    export_model(TorchNetwork(str(model)), model / "onnx/model.onnx")
    return model / "onnx/model.onnx"


@contextmanager
def served(folder: Path):
    """Serve a folder on this machine; yield its address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *_):
        pass


@contextmanager
def browser_page():
    """Yield a page of the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser.new_context().new_page()
        browser.close()


def test_files_of_the_page(exported, tmp_path):
    write_page(exported, tmp_path / "page", "My <colours>", vendor=False)
    config = json.loads((tmp_path / "page/model.json").read_text())
    assert config["labels"] == ["blue", "green", "red"] and config["unsure_below"] == 0.6
    content = (tmp_path / "page/model.onnx").read_bytes()
    digest = base64.b64encode(hashlib.sha384(content).digest()).decode()
    assert config["model"] == {"url": "model.onnx", "bytes": len(content), "hash": f"sha384-{digest}"}
    assert config["resize"]["pillow"] == int(PIL.__version__.split(".")[0])
    assert all((tmp_path / "page" / name).is_file() for name in [*config["files"], "sw.js"])
    assert json.loads((tmp_path / "page/manifest.webmanifest").read_text())["name"] == "My <colours>"
    index = (tmp_path / "page/index.html").read_text()
    assert f"connect-src 'self' https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/" in index
    urls = [config["runtime"][part]["url"] for part in ("script", "wasm")]
    assert all(url.startswith(f"https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/ort") for url in urls)
    (tmp_path / "page/CNAME").write_text("example.org")
    write_page(exported, tmp_path / "page", "Another name", vendor=False)  # replaces its own, and nothing else
    assert (tmp_path / "page/CNAME").read_text() == "example.org"
    assert json.loads((tmp_path / "page/model.json").read_text())["version"] != config["version"]
    assert {path.name for path in tmp_path.iterdir()} == {"page"}


def test_page_that_was_interrupted_is_written_again(exported, tmp_path):
    (tmp_path / "index.html").touch()
    with pytest.raises(UserError, match="already holds something else"):  # a site of the user's own
        write_page(exported, tmp_path, "colours", vendor=False)
    shutil.copyfile(web_page.SOURCE / "icon.svg", tmp_path / "icon.svg")
    write_page(exported, tmp_path, "colours", vendor=False)
    assert (tmp_path / "index.html").stat().st_size


def test_folder_with_something_else_is_refused(exported, tmp_path):
    (tmp_path / "thesis.txt").touch()
    (tmp_path / "model.json").write_text('{"format": "layers-model"}')
    with pytest.raises(UserError, match="already holds something else"):
        write_page(exported, tmp_path, "colours", vendor=False)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "model.json"}


def archive(content: bytes) -> bytes:
    """Return a package with this content in each file of the runtime."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for file, _, _ in RUNTIME.values():
            add_file(package, f"package/dist/{file}", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            subprocess.CalledProcessError(1, "npm", stderr="npm error no network\nnpm error log"),
            "npm error no network",
        ),
        (subprocess.CalledProcessError(1, "npm", stderr=""), "it does not say why"),
        (subprocess.TimeoutExpired("npm", 600), "in 600 seconds"),
        (None, "is not the file that was checked"),
    ],
)
def test_runtime_that_cannot_be_had_leaves_nothing(exported, tmp_path, monkeypatch, failure, message):
    def run(command, cwd, **_):
        if failure:
            raise failure
        Path(cwd, "package.tgz").write_bytes(archive(b"something else"))

    monkeypatch.setattr(web_page.shutil, "which", lambda name: name)
    monkeypatch.setattr(web_page.subprocess, "run", run)
    with pytest.raises(UserError, match=message):
        write_page(exported, tmp_path / "page", "colours", vendor=True)
    monkeypatch.setattr(web_page.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm, which is not installed"):
        write_page(exported, tmp_path / "page", "colours", vendor=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_chromium
def test_page_resizes_as_pillow_does(exported, tmp_path):
    write_page(exported, tmp_path / "page", "colours", vendor=False)
    noise = np.random.default_rng(0)
    rules = [
        ResizeRule(fit, (40, 40), (32, 36), name, (9, 99, 199), centre)
        for name in FILTERS
        for fit, centre in (("crop", "floor"), ("pad", "half_even"), ("stretch", "half_even"))
    ]
    with served(tmp_path / "page") as url, browser_page() as page:
        page.goto(url)
        for rule in rules:
            for height, width in ((33, 97), (300, 41), (20, 20), (1, 7), (57, 64), (306, 2)):
                pixels = noise.integers(0, 256, (height, width, 3), np.uint8)
                values = {**rule._asdict(), "pillow": int(PIL.__version__.split(".")[0])}
                data = base64.b64encode(pixels.tobytes()).decode()
                found = page.evaluate(RESIZE, {"pixels": data, "height": height, "width": width, "rule": values})
                assert np.array_equal(np.reshape(found, (*rule.size, 3)), rule.apply(Image.fromarray(pixels))), rule


def save_as(image: Image.Image, number: int, folder: Path) -> Path:
    """Save an image as JPEG, PNG or WebP, some turned by EXIF, which Chromium does not follow in WebP."""
    path = folder / f"{number}.{('jpg', 'png', 'webp')[number % 3]}"
    exif = image.getexif()
    if number % 5 == 0 and path.suffix != ".webp":
        exif[0x0112] = 1 + number % 8
    image.save(path, exif=exif)
    return path


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_page_answers_as_predict_does(exported, tmp_path):
    """200 images; the runtime comes from its npm package, so this needs a network."""
    write_page(exported, tmp_path / "page", "colours", vendor=True)
    classifier = Classifier(OnnxNetwork(exported))
    same, unsure, largest = 0, 0, 0.0
    with served(tmp_path / "page") as url, browser_page() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        for number in range(200):
            image = draw(("red", "green", "blue")[number % 3], number, 40 + number, 240 - number)
            path = save_as(image, number, tmp_path)
            found = page.evaluate(CLASSIFY, base64.b64encode(path.read_bytes()).decode())
            (expected,) = classifier.predict_files([(str(path), None)], 3)
            shares = [dict(expected.top)[label] for label in classifier.labels]
            answer = None if expected.unsure else expected.top[0][0]
            unsure += expected.unsure
            same += found["answer"] == answer and int(np.argmax(found["probabilities"])) == int(np.argmax(shares))
            largest = max(largest, float(np.abs(np.subtract(found["probabilities"], shares)).max()))
        print(f"the same answer for {same} of 200 images; largest difference of a probability {largest:.2g}")
        assert same >= 199 and largest < 0.01 and 5 <= unsure <= 195
        page.get_by_text("also without a network").wait_for(timeout=30_000)
        assert f"{url}/model.json" in asked
        assert all(address.removeprefix("blob:").startswith(f"{url}/") for address in asked)
        page.context.set_offline(True)
        page.reload()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "3.jpg")
        page.locator("#classes li").nth(2).wait_for(timeout=30_000)


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_damaged_runtime_is_not_run(exported, tmp_path):
    write_page(exported, tmp_path / "page", "colours", vendor=True)
    script = tmp_path / "page/onnxruntime-web" / RUNTIME["script"][0]
    script.write_bytes(b"document.title = 'taken over';" + script.read_bytes())
    with served(tmp_path / "page") as url, browser_page() as page:
        page.goto(url)
        page.get_by_text("The model cannot be loaded").wait_for(timeout=30_000)
        assert page.title() != "taken over" and page.get_by_role("button", name="Try again").is_visible()


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_model_of_another_export_is_not_run(exported, tmp_path):
    write_page(exported, tmp_path / "page", "colours", vendor=True)
    model = tmp_path / "page/model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1  # as many bytes
    model.write_bytes(content)
    with served(tmp_path / "page") as url, browser_page() as page:
        page.goto(url)
        page.get_by_text("model.onnx is not the file that belongs to this page").wait_for(timeout=30_000)


@pytest.mark.slow
def test_page_as_a_static_space(model, exported, tmp_path):
    (tmp_path / "images/red").mkdir(parents=True)
    for seed in range(4):
        draw("red", seed).save(tmp_path / f"images/red/{seed}.png")
    command = [str(PROJECT / "export.py"), str(model), "--check", "images", "--push_to_space", "me/colours-page"]
    with Hub() as server:
        environment = os.environ | server.environment(tmp_path / "home") | {"PYTHONPATH": str(PROJECT)}
        result = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0 and f"{server.url}/spaces/me/colours-page" in result.stdout, result.stderr
        space = server.repositories["spaces/me/colours-page"]
        assert space.sdk == "static" and {"index.html", "model.onnx", "model.json", "sw.js"} <= set(space.files)
        assert yaml.safe_load(space.files["README.md"].decode().split("---")[1])["sdk"] == "static"
        assert b"connect-src 'self' https://huggingface.co" in space.files["index.html"]
        space.sdk = "gradio"
        refused = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert refused.returncode == 2 and "is a Space of another kind (gradio, not static)" in refused.stderr
        assert "Traceback" not in refused.stderr and len(space.commits) == 2


def test_version_of_a_page_changes_with_the_weights_alone(tmp_path, monkeypatch):
    """Browsers keep the files of a version."""
    facts = SimpleNamespace(labels=["a", "b"], resize=SimpleNamespace(_asdict=dict), unsure_below=0.5, none=None)
    monkeypatch.setattr(web_page, "OnnxNetwork", lambda model: SimpleNamespace(facts=facts))
    versions = set()
    for weights in (b"one", b"two"):  # as many bytes
        (tmp_path / "model.onnx").write_bytes(weights)
        write_page(tmp_path / "model.onnx", tmp_path / "page", "colours", vendor=False)
        versions.add(json.loads((tmp_path / "page/model.json").read_text())["version"])
    assert len(versions) == 2


@pytest.mark.parametrize(("options", "private"), [(["--private"], True), ([], None)])
def test_page_on_the_hub_is_hidden_where_the_user_asks_for_it(tmp_path, monkeypatch, options, private):
    asked = []

    def check_access(repo_id, hidden, sdk):
        asked.append((repo_id, hidden, sdk))
        raise UserError("enough")

    facts = SimpleNamespace(labels=["a", "b"], resize=SimpleNamespace(_asdict=dict), unsure_below=0.5, none=None)
    monkeypatch.setattr(web_page, "OnnxNetwork", lambda model: SimpleNamespace(facts=facts))
    monkeypatch.setattr(web_page.hub, "check_access", check_access)
    (tmp_path / "model.onnx").touch()
    args = export.build_parser().parse_args(["colours", "--push_to_space", "me/page", *options])
    with pytest.raises(UserError, match="enough"):
        export.publish_page(args, tmp_path / "model.onnx")
    assert asked == [("me/page", private, "static")]


def test_infinite_threshold_is_null_for_browsers(tmp_path, monkeypatch):
    facts = SimpleNamespace(labels=["a", "b"], resize=SimpleNamespace(_asdict=dict), unsure_below=-np.inf, none=1)
    monkeypatch.setattr(web_page, "OnnxNetwork", lambda model: SimpleNamespace(facts=facts))
    (tmp_path / "model.onnx").touch()
    write_page(tmp_path / "model.onnx", tmp_path / "page", "colours", vendor=False)
    config = json.loads((tmp_path / "page/model.json").read_text())
    assert config["unsure_below"] is None and config["none_class"] == 1


@pytest.mark.slow
@needs_chromium
@needs_npm
@pytest.mark.parametrize(
    ("image", "script", "message"),
    [
        (draw("red", 1), NOISE, "This browser hides the pixels"),
        # A browser shows 12 of these bits as black.
        (Image.fromarray(np.full((40, 40), 4_000, np.uint16)), None, "grey PNG of 16 bits"),
        (Image.new("RGB", (3000, 2), "red"), None, "more than 500 times the other"),
    ],
    ids=["noise", "grey", "elongated"],
)
def test_image_that_the_page_cannot_see_as_predict_does_is_refused(exported, tmp_path, image, script, message):
    write_page(exported, tmp_path / "page", "colours", vendor=True)
    image.save(tmp_path / "a.png")
    with served(tmp_path / "page") as url, browser_page() as page:
        if script:
            page.add_init_script(script)
        page.goto(url)
        page.locator("input[type=file]").first.set_input_files(tmp_path / "a.png")
        page.get_by_text(message).wait_for(timeout=30_000)
        assert page.locator("#classes li").count() == 0


@pytest.mark.slow
@needs_chromium
@needs_npm
def test_page_says_so_where_a_bare_number_is_thrown(exported, tmp_path):
    """As ONNX Runtime does where its memory is exhausted."""
    write_page(exported, tmp_path / "page", "colours", vendor=True)
    with served(tmp_path / "page") as url, browser_page() as page:
        page.add_init_script("SubtleCrypto.prototype.digest = () => Promise.reject(6620456);")
        page.goto(url)
        page.get_by_text("ONNX Runtime stopped (6620456)").wait_for(timeout=30_000)
        assert page.get_by_role("button", name="Try again").is_visible()
