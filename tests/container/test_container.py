"""The image, built and run for real: by Docker where it is, or else by buildah on a base that mmdebstrap makes.

Marked `container`; needs root without Docker, the network, 30 GB of disk and about 15 minutes. CONTRIBUTING.md has the
command. Without Docker a chroot takes the place of a container, and a process namespace makes the entry point its
first process.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT

from luthier.training.checkpoints import newest_whole

pytestmark = pytest.mark.container
BASE, IMAGE, USER = "docker.io/library/debian:bookworm-slim", "luthier-test", "10001:0"
LONG = ("--model_name", "simple_cnn", "--num_train_epochs", "100000", "--disable_tqdm", "True")


def run(*command: str, **options) -> str:
    """Run a command to its end; return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


class Docker:
    """The image in Docker."""

    def __init__(self, work: Path):
        run("docker", "build", "-t", IMAGE, str(PROJECT))
        self.config = json.loads(run("docker", "inspect", IMAGE))[0]["Config"]

    def start(self, mounted: Path, *line: str) -> subprocess.Popen:
        """Start the entry point, with a folder as /mnt."""
        command = ["docker", "run", "--rm", "--name", "luthier-test", "-v", f"{mounted}:/mnt", IMAGE, *line]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def terminate(self, process: subprocess.Popen) -> None:
        """Send the entry point SIGTERM."""
        run("docker", "kill", "--signal", "TERM", "luthier-test")

    def shell(self, command: str) -> str:
        """Run a shell command as the image's user."""
        return run("docker", "run", "--rm", "--entrypoint", "sh", IMAGE, "-c", command)


class Buildah:
    """The image in a chroot, with a process namespace of its own."""

    def __init__(self, work: Path):
        run("mmdebstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(work / "base.tar"))
        container = run("buildah", "from", "scratch").strip()
        run("buildah", "add", container, str(work / "base.tar"), "/")
        # A machine behind a proxy has certificates of its own.
        (work / "pip.conf").write_text("[global]\ncert = /etc/host-certificates.crt\n")
        run("buildah", "add", container, "/etc/ssl/certs/ca-certificates.crt", "/etc/host-certificates.crt")
        run("buildah", "add", container, str(work / "pip.conf"), "/etc/pip.conf")
        run("buildah", "commit", container, BASE)
        run("buildah", "rm", container)
        build = ("buildah", "build", "--isolation", "chroot", "--pull-never", "--format", "docker", "-t", IMAGE)
        run(*build, str(PROJECT))
        self.config = json.loads(run("buildah", "inspect", "--type", "image", IMAGE))["Docker"]["config"]
        self.container = run("buildah", "from", "--pull-never", IMAGE).strip()
        self.root = Path(run("buildah", "mount", self.container).strip())

    def command(self, mounted: Path, *line: str) -> list[str]:
        """Return the command that runs the entry point as the first process, with a folder as /mnt."""
        assert self.config["User"] == USER
        inside = (
            'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount --bind "$1" "$0/mnt" && root=$0 && '
            'shift && cd / && exec chroot --userspec=10001:0 "$root" /usr/bin/env --chdir=/srv "$@"'
        )
        command = ["unshare", "--pid", "--fork", "--mount", "sh", "-c", inside, str(self.root), str(mounted)]
        return [*command, *self.config["Env"], *self.config["Entrypoint"], *line]

    def start(self, mounted: Path, *line: str) -> subprocess.Popen:
        """Start it."""
        command = self.command(mounted, *line)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def terminate(self, process: subprocess.Popen) -> None:
        """Send the entry point SIGTERM."""
        (first,) = run("pgrep", "-P", str(process.pid)).split()
        os.kill(int(first), signal.SIGTERM)

    def shell(self, command: str) -> str:
        """Run a shell command as the image's user."""
        return run("chroot", f"--userspec={USER}", str(self.root), "sh", "-c", command)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[Docker | Buildah]:
    """The built image."""
    work = tmp_path_factory.mktemp("image")
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        yield Docker(work)
    elif shutil.which("buildah") and shutil.which("mmdebstrap") and os.geteuid() == 0:
        image = Buildah(work)
        yield image
        run("buildah", "rm", image.container)
        run("buildah", "rmi", IMAGE)
    else:
        pytest.skip("needs Docker, or root with buildah and mmdebstrap")


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A folder that the image's user may write to."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o111)
    return tmp_path


def test_config(image):
    config = image.config
    assert re.fullmatch(r"\d+:0", config["User"]) and not config.get("ExposedPorts")
    assert set(config["Volumes"]) == {"/srv/outputs", "/cache"} and config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["NONE"]
    assert not any("TOKEN" in entry or "PASSWORD" in entry for entry in config["Env"])


def test_nothing_but_volumes_is_writable(image):
    found = image.shell(
        "find / -xdev -writable ! -type l ! -path '/proc/*' ! -path '/dev/*' ! -path '/sys/*' 2>/dev/null; true"
    )
    assert set(found.split()) <= {"/srv/outputs", "/cache", "/tmp", "/var/tmp", "/run/lock", "/mnt"}
    others = image.shell("find /app /opt/luthier /srv /cache -xdev -perm -0002 ! -type l")
    assert others == ""
    assert image.shell("stat -c '%a %g' /cache /srv/outputs").split("\n")[:2] == ["770 0", "770 0"]


def test_quick_start(image, mounted):
    process = image.start(mounted, "--max_steps", "4", "--disable_tqdm", "True", "--output_dir", "/mnt/run")
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "test     accuracy" in told, told
    assert (mounted / "run/report.html").exists() and (mounted / "run").stat().st_uid == 10001


def test_sigterm_leaves_a_checkpoint_to_go_on_from(image, mounted):
    process = image.start(mounted, *LONG, "--output_dir", "/mnt/run")
    for text in process.stdout:
        if re.match(r"\s+2 ", text):
            break
    start = time.monotonic()
    image.terminate(process)
    told = process.communicate(timeout=60)[0]
    assert time.monotonic() - start < 10 and process.returncode == 143, told
    assert "stopped  by SIGTERM" in told and not (mounted / "run/metrics.json").exists()
    checkpoint = newest_whole(mounted / "run")
    assert checkpoint is not None
    step = int(checkpoint.name.split("-")[1])
    line = [*LONG[:2], "--max_steps", str(step + 1), *LONG[4:], "--output_dir", "/mnt/run"]
    process = image.start(mounted, *line, "--resume_from_checkpoint", "auto")
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f"resume   from /mnt/run/checkpoint-{step}" in told, told


def test_mistake_is_one_message_and_exit_code_1(image, mounted):
    process = image.start(mounted, "--learning_rat", "1")
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "did you mean 'learning_rate'" in told and "Traceback" not in told
