"""Pushing to a local stand-in for the Hub and loading from it: faults, permissions, and files that must not go up."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from conftest import PROJECT, draw, draw_folder, write_archive
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

import luthier.serving.hub as hub
import prepare
import score
import train
from luthier.errors import UserError
from luthier.output_dir import mark_unfinished
from luthier.reporting.card import note_export, write_model_card
from luthier.run_files import EXPORTS

PUBLISHED = {
    ".gitattributes", "README.md", "config.json", "confusion_matrix.png", "coverage.png", "curves.png",
    "familiarity.safetensors", "model.safetensors", "models.py", "preprocessor_config.json", "reliability.png",
}  # fmt: skip
LOAD_FAMILIARITY = """
import sys
from luthier.familiarity import load_familiarity
from models import load_trained

familiarity = load_familiarity(load_trained(sys.argv[1])[0], sys.argv[1])
print(familiarity and len(familiarity.bank))
"""
LOAD_MODEL = """
import sys
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

options = {"trust_remote_code": True} if sys.argv[2] == "trust" else {}
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], **options)
model.save_pretrained("loaded")
print(pipeline("image-classification", model=sys.argv[1], **options)(Image.new("RGB", (40, 40), "red"))[0]["label"])
"""


PUSH_LOOP = """
import contextlib, io, json, os, sys
import push
from luthier.serving import hub

hub.WAITS = (0.05,) * 5
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            token, *arguments = json.loads(line)
            os.environ["HF_TOKEN"] = token
            push.main(arguments)
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class PushResult(NamedTuple):
    """The result of a push."""

    returncode: int
    stdout: str
    stderr: str


