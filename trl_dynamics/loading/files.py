"""The files of a model, in a folder or on the hub, and one line for what is wrong with them."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import cached_file

from trl_dynamics.errors import first_line, raised_here

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# What a model in a run's folder was merged from.
MERGED_FROM = "merged_from.json"
# What a mistake in this package raises, and no file.
_FAULTS = (AssertionError, AttributeError, LookupError, NameError, TypeError)
# What the libraries raise for a file that is cut or missing.
_DAMAGED = ("SafetensorError", "UnpicklingError", "EOFError", "BadZipFile", "FileNotFoundError")


class NotLoadable(ValueError):
    """Why a model or tokenizer cannot be loaded, in one line."""


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn whatever goes wrong while a model is loaded into one line that names the model.

    Raises:
        NotLoadable: In place of any error of another package, but for a lack of memory. A fault of this package stays
            what it is.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files of unknown origin: each library that reads them has its own errors
        if isinstance(error, (ValueError, *_FAULTS)) and raised_here(error):
            raise
        raise NotLoadable(f"model {path!r} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    reason = first_line(error)
    if isinstance(error, KeyError):
        return f"{reason} is unknown to the installed transformers or peft; upgrade them, or correct the config"
    if type(error).__name__ in _DAMAGED:
        return f"{reason}; a file is damaged or missing, save or copy the model again"
    return reason


def find_file(path: str, name: str, revision: str | None = None) -> str | None:
    """Path of a file of a folder or hub repository on this machine; None if there is none of that name."""
    if Path(path).is_dir():
        return str(Path(path, name)) if Path(path, name).is_file() else None
    try:
        return cached_file(path, name, revision=revision)
    except OSError:
        return None


def find_adapter_config(path: str, revision: str | None = None) -> str | None:
    """Path of the config of the adapter at a folder or hub name; None where there is a whole model.

    Raises:
        OSError: If the hub cannot be reached and has left nothing in the cache.
    """
    return find_file(path, ADAPTER_CONFIG) if Path(path).is_dir() else _on_hub(path, revision)


@functools.lru_cache
def _on_hub(path: str, revision: str | None) -> str | None:
    """A hub that cannot be reached is waited for once, and not once per file."""
    try:
        cached_file(path, CONFIG, revision=revision)
    except OSError as error:
        found = try_to_load_from_cache(path, ADAPTER_CONFIG, revision=revision)
        if isinstance(found, str):
            return found
        cause = error.__cause__
        if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
            raise
    return find_file(path, ADAPTER_CONFIG, revision)


def require_model(path: str) -> None:
    """Refuse a folder in which there is no model.

    Raises:
        NotLoadable: Says which inner folder holds one, if any.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / CONFIG).is_file():
        return
    inner = sorted(str(found.parent) for name in (CONFIG, ADAPTER_CONFIG) for found in folder.glob(f"*/{name}"))
    hint = f"; there is one in {inner[-1]!r}" if inner else ""
    raise NotLoadable(
        f"{path!r} holds no model: expected {CONFIG} (a whole model) or {ADAPTER_CONFIG} (an adapter){hint}"
    )


def and_more(names: list) -> str:
    """How many names there are after the first."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
