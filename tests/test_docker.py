"""The Dockerfile: user, permissions, secrets, copied files and pinned versions; tests/container builds and runs it."""

import re
import subprocess

import pytest
from conftest import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKERFILE = (PROJECT / "Dockerfile").read_text()


def test_container_has_a_numeric_user_no_open_port_no_secret_and_no_wide_permission():
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["10001:0"]
    assert "EXPOSE" not in DOCKERFILE and "jupyter" not in DOCKERFILE.lower() and "HEALTHCHECK NONE" in DOCKERFILE
    assert not re.search(r"chmod\s+(-R\s+)?(0?777|[ao]\+\w*w|0?\d\d[2367]\b)", DOCKERFILE)
    assert not re.search(r"^(ARG|ENV).*(TOKEN|SECRET|PASSWORD)", DOCKERFILE, re.M)
    assert 'ENTRYPOINT ["/app/entrypoint.sh"]' in DOCKERFILE and DOCKERFILE.count("FROM debian:bookworm-slim") == 2


def test_dockerignore_allows_exactly_the_copied_files():
    lines = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    sources = re.findall(r"^COPY (?!--from)(.+) /\S+$", DOCKERFILE, re.M)
    assert {word for source in sources for word in source.split()} == allowed
    assert not {"outputs", "tests", ".git", ".env"} & allowed


def test_pinned_versions_satisfy_the_requirements():
    lock = (line.partition("==") for line in (PROJECT / "requirements.lock").read_text().splitlines())
    pins = {canonicalize_name(name): version for name, _, version in lock if version}
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        if text := line.split("#")[0].strip():
            requirement = Requirement(text)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_hadolint():
    result = subprocess.run(["hadolint", str(PROJECT / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted(PROJECT.glob("*/*.sh")), ids=lambda path: path.name)
def test_shellcheck(path):
    result = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
