"""An append-only .jsonl file: each row is on the disk before the next one is made, and a torn end is cut off."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


class Journal:
    """Rows on disk, one line each.

    A last line that was torn by a crash is dropped; anything else that is no row is an error, since the file then is
    another one. One process at a time may have it open.

    Args:
        path (`Path`): Made with its folder where it is missing.
        read (`Callable[[dict], None]`): Called with every row that is there; a KeyError, TypeError or ValueError of
            its says that the row is none.
        file_is, row_is (`str`): What file and rows are, for messages: "the cache of answers", "a cached answer".
        remedy (`str`): What to do about a wrong line.

    Raises:
        ValueError: If a line is no row, or the file cannot be written.
    """

    def __init__(self, path: Path, read: Callable[[dict], None], *, file_is: str, row_is: str, remedy: str):
        self.path, self._num_rows = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
        except OSError as error:
            raise ValueError(f"cannot write {file_is} {str(path)!r}: {error.strerror}") from error
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                logger.warning("the last line of %s was torn by a crash and is dropped", path)
                break
            try:
                read(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                self._file.close()
                raise ValueError(f"{path}, line {number} is not {row_is} ({error}); {remedy}") from error
            good, self._num_rows = good + len(line), number
        self._file.truncate(good)
        self._file.seek(good)

    def append(self, row: dict) -> None:
        """Add a row; it is on the disk when this returns."""
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._num_rows += 1

    def close(self) -> None:
        """Close the file, which disappears if it has no rows."""
        self._file.close()
        if not self._num_rows:
            self.path.unlink(missing_ok=True)
