"""What the image must not be, told from its recipe; tests/container builds and runs it."""

import re
import subprocess

import pytest
from conftest import PROJECT
from packaging.requirements import Requirement

RECIPE = (PROJECT / "Dockerfile").read_text()


def test_recipe_runs_as_a_numeric_user_opens_nothing_and_widens_no_rights():
    assert re.findall(r"^USER (.*)$", RECIPE, re.M) == ["10001:0"]
    assert "EXPOSE" not in RECIPE and "jupyter" not in RECIPE.lower() and "HEALTHCHECK NONE" in RECIPE
    assert not re.search(r"chmod\s+(-R\s+)?(0?777|[ao]\+\w*w|0?\d\d[2367]\b)", RECIPE)
    assert not re.search(r"^(ARG|ENV).*(TOKEN|SECRET|PASSWORD)", RECIPE, re.M)
    assert 'ENTRYPOINT ["/app/entrypoint.sh"]' in RECIPE and RECIPE.count("FROM debian:bookworm-slim") == 2


def test_all_that_it_copies_is_let_through_and_nothing_else():
    lines = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    sources = re.findall(r"^COPY (?!--from)(.+) /\S+$", RECIPE, re.M)
    assert {word for source in sources for word in source.split()} == allowed
    assert not {"outputs", "tests", ".git", ".env"} & allowed


def test_pins_are_within_the_requirements():
    pins = dict(line.split("==") for line in (PROJECT / "requirements.lock").read_text().splitlines() if "==" in line)
    for line in (PROJECT / "requirements.txt").read_text().splitlines():
        if text := line.split("#")[0].strip():
            requirement = Requirement(text)
            assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text


def test_hadolint():
    ran = subprocess.run(["hadolint", str(PROJECT / "Dockerfile")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("path", sorted((PROJECT / "cloud").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck(path):
    ran = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
