"""Is a name a path or a repository on the hub? Paths that do not exist are refused before the hub is asked."""

import os
import re
from pathlib import Path

# A name that ends like this is a file's.
FILE_SUFFIXES = (
    *(".jsonl", ".json", ".parquet", ".csv", ".txt", ".yaml", ".yml", ".arrow", ".safetensors", ".bin", ".pt"),
    *(".gz", ".zst", ".xz", ".bz2", ".zip", ".tar"),
)
_HUB_NAME = re.compile(r"[\w.\-/]+", re.ASCII)
# How long the hub may take to say whether it has a repository of a name that looks like a path.
HUB_SECONDS = 5.0


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: no repository on the hub can be called like that."""
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or not _HUB_NAME.fullmatch(name)
        or name.lower().endswith(FILE_SUFFIXES)
    )


def refuse_missing(name: str, what: str, expected: str, *, kind: str = "model") -> None:
    """Refuse a path that does not exist; a name that may be on the hub passes.

    `ORG/NAME` is a hub name, unless there is a folder `ORG` here: then the hub is asked, for a few seconds.

    Args:
        name (`str`): Path or hub name, as given.
        what (`str`): What the name is for, such as `"model"`.
        expected (`str`): What may be given instead.
        kind (`str`, *optional*): Kind of repository: `"model"` or `"dataset"`.

    Raises:
        ValueError: If it is a path and does not exist.
    """
    if Path(name).exists():
        return
    if name.startswith("~") and Path(name).expanduser().exists():
        raise ValueError(f"{what} {name!r}: '~' is not expanded here; write {str(Path(name).expanduser())!r}")
    if looks_local(name):
        raise ValueError(f"{what} {name!r} does not exist; expected {expected}{_nearest(name)}")
    folder = name.split("/")[0]
    if "/" in name and Path(folder).is_dir() and not _is_on_hub(name, kind):
        raise ValueError(
            f"{what} {name!r} is neither a path here (the folder {folder!r} has no {name.split('/')[1]!r}) nor a "
            f"{kind} that the hub returned; expected {expected}"
        )


def require_file(path: str | Path, what: str) -> None:
    """Refuse a path that is no file to read: a folder, or a file that is missing, unreadable or empty.

    Raises:
        ValueError: Says which of these it is.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{what} {str(path)!r} is a folder; expected a file")
    if not path.exists():
        raise ValueError(f"{what} {str(path)!r} does not exist{_nearest(str(path))}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{what} {str(path)!r} cannot be read: permission denied; change its mode or owner")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{what} {str(path)!r} is empty; was it written to its end?")


def _nearest(name: str) -> str:
    """Which part of the path is there."""
    path = Path(name)
    found = next((parent for parent in path.parents if parent.exists()), None)
    if found is None or found in (path.parent, Path(".")):
        return ""
    return f"; there is no folder {str(path.parent)!r} either"


def _is_on_hub(name: str, kind: str) -> bool:
    from huggingface_hub import HfApi, constants

    if Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir():
        return True
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
    except Exception:  # the hub and its HTTP library have many: not found, offline, no network, no permission
        return False
    return True
