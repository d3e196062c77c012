"""Publishing on the Hub: what goes up, the rights to it, and retries."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from jinja2 import TemplateError

from luthier.errors import REFUSED_BY_SYSTEM, UserError, first_line, message_for_user
from luthier.output_dir import has_ended, has_weights
from luthier.reporting.card import FIGURES, write_model_card
from luthier.run_files import CARD, CODE, CONFIG, EXPORTS, METRICS, ONNX, ONNX_FILES
from luthier.terminal import of_project, quote, say
from models import BEFORE_MODEL

# Besides the card, which is rewritten with the repository's name. Nothing else leaves the machine: no checkpoints,
# no logs, and no report, predictions or audit, which show or name the user's images.
PUBLISHED = (
    CONFIG,
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",  # of models too large for one file
    "model.safetensors.index.json",
    "familiarity.safetensors",  # features of training images
    CODE,
    *(f"{ONNX}/{name}" for name in ONNX_FILES.values()),
    EXPORTS,
    *FIGURES,
)
BUGS = (TypeError, AttributeError, LookupError, AssertionError)  # another try would raise them again
WAITS = (1, 2, 4, 8, 16)  # seconds before each retry, where the Hub does not say how long
MAX_WAIT = 300

T = TypeVar("T")


def check_access(repo_id: str, private: bool | None, sdk: str | None = None) -> str:
    """Create a repository, or check that it can be written to; return its full name.

    Args:
        repo_id: `owner/name`; a bare name belongs to the user who is logged in.
        private: whether a new repository is hidden from others; None is the owner's default.
        sdk: of a Space; None is a model.

    Raises:
        UserError: there is no login, no network or no right to write, the name is not allowed, the repository should
            be hidden and is public, or it is a Space of another SDK.
    """
    api, repo_type = HfApi(), "space" if sdk else "model"
    check_name(repo_id)
    owner = check_login(repo_id)  # for repositories of others too
    repo_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
    with_retries(
        lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=sdk, exist_ok=True), repo_id
    )
    with_retries(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True), repo_id)
    found = with_retries(lambda: api.repo_info(repo_id, repo_type=repo_type), repo_id) if private or sdk else None
    if found and sdk and (other := getattr(found, "sdk", None)) not in (None, sdk):
        raise UserError(
            f"{repo_id} is a Space of another kind ({other}, not {sdk}), whose files would be among the new ones: "
            "give another name, or delete it on the Hub"
        )
    if found and private and not found.private:
        raise UserError(
            f"{repo_id} exists and is public: make it private in its settings on the Hub, give another name, or push "
            "without asking for a private repository"
        )
    return repo_id


def check_name(repo_id: str) -> None:
    """Check the name of a repository, without asking the Hub.

    Raises:
        UserError: it is not allowed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} is not a name for a repository: give one such as me/instruments (train.py: --hub_model_id). "
            f"{error}"
        ) from error


def check_login(repo_id: str) -> str:
    """Return who is logged in to the Hub.

    Args:
        repo_id: the repository that is to be written, for the message of an error.

    Raises:
        UserError: nobody is, or there is no network.
    """
    return str(with_retries(HfApi().whoami, repo_id)["name"])


def publish_staged(staging: Path, repo_id: str) -> str:
    """Upload what `stage` has put into a folder; return the address of the repository's page.

    Raises:
        UserError: see `with_retries`.
    """
    return upload(staging, repo_id, "model", "Fine-tuned with Luthier", PUBLISHED)


