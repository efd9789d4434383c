"""One option of a command: a dataclass field with its help."""

from dataclasses import field


def option(default, text: str, *aliases: str):
    """A field for `HfArgumentParser`: its default (a list starts empty), its help, and other names for it."""
    metadata = {"help": text} | ({"aliases": list(aliases)} if aliases else {})
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)
