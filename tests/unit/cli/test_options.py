"""Options as fields of a dataclass, read from the line."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from trl_dynamics import cli
from trl_dynamics.cli.options import argument, option, parser_of, read


@dataclass
class Options:
    source: str = argument("where from")
    others: list[str] = argument("what else")
    model: str | None = option(None, "which, 100 %", "-m", required=True)
    num: int = option(3, "how many")
    rate: float | None = option(None, "how fast")
    types: list[str] = option([], "of which types")
    format: str = option("html", "as what", choices=["html", "png"])
    full: bool = option(False, "all of it")


def test_every_kind_of_option_is_read():
    given = "a b c -m d --num 4 --rate 0.5 --types e f --format png --full".split()
    assert read(Options, given, "test", None) == Options("a", ["b", "c"], "d", 4, 0.5, ["e", "f"], "png", True)
    least = read(Options, ["--full", "a", "b", "-m", "d"], "test", None)
    assert least == Options("a", ["b"], "d", full=True) and least.types == [] and least.rate is None


def test_a_list_is_each_object_s_own():
    one, other = (read(Options, ["a", "b", "-m", "c"], "test", None) for _ in range(2))
    one.types.append("x")
    assert other.types == []


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ([], "source"),
        (["a", "b"], "-m/--model"),
        (["a", "b", "-m", "c", "--num", "x"], "--num"),
        (["a", "b", "-m", "c", "--format", "csv"], "invalid choice: 'csv'"),
        (["a", "b", "-m", "c", "--nope"], "--nope"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(argv, what, capsys):
    with pytest.raises(SystemExit) as left:
        read(Options, argv, "test", None)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("trl-dynamics test: error: ") and what in said.err
    assert said.err.endswith("(see trl-dynamics test --help)\n")


def test_the_help_has_every_text_as_it_was_written(capsys):
    parser = parser_of((WithDefaults,), "test", "What it does.")
    for parse in (partial(read, Options, ["--help"], "test", "What it does."), partial(parser.parse_args, ["--help"])):
        with pytest.raises(SystemExit) as left:
            parse()
        out = capsys.readouterr().out
        assert left.value.code == 0 and "What it does." in out and "which, 100 %" in out and "-m MODEL" in out


@dataclass
class WithDefaults:
    model: str | None = option(None, "which, 100 %", "-m")


def test_errors_of_a_trainer_s_parser_are_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        parser_of((WithDefaults,), "test").parse_args(["--nope"])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_every_command_declares_its_options_in_this_way():
    """The sides of a judgement, two by name, are added to the parser of its options."""
    files = {path.name: path.read_text() for path in Path(cli.__file__).parent.rglob("*.py")}
    assert {name for name, text in files.items() if "add_argument(" in text} == {"options.py", "judge.py"}
    assert {name for name, text in files.items() if " field(" in text} == {"options.py"}
