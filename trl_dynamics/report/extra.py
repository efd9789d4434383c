"""The packages of the `report` extra, asked for only when a page or a picture is made."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_dynamics.drawing.text import number
from trl_dynamics.report.text import shown


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


def template(name: str) -> Any:
    """A page's template, which escapes what it is given, shows control characters, and refuses unknown names.

    Raises:
        ReportExtraMissing: If the template engine is not installed.
    """
    engine = jinja2()
    environment = engine.Environment(
        loader=engine.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=engine.StrictUndefined,
    )
    environment.finalize = lambda value: shown(value) if type(value) is str else value
    environment.filters |= {"number": number}
    return environment.get_template(name)


def _imported(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReportExtraMissing(package) from error
