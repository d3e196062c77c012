"""The Compute Engine scripts: the commands that gce.sh would run, and boot.sh with stubs for the cloud and Docker."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, draw_folder

from luthier.training.checkpoints import newest_whole

SECRET = "hf_secretOfTheHub0123456789"
CURL = """#!/bin/sh
# Answers for the metadata server, Secret Manager and Compute Engine, and writes each request down.
[ "$1" = -X ] || true
config=
for word in "$@"; do
    case $word in -) config=$(cat) ;; esac
    url=$word
done
echo "$* [$config]" >> "$STUBS/requests"
case $url in
*/token) echo '{"access_token":"vmToken","expires_in":3599}' ;;
*/attributes/luthier-image) echo europe-west4-docker.pkg.dev/p/luthier/luthier ;;
*/attributes/luthier-args) cat "$STUBS/args" ;;
*/attributes/luthier-secret) echo hf-token ;;
*/attributes/luthier-data) echo ;;
*/project/project-id) echo p ;;
*/instance/zone) echo projects/1/zones/europe-west4-a ;;
*/instance/name) echo luthier ;;
*secretmanager*) echo '{"payload": {"data": "'"$(printf %s "$SECRET" | base64)"'"}}' ;;
esac
"""
DOCKER = """#!/bin/bash
# Runs the command of the container without a container; `kill` sends it the signal.
echo "$*" >> "$STUBS/docker"
case $1 in
login) cat > /dev/null ;;
kill) kill -TERM "$(cat "$STUBS/pid")" ;;
run)
    while [ "$1" != europe-west4-docker.pkg.dev/p/luthier/luthier ]; do shift; done
    shift
    echo $$ > "$STUBS/pid"
    exec $TRAIN "$@"
    ;;
esac
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Stubs for the commands that boot.sh calls; train.py runs in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return write_stubs(tmp_path, DOCKER, monkeypatch)


def write_stubs(root: Path, docker: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write stubs for the commands that boot.sh calls, put them on its PATH, and replace its disk by a folder."""
    folder = root / "stubs"
    folder.mkdir()
    do_nothing = "#!/bin/sh\n"
    commands = {"curl": CURL, "docker": docker, "mountpoint": do_nothing, "chown": do_nothing, "poweroff": do_nothing}
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    settings = {"DISK": root / "disk", "SECRETS": root / "secrets", "STUBS": folder, "SECRET": SECRET, "PAUSE": "0"}
    settings |= {"PATH": f"{folder}:{os.environ['PATH']}", "NVIDIA": "/no/gpu"}
    for key, value in settings.items():
        monkeypatch.setenv(key, str(value))
    return folder


def boot() -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", str(PROJECT / "cloud/boot.sh")], **streams)


@pytest.mark.slow
def test_boot_saves_a_checkpoint_on_preemption_and_resumes_from_it(stubs, tmp_path, monkeypatch):
    draw_folder(tmp_path / "images", per_class=6)
    monkeypatch.setenv("TRAIN", f"{sys.executable} {PROJECT / 'train.py'}")
    arguments = "--data_dir images --model_name simple_cnn --num_train_epochs {} --disable_tqdm 1 --output_dir out"
    (stubs / "args").write_text(arguments.format(100000))
    process = boot()
    for _ in range(600):
        time.sleep(0.1)
        if list(Path("out").glob("checkpoint-*")):
            break
    process.terminate()  # as systemd does when the machine shuts down
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "it goes on at the next boot" in output, output
    step = int(newest_whole(Path("out")).name.split("-")[1])
    (stubs / "args").write_text(arguments.format(1))  # it has trained for longer, so it ends at once
    output = boot().communicate(timeout=100)[0]
    assert f"resume   from out/checkpoint-{step}" in output and "the run has ended" in output
    requests = (stubs / "requests").read_text()
    assert (
        "-X DELETE https://compute.googleapis.com/compute/v1/projects/1/zones/europe-west4-a/instances/luthier"
        in requests
    )
    assert SECRET not in (stubs / "docker").read_text() + requests  # the secret is on no command line
    assert not any("vmToken" in text.split(" [")[0] for text in requests.splitlines())
    assert (tmp_path / "secrets/env").read_text() == f"HF_TOKEN={SECRET}\n"
    assert f"--env-file {tmp_path}/secrets/env" in (stubs / "docker").read_text()


def test_run_that_fails_three_times_deletes_the_vm(stubs, monkeypatch):
    monkeypatch.setenv("TRAIN", "false")
    (stubs / "args").write_text("--learning_rat 1")
    output = boot().communicate(timeout=60)[0]
    assert "failure 3 of 3" in output and "-X DELETE" in (stubs / "requests").read_text()
    assert (stubs / "docker").read_text().count("run ") == 3


def dry_run(*arguments: str) -> list[list[str]]:
    result = subprocess.run(
        [str(PROJECT / "cloud/gce.sh"), *arguments, "--dry-run"], capture_output=True, text=True, check=True
    )
    return [shlex.split(text) for text in result.stdout.splitlines() if text.startswith("gcloud ")]


def test_up_creates_a_spot_vm_with_a_persistent_disk_and_a_time_limit(tmp_path):
    settings = (PROJECT / "cloud/settings.env").read_text()
    settings = settings.replace("SECRET=\n", "SECRET=hf-token\n").replace("DATA=\n", "DATA=gs://bucket/photos\n")
    (tmp_path / "mine.env").write_text(settings)
    commands = dry_run("up", "--settings", str(tmp_path / "mine.env"))
    (create,) = (command for command in commands if command[1:4] == ["compute", "instances", "create"])
    text = " ".join(create)
    assert "--provisioning-model SPOT --instance-termination-action STOP" in text and "--max-run-duration 8h" in text
    assert "auto-delete=no" in text and "user-data=cloud/cloud-init.yaml" in text
    roles = [command[command.index("--role") + 1] for command in commands if "--role" in command]
    assert roles == [
        "roles/artifactregistry.reader", "roles/secretmanager.secretAccessor", "roles/storage.objectViewer",
        "projects/my-project/roles/luthierDeleteSelf",
    ]  # fmt: skip


def test_mistake_on_the_command_line_gives_one_message(tmp_path):
    for arguments, message in (
        (["fly"], "say up, logs, ssh, status or down"),
        (["up", "--fast"], "unknown option --fast"),
        (["up", "--settings", "none.env"], "there is no file none.env"),
        (["up"], "still says PROJECT=my-project"),
    ):
        result = subprocess.run([str(PROJECT / "cloud/gce.sh"), *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.skipif(not shutil.which("gcloud"), reason="needs gcloud")
@pytest.mark.parametrize("arguments", [["up"], ["logs"], ["ssh"], ["status"], ["down", "--disk"]])
def test_gcloud_knows_every_flag(arguments, tmp_path):
    """gcloud parses the command line before it looks for credentials; here it finds none."""
    environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    for command in dry_run(*arguments):
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT)
        assert "unrecognized arguments" not in result.stderr and "Invalid choice" not in result.stderr, result.stderr


def test_cloud_init_writes_the_service():
    text = (PROJECT / "cloud/cloud-init.yaml").read_text()
    config = yaml.safe_load(text)
    assert text.startswith("#cloud-config\n") and "docker.io" in config["packages"]
    assert "luthier-boot" in config["write_files"][0]["content"]


@pytest.mark.skipif(not shutil.which("cloud-init"), reason="needs cloud-init")
def test_cloud_init_matches_its_schema():
    command = ["cloud-init", "schema", "--config-file", str(PROJECT / "cloud/cloud-init.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
