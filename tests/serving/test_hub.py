"""Pushing and loading over real HTTP against a Hub on a loopback address, its faults, and what must never go up."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PROJECT, draw, draw_folder
from hub_server import TOKEN, Hub
from safetensors.torch import load_file, save_file

import luthier.serving.hub as hub
import score
from luthier.errors import UserError
from luthier.reporting.card import write_model_card

PUBLISHED = {
    ".gitattributes", "README.md", "config.json", "confusion_matrix.png", "coverage.png", "curves.png",
    "model.safetensors", "models.py", "preprocessor_config.json", "reliability.png",
}  # fmt: skip
LOAD = """
import sys
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

options = {"trust_remote_code": True} if sys.argv[2] == "trust" else {}
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], **options)
model.save_pretrained("loaded")
print(pipeline("image-classification", model=sys.argv[1], **options)(Image.new("RGB", (40, 40), "red"))[0]["label"])
"""


PUSHES = """
import contextlib, io, json, os, sys
import push

for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            token, *words = json.loads(line)
            os.environ["HF_TOKEN"] = token
            push.main(words)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Pushed(NamedTuple):
    """What a push ended with."""

    returncode: int
    stdout: str
    stderr: str


def environment(server: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return inherited | {"PYTHONPATH": str(PROJECT)} | server.environment(home, token)


@pytest.fixture(scope="module")
def running():
    with Hub() as server:
        yield server


@pytest.fixture
def server(running):
    """The Hub, empty and without faults."""
    running.repositories, running.objects, running.faults, running.corrupt = {}, {}, [], False
    running.requests, running.bodies = [], []
    return running


@pytest.fixture(scope="module")
def pushes(running, tmp_path_factory):
    """A process that pushes as often as it is told to: the imports take longer than a push."""
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(
        [sys.executable, "-c", PUSHES],
        env=environment(running, home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


@pytest.fixture
def push(server, pushes):
    """Run push.py as a user of the loopback Hub."""

    def run(*line: str | Path, token: str = TOKEN) -> Pushed:
        print(json.dumps([token, *map(str, line)]), file=pushes.stdin, flush=True)
        return Pushed(*json.loads(pushes.stdout.readline()))

    return run


@pytest.fixture
def client(server, tmp_path):
    """Run a script or code in a process of its own, as a user of the loopback Hub; from an empty folder."""

    def run(*command: str | Path, token: str | None = TOKEN, home: str = "home") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path, env=environment(server, tmp_path / home, token), capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, launch):
    """The folder of a finished run of simple_cnn, in which secrets lie about."""
    folder = tmp_path_factory.mktemp("finished")
    draw_folder(folder / "images", per_class=6)
    line = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--output_dir", "out"]
    ran = launch("train.py", *line, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    (folder / "out/.env").write_text(f"HF_TOKEN={TOKEN}")
    (folder / "out/training_args.bin").write_bytes(TOKEN.encode())
    (folder / "out/runs").mkdir()
    (folder / "out/runs/log.txt").write_text(TOKEN)
    return folder / "out"


def test_push_to_a_private_repository_then_load_is_bit_equal(server, push, client, finished, tmp_path):
    ran = push(finished, "me/instruments", "--private")
    assert ran.returncode == 0 and f"{server.url}/me/instruments" in ran.stdout, ran.stderr
    assert server.repositories["models/me/instruments"].private
    assert set(server.repositories["models/me/instruments"].files) == PUBLISHED
    listed = re.findall(r"MB  (\S+)", ran.stdout)
    assert set(listed) == PUBLISHED - {".gitattributes"}
    assert not any(TOKEN.encode() in data for data in server.repositories["models/me/instruments"].files.values())
    assert not any(TOKEN.encode() in body for body in server.bodies) and TOKEN not in ran.stdout + ran.stderr
    card = server.repositories["models/me/instruments"].files["README.md"].decode()
    assert (
        "model-index" in card and 'pipeline("image-classification", "me/instruments", trust_remote_code=True)' in card
    )
    loaded = client("-c", LOAD, "me/instruments", "trust")
    assert loaded.returncode == 0 and loaded.stdout.strip() in ("blue", "green", "red"), loaded.stderr
    here, there = load_file(finished / "model.safetensors"), load_file(tmp_path / "loaded/model.safetensors")
    assert here.keys() == there.keys() and all((here[name] == there[name]).all() for name in here)


def test_second_push_sends_what_changed_and_takes_away_what_is_gone(server, push, finished, tmp_path):
    copied = tmp_path / "copied"
    subprocess.run(["cp", "-r", finished, copied], check=True)
    assert push(copied, "me/x").returncode == 0
    repository = server.repositories["models/me/x"]
    repository.files["NOTES.md"] = b"of the owner"
    weights = load_file(copied / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    (copied / "curves.png").unlink()
    before, sent = dict(repository.files), len(server.requests)
    assert push(copied, "me/x").returncode == 0
    after = repository.files
    changed = {path for path in before if before[path] != after.get(path)}
    assert changed == {"model.safetensors", "curves.png", "README.md"} and "curves.png" not in after
    assert after["NOTES.md"] == b"of the owner"
    assert sum(request.startswith("PUT") for request in server.requests[sent:]) == 1


@pytest.mark.parametrize(
    ("pattern", "status", "times", "headers"),
    [
        ("POST /api/repos/create", 503, 1, {}),
        ("POST .*/preupload/", 503, 1, {}),
        ("POST .*/commit/", 503, 2, {}),
        ("POST .*/commit/", 429, 1, {"Retry_After": "2"}),
        ("POST .*/objects/batch", 500, 1, {}),
        ("PUT /lfs/", None, 1, {}),
        ("POST .*/commit/", None, 1, {}),
        ("GET /api/whoami-v2", None, 1, {}),
    ],
)
def test_fault_that_passes_is_overcome(server, push, finished, pattern, status, times, headers):
    fault = server.fail(pattern, status, times, **headers)
    ran = push(finished, "me/x")
    assert ran.returncode == 0 and fault.seen == times, ran.stderr
    assert set(server.repositories["models/me/x"].files) == PUBLISHED
    assert "Traceback" not in ran.stderr
    if headers:
        assert "retrying in 2 s" in ran.stderr


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("GET /api/whoami-v2", 401, "does not know this token"),
        ("POST /api/repos/create", 403, "may not write to me/x"),
        ("GET .*/auth-check", 403, "may not write to me/x"),
        ("POST .*/preupload/", 404, "check the name"),
        ("POST .*/commit/", 409, "is taken"),
        ("POST .*/commit/", 413, "error .413"),
    ],
)
def test_fault_that_stays_ends_in_one_message(server, push, finished, pattern, status, message):
    server.fail(pattern, status, 99)
    ran = push(finished, "me/x")
    assert ran.returncode != 0 and re.search(message, ran.stderr) and "Traceback" not in ran.stderr, ran.stderr
    assert sum(line.startswith("error: ") for line in ran.stderr.splitlines()) == 1


def test_damage_on_the_way_is_found_and_nothing_is_published(server, push, finished):
    server.corrupt = True
    ran = push(finished, "me/x")
    assert ran.returncode != 0 and "another hash" in ran.stderr and "Traceback" not in ran.stderr
    assert set(server.repositories["models/me/x"].files) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("", "me/x", "nobody is logged in"),
        ("hf_wrong", "me/x", "does not know this token"),
        (TOKEN, "somebody/else", "may not write to somebody/else"),
        (TOKEN, "me/no such name!", "is not a name for a repository"),
        (TOKEN, "bare", "'bare' is not a name for a repository: give owner/name"),
    ],
)
def test_missing_rights(push, finished, token, repo_id, message):
    ran = push(finished, repo_id, token=token)
    assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def test_rights_are_seen_before_training(server, client, tmp_path):
    draw_folder(tmp_path / "images", per_class=6)
    line = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--push_to_hub"]
    ran = client(PROJECT / "train.py", *line, "--hub_model_id", "somebody/else")
    assert ran.returncode == 2 and "may not write to somebody/else" in ran.stderr, ran.stderr
    assert not ran.stdout and not (tmp_path / "outputs").exists() and "Traceback" not in ran.stderr


