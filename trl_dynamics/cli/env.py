"""trl-dynamics env: versions for a bug report, and what is wrong with them."""

import importlib
import platform

from trl_dynamics import versions
from trl_dynamics.cli.options import Parser

PACKAGES = (*versions.VERSIONED, "tokenizers", "pyarrow", "pandas", "numpy", "jinja2", "vl-convert-python")


def run(argv: list[str]) -> int:
    """Print the platform, the accelerators, the versions that decide how this package behaves, and what is wrong.

    It ends with status 0 whatever is missing or broken: that is what a bug report is about.
    """
    Parser("trl-dynamics env", description=__doc__).parse_args(argv)
    print(f"- platform: {platform.platform()}\n- python: {platform.python_version()}")
    for name, found in versions.installed_versions(PACKAGES).items():
        print(f"- {name}: {found or 'not installed'}")
    for name, look in {"devices": devices, "problems": problems}.items():
        try:
            print(f"- {name}: {look()}")
        except Exception as error:
            # Broken libraries raise anything: OSError for a missing .so, RuntimeError for a driver.
            print(f"- {name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return 0


def devices() -> str:
    """The accelerators that torch sees, else the CPU and its threads."""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or f"cpu, {torch.get_num_threads()} threads"


def problems() -> str:
    """What this package says about the versions, or none; raises the error that importing it raises."""
    # It refuses versions and missing private names.
    importlib.import_module("trl_dynamics.compat")
    return versions.untested(versions.installed_versions(tuple(versions.ACCEPTED))) or "none"
