"""Where the command line takes models, data and probe sets from: files, folders, the hub, or what is shipped."""

from collections.abc import Sequence
from pathlib import Path

from trl_dynamics import embedded, places
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.schema import ProbeSet

# As model, dataset or probe set: what this package ships, so that a run needs neither files nor a hub.
EMBEDDED = "embedded"
EMBEDDED_PROBES = 40


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
