"""One writer per output_dir: a lock on a file beside `dynamics/` that the kernel drops together with its owner."""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import weakref
from pathlib import Path

from trl_dynamics.store import files

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_NAME = ".dynamics.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockedError(ValueError):
    """Another process is writing into the same output_dir."""


class RunLock:
    """An exclusive `flock` on `output_dir/.dynamics.lock`.

    The kernel releases it when its owner ends, however it ends; nothing has to be cleaned up after a crash. The file
    says who holds it, and is gone after a release.

    On NFS, Linux turns `flock` into a lock of the server, so it holds across hosts; a mount with `nolock` or
    `local_lock=flock`, Lustre with `localflock` and most FUSE file systems keep it within one host. There two hosts
    are not kept apart: a file that another host left behind is all that is seen, and it is warned about. Where the
    file system or the operating system has no such locks at all, a warning says so and nothing is kept apart.

    Args:
        folder (`Path`): The output_dir.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, or keep it when it is held by this object already.

        Raises:
            LockedError: If another process, or another object of this one, holds it.
            OSError: If the file cannot be written.
        """
        while self._descriptor is None:
            descriptor = files.perform(
                "open", self.path, os.open, self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            try:
                self._lock(descriptor)
                # Between opening and locking, the owner may have released the lock and its file be gone.
                if _is_at(descriptor, self.path):
                    self._note_earlier_owner()
                    self._write_owner(descriptor)
                    self._descriptor, descriptor = descriptor, None
                    _HELD.add(self)
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            files.perform("remove", self.path, self.path.unlink)
        os.close(self._descriptor)
        self._descriptor = None
        _HELD.discard(self)

    def forget(self) -> None:
        """Close a forked child's copy: a worker that outlives its parent must not hold the parent's lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            logger.warning("this system has no flock: make sure that one run at a time writes into an output_dir")
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._read_owner()
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
            raise LockedError(
                f"{self.path.parent} is being written by {who}. Wait for it to end, stop it, or use another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                f"{self.path.parent} is on a file system without locks: make sure that one run at a time writes there"
            )

    def _note_earlier_owner(self) -> None:
        owner = self._read_owner()
        if owner and owner["host"] != socket.gethostname():
            logger.warning(
                f"process {owner['pid']} on {owner['host']} took {self.path} at {owner['since']} and never gave it "
                "back. It most likely crashed; if it is still running, this file system does not lock across hosts: "
                "stop one of the two"
            )

    def _read_owner(self) -> dict | None:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
            return owner if {"host", "pid", "since"} <= set(owner) else None
        except (OSError, ValueError, TypeError):
            return None

    def _write_owner(self, descriptor: int) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        # The lock is what counts; a disk too full for its label does not make it less of a lock.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            files.perform("write", self.path, lambda text: os.pwrite(descriptor, text, 0), json.dumps(owner).encode())


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


_HELD: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
