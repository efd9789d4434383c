"""Where the command line takes models, data and probe sets from: files, folders, the hub, or what is shipped."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import trl
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers.integrations import get_available_reporting_integrations

from trl_dynamics import embedded, places
from trl_dynamics.errors import crosses_user_code, first_line, is_unreadable, root_cause
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.files import quiet_readers, refusal, require_utf8
from trl_dynamics.probing.schema import ProbeSet

# As model, dataset or probe set: what this package ships, so that a run needs neither files nor a hub.
EMBEDDED = "embedded"
EMBEDDED_ROWS, EMBEDDED_PROBES = 200, 40

_LOCAL_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Trackers that the Trainer can log to, and the package of each.
REPORTERS = {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
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


def find_model(name_or_path: str | None) -> str:
    """The model's folder or hub name.

    Raises:
        ValueError: If none is given or a local folder does not exist.
    """
    if not name_or_path:
        raise ValueError("no model given: pass --model_name_or_path (a folder, a hub name, or 'embedded')")
    if name_or_path == EMBEDDED:
        return embedded.model_path()
    return require_folder(name_or_path, "model")


def require_folder(name_or_path: str, what: str) -> str:
    """Refuse a local model folder that does not exist; `what` says what the model is for.

    Raises:
        ValueError: If it does not exist, or is a file.
    """
    expected = "a folder with a model, or a hub name"
    places.refuse_missing(name_or_path, what, expected)
    if Path(name_or_path).is_file():
        raise ValueError(f"{what} {name_or_path!r} is a file; expected {expected}")
    return name_or_path


def find_checkpoint(given: str | bool | None, output_dir: str) -> str | bool | None:
    """What training resumes from: a checkpoint's folder, True for the last one of the run, or None.

    Raises:
        ValueError: If there is no such checkpoint.
    """
    value = {"true": True, "false": None}.get(str(given).lower(), given)
    if not value:
        return None
    there = sorted(path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json"))
    hint = f"; {output_dir!r} has {', '.join(path.name for path in there)}" if there else ""
    if value is True and not there:
        raise ValueError(f"resume_from_checkpoint is True, but {output_dir!r} has no checkpoint; start without it")
    if value is not True and not Path(value, "trainer_state.json").is_file():
        what = "is no checkpoint (it has no trainer_state.json)" if Path(value).exists() else "does not exist"
        raise ValueError(f"resume_from_checkpoint {value!r} {what}; expected a folder checkpoint-N of a run{hint}")
    return value


def require_template(path: str | None) -> None:
    """Refuse a chat template that does not exist, before anything is loaded.

    Raises:
        ValueError: If it is neither a file nor a model's folder nor a name that may be on the hub.
    """
    if path is not None:
        places.refuse_missing(path, "chat_template_path", "a .jinja file, or a folder or hub name of a tokenizer")


def require_reporters(report_to: list[str] | str | None) -> None:
    """Refuse trackers whose package is missing, before anything is loaded.

    Raises:
        ValueError: Names the package to install.
    """
    wanted = [report_to] if isinstance(report_to, str) else report_to or []
    available = get_available_reporting_integrations()
    for name, package in REPORTERS.items():
        if name not in wanted or name in available:
            continue
        raise ValueError(
            f"report_to has {name!r}, whose package is missing; pip install {package}, or --report_to none"
        )


def find_probe_set(source: str | None, num_probes: int | None, types: Sequence[str] = ()) -> ProbeSet | None:
    """The probe set of that name, its first `num_probes` probes; None where none is named.

    `types` are columns that hold answers besides those named like a response type.
    """
    if source is None:
        return None
    if source == EMBEDDED:
        return embedded.probe_set(num_probes or EMBEDDED_PROBES)
    probe_set = probe_io.load(source, types=types)
    return probe_set if num_probes is None else probe_set.select(num_probes)


def load_splits(script_args, dataset_args):
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
def streaming(script_args) -> Iterator[None]:
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


def take_split(splits, name: str):
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


def require_free(output_dir: str, own_file: str, overwrite: bool) -> Path:
    """The folder of new results, which replace earlier ones only with `overwrite`.

    Args:
        output_dir (`str`): As given.
        own_file (`str`): What results of this command have in their folder.
        overwrite (`bool`): Replace such results.

    Raises:
        ValueError: If it is a file, cannot be written, or holds something else.
    """
    folder = Path(output_dir)
    require_writable(output_dir)
    if folder.exists() and any(folder.iterdir()) and not (overwrite and (folder / own_file).is_file()):
        raise ValueError(f"{output_dir!r} is not empty; choose another folder, or --overwrite earlier results")
    return folder


def require_writable(output_dir: str) -> None:
    """Refuse an output directory that cannot be written, before anything is loaded; it is not made yet.

    Raises:
        ValueError: If no file can be made there, or in the nearest folder above it that exists.
    """
    place = Path(output_dir)
    try:
        nearest = next(path for path in (place, *place.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {output_dir!r}: {error.strerror}; choose another one") from error
