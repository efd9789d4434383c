"""What makes two parts of a run one series: entries of meta.json that must not change on a resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MISSING = object()


@dataclass(frozen=True)
class Same:
    """An entry of meta.json that must be the same after a resume.

    Args:
        path (`str`): Where it is, with dots: `"model.architecture"`. What the earlier or the later meta.json does not
            have is not compared.
        what (`str`): The entry in words, for the error.
        remedy (`str`): What to keep.
        shown (`bool`): Whether its values are shown; not those of hashes.
        causes (`Sequence[str]`): Paths of options that may be why it differs; those that do are named. One that is
            not there was not given.
    """

    path: str
    what: str
    remedy: str
    shown: bool = True
    causes: Sequence[str] = ()


def refuse_other_series(earlier: dict, now: dict, same: Sequence[Same], root: Path) -> None:
    """Refuse to continue rows that something else made.

    Args:
        earlier, now (`dict`): meta.json as recorded, and as this run would write it. The number of processes may
            change.
        same (`Sequence[Same]`): What is compared, in this order.
        root (`Path`): The store, for the message.

    Raises:
        ValueError: If anything differs, with both values and what to do.
    """
    for entry in same:
        was, is_now = _entry(earlier, entry.path), _entry(now, entry.path)
        if was is not _MISSING and is_now is not _MISSING and was != is_now:
            values = f" was {was!r}, is {is_now!r}" if entry.shown else " changed"
            causes = "".join(
                f", {path.rpartition('.')[2]} was {_given(earlier, path)!r}, is {_given(now, path)!r}"
                for path in entry.causes
                if _given(earlier, path) != _given(now, path)
            )
            raise ValueError(
                f"cannot resume probing: {entry.what}{values}{causes}; the records in {root} would not be one series. "
                f"{entry.remedy}, or use another output_dir"
            )
    was, is_now = earlier.get("run_id"), now.get("run_id")
    if None not in (was, is_now) and was != is_now:
        raise ValueError(
            f"cannot resume probing: the checkpoint is of another run than the records in {root}. Resume from a "
            "checkpoint of the run that wrote them, or, if that run's records were moved aside, move its "
            f"{root.name}-old-* folder back to {root.name}"
        )


def _given(meta: dict, path: str) -> object:
    value = _entry(meta, path)
    return None if value is _MISSING else value


def _entry(meta: dict, path: str) -> object:
    for name in path.split("."):
        if not isinstance(meta, dict) or name not in meta:
            return _MISSING
        meta = meta[name]
    return meta
