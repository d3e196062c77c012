"""Publish a finished run on the Hub: the model, its card and the report's figures.

    python push.py outputs/my_run me/instruments

`train.py --push_to_hub` does the same at the end of a run.
"""

import argparse
import tempfile
from pathlib import Path

from luthier.command_line import CommandParser
from luthier.errors import UserError, exit_on_user_error
from luthier.terminal import say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = CommandParser(prog="push.py", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="the output directory of train.py")
    parser.add_argument("repo_id", help="the repository, such as me/instruments; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="hide a new repository from others")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Publish a finished run; see `python push.py --help`."""
    args = build_parser().parse_args(argv)
    from luthier.serving import hub

    if "/" not in args.repo_id:
        raise UserError(f"{args.repo_id!r} is not a name for a repository: give owner/name")
    with tempfile.TemporaryDirectory() as staging:
        hub.stage(args.output_dir, args.repo_id, Path(staging))  # before anything is created on the Hub
        hub.check_access(args.repo_id, args.private)
        say("pushed", hub.publish_staged(Path(staging), args.repo_id))


if __name__ == "__main__":
    main()
