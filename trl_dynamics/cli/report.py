"""trl-dynamics report: runs -> one offline page, PNG charts or CSV."""

from dataclasses import dataclass
from pathlib import Path

from trl_dynamics.cli.options import argument, option, read
from trl_dynamics.report.load import open_run


@dataclass
class ReportArguments:
    """Options of `trl-dynamics report`."""

    runs: list[str] = argument("output directories of runs (or their dynamics/ folders)")
    output: str | None = option(
        None, "the page, or the folder for png/csv; default: report.html in the first run's dynamics/", "-o"
    )
    format: str = option("html", "", choices=["html", "png", "csv"])


def run(argv: list[str]) -> int:
    """Write what was asked for and print its path.

    Raises:
        ValueError: If the output's name is that of another format, or of one file where several are written.
    """
    args = read(ReportArguments, argv, "report", __doc__)
    if args.output is not None:
        check_output(args.output, args.format)
    if args.format == "html":
        from trl_dynamics.report.page import build_page

        written = [build_page(args.runs, args.output or open_run(args.runs[0]).root / "report.html")]
    else:
        from trl_dynamics.report import export

        folder = Path(args.output or open_run(args.runs[0]).root / args.format)
        written = (export.export_png if args.format == "png" else export.export_csv)(args.runs, folder)
    for path in written:
        print(path)
    return 0


def check_output(output: str, kind: str) -> None:
    """Refuse a name that promises something else than what would be written there.

    Raises:
        ValueError: Says what the format writes.
    """
    suffix = Path(output).suffix.lower()
    if kind == "html" and suffix in (".csv", ".png"):
        raise ValueError(f"-o {output} is named like a {suffix[1:]} file: add --format {suffix[1:]} and name a folder")
    if kind == "html" and Path(output).is_dir():
        raise ValueError(f"-o {output} is a folder, expected the page's name, e.g. {Path(output, 'report.html')}")
    if kind != "html" and suffix in (".csv", ".png", ".html"):
        raise ValueError(f"-o {output} is named like a file, expected a folder: --format {kind} writes several files")