def upload(staging: Path, repo_id: str, repo_type: str, message: str, ours: tuple[str, ...] = ()) -> str:
    """List the files of a folder and upload them in one commit; return the address of the repository's page.

    Args:
        staging: the folder.
        repo_id: `owner/name`.
        repo_type: `model` or `space`.
        message: of the commit.
        ours: patterns; files in the repository that match one and are no longer in the folder are deleted.

    Raises:
        UserError: see `with_retries`.
    """
    api = HfApi()
    say("push", f"to {repo_id}:")
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        say("", f"{file.stat().st_size / 1e6:8.2f} MB  {file.relative_to(staging).as_posix()}")
    with_retries(
        lambda: api.upload_folder(
            repo_id=repo_id, repo_type=repo_type, folder_path=staging, commit_message=message,
            delete_patterns=list(ours),
        ),
        repo_id,
    )  # fmt: skip
    return f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def stage(output_dir: Path, repo_id: str, staging: Path) -> None:
    """Copy what is published of a run into an empty folder, with its model card.

    Raises:
        UserError: the folder holds no finished run of train.py, or a file of it is damaged.
    """
    options = f"--output_dir {quote(str(output_dir))} --resume_from_checkpoint auto"
    unfinished = f"the run in {output_dir} has not ended: go on with it by {options}, then push it"
    if not (output_dir / METRICS).is_file():
        if any(any(output_dir.glob(pattern)) for pattern in BEFORE_MODEL):
            raise UserError(unfinished)
        found = "holds no finished run" if output_dir.is_dir() else "is no folder"
        raise UserError(f"{output_dir} {found}: give the output directory of train.py first, then the repository")
    files = [path for pattern in PUBLISHED for path in output_dir.glob(pattern)]
    try:
        metrics = json.loads((output_dir / METRICS).read_text(encoding="utf-8"))
        if "test" in metrics and not has_weights(output_dir):
            raise UserError(
                f"{output_dir} holds no model: score.py writes none. Give the output directory of train.py"
            )
        for path in files:
            copy = staging / path.relative_to(output_dir)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        if (card := output_dir / CARD).is_file():  # of which a part is kept
            shutil.copyfile(card, staging / CARD)
        write_model_card(staging, metrics, repo_id)
        if not has_ended(output_dir):
            raise UserError(unfinished)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
        if getattr(error, "errno", None) in REFUSED_BY_SYSTEM:
            raise
        raise UserError(
            f"{output_dir} holds no finished run, or {METRICS} or another of its files is damaged "
            f"({type(error).__name__}: {' '.join(str(error).split())}): give the output directory of train.py"
        ) from error


def with_retries(call: Callable[[], T], repo_id: str) -> T:
    """Return what a call of the Hub returns; retry while the cause may pass.

    Args:
        call: asks the Hub.
        repo_id: what it is about, for the message of an error.

    Raises:
        UserError: it failed for good; the message says why, and the remedy.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as raised:  # also those of the HTTP library, which differs by version
            if getattr(raised, "errno", None) in REFUSED_BY_SYSTEM or isinstance(raised, BUGS):
                raise
            error = raised.__cause__ if isinstance(raised.__cause__, HfHubHTTPError) else raised
            status = getattr(getattr(error, "response", None), "status_code", None)
            lasting = isinstance(error, (ValueError, LocalTokenNotFoundError, OfflineModeIsEnabled))
            # 412: another commit came first, and the next try starts from it.
            if wait is None or lasting or (status is not None and status not in (408, 412, 429) and status < 500):
                raise UserError(explain(error, status, repo_id)) from raised
            pause = _retry_after(error) or wait
            print(f"hub      {_first_line(error)}; retrying in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError  # the last try returns or raises


def explain(error: Exception, status: int | None, repo_id: str) -> str:
    """Return why the Hub was not reached or did not accept a push, and what to do."""
    login = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in to the Hub: {login}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE switches the Hub off on this machine: unset it to push"
    if status == 401:
        return f"the Hub does not know this token (401): {login}"
    if status == 403:
        return f"this login may not write to {repo_id} (403, {_first_line(error)}): {login}, or give another name"
    if status == 402:
        return (
            f"the Hub wants a paid plan for {repo_id} (402: {_first_line(error)}). A static Space is free: "
            "`export.py MODEL --push_to_space OWNER/NAME`"
        )
    if status == 404:
        return f"the Hub has no {repo_id}, or its owner does not exist (404): check the name"
    if status == 409:
        return f"the name {repo_id} is taken by something else on the Hub (409): give another"
    if status == 429:
        return "the Hub has received too many requests from here (429): try again in an hour"
    if status is not None:
        return f"the Hub answers with an error ({status}): {_first_line(error)}"
    if isinstance(error, ValueError):
        return f"the Hub does not accept it: {_first_line(error)}"
    return f"the Hub cannot be reached, or cuts the connection: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    server_message = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
    return first_line(error, server_message)


def _retry_after(error: Exception) -> float | None:
    """Return the seconds that the Hub asks to wait; None where it gives none, or a date."""
    try:
        return max(0.0, min(MAX_WAIT, float(getattr(error, "response").headers["Retry-After"])))  # noqa: B009
    except (AttributeError, KeyError, ValueError):
        return None


def publish(output_dir: Path, repo_id: str, private: bool | None) -> str:
    """Push a finished run; where that fails, return why, and how to repeat the push alone.

    Args:
        output_dir: of a finished run.
        repo_id: as `check_access` returns it.
        private: as it was asked for, for the command that repeats the push.
    """
    try:
        with tempfile.TemporaryDirectory() as staging:
            stage(output_dir, repo_id, Path(staging))
            say("pushed", publish_staged(Path(staging), repo_id))
        return ""
    except Exception as raised:
        error = message_for_user(raised) or f"{type(raised).__name__}: {raised}"
        command = quote("python", of_project("push.py"), str(output_dir), repo_id, *(["--private"] if private else []))
        return f"not pushed: {error}\nThe run is complete, in {output_dir}. To push it again:\n  {command}"