def test_push_that_fails_costs_nothing_and_is_repeated_alone(server, client, push, tmp_path):
    draw_folder(tmp_path / "images", per_class=6)
    fault = server.fail("POST .*/commit/", 403, 1)
    line = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--push_to_hub"]
    ran = client(PROJECT / "train.py", *line, "--hub_model_id", "colours", "--output_dir", "out")
    assert fault.seen == 1 and ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert "not pushed: this login may not write to me/colours" in ran.stderr
    (again,) = re.findall(r"^  python push.py (.*)$", ran.stderr, re.M)
    assert again == "out me/colours" and (tmp_path / "out/report.html").exists()
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(TOKEN.encode() in body for body in server.bodies)
    repeated = push(tmp_path / "out", "me/colours")
    assert repeated.returncode == 0 and set(server.repositories["models/me/colours"].files) == PUBLISHED


def test_resumed_run_that_has_ended_is_pushed_and_not_trained(server, client, finished):
    line = ["--data_dir", finished.parent / "images", "--model_name", "simple_cnn", "--output_dir", finished]
    line += ["--resume_from_checkpoint", "auto", "--push_to_hub", "--hub_model_id", "me/late"]
    ran = client(PROJECT / "train.py", *line)
    assert ran.returncode == 0 and "done     " in ran.stdout and "epoch" not in ran.stdout, ran.stderr
    assert set(server.repositories["models/me/late"].files) == PUBLISHED


