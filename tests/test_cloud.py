"""The cloud: SkyPilot accepts the task and the documented commands, `hf` the job, and the task starts train.py."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT

TASK = PROJECT / "cloud/sky.yaml"
LOAD = """
import sys, sky, yaml

given = [("DATA", "gs://photos"), ("BUCKET", "runs")]
task = sky.Task.from_yaml_config(yaml.safe_load(sys.stdin), env_overrides=given)
assert all(resources.use_spot for resources in task.resources)
print(sorted(name for resources in task.resources for name in resources.accelerators))
"""


def commands(first: str) -> list[list[str]]:
    """Return the commands of docs/cloud.md that begin with these words."""
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT / "docs/cloud.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith(first)]
    assert found
    return found


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [
        (1, 1, "--num_processes 1"),
        (1, 4, "--num_processes 4 --multi_gpu --num_machines 1 --machine_rank 0 --main_process_ip 10.0.0.2"),
        (2, 4, "--num_processes 8 --multi_gpu --num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.2"),
    ],
)
def test_task_starts_a_process_for_each_gpu_of_each_machine(tmp_path, nodes, gpus, expected):
    for program, script in (("accelerate", 'echo "$@"'), ("python", "exit 0")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / program).chmod(0o755)
    variables = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NUM_GPUS_PER_NODE": gpus, "SKYPILOT_NODE_RANK": 0}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.2\n10.0.0.3", "RUN": "a", "ARGS": "--seed 2"}
    variables |= {"HOME": tmp_path, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "luthier/bin").mkdir(parents=True)
    (tmp_path / "luthier/bin/activate").touch()
    environment = {name: str(value) for name, value in variables.items()}
    script = yaml.safe_load(TASK.read_text())["run"]
    result = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"launch {expected}")
    end = "train.py --data_dir /data --output_dir /runs/a --resume_from_checkpoint auto --seed 2\n"
    assert result.stdout.endswith(end)
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")  # torch cannot use the GPU
    assert subprocess.run(["bash", "-uc", script], env=environment, capture_output=True).returncode == 1


def default_signals():
    """A shell cannot trap what was ignored when it started, as under `nohup`."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_script_of_the_container_runs_in_a_checkout_and_passes_signals_on(tmp_path, number):
    launcher = tmp_path / "accelerate"
    launcher.write_text('#!/bin/sh\necho "$@"\nsleep 60 & wait $!\n')
    launcher.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["sh", "cloud/entrypoint.sh", "--seed", "3"], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=default_signals,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        config = "--config_file cloud/../accelerate_config.yaml"
        assert process.stdout.readline() == f"launch --quiet {config} cloud/../train.py --seed 3\n"
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(20) == 143


@pytest.mark.parametrize(("processes", "expected"), [(None, ""), ("1", ""), ("2", "--multi_gpu --num_processes 2 ")])
def test_script_of_the_container_starts_as_many_processes_as_asked_for(tmp_path, processes, expected):
    launcher = tmp_path / "accelerate"
    launcher.write_text('#!/bin/sh\necho "$@"\n')
    launcher.chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"PROCESSES": processes} if processes else {})
    line = ["sh", "cloud/entrypoint.sh", "--seed", "3"]
    told = subprocess.run(line, cwd=PROJECT, env=os.environ | own, capture_output=True, text=True, check=True).stdout
    assert told.endswith(f"accelerate_config.yaml {expected}cloud/../train.py --seed 3\n")


@pytest.mark.parametrize("name", ["my_photos/cat/1.jpg", "my_photos_2/1.jpg", "shards/train.parquet", "outputs/a/x"])
def test_images_and_runs_are_not_copied_with_the_checkout(tmp_path, name):
    """SkyPilot's `workdir: .` leaves out what git ignores."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text((PROJECT / ".gitignore").read_text())
    assert subprocess.run(["git", "-C", str(tmp_path), "check-ignore", "-q", name]).returncode == 0


def test_disk_of_the_vm_has_room_beside_the_image():
    assert yaml.safe_load(TASK.read_text())["resources"]["disk_size"] >= 200  # SkyPilot's GPU image alone takes 50 GB


def test_documented_container_can_be_stopped_and_shows_no_token():
    text = (PROJECT / "docs/cloud.md").read_text()
    assert "docker run --name luthier --detach --stop-timeout 120" in text and "HF_TOKEN=" not in text


def test_hf_accepts_the_job(tmp_path):
    (command,) = commands("hf jobs run")
    launcher = [str(Path(sys.executable).with_name("hf")), *command[1:3], "--dry-run", *command[3:]]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_none"}
    (tmp_path / "my_photos").mkdir()
    result = subprocess.run(launcher, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "t4-small" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("command", commands("hf buckets"), ids=lambda command: command[2])
def test_hf_has_the_options_for_buckets(command):
    known = subprocess.run([str(Path(sys.executable).with_name("hf")), *command[1:3], "--help"], capture_output=True)
    flags = [word for word in command if word.startswith("--")]
    assert flags and all(flag in known.stdout.decode() for flag in flags), known


@pytest.mark.slow
def test_skypilot_accepts_the_task_and_the_commands(tmp_path):
    """It is installed in an environment of its own, because it does not go together with Luthier's requirements."""
    venv.create(tmp_path / "sky", with_pip=True)
    folder = tmp_path / "sky" / "bin"
    install = [str(folder / "pip"), "install", "--quiet", "-r", str(PROJECT / "requirements-cloud.txt")]
    subprocess.run(install, check=True)
    environment = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}

    def run(*command: str, text: str = "") -> subprocess.CompletedProcess:
        line = [str(folder / command[0]), *command[1:]]
        return subprocess.run(line, input=text, env=environment, cwd=PROJECT, capture_output=True, text=True)

    loaded = run("python", "-c", LOAD, text=TASK.read_text())
    assert loaded.returncode == 0 and loaded.stdout.endswith("['A10G', 'L4', 'T4']\n"), loaded.stderr
    broken = run("python", "-c", LOAD, text=TASK.read_text().replace("use_spot", "use_sopt"))
    assert broken.returncode != 0 and "use_sopt" in broken.stderr
    for command in commands("sky "):
        words = command[: next((n for n, word in enumerate(command) if word[0] == "-" or "/" in word), len(command))]
        known = run(*words, "--help").stdout
        flags = [word for word in command if re.fullmatch(r"-[a-z]|--[a-z-]+", word)]
        assert flags and all(re.search(rf"(^|[ ,]){flag}\b", known) for flag in flags), (command, known)
    for words in (["sky", "down"], ["sky", "jobs", "cancel"]):
        assert "--graceful" in run(*words, "--help").stdout


def test_files_of_a_container_may_be_written_by_its_group(tmp_path):
    stub = tmp_path / "accelerate"
    stub.write_text(f"#!/bin/sh\nmkdir {tmp_path}/run\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "cloud/entrypoint.sh"], cwd=PROJECT, env=environment, check=True)
    assert (tmp_path / "run").stat().st_mode & 0o070 == 0o070
