"""Names to modules: the commands of `trl-dynamics`, and the actions of a command that has several."""

import importlib
import keyword
from collections.abc import Mapping
from typing import NamedTuple

HELP = ("-h", "--help")


class Group(NamedTuple):
    """Commands by name; a named tuple, since a dataclass would slow `--help` down by its import.

    Each is a module of `package` with `run(argv) -> int`, which loads when it is asked for.

    Args:
        package (`str`): Where the modules are. `-` in a name is `_` there, and a keyword of Python ends in `_`.
        noun (`str`): What one of them is called in messages.
        commands (`Mapping[str, str]`): Name -> help.
        usage (`str`): The first line of the help.
        notes (`tuple[str, ...]`, *optional*): Its last lines.
    """

    package: str
    noun: str
    commands: Mapping[str, str]
    usage: str
    notes: tuple[str, ...] = ()

    def run(self, argv: list[str]) -> int:
        """Run the command that `argv` begins with; without one, or for help, print the list.

        Raises:
            ValueError: If there is no such command.
        """
        if not argv or argv[0] in HELP:
            print(self.help())
            return 0 if argv else 2
        if argv[0] not in self.commands:
            raise ValueError(self.unknown(argv[0]))
        name = argv[0].replace("-", "_")
        module = importlib.import_module(f"{self.package}.{name}{'_' if keyword.iskeyword(name) else ''}")
        return module.run(argv[1:])

    def unknown(self, name: str) -> str:
        """What to say of a name that is none of the commands'."""
        return f"unknown {self.noun} {name!r}; expected one of {', '.join(self.commands)}"

    def help(self) -> str:
        """The list of commands."""
        width = max(map(len, self.commands))
        lines = [f"  {name:<{width}}  {text}" for name, text in self.commands.items()]
        return "\n".join([self.usage, "", *lines, *(["", *self.notes] if self.notes else [])])
