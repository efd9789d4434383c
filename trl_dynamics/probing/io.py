"""Probe sets to and from jsonl files, folders, `datasets` objects and the hub.

One flat row per probe: `probe_id`, `prompt` and one column per response type; a type that a probe lacks is absent
or null. [`flat_rows`] says which columns are read.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from trl_dynamics import places
from trl_dynamics.errors import root_cause
from trl_dynamics.plain import plain_or_text
from trl_dynamics.probing.files import quiet_readers, read_lines, read_mapping, read_texts, refusal
from trl_dynamics.probing.flat_rows import from_rows
from trl_dynamics.probing.schema import ProbeSet

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FILE, CARD_FILE = "data.jsonl", "probe.yaml"

_FILE_KINDS = {".json": "json", ".parquet": "parquet"}
# Entries of a card that are read, and the types that they may have.
_CARD_TYPES = {"name": str, "response_types": (dict, list), "required_types": list, "metadata": dict}


def load(source: object, *, name: str | None = None, types: Sequence[str] = ()) -> ProbeSet:
    """Read a probe set.

    Args:
        source: A `ProbeSet` (returned as it is), a folder written by [`save`], a .jsonl or .parquet file, a
            `datasets.Dataset`, a list of rows, or the name of a dataset on the hub.
        name (`str`, *optional*): Name of the set; by default taken from the source.
        types (`Sequence[str]`, *optional*): Columns that hold answers besides those named like a response type; what
            a card of ours lists needs no naming.

    Raises:
        ValueError: If the source does not exist or its rows are not a valid probe set.
    """
    if isinstance(source, ProbeSet):
        return source
    if not isinstance(source, (str, Path)):
        return from_rows(_rows_of(source), name=name or "probes", types=types)
    path = Path(source)
    if path.is_dir() and (path / DATA_FILE).is_file():
        return _read_folder(path, name, types)
    rows = read_rows(source)
    card = {} if path.exists() else _hub_card(str(source))
    types = [*types, *card.get("response_types", ())]
    return from_rows(rows, name=name or (path.stem if path.exists() else str(source)), types=types)


def _rows_of(source) -> list[Mapping]:
    """The rows of an object, for example a `datasets.Dataset`.

    Raises:
        ValueError: If it is not made of rows, for example a `datasets.DatasetDict`.
    """
    kind = type(source).__name__
    if isinstance(source, Mapping) and source and all(hasattr(split, "features") for split in source.values()):
        names = list(source)
        raise ValueError(f"probe_set is a {kind} with the splits {names}; pass one of them, as in data[{names[0]!r}]")
    rows = list(source) if isinstance(source, Iterable) and not isinstance(source, Mapping) else [source]
    if not all(isinstance(row, Mapping) for row in rows) or isinstance(source, Mapping):
        raise ValueError(
            f"probe_set is a {kind}, which is not made of rows; expected a folder, a file, a hub name, a "
            "datasets.Dataset (Dataset.from_dict and Dataset.from_pandas make one) or a list of dicts"
        )
    return rows


def read_rows(source: str | Path) -> list[dict]:
    """The rows of a file, of a folder that `save_to_disk` wrote, or of a dataset on the hub.

    Raises:
        ValueError: If the source does not exist or a line of a .jsonl file is not an object.
    """
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return read_lines(path, "probe set")
    if path.suffix == ".csv" and path.is_file():
        return read_texts(path, "probe set")
    if path.exists():
        return _read_with_datasets(path)
    expected = f"a folder with {DATA_FILE}, a .jsonl or .parquet file, or the name of a dataset on the hub"
    places.refuse_missing(str(source), "probe set", expected, kind="dataset")
    return _read_hub(str(source))


def read_jsonl(
    path: str | Path,
    *,
    name: str | None = None,
    required_types: tuple[str, ...] | None = None,
    types: Sequence[str] = (),
) -> ProbeSet:
    """Read a .jsonl probe set, in this package's layout or the published one; see [`flat_rows.from_rows`].

    Raises:
        ValueError: If the file does not exist, a line is not JSON or the rows are not a valid probe set.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"probe set file {str(path)!r} does not exist")
    rows = read_lines(path, "probe set")
    return from_rows(rows, name=name or path.stem, required_types=required_types, types=types)


