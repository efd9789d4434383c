"""A file to which finished tiles are appended, so that a run that was interrupted goes on where it stopped."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_dynamics.akg.task import Task

Arrays = dict[str, np.ndarray]


class Journal:
    """Tiles by name, each on disk before the next one starts.

    Args:
        path (`str` or `Path`, *optional*): The file; without one nothing is kept.
        fingerprint (`Mapping`): What the tiles depend on, by words that a message can use.

    Raises:
        ValueError: If the file has tiles of another fingerprint, or is no journal.
    """

    def __init__(self, path: str | Path | None, fingerprint: Mapping[str, str]):
        self.path, self.tiles = None if path is None else Path(path), {}
        if self.path is None:
            return
        records = list(self._read()) if self.path.exists() else []
        if not records:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self._append({"fingerprint": np.array(json.dumps(dict(fingerprint)))})
            return
        if "fingerprint" not in records[0]:
            raise ValueError(f"{self.path} is no journal of gram; give another path")
        before = json.loads(str(records[0]["fingerprint"]))
        differing = sorted(k for k in {*before, *fingerprint} if before.get(k) != fingerprint.get(k))
        if differing:
            raise ValueError(
                f"{self.path} has tiles of a run with other {' and '.join(differing)}; run with the same ones to "
                "resume, or give another path"
            )
        self.tiles = {str(record.pop("tile")): record for record in records[1:]}

    def add(self, tile: str, arrays: Arrays) -> None:
        """Keep a finished tile."""
        self.tiles[tile] = arrays
        if self.path is not None:
            self._append({"tile": np.array(tile), **arrays})

    def _append(self, arrays: Arrays) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        with self.path.open("ab") as file:
            file.write(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> Iterable[Arrays]:
        """The records that are whole; what an interruption left of the last one is cut off."""
        with self.path.open("r+b") as file:
            while head := file.read(8):
                start, size = file.tell() - len(head), int.from_bytes(head, "little")
                blob = file.read(size) if size < 1 << 62 else b""
                if len(head) < 8 or len(blob) < size:
                    if start == 0:
                        raise ValueError(f"{self.path} is no journal of gram; give another path")
                    file.truncate(start)
                    return
                with np.load(io.BytesIO(blob)) as record:
                    yield dict(record)


def fingerprint(task: Task, batches: Iterable[Any], options: Mapping[str, Any]) -> dict[str, str]:
    """What a result depends on: the model's values, the batches, and options."""
    model = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    trained = sorted(task.trainable())
    return {
        "model values": _digest([model, trained]),
        "data": _digest(list(batches)),
        **{name: _digest(value) for name, value in options.items()},
    }


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:32]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(str(name).encode())
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())
