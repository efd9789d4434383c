"""Local data files: JSON lines read by hand, and one line for what is wrong with a file, line number included."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml

from trl_dynamics import places
from trl_dynamics.errors import root_cause


def read_lines(path: str | Path, what: str = "data file") -> list[dict]:
    """The objects of a .jsonl file, one per line; blank lines, a byte order mark and CRLF are passed over.

    Args:
        path (`str` or `Path`): The file.
        what (`str`, *optional*): What it is for, in errors.

    Raises:
        ValueError: If it is no readable UTF-8 file, or a line is not an object; names file and line.
    """
    places.require_file(path, what)
    rows = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(path, number, line))
    except UnicodeDecodeError as error:
        remedy = "unpack it: it is a gzip file" if _is_gzip(path) else "save it as UTF-8"
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); {remedy}") from error
    return rows


def read_texts(path: str | Path, what: str = "data file") -> list[dict[str, str | None]]:
    """The rows of a .csv file, every cell as text and an empty one as None: `NA` and `42` may be answers.

    Args:
        path (`str` or `Path`): The file.
        what (`str`, *optional*): What it is for, in errors.

    Raises:
        ValueError: If it is no readable UTF-8 file, has no rows, or its rows have different numbers of cells.
    """
    places.require_file(path, what)
    require_utf8(path)
    try:
        with warnings.catch_warnings():
            # Rows with more cells than there are columns: without this their last cells would be left out.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise refusal(path, error, what) from error
    if table.empty:
        raise ValueError(f"{what} {str(path)!r} has no rows; expected one below the names of the columns")
    return [{name: text or None for name, text in row.items()} for row in table.to_dict("records")]


def require_utf8(path: str | Path) -> None:
    """Refuse a text file with other bytes, which `datasets` reads and stumbles over much later; gzip files pass.

    Raises:
        ValueError: Names the line.
    """
    if _is_gzip(path):
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 ({error.reason}); save it as UTF-8") from error


def _is_gzip(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _parse_line(path: str | Path, number: int, line: str) -> dict:
    if number == 1 and line.lstrip().startswith("["):
        raise ValueError(f"{path}, line 1 is a list; expected one object per line, or name the file .json")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}; correct or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is a {type(row).__name__}; expected one object per line")
    return row


def read_mapping(path: str | Path, what: str) -> dict:
    """The mapping in a YAML or JSON file.

    Args:
        path (`str` or `Path`): The file.
        what (`str`): What it is for, in errors.

    Raises:
        ValueError: If it is no readable file, not YAML (names the line), or no mapping.
    """
    places.require_file(path, what)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    return parse_mapping(text, f"{what} {str(path)!r}")


def parse_mapping(text: str, what: str) -> dict:
    """The mapping that a text holds as YAML or JSON.

    Raises:
        ValueError: If it is not YAML (names the line), or no mapping.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{what}{where} is not YAML: {problem}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds {found!r:.60}; expected a mapping, one `key: value` per line")
    return found


@contextlib.contextmanager
def quiet_readers() -> Iterator[None]:
    """Leave out what `datasets` logs of a file that it cannot read, ahead of its error."""
    logger = logging.getLogger("datasets.packaged_modules")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def refusal(path: str | Path, error: Exception, what: str = "data file") -> ValueError:
    """Why `datasets` could not read a local file: the line of a .jsonl file, else what the reader said.

    Args:
        path (`str` or `Path`): The file or folder.
        error (`Exception`): What `datasets` raised.
        what (`str`, *optional*): What it is for.
    """
    path = Path(path)
    try:
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            if file.suffix == ".jsonl" and not read_lines(file, what):
                return ValueError(f"{what} {str(file)!r} has no rows; expected one object per line")
        if path.is_file():
            places.require_file(path, what)
    except ValueError as found:
        return found
    kind = "as a dataset" if path.is_dir() else f"as {path.suffix.removeprefix('.')}"
    return ValueError(f"{what} {str(path)!r} cannot be read {kind}: {root_cause(error)}")
