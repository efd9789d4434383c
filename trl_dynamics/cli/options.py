"""Options of commands: fields of a dataclass, each with its help, and reading them from the line and a YAML file."""

import argparse
import functools
from dataclasses import MISSING, Field, field, fields
from typing import Any, get_args, get_origin, get_type_hints


def option(default: Any, text: str, *aliases: str, **how: Any) -> Any:
    """A field: its default (a list starts empty), its help, and other names for it.

    The help is plain text: argparse, which formats it with `%`, finds each sign doubled.

    Args:
        how: Further arguments of [`~argparse.ArgumentParser.add_argument`], such as `choices`.
    """
    metadata = how | {"help": text.replace("%", "%%")} | ({"aliases": list(aliases)} if aliases else {})
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(text: str, **how: Any) -> Any:
    """A field that is given without a name, by its place on the line; of a list, at least one."""
    return field(metadata=how | {"help": text.replace("%", "%%")})


class OneLineErrors:
    """argparse's errors on one line: the usage of a trainer, which would come first, is some 180."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Parser(OneLineErrors, argparse.ArgumentParser):
    """A parser of plain arguments."""


def read(kind: type, argv: list[str], name: str, text: str | None, **how: Any) -> Any:
    """The options of a command that needs neither transformers nor a YAML file.

    Wrong usage ends the process with status 2 and a line on stderr.

    Args:
        kind (`type`): A dataclass of [`option`]s and [`argument`]s of type str, int, bool (off by default) or list.
        argv (`list[str]`): The line after the command.
        name (`str`): The command.
        text (`str`, *optional*): What it does.
        how: Further arguments of [`~argparse.ArgumentParser`], such as `epilog`.
    """
    parser, hints = Parser(f"trl-dynamics {name}", description=text, **how), get_type_hints(kind)
    for part in fields(kind):
        names, how = _declared(part, hints[part.name])
        parser.add_argument(*names, **how)
    return kind(**vars(parser.parse_args(argv)))


def _declared(part: Field, hint: Any) -> tuple[list[str], dict]:
    """Names and further arguments of `add_argument`."""
    how = dict(part.metadata)
    inner = [one for one in get_args(hint) if one is not type(None)] if get_origin(hint) is not list else [hint]
    hint = inner[0] if inner else hint
    if get_origin(hint) is list:
        how["nargs"] = "+"
    elif hint is bool:
        how["action"] = "store_true"
    elif hint is not str:
        how["type"] = hint
    if part.default is MISSING and part.default_factory is MISSING:
        return [part.name], how
    how["default"] = part.default if part.default is not MISSING else part.default_factory()
    return [*how.pop("aliases", ()), f"--{part.name}"], how


def parser_of(types: tuple[type, ...], name: str, text: str | None = None) -> Any:
    """A [`~trl.TrlParser`] for dataclasses of options, those of trainers among them; its errors are one line."""
    return _trl_parser()(types, prog=f"trl-dynamics {name}", description=text)


@functools.cache
def _trl_parser() -> type:
    import trl

    return type("TrlParser", (OneLineErrors, trl.TrlParser), {})


def names_of(parser: argparse.ArgumentParser) -> set[str]:
    """All ways to write the options of a parser, such as `--output_dir` and `-o`."""
    return {name for action in parser._actions for name in action.option_strings}


def parse(parser: Any, argv: list[str], **how: Any) -> tuple:
    """[`~trl.TrlParser.parse_args_and_config`], with one line for a `--config` file that cannot be used.

    Raises:
        ValueError: If the file is missing, not YAML, no mapping, or has a value of the wrong kind.
    """
    from trl_dynamics.probing.files import read_mapping

    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv:
        given = argv[argv.index("--config") + 1 :][:1]
        if not given:
            raise ValueError("--config names no file; expected a YAML file of options")
        parts = read_mapping(given[0], "--config").get("datasets") or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) and "path" in part for part in parts):
            raise ValueError(
                f"`datasets:` in {given[0]!r} is {parts!r:.60}; expected a list of mappings, each with a `path`"
            )
    try:
        return parser.parse_args_and_config(argv, return_remaining_strings=True, **how)
    except (ValueError, TypeError, ImportError) as error:
        # All that happens in there is about the arguments: what the config classes say is for the user to read.
        raise ValueError(" ".join(str(error).split())) from error


def refuse_unknown(unknown: list[str], name: str) -> None:
    """Refuse what no option took.

    Raises:
        ValueError: If there is any; it names the first.
    """
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; see trl-dynamics {name} --help")


def require(args: Any, names: tuple[str, ...], name: str) -> None:
    """Refuse a command without options that it needs.

    Raises:
        ValueError: If one was not given; it names the first.
    """
    for option_name in names:
        if not getattr(args, option_name):
            raise ValueError(f"--{option_name} is missing; see trl-dynamics {name} --help")