def save(probe_set: ProbeSet, folder: str | Path) -> None:
    """Write the set as `data.jsonl` and `probe.yaml` into `folder`, which is created when missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in to_files(probe_set).items():
        (folder / name).write_text(text, encoding="utf-8")


def to_files(probe_set: ProbeSet) -> dict[str, str]:
    """The text of each file that [`save`] writes."""
    rows = "".join(json.dumps(probe.to_row(), ensure_ascii=False) + "\n" for probe in probe_set)
    card = {
        "name": probe_set.name,
        "num_probes": len(probe_set),
        "response_types": probe_set.counts,
        "required_types": list(probe_set.required_types),
        "fingerprint": probe_set.fingerprint,
        "metadata": plain_or_text(probe_set.metadata),
    }
    return {DATA_FILE: rows, CARD_FILE: yaml.safe_dump(card, sort_keys=False, allow_unicode=True)}


def to_dataset(probe_set: ProbeSet) -> "Dataset":
    """The set as a `datasets.Dataset`, one row per probe; a type that a probe lacks is None."""
    from datasets import Dataset

    types = probe_set.response_types
    rows = [{"probe_id": p.probe_id, "prompt": p.prompt} | {t: p.responses.get(t) for t in types} for p in probe_set]
    return Dataset.from_list(rows)


@contextmanager
def complete_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder next to `folder`, which replaces it when the block ends well and disappears when it does not.

    Raises:
        ValueError: If the folder cannot be written.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
    except OSError as error:
        raise ValueError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def write_folder(
    probe_set: ProbeSet, folder: str | Path, files: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> Path:
    """Write the set and further text files as one folder, which appears complete or not at all.

    Args:
        probe_set ([`ProbeSet`]): Written as [`save`] does.
        folder (`str` or `Path`): Made with its parents.
        files (`Mapping[str, str]`, *optional*): File name to text.
        overwrite (`bool`, *optional*): Replace a probe set in that folder.

    Raises:
        ValueError: If something is there already, or the folder cannot be written.
    """
    refuse_existing(folder, overwrite)
    with complete_folder(folder) as part:
        save(probe_set, part)
        for name, text in (files or {}).items():
            (part / name).write_text(text, encoding="utf-8")
    return Path(folder)


def refuse_existing(folder: str | Path, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        ValueError: If `folder` is a file, holds something that is no probe set, or a probe set without `overwrite`.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / DATA_FILE).is_file():
        raise ValueError(f"{str(folder)!r} exists and is no probe set; choose another folder")
    if not overwrite:
        raise ValueError(f"{str(folder)!r} holds a probe set already; pass --overwrite or choose another folder")


def push(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a probe set's folder, card and all, to the hub as a dataset; returns its address.

    Raises:
        ValueError: If the folder is no valid probe set with a card, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    folder = Path(folder)
    if not (folder / DATA_FILE).is_file() or not (folder / "README.md").is_file():
        raise ValueError(
            f"{str(folder)!r} is no probe set with a README.md; build or import one with trl-dynamics probes"
        )
    probe_set = load(folder)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        message = f"Probe set {probe_set.name}, {len(probe_set)} probes, fingerprint {probe_set.fingerprint[:12]}"
        api.upload_folder(folder_path=folder, repo_id=repo_id, repo_type="dataset", commit_message=message)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a dataset on the hub: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError("the hub is switched off here (HF_HUB_OFFLINE); nothing was uploaded") from error
    except HfHubHTTPError as error:
        raise ValueError(_hub_refusal(repo_id, error)) from error
    except Exception as error:  # the hub's HTTP library has errors of its own for a lost or missing connection
        raise ValueError(
            f"the hub cannot be reached ({error}); nothing or part of {repo_id!r} was uploaded"
        ) from error
    return str(url)


def _hub_refusal(repo_id: str, error) -> str:
    status = error.response.status_code if error.response is not None else None
    advice = {
        401: "log in with `hf auth login`, or set HF_TOKEN",
        403: "your token may not write there; it needs the write role for that user or organisation",
        404: "no such user or organisation, or your token cannot see it",
    }.get(status, "try again later")
    return f"the hub refused to take {repo_id!r} (status {status}): {advice}"


def _read_folder(path: Path, name: str | None, types: Sequence[str]) -> ProbeSet:
    card_path = path / CARD_FILE
    card = _read_card(card_path) if card_path.is_file() else {}
    required = tuple(card["required_types"]) if "required_types" in card else None
    probe_set = read_jsonl(
        path / DATA_FILE,
        name=name or card.get("name", path.name),
        required_types=required,
        types=[*types, *card.get("response_types", ())],
    )
    metadata = {**card.get("metadata", {}), **probe_set.metadata}
    return ProbeSet(probe_set.probes, probe_set.name, metadata, probe_set.required_types)


def _read_card(path: Path) -> dict:
    """The entries of a card; one without a value counts as left out.

    Raises:
        ValueError: If an entry that is read is of another type than [`to_files`] writes.
    """
    card = read_mapping(path, "the card of a probe set")
    card = {name: value for name, value in card.items() if value is not None}
    for name, kind in _CARD_TYPES.items():
        if name in card and not isinstance(card[name], kind):
            raise ValueError(
                f"the card of a probe set {str(path)!r} has {name}: {card[name]!r:.60}, which is a "
                f"{type(card[name]).__name__}; correct or remove that entry"
            )
    return card


def _hub_card(name: str) -> dict:
    """What `probe.yaml` of a set on the hub says; nothing where a dataset has no such file."""
    from huggingface_hub import hf_hub_download

    try:
        return _read_card(Path(hf_hub_download(name, CARD_FILE, repo_type="dataset")))
    except Exception:  # no such file, or no way to the hub; its HTTP library has errors of its own
        return {}


def _read_with_datasets(path: Path) -> list[dict]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if path.is_dir():
        try:
            found = load_from_disk(str(path))
        except FileNotFoundError as error:
            raise ValueError(
                f"folder {str(path)!r} holds no probe set; expected {DATA_FILE}, or a dataset written by save_to_disk"
            ) from error
        except Exception as error:
            raise refusal(path, error, "probe set") from error
        if isinstance(found, DatasetDict):
            raise ValueError(
                f"folder {str(path)!r} has the splits {list(found)}; give one of them, as in "
                f"{str(path / next(iter(found)))!r}"
            )
        return list(found)
    if path.suffix not in _FILE_KINDS:
        raise ValueError(
            f"probe set {str(path)!r} is a {path.suffix or 'file without suffix'}; expected .jsonl, .json, "
            ".parquet or .csv"
        )
    try:
        with quiet_readers():
            return list(load_dataset(_FILE_KINDS[path.suffix], data_files=str(path), split="train"))
    except Exception as error:  # each reader has its own errors for a damaged file
        raise refusal(path, error, "probe set") from error


def _read_hub(name: str) -> list[dict]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:
        raise ValueError(
            f"probe set {name!r} is neither a local folder or file nor a dataset that the hub returned: "
            f"{root_cause(error)}"
        ) from error
