"""Options of commands: a dataclass field with its help, and reading them from the line and a YAML file."""

from dataclasses import field

import trl

from trl_dynamics.probing.files import read_mapping


def option(default, text: str, *aliases: str):
    """A field for `HfArgumentParser`: its default (a list starts empty), its help, and other names for it.

    The help is plain text: argparse, which formats it with `%`, finds each sign doubled.
    """
    metadata = {"help": text.replace("%", "%%")} | ({"aliases": list(aliases)} if aliases else {})
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(parser: trl.TrlParser, argv: list[str], **how) -> tuple:
    """[`~trl.TrlParser.parse_args_and_config`], with one line for a `--config` file that cannot be used.

    Raises:
        ValueError: If the file is missing, not YAML, no mapping, or has a value of the wrong kind.
    """
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
