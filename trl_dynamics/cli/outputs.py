"""Where a command writes and logs to, refused before anything is loaded."""

import tempfile
from pathlib import Path

from transformers.integrations import get_available_reporting_integrations

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