def environment(server: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return inherited | {"PYTHONPATH": str(PROJECT)} | server.environment(home, token)


@pytest.fixture(scope="module")
def shared_server():
    with Hub() as server:
        yield server


@pytest.fixture
def server(shared_server):
    """The server, empty and without faults."""
    shared_server.repositories, shared_server.objects, shared_server.faults, shared_server.corrupt = {}, {}, [], False
    shared_server.requests, shared_server.bodies = [], []
    return shared_server


@pytest.fixture(scope="module")
def push_process(shared_server, tmp_path_factory):
    """One process for all pushes, because the imports take longer than a push."""
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(
        [sys.executable, "-c", PUSH_LOOP],
        env=environment(shared_server, home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


@pytest.fixture
def push(server, push_process):
    """A function that runs push.py as a user of the server."""

    def run(*args: str | Path, token: str = TOKEN) -> PushResult:
        print(json.dumps([token, *map(str, args)]), file=push_process.stdin, flush=True)
        return PushResult(*json.loads(push_process.stdout.readline()))

    return run


@pytest.fixture
def client(server, tmp_path):
    """A function that runs a script or code in a new process, as a user of the server."""

    def run(*command: str | Path, token: str | None = TOKEN, home: str = "home") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path, env=environment(server, tmp_path / home, token), capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a finished run of simple_cnn, with secrets in some of its files."""
    folder = tmp_path_factory.mktemp("finished")
    draw_folder(folder / "images", per_class=6)
    args = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--output_dir", "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(args)
    (folder / "out/.env").write_text(f"HF_TOKEN={TOKEN}")
    (folder / "out/training_args.bin").write_bytes(TOKEN.encode())
    (folder / "out/runs").mkdir()
    (folder / "out/runs/log.txt").write_text(TOKEN)
    return folder / "out"


@pytest.mark.slow
def test_model_from_a_private_repository_equals_the_pushed_one_bit_for_bit(
    server, push, client, finished_run, tmp_path
):
    result = push(finished_run, "me/instruments", "--private")
    assert result.returncode == 0 and f"{server.url}/me/instruments" in result.stdout, result.stderr
    assert server.repositories["models/me/instruments"].private
    assert set(server.repositories["models/me/instruments"].files) == PUBLISHED
    listed = re.findall(r"MB  (\S+)", result.stdout)
    assert set(listed) == PUBLISHED - {".gitattributes"}
    assert not any(TOKEN.encode() in data for data in server.repositories["models/me/instruments"].files.values())
    assert not any(TOKEN.encode() in body for body in server.bodies) and TOKEN not in result.stdout + result.stderr
    card = server.repositories["models/me/instruments"].files["README.md"].decode()
    assert (
        "model-index" in card and 'pipeline("image-classification", "me/instruments", trust_remote_code=True)' in card
    )
    loaded = client("-c", LOAD_MODEL, "me/instruments", "trust")
    assert loaded.returncode == 0 and loaded.stdout.strip() in ("blue", "green", "red"), loaded.stderr
    local, remote = load_file(finished_run / "model.safetensors"), load_file(tmp_path / "loaded/model.safetensors")
    assert local.keys() == remote.keys() and all((local[name] == remote[name]).all() for name in local)


@pytest.mark.slow
def test_familiarity_is_loaded_from_the_hub_and_may_be_missing(server, push, client, finished_run):
    assert push(finished_run, "me/colours").returncode == 0
    loaded = client("-c", LOAD_FAMILIARITY, "me/colours")
    references = load_file(finished_run / "familiarity.safetensors")["references"]
    assert loaded.stdout.strip() == str(len(references)) != "0", loaded.stderr
    server.fail("familiarity", 503, times=50)
    failed = client("-c", LOAD_FAMILIARITY, "me/colours", home="a third")
    assert failed.returncode != 0 and "cannot be fetched from the Hub (" in failed.stderr
    server.faults.clear()
    del server.repositories["models/me/colours"].files["familiarity.safetensors"]
    loaded = client("-c", LOAD_FAMILIARITY, "me/colours", home="another")
    assert loaded.stdout.strip() == "None", loaded.stderr


@pytest.mark.slow
def test_second_push_uploads_changed_files_and_deletes_missing_ones(server, push, finished_run, tmp_path):
    copied_run = tmp_path / "copied"
    subprocess.run(["cp", "-r", finished_run, copied_run], check=True)
    assert push(copied_run, "me/x").returncode == 0
    repository = server.repositories["models/me/x"]
    repository.files["NOTES.md"] = b"of the owner"
    weights = load_file(copied_run / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, copied_run / "model.safetensors", {"format": "pt"}
    )
    (copied_run / "curves.png").unlink()
    before, first_requests = dict(repository.files), len(server.requests)
    assert push(copied_run, "me/x").returncode == 0
    after = repository.files
    changed = {path for path in before if before[path] != after.get(path)}
    assert changed == {"model.safetensors", "curves.png", "README.md"} and "curves.png" not in after
    assert after["NOTES.md"] == b"of the owner"
    assert sum(request.startswith("PUT") for request in server.requests[first_requests:]) == 1


@pytest.mark.slow
def test_exports_are_pushed_and_those_of_others_stay(server, push, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run/onnx").mkdir()
    row = {
        "precision": "fp32",
        "images": "of test",
        "weights": "shipped",
        "n": 9,
        "same": 9,
        "largest_difference": 1e-6,
        "labelled": False,
        "accuracy": [1.0, 1.0],
        "difference_ci95": [0.0, 0.0],
    }
    (tmp_path / "run/export.json").write_text(json.dumps({"model.onnx": row}))
    (tmp_path / "run/images.json").write_text('{"options": {"data_dir": "/home/me/secret"}}')
    for name in ("model.onnx", "model_int8.onnx"):
        (tmp_path / "run/onnx" / name).write_bytes(b"weights")
    assert push(tmp_path / "run", "me/exported").returncode == 0
    repository = server.repositories["models/me/exported"]
    assert set(repository.files) == PUBLISHED | {"export.json", "onnx/model.onnx", "onnx/model_int8.onnx"}
    assert b"| onnx/model.onnx | of test | shipped | 9 of 9 |" in repository.files["README.md"]
    repository.commits.append({**repository.files, "onnx/model_quantized.onnx": b"of somebody else"})
    (tmp_path / "run/onnx/model_int8.onnx").unlink()
    assert push(tmp_path / "run", "me/exported").returncode == 0
    assert {name for name in repository.files if name.startswith("onnx")} == {
        "onnx/model.onnx", "onnx/model_quantized.onnx"
    }  # fmt: skip


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
        ("POST .*/commit/", 412, 1, {}),
        ("GET /api/whoami-v2", None, 1, {}),
    ],
)
def test_temporary_fault_is_retried(server, push, finished_run, pattern, status, times, headers):
    fault = server.fail(pattern, status, times, **headers)
    result = push(finished_run, "me/x")
    assert result.returncode == 0 and fault.count == times, result.stderr
    assert set(server.repositories["models/me/x"].files) == PUBLISHED
    assert "Traceback" not in result.stderr
    if headers:
        assert "retrying in 2 s" in result.stderr


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
def test_permanent_fault_gives_one_message(server, push, finished_run, pattern, status, message):
    server.fail(pattern, status, 99)
    pushed = push(finished_run, "me/x")
    assert pushed.returncode != 0 and re.search(message, pushed.stderr) and "Traceback" not in pushed.stderr, (
        pushed.stderr
    )
    assert sum(line.startswith("error: ") for line in pushed.stderr.splitlines()) == 1


def test_upload_damaged_on_the_way_is_detected_and_not_published(server, push, finished_run):
    server.corrupt = True
    result = push(finished_run, "me/x")
    assert result.returncode != 0 and "another hash" in result.stderr and "Traceback" not in result.stderr
    assert set(server.repositories["models/me/x"].files) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("", "me/x", "nobody is logged in"),
        ("hf_wrong", "me/x", "does not know this token"),
        (TOKEN, "somebody/else", "may not write to somebody/else"),
        (TOKEN, "me/no such name!", "is not a name for a repository: give one such as me/instruments"),
        (TOKEN, "bare", "'bare' is not a name for a repository: give owner/name"),
    ],
)
def test_missing_permission_gives_one_message(push, finished_run, token, repo_id, message):
    result = push(finished_run, repo_id, token=token)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_public_repository_is_not_taken_for_a_private_one(server, push, finished_run):
    assert push(finished_run, "me/open").returncode == 0
    before = dict(server.repositories["models/me/open"].files)
    result = push(finished_run, "me/open", "--private")
    assert result.returncode == 2 and "me/open exists and is public" in result.stderr, result.stderr
    assert server.repositories["models/me/open"].files == before
    for _ in range(2):
        assert push(finished_run, "me/hidden", "--private").returncode == 0
    assert server.repositories["models/me/hidden"].private


@pytest.mark.slow
def test_permission_is_checked_before_training(server, client, tmp_path):
    draw_folder(tmp_path / "images", per_class=6)
    args = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--push_to_hub"]
    result = client(PROJECT / "train.py", *args, "--hub_model_id", "somebody/else")
    assert result.returncode == 2 and "may not write to somebody/else" in result.stderr, result.stderr
    assert not result.stdout and not (tmp_path / "outputs").exists() and "Traceback" not in result.stderr


@pytest.mark.slow
def test_failed_push_keeps_the_run_and_can_be_repeated(server, client, push, tmp_path):
    draw_folder(tmp_path / "images", per_class=6)
    fault = server.fail("POST .*/commit/", 403, 1)
    args = ["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--push_to_hub"]
    result = client(PROJECT / "train.py", *args, "--hub_model_id", "colours", "--output_dir", "out")
    assert fault.count == 1 and result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "not pushed: this login may not write to me/colours" in result.stderr
    script, arguments = re.findall(r"^  python (\S+) (.*)$", result.stderr, re.M)[0]
    assert Path(script) == PROJECT / "push.py" and arguments == "out me/colours"
    assert (tmp_path / "out/report.html").exists()
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(TOKEN.encode() in body for body in server.bodies)
    second_push = push(tmp_path / "out", "me/colours")
    assert second_push.returncode == 0 and set(server.repositories["models/me/colours"].files) == PUBLISHED


@pytest.mark.slow
def test_finished_run_that_is_resumed_is_pushed_and_not_trained(server, client, finished_run):
    args = ["--data_dir", finished_run.parent / "images", "--model_name", "simple_cnn", "--output_dir", finished_run]
    args += ["--resume_from_checkpoint", "auto", "--push_to_hub", "--hub_model_id", "me/late"]
    result = client(PROJECT / "train.py", *args)
    assert result.returncode == 0 and "done     " in result.stdout and "epoch" not in result.stdout, result.stderr
    assert set(server.repositories["models/me/late"].files) == PUBLISHED


@pytest.mark.slow
def test_original_experiment_from_download_to_published_model(server, client, tmp_path, launch, monkeypatch):
    """The third original experiment, with drawn images and random weights in the layout of its dataset and model."""
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
    args = [config, "--num_train_epochs", "1", "--push_to_hub", "--hub_model_id", "me/instruments"]
    result = client(*launcher, PROJECT / "train.py", *args)
    assert result.returncode == 0, result.stderr
    assert "pushed   " in result.stdout and "10 classes" in result.stdout
    repository = server.repositories["models/me/instruments"]
    labels = json.loads(repository.files["config.json"])["label_names"]
    assert labels[:2] == ["harp", "baglama"]
    loaded = client("-c", LOAD_MODEL, "me/instruments", "plain", home="fresh")
    assert loaded.returncode == 0 and loaded.stdout.strip() in labels, loaded.stderr


@pytest.mark.slow
@pytest.mark.parametrize("archives", [False, True])
def test_dataset_of_the_hub_is_streamed(server, client, tmp_path, monkeypatch, archives):
    monkeypatch.chdir(tmp_path)
    if archives:
        for split, n in (("train", 66), ("validation", 15), ("test", 15)):
            write_archive(tmp_path / f"shards/{split}-0.tar", n, 1000 * len(split))
    else:
        draw_folder(tmp_path / "images", per_class=40)
        prepare.main(["images", "shards", "--images", "30"])
    server.add("datasets", "me/shards", tmp_path / "shards")
    options = ["--streaming", "--model_name", "simple_cnn", "--num_train_epochs", "1", "--disable_tqdm", "1"]
    result = client(PROJECT / "train.py", "--dataset_name", "me/shards", *options, "--output_dir", "out")
    assert result.returncode == 0 and "66 training images, read in blocks" in result.stdout, result.stderr
    data = json.loads((tmp_path / "out/metrics.json").read_text())["data"]
    assert data["name"] == "me/shards" and list(data["splits"]["train"]["per_class"].values()) == [22, 22, 22]


def test_no_network_gives_one_message(monkeypatch):
    monkeypatch.setattr(hub, "WAITS", (0, 0))
    calls = []

    def call():
        calls.append(1)
        raise ConnectionError("no route to host")

    with pytest.raises(UserError, match="cannot be reached, or cuts the connection: no route to host"):
        hub.with_retries(call, "me/x")
    assert len(calls) == 3


def test_hostile_names_are_escaped_in_the_model_card(finished_run, tmp_path):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    metrics["data"]["name"] = "<img src=x onerror=alert(1)> [x](javascript:alert(1))"
    names = ["| a |", "<b>b</b>", "[c](http://c)"]
    per_class = dict(zip(names, metrics["test"]["per_class"].values(), strict=True))
    metrics["test"]["per_class"] = per_class
    metrics["baselines"]["majority"]["label"] = names[1]
    write_model_card(tmp_path, metrics, "me/instruments")
    body = (tmp_path / "README.md").read_text().split("---", 2)[2]
    assert not any(text in body for text in ("<img", "<b>", "[x](", "[c](", "| | a |")) and "# instruments" in body


def test_metrics_that_were_edited_by_hand_give_one_message(finished_run, tmp_path):
    run, staging = tmp_path / "run", tmp_path / "staging"
    shutil.copytree(finished_run, run)
    staging.mkdir()
    metrics = json.loads((run / "metrics.json").read_text()) | {"command": None}
    (run / "metrics.json").write_text(json.dumps(metrics))
    note_export(run, "model.onnx", {})
    with pytest.raises(UserError, match="holds no finished run"):
        hub.stage(run, "me/x", staging)


def test_damaged_note_of_exports_is_left_out(finished_run, tmp_path):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").touch()
    for text in ("{", "[]", '{"model.onnx": 1}', '{"model.onnx": {"n": 1}}'):
        (tmp_path / EXPORTS).write_text(text)
        write_model_card(tmp_path, metrics)
        assert "## Exports" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        ("license: mit\nlicense_name: mine\nlicense_link: https://example.org/mine\nlanguage: en\n", True),
        (": [\n", False),
    ],
)
def test_licence_that_a_person_has_added_to_the_card_stays(finished_run, tmp_path, capsys, head, kept):
    run, staging = tmp_path / "run", tmp_path / "staging"
    shutil.copytree(finished_run, run)
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("---\n", f"---\n{head}", 1))
    staging.mkdir()
    hub.stage(run, "me/x", staging)
    mark_unfinished(run)  # it goes on, and writes its card anew
    write_model_card(run, json.loads((run / "metrics.json").read_text()))
    for folder in (staging, run):
        card = (folder / "README.md").read_text()
        added = ("license: mit", "license_name: mine", "license_link: https://example.org/mine", "language: en")
        assert [line in card for line in added] == [kept] * 4 and "library_name" in card
    assert ("metadata of the model card is lost" in capsys.readouterr().out) != kept
    assert {path.name for path in run.iterdir()} == {path.name for path in finished_run.iterdir()}


def test_folder_without_a_run_sends_no_request(server, push, tmp_path):
    for text in (None, "{}", "no JSON"):
        if text:
            (tmp_path / "metrics.json").write_text(text)
        result = push(tmp_path, "me/x")
        assert result.returncode == 2 and "holds no finished run" in result.stderr and "Traceback" not in result.stderr
    assert not server.requests


def test_output_of_score_is_refused(server, push, finished_run, tmp_path):
    """Its metrics.json has no temperature, no validation scores and no random seeds."""
    images = str(finished_run.parent / "images")
    score.main([str(finished_run), "--data_dir", images, "--output_dir", str(tmp_path / "scored")])
    result = push(tmp_path / "scored", "me/x")
    assert result.returncode == 2 and "holds no model: score.py writes none" in result.stderr
    assert "Traceback" not in result.stderr
    assert not server.requests


def test_unfinished_folders_are_refused(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "interrupted")
    (tmp_path / "interrupted/README.md").unlink()
    note_export(tmp_path / "interrupted", "model.onnx", {})  # which does not make it a finished one
    (tmp_path / "interrupted" / EXPORTS).unlink()
    (tmp_path / "first").mkdir()
    with pytest.raises(UserError, match="interrupted has not ended"):
        hub.stage(tmp_path / "interrupted", "me/x", tmp_path / "first")
    (tmp_path / "metrics.json").write_text((finished_run / "metrics.json").read_text())
    (tmp_path / "staging").mkdir()
    with pytest.raises(UserError, match=r"holds no model: score.py writes none"):
        hub.stage(tmp_path, "me/x", tmp_path / "staging")


def test_full_disk_is_not_taken_for_something_else(finished_run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        hub.with_retries(full, "me/x")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        hub.stage(finished_run, "me/x", tmp_path)
    failure = hub.publish(finished_run, "me/x", private=False)  # after a training
    assert "No space left on device. Free some" in failure and "python push.py" in failure


def test_what_is_pushed_must_be_a_finished_run(tmp_path):
    for folder, found in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "holds no finished run")):
        with pytest.raises(UserError, match=f"{found}: give the output directory of train.py first"):
            hub.stage(folder, "me/x", tmp_path)


def test_run_that_was_interrupted_is_not_taken_for_another_folder(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match=r"go on with it by --output_dir .* --resume_from_checkpoint auto, then push"):
        hub.stage(tmp_path, "me/x", tmp_path)


@pytest.mark.parametrize(("options", "private"), [(["--hub_private_repo", "true"], True), ([], None)])
def test_run_asks_for_a_private_repository_where_the_user_does(tmp_path, monkeypatch, options, private):
    asked = []

    def check_access(repo_id, hidden):
        asked.append((repo_id, hidden))
        raise UserError("enough")

    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=1)
    monkeypatch.setattr(hub, "check_access", check_access)
    args = ["--data_dir", "images", "--model_name", "simple_cnn", "--push_to_hub", "--hub_model_id", "me/x"]
    with pytest.raises(SystemExit) as exit_info:
        train.main([*args, *options])
    assert exit_info.value.code == 2 and asked == [("me/x", private)]


@pytest.mark.parametrize(
    ("status", "passes"),
    [(408, True), (412, True), (429, True), (500, True), (503, True), (400, False), (403, False), (404, False)],
)
def test_faults_that_may_pass_are_retried_five_times(monkeypatch, status, passes):
    waited = []

    def call():
        raise HfHubHTTPError("fault", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(hub.time, "sleep", waited.append)
    with pytest.raises(UserError):
        hub.with_retries(call, "me/x")
    assert waited == ([1, 2, 4, 8, 16] if passes else [])


def test_space_that_costs_names_the_one_that_is_free():
    def refuse():
        response = SimpleNamespace(status_code=402, headers={}, request=None)
        raise HfHubHTTPError("402 Payment Required", response=response, server_message="it requires PRO")

    with pytest.raises(UserError, match=r"plan for me/demo \(402: it requires PRO\). A static Space is free: `export"):
        hub.with_retries(refuse, "me/demo")


def test_card_names_the_model_and_the_dataset_of_the_hub(finished_run, tmp_path):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert metrics["base_model"] is None  # of simple_cnn
    write_model_card(tmp_path, metrics)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None and data.datasets is None  # of a folder
    metrics["base_model"], metrics["data"]["name"] = "timm/resnet18.tv_in1k", "someone/their-set"
    write_model_card(tmp_path, metrics, "me/x")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "timm/resnet18.tv_in1k" and data.datasets == ["someone/their-set"]
