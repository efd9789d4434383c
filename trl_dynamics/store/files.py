"""The one write seam: every change that the store makes to the disk is one named operation of [`perform`].

A file appears under its name only when it is complete and durable: temporary name, write, fsync, rename, fsync of the
folder. Whoever is killed in between leaves the earlier file, or none, and a `.tmp` that nobody reads.
"""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPORARY = ".tmp"
_CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def perform(operation: str, path: Path, action: Callable[..., object], *arguments) -> object:
    """Do one operation on the disk; tests put their failures here.

    Args:
        operation (`str`): `open`, `write`, `sync`, `rename`, `sync folder`, `make folder` or `remove`.
        path (`Path`): What it is done to.
        action, arguments: The call that does it.
    """
    return action(*arguments)


class NewFile:
    """A file under its temporary name, to be written piece by piece."""

    def __init__(self, path: Path):
        self.path = path
        self._file = perform("open", path, open, path, "wb")

    def write(self, payload: bytes) -> None:
        perform("write", self.path, self._file.write, payload)

    def finish(self) -> None:
        """Bring everything to the disk."""
        perform("sync", self.path, self._sync)

    def close(self) -> None:
        # What a failed write left in the buffer cannot be flushed either, and is thrown away with the file.
        with contextlib.suppress(OSError):
            self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """A file that takes its name, replacing what had it, when the block ends well; else nothing is left of it."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        file = NewFile(temporary)
        try:
            yield file
            file.finish()
        finally:
            file.close()
        perform("rename", path, os.replace, temporary, path)
        perform("sync folder", path.parent, _sync_folder, path.parent)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write(path: Path, payload: bytes) -> None:
    """Write a whole file at once, as [`new_file`] does."""
    with new_file(path) as file:
        file.write(payload)


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing."""
    perform("make folder", path, lambda: path.mkdir(parents=True, exist_ok=True))


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder within its parent folder."""
    perform("rename", target, os.rename, source, target)
    perform("sync folder", target.parent, _sync_folder, target.parent)


def remove(path: Path) -> None:
    """Remove a file or folder that nothing refers to any more; one that resists is left for the next time."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            perform("remove", path, shutil.rmtree, path)
        else:
            perform("remove", path, path.unlink)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of a failed write which place it was, that nothing was lost, and what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise type(error)(
            error.errno,
            f"cannot write probe records ({reason}); nothing already written was lost. Free space or fix permissions, "
            "or choose another output_dir",
            str(path),
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def without_nan(entries: dict) -> dict:
    """The same with None for floats that are not finite, for which JSON has no number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entries.items()
    }