def test_original_experiments_whole_path_from_download_to_published_model(
    server, client, tmp_path, launch, monkeypatch
):
    """The original third experiment: its dataset's and its model's layout, drawn images and random weights."""
    names = ["arp", "baglama", "elektro gitar", "gitar", "kanun", "keman", "kemence", "mandolin", "ud", "yayli tambur"]
    for number, name in enumerate(names):
        (tmp_path / "dataset/instruments" / name).mkdir(parents=True)
        for seed in range(6):
            image = draw(("blue", "green", "red")[number % 3], 100 * number + seed)
            image = {0: image.convert("L"), 1: image.convert("RGBA")}.get(seed, image)
            image.save(tmp_path / "dataset/instruments" / name / f"{seed}.png")
    server.add("datasets", "YakupAkdin/instrument-images", tmp_path / "dataset")
    code = (
        "import timm, json, pathlib; from safetensors.torch import save_file; m = timm.create_model('resnet18');"
        "p = pathlib.Path('model'); p.mkdir(); save_file(m.state_dict(), p / 'model.safetensors', {'format': 'pt'});"
        "cfg = {k: v for k, v in m.pretrained_cfg.items() if v is not None and k != 'url'};"
        "(p / 'config.json').write_text(json.dumps({'architecture': 'resnet18', 'num_classes': 1000,"
        " 'pretrained_cfg': cfg | {'input_size': [3, 64, 64], 'tag': 'tv_in1k'}}))"
    )
    assert client("-c", code).returncode == 0
    server.add("models", "timm/resnet18.tv_in1k", tmp_path / "model")
    config = PROJECT / "configs/resnet18_instruments_augmix.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", PROJECT / "accelerate_config.yaml"]
    line = [config, "--num_train_epochs", "1", "--push_to_hub", "--hub_model_id", "me/instruments"]
    ran = client(*launcher, PROJECT / "train.py", *line)
    assert ran.returncode == 0, ran.stderr
    assert "pushed   " in ran.stdout and "10 classes" in ran.stdout
    repository = server.repositories["models/me/instruments"]
    labels = json.loads(repository.files["config.json"])["label_names"]
    assert labels[:2] == ["harp", "baglama"]
    loaded = client("-c", LOAD, "me/instruments", "plain", home="fresh")
    assert loaded.returncode == 0 and loaded.stdout.strip() in labels, loaded.stderr


def test_no_network_is_one_message(monkeypatch):
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    calls = []

    def call():
        calls.append(1)
        raise ConnectionError("no route to host")

    with pytest.raises(UserError, match="cannot be reached, or cuts the connection: no route to host"):
        hub.with_retries(call, "me/x")
    assert len(calls) == 3


def test_hostile_names_stay_text_in_the_card(finished, tmp_path):
    metrics = json.loads((finished / "metrics.json").read_text())
    metrics["data"]["name"] = "<img src=x onerror=alert(1)> [x](javascript:alert(1))"
    names = ["| a |", "<b>b</b>", "[c](http://c)"]
    per_class = dict(zip(names, metrics["test"]["per_class"].values(), strict=True))
    metrics["test"]["per_class"] = per_class
    metrics["baselines"]["majority"]["label"] = names[1]
    write_model_card(tmp_path / "README.md", metrics, False, "me/instruments")
    body = (tmp_path / "README.md").read_text().split("---", 2)[2]
    assert not any(text in body for text in ("<img", "<b>", "[x](", "[c](", "| | a |")) and "# instruments" in body


def test_nothing_is_made_on_the_hub_for_a_folder_without_a_run(server, push, tmp_path):
    for text in (None, "{}", "no JSON"):
        if text:
            (tmp_path / "metrics.json").write_text(text)
        ran = push(tmp_path, "me/x")
        assert ran.returncode == 2 and "holds no finished run" in ran.stderr and "Traceback" not in ran.stderr
    assert not server.requests


def test_folder_of_a_score_is_refused(server, push, finished, tmp_path):
    """Its metrics.json has no temperature, no validation and no seeds."""
    score.main(
        [str(finished), "--data_dir", str(finished.parent / "images"), "--output_dir", str(tmp_path / "scored")]
    )
    ran = push(tmp_path / "scored", "me/x")
    assert (
        ran.returncode == 2 and "holds no model: score.py writes none" in ran.stderr and "Traceback" not in ran.stderr
    )
    assert not server.requests


def test_unfinished_folders_are_refused(finished, tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        hub.stage(tmp_path, "me/x", tmp_path)
    (tmp_path / "metrics.json").write_text((finished / "metrics.json").read_text())
    (tmp_path / "staging").mkdir()
    with pytest.raises(UserError, match=r"holds no model: score.py writes none"):
        hub.stage(tmp_path, "me/x", tmp_path / "staging")
