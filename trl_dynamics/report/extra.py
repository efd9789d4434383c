"""The packages of the `report` extra, asked for only when a page or a picture is made."""

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
    try:
        import vl_convert
    except ImportError as error:
        raise ReportExtraMissing("vl-convert-python") from error
    return vl_convert


def jinja2() -> ModuleType:
    """The template engine.

    Raises:
        ReportExtraMissing: If it is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ReportExtraMissing("jinja2") from error
    return jinja2
