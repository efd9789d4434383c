"""The data that commands train on, screen or ask: files, folders, hub datasets, mixtures, or what is shipped."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import trl
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from trl_dynamics import embedded, places
from trl_dynamics.cli.sources import EMBEDDED
from trl_dynamics.errors import crosses_user_code, first_line, is_unreadable, root_cause
from trl_dynamics.probing.files import quiet_readers, refusal, require_utf8

EMBEDDED_ROWS = 200
_LOCAL_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_ACCEPTED_COLUMNS = {
    "dpo": [{"chosen", "rejected"}],
    "grpo": [{"prompt"}, {"chosen", "rejected"}],
    "sft": [
        {"messages"},
        {"text"},
        {"prompt", "completion"},
        {"prompt", "chosen"},
        {"chosen", "rejected"},
        {"conversations"},
        {"input_ids"},
    ],
}


def load_splits(script_args: trl.ScriptArguments, dataset_args: trl.DatasetMixtureConfig) -> DatasetDict:
    """The training data by split: a local file or folder, a hub dataset, or a mixture.

    Raises:
        ValueError: If neither or both of `dataset_name` and `datasets` are given, or a local path does not exist.
    """
    if bool(script_args.dataset_name) == bool(dataset_args.datasets):
        raise ValueError(
            "give exactly one of --dataset_name (a file, folder or hub dataset) and `datasets:` in the YAML"
        )
    if dataset_args.datasets:
        return _mixture(dataset_args)
    name, path = script_args.dataset_name, Path(script_args.dataset_name)
    if name == EMBEDDED:
        num_rows = script_args.dataset_num_rows or EMBEDDED_ROWS
        splits = {split: embedded.preference_rows(num_rows, split=split) for split in ("train", "test")}
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    places.refuse_missing(name, "dataset", "a .jsonl or .parquet file, a folder or a hub name", kind="dataset")
    kind = _kind(path) if path.is_file() else None
    streaming = script_args.dataset_streaming
    with reading(name), quiet_readers():
        if path.is_dir() and any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            loaded = load_from_disk(name)
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
        if kind is not None:
            return load_dataset(kind, data_files=name, streaming=streaming)
        data_dir = getattr(script_args, "dataset_data_dir", None)
        return load_dataset(name, name=script_args.dataset_config, data_dir=data_dir, streaming=streaming)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Say which dataset cannot be read, and of a .jsonl file which line.

    Raises:
        ValueError: In place of what the readers raise: each has errors of its own.
    """
    try:
        yield
    except Exception as error:
        if Path(name).exists():
            raise refusal(name, error, "dataset") from error
        raise ValueError(
            f"dataset {name!r} is neither a file or folder here nor a dataset that the hub returned: "
            f"{first_line(error)}"
        ) from error


@contextlib.contextmanager
def streaming(script_args: trl.ScriptArguments) -> Iterator[None]:
    """[`reading`] for a local file that is streamed: its lines are read while it is used.

    Raises:
        ValueError: In place of what the readers of data files raise.
    """
    try:
        with quiet_readers():
            yield
    except Exception as error:
        name = script_args.dataset_name
        is_of_data = is_unreadable(error) and not crosses_user_code(error)
        if not script_args.dataset_streaming or not is_of_data or not Path(name or "").exists():
            raise
        raise refusal(name, error, "dataset") from error


def _mixture(dataset_args) -> DatasetDict:
    parts = dataset_args.datasets
    for part in parts:
        places.refuse_missing(part.path, "dataset", "a folder, a hub name or a kind of files", kind="dataset")
    try:
        return trl.get_dataset(dataset_args)
    except Exception as error:
        names = ", ".join(str(part.path) for part in parts)
        raise ValueError(f"the mixture of {names} cannot be read: {root_cause(error)}") from error


def _kind(path: Path) -> str:
    """Which reader of `datasets` a file is for."""
    if path.suffix not in _LOCAL_KINDS:
        raise ValueError(
            f"dataset file {str(path)!r} is of kind {path.suffix!r}; expected one of {list(_LOCAL_KINDS)}: convert or "
            "unpack it"
        )
    places.require_file(path, "dataset file")
    if path.suffix != ".parquet":
        require_utf8(path)
    return _LOCAL_KINDS[path.suffix]


def take_split(splits: DatasetDict, name: str) -> Dataset:
    """One split of the data.

    Raises:
        ValueError: If there is no such split.
    """
    if name not in splits:
        raise ValueError(f"the data has no split {name!r}; found {list(splits)}")
    return splits[name]


def require_columns(dataset: Dataset, method: str) -> None:
    """Refuse data that `method` cannot train on.

    Raises:
        ValueError: If the columns are those of no format that TRL knows for it.
    """
    columns, accepted = set(dataset.column_names), _ACCEPTED_COLUMNS[method]
    if not any(wanted <= columns for wanted in accepted):
        listed = " or ".join("+".join(sorted(wanted)) for wanted in accepted)
        raise ValueError(f"training data has the columns {sorted(columns)}; {method} needs {listed}")
