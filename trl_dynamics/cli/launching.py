"""Several processes: options of `accelerate launch` among a command's own, and starting the command again under it."""

import difflib
import os
import subprocess
import sys

import torch
from accelerate.commands.launch import launch_command_parser

# `accelerate launch` sets the second for a single process too. Read before training arguments can set it as well.
LAUNCHED = "RANK" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


def needs_launcher(launch_args: list[str]) -> bool:
    """Whether this process should hand over: launch options were given, or it alone sees several GPUs."""
    return not LAUNCHED and (bool(launch_args) or torch.cuda.device_count() > 1)


def launch(name: str, launch_args: list[str], argv: list[str]) -> int:
    """Start the command on many processes; returns the exit status of `accelerate launch`."""
    arguments = ["--config_file" if arg == "--accelerate_config" else arg for arg in launch_args]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "-m", "trl_dynamics.cli.main", name]
    return subprocess.run([*command, *_without(argv, launch_args)], check=False).returncode


def refuse_unknown(launch_args: list[str], own_options: set[str], name: str) -> None:
    """Refuse what is neither an option of the command nor one of `accelerate launch`.

    Raises:
        ValueError: Names the option and the nearest one that exists.
    """
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    known.add("--accelerate_config")
    for arg in launch_args:
        option = arg.split("=")[0]
        if option.startswith("--") and option not in known:
            unknown = option.removeprefix("--")
            names = sorted(name.removeprefix("--") for name in own_options | known)
            near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.7)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ValueError(f"unknown option or YAML key {unknown!r}{hint} (trl-dynamics {name} --help)")


def _without(argv: list[str], taken: list[str]) -> list[str]:
    """`argv` without the subsequence `taken` of it; entries of `taken` that came from elsewhere are passed over."""
    left, rest = list(taken), []
    for arg in argv:
        if arg in left:
            left = left[left.index(arg) + 1 :]
        else:
            rest.append(arg)
    return rest
