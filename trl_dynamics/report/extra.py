"""The packages of the `report` extra, asked for only when a page or a picture is made."""

import importlib
from types import ModuleType


class ReportExtraMissing(ImportError):
    """A package of the `report` extra is not installed."""

    def __init__(self, package: str):
        super().__init__(f"the report needs the package {package}: pip install 'trl-dynamics[report]'", name=package)


def vl_convert() -> ModuleType:
    """The Vega-Lite renderer.

    Raises:
        ReportExtraMissing: If it is not installed.
    """
    return _imported("vl_convert", package="vl-convert-python")


def jinja2() -> ModuleType:
    """The template engine.

    Raises:
        ReportExtraMissing: If it is not installed.
    """
    return _imported("jinja2", package="jinja2")


def _imported(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReportExtraMissing(package) from error
