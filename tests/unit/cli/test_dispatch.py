"""Groups of commands: names to modules, the list, and what is unknown."""

import argparse
import sys
from types import ModuleType

import pytest

from trl_dynamics.cli import env
from trl_dynamics.cli.dispatch import Group
from trl_dynamics.cli.main import main

GROUP = Group("group", "animal", {"import": "a keyword", "red-fox": "two words"}, "usage: group ANIMAL", ("a note",))


@pytest.fixture
def calls(monkeypatch) -> list:
    found: list = []
    for name in ("import_", "red_fox"):
        module = ModuleType(f"group.{name}")
        module.run = lambda argv, name=name: found.append((name, argv)) or 7
        monkeypatch.setitem(sys.modules, f"group.{name}", module)
    monkeypatch.setitem(sys.modules, "group", ModuleType("group"))
    return found


def test_a_name_leads_to_its_module(calls):
    assert GROUP.run(["import", "a", "--b"]) == 7 and GROUP.run(["red-fox"]) == 7
    assert calls == [("import_", ["a", "--b"]), ("red_fox", [])]


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["-h"], 0), (["--help"], 0)])
def test_without_a_name_the_list_is_printed(argv, status, capsys):
    assert GROUP.run(argv) == status
    assert capsys.readouterr().out.splitlines() == [
        "usage: group ANIMAL",
        "",
        "  import   a keyword",
        "  red-fox  two words",
        "",
        "a note",
    ]


def test_what_is_unknown_names_what_there_is(capsys):
    with pytest.raises(ValueError, match="unknown animal 'cow'; expected one of import, red-fox"):
        GROUP.run(["cow"])
    assert main(["cow"]) == 2 and "unknown command 'cow'" in capsys.readouterr().err
    assert main(["probes", "cow"]) == 1 and "unknown action 'cow'" in capsys.readouterr().err


def test_argparse_is_as_it_was_while_a_command_runs(monkeypatch):
    """Code of a user's own, such as a reward function, may parse arguments too."""
    whole, seen = argparse.ArgumentParser.error, []
    monkeypatch.setattr(env, "run", lambda argv: seen.append(argparse.ArgumentParser.error) or 0)
    assert main(["env"]) == 0 and seen == [whole]
