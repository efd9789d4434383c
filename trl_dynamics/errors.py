"""Errors on one line: whose they are, and the part of a library's message that helps."""

import json
import sysconfig
import traceback
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent
_PYTHON = Path(sysconfig.get_path("stdlib")).resolve()
# Packages whose own errors are about files, networks and formats.
_READERS = ("datasets", "httpx", "huggingface_hub", "pyarrow", "requests", "safetensors", "yaml")
# Packages that take the user's options; their ValueErrors say what is wrong with one.
_HOSTS = ("trl", "transformers", "peft", "accelerate")


def raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code: its message is then all a user needs."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE_ROOT)


def is_unreadable(error: BaseException) -> bool:
    """Whether a reader of data files raised it."""
    return type(error).__module__.partition(".")[0] in _READERS or isinstance(error, UnicodeDecodeError)


def from_outside(error: BaseException) -> bool:
    """Whether an error of another package is about files, the network, a missing package, or an option of the user."""
    if is_unreadable(error) or isinstance(error, OSError | ImportError | json.JSONDecodeError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    places = [Path(frame.filename).parts for frame in frames[-1:]]
    return isinstance(error, ValueError) and any(host in parts for host in _HOSTS for parts in places)


def crosses_user_code(error: BaseException) -> bool:
    """Whether the error passed through code of the user's own, such as a reward function: files that are installed
    neither with Python nor with a package."""
    return any(map(_is_users, traceback.walk_tb(error.__traceback__)))


def _is_users(place: tuple) -> bool:
    frame, _ = place
    if frame.f_code.co_filename.startswith("<"):
        return False
    # A package may be installed in place, from a checkout.
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    path = Path(frame.f_code.co_filename).resolve()
    installed = path.is_relative_to(PACKAGE_ROOT) or path.is_relative_to(_PYTHON) or package in (*_HOSTS, *_READERS)
    return not installed and not {"site-packages", "dist-packages"} & {*path.parts}


def first_line(error: BaseException) -> str:
    """The first line of a message that says something, or the error's name; a heading takes the next one with it."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def root_cause(error: BaseException) -> str:
    """[`first_line`] of the error that the others came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
