"""trl-dynamics env: versions for a bug report."""

import platform

from trl_dynamics import compat
from trl_dynamics.tracking.run import VERSIONED


def run(argv: list[str]) -> int:
    """Print the platform, the accelerators and the versions that decide how this package behaves."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"]
    lines = {"platform": platform.platform(), "python": platform.python_version(), "devices": ", ".join(devices)}
    packages = (*VERSIONED, "tokenizers", "pyarrow", "pandas", "numpy", "jinja2", "vl-convert-python")
    for name, value in (lines | compat.installed_versions(packages)).items():
        print(f"- {name}: {value or 'not installed'}")
    return 0
