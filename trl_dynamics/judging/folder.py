"""The folder of a comparison: its settings, its answers and its verdicts, each on the disk as soon as it is there."""

import json
from pathlib import Path

from trl_dynamics.judging.match import FIRST, SECOND, Showing, Verdict
from trl_dynamics.probing.cache import AnswerCache
from trl_dynamics.probing.journal import Journal
from trl_dynamics.store import files
from trl_dynamics.store.lock import LOCK_NAME, RunLock

SETTINGS_FILE, CACHE_FILE, VERDICTS_FILE, SUMMARY_FILE = (
    "settings.json",
    "answers.jsonl",
    "verdicts.jsonl",
    "summary.json",
)


class ComparisonFolder:
    """Where a comparison is kept; one process at a time, as a context manager.

    Args:
        root (`str` or `Path`): Made where it is missing.

    Raises:
        ValueError: On entering, if the folder holds something else, cannot be written, or another process is at work.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.settings: dict = {}
        self.rows: dict[str, dict] = {}

    def __enter__(self) -> "ComparisonFolder":
        try:
            files.make_folder(self.root)
            settings = self.root / SETTINGS_FILE
            begun = [path for path in self.root.iterdir() if path.name != LOCK_NAME and path.suffix != files.TEMPORARY]
            if begun and not settings.is_file():
                raise ValueError(f"{str(self.root)!r} is not empty and holds no comparison; choose another folder")
            self._lock = RunLock(self.root)
            self._lock.acquire()
        except OSError as error:
            raise ValueError(f"cannot write to {str(self.root)!r}: {error.strerror or error}") from error
        try:
            if settings.is_file():
                self.settings = _read_settings(settings)
            else:
                self.write(SETTINGS_FILE, "{}\n")
            self.cache = AnswerCache(self.root / CACHE_FILE)
            self._verdicts = Journal(
                self.root / VERDICTS_FILE,
                self._read,
                file_is="the verdicts",
                row_is="a verdict",
                remedy="remove the line, or choose another folder",
            )
        except ValueError:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.cache.__exit__(*error)
        self._verdicts.close()
        self._lock.release()

    def settle(self, name: str, value: object) -> None:
        """Write down what this comparison depends on, or refuse what is not as it was.

        Raises:
            ValueError: If the folder was begun with another value.
        """
        value = json.loads(json.dumps(value))
        if name not in self.settings:
            self.settings[name] = value
            self.write(SETTINGS_FILE, json.dumps(self.settings, indent=2) + "\n")
        elif self.settings[name] != value:
            difference = _difference(name, self.settings[name], value)
            raise ValueError(
                f"{str(self.root)!r} holds a comparison with other settings: {difference}. Go on with the earlier "
                "ones, or choose another --output_dir"
            )

    def add(self, showing: Showing, verdict: Verdict) -> None:
        """Keep a verdict; it is on the disk when this returns."""
        row = to_row(showing, verdict)
        self._verdicts.append(row)
        self.rows[row["key"]] = row

    def write(self, name: str, text: str) -> None:
        """Write a whole file."""
        try:
            files.write(self.root / name, text.encode())
        except OSError as error:
            raise ValueError(f"cannot write {str(self.root / name)!r}: {error.strerror or error}") from error

    def _read(self, row: dict) -> None:
        if not {"prompt", "first", "verdict"} <= set(row):
            raise ValueError(f"it has the fields {sorted(row)}")
        self.rows[row["key"]] = row


def to_row(showing: Showing, verdict: Verdict) -> dict:
    """A verdict as a line of the file: the prompt's number, the side that was shown first, and as `verdict` the side
    that won, `tie` or `unparsable`."""
    winner = {FIRST: showing.sides[0], SECOND: showing.sides[1]}.get(verdict.choice, verdict.choice)
    row = {"prompt": showing.match.index, "first": showing.leader, "verdict": winner}
    if verdict.said:
        row["said"] = verdict.said
    if verdict.numbers:
        row["numbers"] = {side: dict(numbers) for side, numbers in verdict.numbers.items()}
    return row | {"key": showing.key}


def _read_settings(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {found!r:.60}, expected an object; choose another folder")
    return found


def _difference(name: str, before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in before | now if before.get(key) != now.get(key))
        return _difference(f"{name}, {key}", before.get(key), now.get(key))
    return f"{name} was {before!r:.80}, now {now!r:.80}"
