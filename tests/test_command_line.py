"""CommandParser: one message for every mistake on a command line, and the option that was probably meant."""

import pytest

import app
import compare
import export
import predict
import push
from luthier.command_line import CommandParser
from luthier.errors import UserError


@pytest.mark.parametrize("command", [app, compare, export, predict, push])
def test_every_command_explains_mistakes(command):
    parser = command.build_parser()
    assert isinstance(parser, CommandParser) and parser.prog == f"{command.__name__}.py"


def test_file_whose_name_begins_with_a_dash_is_no_unknown_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-a.png").touch()
    with pytest.raises(UserError, match=r"^-a\.png is taken for an option: .* write \./-a\.png$"):
        CommandParser(prog="x.py").parse_args(["-a.png"])
    parser = CommandParser(prog="x.py")
    parser.add_argument("input")
    with pytest.raises(UserError, match=r"^-a\.png is taken for an option: "):
        parser.parse_args(["-a.png"])
    with pytest.raises(UserError, match=r"^the following arguments are required: input"):
        parser.parse_known_args([])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], r"^the following arguments are required: model, input\. Examples: python x\.py --help$"),
        (["m", "a", "--topk", "3"], r"^unknown option --topk; did you mean 'top_k'\? All options: python x"),
        (["m", "a", "-top_k=3"], r"^unknown option -top_k=3; did you mean 'top_k'\?"),
        (["m", "a", "--zzz"], r"^unknown option --zzz\. All options: python x\.py --help$"),
        (["m", "a", "--top", "3"], r"^unknown option --top; did you mean 'top_k'"),
        (["m", "a", "--top_k", "3", "b"], r"^cannot place the argument 'b': a path with spaces needs quotes, and no"),
        (["m", "a", "--top_k", "3", "\u2014private"], r"^\u2014private has a dash or a quote of a word processor"),
        (["m", "a", "--private", "#", "three", "of", "them"], r"^# begins a comment, which this shell does not skip"),
        (["m", "a", "--top-k", "three"], r"^argument --top_k: invalid int value: 'three'; give a whole number"),
        (["m", "a", "--top_k"], r"^argument --top_k: expected one argument$"),
    ],
)
def test_mistake_gives_one_message(line, message):
    parser = CommandParser(prog="x.py", description="Do it.")
    parser.add_argument("model")
    parser.add_argument("input", nargs="+")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--private", action="store_true")
    with pytest.raises(UserError, match=message):
        parser.parse_args(line)
