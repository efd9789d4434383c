"""Several processes: options of `accelerate launch` among a command's own, and starting the command again under it."""

import difflib
import os
import subprocess
import sys

import torch
from accelerate.commands.launch import launch_command_parser

from trl_dynamics.cli.options import names_of
from trl_dynamics.probing.files import read_mapping

# `accelerate launch` sets the second for a single process too. Read before training arguments can set it as well.
LAUNCHED = "RANK" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


def needs_launcher(launch_args: list[str]) -> bool:
    """Whether this process should hand over: launch options were given, or it alone sees several GPUs."""
    return not LAUNCHED and (bool(launch_args) or torch.cuda.device_count() > 1)


def launch(name: str, launch_args: list[str], argv: list[str]) -> int:
    """Start the command on many processes; returns the exit status of `accelerate launch`.

    Raises:
        ValueError: If the file of `--accelerate_config` is missing or no YAML mapping.
    """
    for arg, value in zip(launch_args, [*launch_args[1:], ""], strict=False):
        option, equals, given = arg.partition("=")
        if option in ("--accelerate_config", "--config_file"):
            read_mapping(given if equals else value, option)
    arguments = [arg.replace("--accelerate_config", "--config_file", 1) for arg in launch_args]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "-m", "trl_dynamics.cli.main", name]
    return subprocess.run([*command, *_without(argv, launch_args)], check=False).returncode


def refuse_unknown(launch_args: list[str], own_options: set[str], name: str) -> None:
    """Refuse what is neither an option of the command nor one of `accelerate launch`.

    Raises:
        ValueError: Names the option and the nearest one that exists.
    """
    known = names_of(launch_command_parser()) | {"--accelerate_config"}
    for arg in launch_args:
        option = arg.split("=")[0]
        if option.startswith("--") and option not in known:
            unknown = option.removeprefix("--")
            names = sorted(name.removeprefix("--") for name in own_options | known)
            near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.7)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ValueError(f"unknown option or YAML key {unknown!r}{hint} (trl-dynamics {name} --help)")


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without the options in `taken` and their values; those that came from elsewhere are passed over."""
    rest = list(argv)
    starts = [index for index, arg in enumerate(taken) if arg.startswith("-")]
    for start, stop in zip(starts, [*starts[1:], len(taken)], strict=True):
        option = taken[start:stop]
        for index in range(len(rest)):
            # The value alone may be that of another option.
            if rest[index : index + len(option)] == option:
                del rest[index : index + len(option)]
                break
    return rest
