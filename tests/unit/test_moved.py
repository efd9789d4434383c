"""Paths that the README promised before modules moved."""

import importlib
import subprocess
import sys

import pytest

from trl_dynamics.moved import MOVED

NAMES = {
    "trl_dynamics.akg.cheap": "head_only",
    "trl_dynamics.akg.gram.gram": "gram",
    "trl_dynamics.akg.influence": "influence",
    "trl_dynamics.akg.several": "influences",
    "trl_dynamics.akg.verify": "verify",
    "trl_dynamics.tracking.lbk": "lower_bounds",
    "trl_dynamics.tracking.metrics": "METRICS",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_new_module_s_names_with_a_warning(old):
    module = importlib.import_module(old)
    with pytest.warns(FutureWarning, match=MOVED[old]):
        found = getattr(module, NAMES[old])
    assert found is getattr(importlib.import_module(MOVED[old]), NAMES[old])
    for name in ("nothing_of_that_name", "__file__"):
        assert not hasattr(module, name)


def test_the_package_s_function_can_be_called_whatever_was_imported_first():
    code = """
import warnings
warnings.simplefilter("ignore")
{first}
{second}
from trl_dynamics.akg import one_step
try:
    influence()
except TypeError as error:
    print(error)
"""
    old, new = "from trl_dynamics.akg.influence import predict", "from trl_dynamics.akg import influence"
    said = set()
    for first, second in ((old, new), (new, old)):
        run = [sys.executable, "-c", code.format(first=first, second=second)]
        said.add(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert len(said) == 1 and "influence() missing" in said.pop()


def test_importing_the_package_warns_of_nothing():
    command = [
        sys.executable,
        "-W",
        "error::FutureWarning:trl_dynamics",
        "-c",
        "import trl_dynamics; trl_dynamics.load_records",
    ]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
