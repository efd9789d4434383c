"""Where the command line takes models, data and probe sets from: files, folders, the hub, or what is shipped."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import trl
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoConfig, GenerationConfig

from trl_dynamics import embedded
from trl_dynamics.cli.main import raised_here
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.schema import ProbeSet

# As model, dataset or probe set: what this package ships, so that a run needs neither files nor a hub.
EMBEDDED = "embedded"
EMBEDDED_ROWS, EMBEDDED_PROBES = 200, 40

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


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Say of a model that cannot be loaded which one it is.

    Raises:
        ValueError: In place of what transformers raises.
    """
    try:
        yield
    except (OSError, ValueError, AttributeError, ImportError) as error:
        if raised_here(error):
            raise
        raise ValueError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def require_folder(name_or_path: str, what: str) -> str:
    """Refuse a local model folder that does not exist; `what` says what the model is for.

    Raises:
        ValueError: If it does not exist.
    """
    if looks_local(name_or_path) and not Path(name_or_path).is_dir():
        raise ValueError(f"{what} {name_or_path!r} does not exist; expected a folder with a model, or a hub name")
    return name_or_path


def context_length(model: str) -> int | None:
    """How many tokens the model can take, by its config; None if it does not say."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def end_ids(model: str) -> list[int]:
    """Token ids that end a turn by the model's generation config."""
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        return []
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


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
        return trl.get_dataset(dataset_args)
    name, path = script_args.dataset_name, Path(script_args.dataset_name)
    if name == EMBEDDED:
        num_rows = script_args.dataset_num_rows or EMBEDDED_ROWS
        splits = {split: embedded.preference_rows(num_rows, split=split) for split in ("train", "test")}
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    streaming = script_args.dataset_streaming
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        loaded = load_from_disk(name)
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    if path.is_file():
        if path.suffix not in _LOCAL_KINDS:
            raise ValueError(f"dataset file {name!r} is of kind {path.suffix!r}; expected one of {list(_LOCAL_KINDS)}")
        return load_dataset(_LOCAL_KINDS[path.suffix], data_files=name, streaming=streaming)
    if not path.exists() and looks_local(name):
        raise ValueError(
            f"dataset {name!r} does not exist; expected a .jsonl or .parquet file, a folder or a hub name"
        )
    data_dir = getattr(script_args, "dataset_data_dir", None)
    return load_dataset(name, name=script_args.dataset_config, data_dir=data_dir, streaming=streaming)


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


def looks_local(name: str) -> bool:
    """Whether a name can only mean a path: it could not be that of a hub repository."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in _LOCAL_KINDS
