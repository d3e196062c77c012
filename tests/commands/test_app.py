"""The web app in a real browser, the files that it may read, and the Space that serves a model from the Hub."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import PROJECT, draw, draw_folder
from hub_server import Hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

import app
import train
from luthier.errors import UserError
from luthier.serving.classifier import MAX_FOREIGN_PIXELS, Prediction
from luthier.serving.space import find_imports, find_requirements, push_to_space, stage_space


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run of simple_cnn on images of three colours."""
    folder = tmp_path_factory.mktemp("model")
    draw_folder(folder / "images", per_class=20)
    args = ["--data_dir", str(folder / "images"), "--model_name", "simple_cnn", "--num_train_epochs", "12"]
    args += ["--learning_rate", "5e-3", "--per_device_train_batch_size", "4", "--disable_tqdm", "1"]
    train.main([*args, "--output_dir", str(folder / "colours")])
    return folder / "colours"


@contextmanager
def running_app(*command: str | Path, cwd: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run the app until the `with` block ends; yield its address."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = str(free_socket.getsockname()[1])
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd, env=os.environ | environment | {"GRADIO_SERVER_PORT": port}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(300):
                time.sleep(0.2)
                assert process.poll() is None
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    continue
            yield url
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_app_in_a_browser(model, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "examples").mkdir()
    for colour in ("red", "blue"):
        draw(colour, 77).save(tmp_path / f"examples/{colour}.png")
    (tmp_path / "garbage.png").write_bytes(b"no image")
    command = [PROJECT / "app.py", model, "--examples", "examples", "--always_answer"]
    with running_app(*command, cwd=tmp_path, environment={}) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(url)
        answer, file = page.get_by_label("Answer"), page.locator("input[type=file]").first
        for colour in ("red", "blue"):
            file.set_input_files(tmp_path / f"examples/{colour}.png")
            expect(answer).to_have_value(re.compile(rf"{colour} \(\d+%\)"), timeout=30_000)
            expect(page.get_by_text(colour, exact=True).first).to_be_visible()
            page.reload()  # the page takes one image; this makes room for the next
        file.set_input_files(tmp_path / "garbage.png")
        expect(answer).to_have_value(re.compile("No prediction: not an image in an allowed format"), timeout=30_000)
        for address, message in (
            ("http://127.0.0.1/a.png", "is not public"),
            ("/etc/passwd", "only http and https"),
            ("file:///etc/passwd", "only http and https"),
        ):
            page.get_by_label("Or its address").fill(address)
            page.get_by_role("button", name="Classify the address").click()
            expect(answer).to_have_value(re.compile(message), timeout=30_000)
        browser.close()
    assert {re.match(r"\w+://[^/]+", url)[0] for url in requested if "://" in url} == {url}


def test_app_reads_only_the_images_that_it_was_given(tmp_path):
    class FakeClassifier:
        def load_file(self, name, max_pixels):
            return max_pixels

    (tmp_path / "cache").mkdir()
    for name in ("cache/a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "cache/link.png").symlink_to(tmp_path / "b.png")
    read = app.file_loader(FakeClassifier(), [tmp_path / "cache"])
    assert read(str(tmp_path / "cache/a.png")) == MAX_FOREIGN_PIXELS, "as of an address"
    outside = ("b.png", "cache/../b.png", "cache/link.png", "cache/none.png", "cache")
    for name in (*(f"{tmp_path}/{each}" for each in outside), "/dev/zero", "http://example.org/a.png"):
        with pytest.raises(OSError, match="only images that were given to this page"):
            read(name)


def test_photographs_of_cameras_of_50_megapixels_are_taken():
    assert max(8688 * 5792, 8192 * 6144) < MAX_FOREIGN_PIXELS < 60_000_000


def test_app_does_not_fetch_an_address_in_the_place_of_an_image():
    moved = []

    async def move(name):
        moved.append(name)
        return name

    move_file = app._refuse_addresses(SimpleNamespace(async_move_resource_to_block_cache=move))
    assert asyncio.run(move_file("/tmp/a.png")) == "/tmp/a.png"
    with pytest.raises(ValueError, match="an address is classified by"):
        asyncio.run(move_file("http://169.254.169.254/a.png"))
    assert moved == ["/tmp/a.png"]


def test_files_of_a_space_follow_from_the_imports():
    files, packages = find_imports()
    assert {"app.py", "models.py", "luthier/serving/classifier.py", "luthier/images/views.py"} <= set(files)
    assert not {"train.py", "data.py", "luthier/serving/space.py", "luthier/serving/hub.py"} & set(files)
    assert {"torch", "PIL", "gradio"} <= packages and not {"luthier", "models", "sys", "pathlib"} & packages
    names = {line.split(">=")[0] for line in find_requirements(packages)}
    assert {"torch", "pillow", "pi-heif", "transformers"} <= names and not {"matplotlib", "tensorboard"} & names


@pytest.mark.slow
def test_space_serves_the_pushed_model(model, tmp_path):
    with Hub() as server:
        server.add("models", "me/colours", model)
        environment = server.environment(tmp_path / "home") | {"PYTHONPATH": str(PROJECT)}
        args = ["me/colours", "--push_to_space", "me/colours-demo"]
        command = [sys.executable, str(PROJECT / "app.py"), *args]
        result = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        assert result.returncode == 0 and f"{server.url}/spaces/me/colours-demo" in result.stdout, result.stderr
        space = server.repositories["spaces/me/colours-demo"]
        assert space.sdk == "gradio"
        card = yaml.safe_load(space.files["README.md"].decode().split("---")[1])
        assert card["app_file"] == "start.py" and card["models"] == ["me/colours"] and card["sdk"] == "gradio"
        packages = {line.split(">=")[0] for line in space.files["requirements.txt"].decode().split()}
        assert {"torch", "torchvision", "transformers", "timm", "pillow", "numpy"} <= packages
        for name, data in space.files.items():
            (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "space" / name).write_bytes(data)
        space_environment = server.environment(tmp_path / "elsewhere") | {"PYTHONPATH": ""}
        with running_app("start.py", cwd=tmp_path / "space", environment=space_environment) as url:
            assert b"colours" in urllib.request.urlopen(url, timeout=10).read()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["nowhere", "--examples", "none"], "--examples none is not a folder with images"),
        ([".", "--push_to_space", "me/x"], "a Space loads its model from the Hub"),
        (["colours", "--push_to_space", "me/x"], "such as me/instruments, instead of colours"),
        (["me/x", "--push_to_space", "me/y", "--always_answer"], "--always_answer are for the app on this machine"),
        (["me/x", "--push_to_space", "me/y", "--examples", "x"], "--always_answer are for the app on this machine"),
        (["me/x", "--private"], "--private hides a Space: give --push_to_space"),
        (["me/x", "--exmples", "photos"], "unknown option --exmples; did you mean 'examples'?"),
    ],
)
def test_mistake_on_the_command_line_gives_one_message(capsys, args, message):
    with pytest.raises(SystemExit) as exit_info:
        app.main(args)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_examples_may_be_below_the_home_directory(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "photos").mkdir()
    draw("red", 1).save(tmp_path / "photos/red.png")
    with pytest.raises(SystemExit) as exit_info:
        app.main(["nowhere", "--examples=~/photos"])
    assert exit_info.value.code == 2 and "there is no folder 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["abc", "70000"])
