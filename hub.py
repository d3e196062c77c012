"""What goes to the Hub, and getting it there; apart from train.py, because a push that failed is repeated alone.

    python hub.py outputs/my_run me/instruments

publishes a finished run: the model, its card and the report's figures. `train.py --push_to_hub` does the same.
"""

import argparse
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

from arguments import user_errors
from report import FIGURES, write_model_card

# Besides the card, which is written anew under the repository's name. Nothing else leaves the machine: no checkpoints,
# no logs, and no report, predictions or audit, which show or name the user's pictures.
PUBLISHED = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",  # of models too large for one file
    "model.safetensors.index.json",
    "models.py",
    *FIGURES,
)
WAITS = (1, 2, 4, 8, 16)  # seconds before each new try, where the Hub does not say how long
LONGEST_WAIT = 300

Result = TypeVar("Result")


def check_access(repo_id: str, private: bool | None, repo_type: str = "model") -> str:
    """Return the whole name of the repository to push to, after creating it or seeing that it can be written to.

    Args:
        repo_id: `owner/name`; of a bare name the owner is who is logged in.
        private: whether a new repository is hidden from others; None is the owner's default.
        repo_type: model or space.

    Raises:
        ValueError: there is no login, no network, no right to write, or no such name is allowed.
    """
    api = HfApi()
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name for a repository: {error}") from error
    owner = persistently(api.whoami, repo_id)["name"]  # asked for whoever owns the repository: is the login good?
    repo_id = repo_id if "/" in repo_id else f"{owner}/{repo_id}"
    sdk = "gradio" if repo_type == "space" else None
    options = {"repo_type": repo_type, "private": private, "space_sdk": sdk, "exist_ok": True}
    persistently(lambda: api.create_repo(repo_id, **options), repo_id)
    persistently(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True), repo_id)
    return repo_id


def push(output_dir: Path, repo_id: str) -> str:
    """Publish a finished run; return the address of its page.

    Args:
        output_dir: what train.py left.
        repo_id: as `check_access` returns it.

    Raises:
        ValueError: the folder holds no finished run, or the Hub did not take it; nothing is lost by either.
    """
    with tempfile.TemporaryDirectory() as staging:
        stage(output_dir, repo_id, Path(staging))
        return publish_model(Path(staging), repo_id)


def publish_model(staging: Path, repo_id: str) -> str:
    """Send what `stage` has put into a folder; return the address of the repository's page."""
    return upload(staging, repo_id, "model", "Fine-tuned with Luthier", PUBLISHED)


def upload(staging: Path, repo_id: str, repo_type: str, message: str, ours: tuple[str, ...] = ()) -> str:
    """List the files of a folder and send them, in one commit; return the address of the repository's page.

    Of the files there that match `ours`, those that the folder has no more are taken away.
    """
    api = HfApi()
    print(f"push     to {repo_id}:", flush=True)
    for file in sorted(staging.iterdir()):
        print(f"         {file.stat().st_size / 1e6:8.2f} MB  {file.name}", flush=True)
    options = {"repo_id": repo_id, "repo_type": repo_type, "folder_path": staging, "commit_message": message}
    persistently(lambda: api.upload_folder(**options, delete_patterns=list(ours)), repo_id)
    return f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def stage(output_dir: Path, repo_id: str, staging: Path) -> None:
    """Put what is published of a run into an empty folder.

    Raises:
        ValueError: the folder holds no finished run.
    """
    files = [path for pattern in PUBLISHED for path in output_dir.glob(pattern)]
    try:
        metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
        for path in files:
            shutil.copyfile(path, staging / path.name)
        write_model_card(staging / "README.md", metrics, (staging / "models.py").exists(), repo_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output_dir} holds no finished run ({error!r}): give what train.py wrote") from error
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{output_dir} holds no model: --eval_only scores one and leaves none")


def persistently(call: Callable[[], Result], repo_id: str) -> Result:
    """Return what a call of the Hub returns, tried again while the cause may pass.

    Raises:
        ValueError: it failed for good; the message says what, and the remedy.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as raised:  # also the HTTP library's own, which is another one by version
            error = raised.__cause__ if isinstance(raised.__cause__, HfHubHTTPError) else raised
            status = getattr(getattr(error, "response", None), "status_code", None)
            lasting = isinstance(error, (ValueError, LocalTokenNotFoundError, OfflineModeIsEnabled))
            if wait is None or lasting or (status is not None and status not in (408, 429) and status < 500):
                raise ValueError(explain(error, status, repo_id)) from raised
            pause = _retry_after(error) or wait
            print(f"hub      {_first_line(error)}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def explain(error: Exception, status: int | None, repo_id: str) -> str:
    """Say why the Hub was not reached or did not take it, and what to do."""
    login = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in to the Hub: {login}"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off here by HF_HUB_OFFLINE: unset it to push"
    if status == 401:
        return f"the Hub does not know this token (401): {login}"
    if status == 403:
        return f"this login may not write to {repo_id} (403): {login}, or give a name of your own"
    if status == 404:
        return f"the Hub has no {repo_id}, or its owner does not exist (404): check the name"
    if status == 409:
        return f"the name {repo_id} is taken by something else on the Hub (409): give another"
    if status == 429:
        return "the Hub has had too many requests from here (429) and still has: try again in an hour"
    if status is not None:
        return f"the Hub answers with an error ({status}): {_first_line(error)}"
    if isinstance(error, ValueError):
        return f"the Hub did not take it: {_first_line(error)}"
    return f"the Hub cannot be reached, or cuts the connection: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    server_message = getattr(error, "server_message", None) if isinstance(error, HfHubHTTPError) else None
    lines = (server_message or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _retry_after(error: Exception) -> float | None:
    """Return the seconds that the Hub asks to wait; it may also give a date, which is taken as not said."""
    try:
        return min(LONGEST_WAIT, float(error.response.headers["Retry-After"]))
    except (AttributeError, KeyError, ValueError):
        return None


def main(argv: list[str] | None = None) -> None:
    """Publish a finished run; see `python hub.py --help`."""
    parser = argparse.ArgumentParser(description="Publish a finished run on the Hub.")
    parser.add_argument("output_dir", type=Path, help="what train.py left")
    parser.add_argument("repo_id", help="where to, such as me/instruments; created where it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="hide a new repository from others")
    args = parser.parse_args(argv)
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        if "/" not in args.repo_id:
            raise ValueError(f"{args.repo_id!r} is no name for a repository: give owner/name")
        staging = Path(folder)
        stage(args.output_dir, args.repo_id, staging)  # before anything is made on the Hub
        check_access(args.repo_id, args.private)
        print(f"pushed   {publish_model(staging, args.repo_id)}")


if __name__ == "__main__":
    main()