def test_port_that_cannot_be_gives_one_message(capsys, monkeypatch, port):
    monkeypatch.setenv("GRADIO_SERVER_PORT", port)
    with pytest.raises(SystemExit) as exit_info:
        app.main(["nowhere"])
    assert exit_info.value.code == 2 and f"GRADIO_SERVER_PORT is '{port}', but must be" in capsys.readouterr().err


def test_port_that_is_taken_is_not_replaced_by_the_next(model, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(other.getsockname()[1]))
        with pytest.raises(SystemExit) as exit_info:
            app.main([str(model)])
    assert exit_info.value.code == 2 and "the app cannot be served" in capsys.readouterr().err


def test_space_of_a_model_that_the_hub_does_not_have_is_refused(monkeypatch):
    def missing(self, repo_id, **_):
        error = HfHubHTTPError("404 Client Error", response=SimpleNamespace(status_code=404, headers={}, request=None))
        raise error

    monkeypatch.setattr(HfApi, "repo_info", missing)
    with pytest.raises(UserError, match="the Hub has no outputs/my_runn, or its owner does not exist"):
        push_to_space("outputs/my_runn", "me/demo")


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        (Prediction("", [("none", 0.9), ("a", 0.1)], unsure=True, none=True), "None of these"),
        (Prediction("", [("a", 0.9), ("none", 0.1)]), "a (90%)"),
        # Two classes have one name: the likelier one counts.
        (Prediction("", [("a", 0.4), ("b", 0.3), ("a", 0.2)], unsure=True), "Unsure. Most likely: a (40%)"),
        (Prediction("", [], error="not a number"), "No prediction: not a number"),
    ],
)
def test_answer_is_that_of_the_prediction(prediction, answer):
    ask = app.answerer(SimpleNamespace(predict=lambda image, top_k: prediction), lambda source: source)
    said, classes = ask(" image ")
    assert said == answer and classes == dict(reversed(prediction.top)) and ask("  ") == ask(None) == ("", {})
    assert list(classes) == list(dict(prediction.top)), "the likeliest first"


@pytest.mark.parametrize(("options", "private"), [(["--private"], True), ([], None)])
def test_space_is_hidden_where_the_user_asks_for_it(monkeypatch, options, private):
    asked = []

    def check_access(repo_id, hidden, sdk):
        asked.append((repo_id, hidden, sdk))
        raise UserError("enough")

    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: None)  # the Hub has the model
    monkeypatch.setattr("luthier.serving.hub.check_access", check_access)
    with pytest.raises(SystemExit) as exit_info:
        app.main(["me/colours", "--push_to_space", "me/demo", *options])
    assert exit_info.value.code == 2 and asked == [("me/demo", private, "gradio")]


def test_space_runs_the_python_of_its_publisher(tmp_path):
    stage_space("me/x", "me/demo", tmp_path)
    head = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert head["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"  # a text: 3.10 is not 3.1


def test_page_fetches_public_addresses_beside_others_keeps_images_for_an_hour_and_reports_nothing(monkeypatch):
    network = SimpleNamespace(labels=["a"], batch_size=16)
    monkeypatch.setattr("luthier.serving.classifier.open_network", lambda name: network)
    page = app.build_page("colours", False, [])
    ((number, url),) = (entry for entry in page.fns.items() if entry[1].api_name == "url")
    assert "is not public" in url.fn("http://127.0.0.1:9/a.png")[0]
    assert url.concurrency_limit == app.FETCHES > 1, "a slow address does not hold up the other visitors"
    assert any(number in function.cancels for function in page.fns.values()), "a newer image ends the wait for one"
    assert page.delete_cache == (600, 3600) and page.analytics_enabled is False
