"""trl-dynamics probes import: the published layout, or any table with a column per response type -> a probe set."""

from dataclasses import dataclass
from pathlib import Path

from trl_dynamics.cli import options
from trl_dynamics.cli.options import argument, option
from trl_dynamics.cli.probes.columns import parse_columns
from trl_dynamics.probing import card
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.build import Built
from trl_dynamics.probing.flat_rows import from_rows
from trl_dynamics.probing.schema import RESERVED_FIELDS, ProbeSet, is_known_type


@dataclass
class ImportArguments:
    """Options of `trl-dynamics probes import`."""

    source: str = argument(".jsonl, .parquet or .csv file, dataset folder or hub dataset")
    output_dir: str | None = option(None, "folder of the new set", "-o", required=True)
    columns: list[str] = option(
        [],
        "COLUMN=TYPE, and COLUMN=prompt; columns that are neither named here nor named like a type are left out",
    )
    name: str | None = option(None, "name of the set; by default that of its folder")
    license: str = option("unknown", "licence of the source, for the card")
    overwrite: bool = option(False, "replace a probe set in that folder")


def run(argv: list[str]) -> int:
    """Read, validate and write the set with its card.

    Raises:
        ValueError: If the source, a column or a row is wrong; then nothing is written.
    """
    args = options.read(ImportArguments, argv, "probes import", __doc__)
    probe_io.refuse_existing(args.output_dir, args.overwrite)
    columns = parse_columns(args.columns)
    name = args.name or Path(args.output_dir).name
    probe_set, left_out = read(args.source, columns, name)
    about = {
        "source": Path(args.source).name if Path(args.source).exists() else args.source,
        "license": args.license,
        "columns": columns,
        "columns_left_out": left_out,
        "versions": card.versions(),
    }
    probe_set = ProbeSet(probe_set.probes, name, probe_set.metadata | about, probe_set.required_types)
    built = Built(probe_set)
    folder = built.save(args.output_dir, overwrite=args.overwrite)
    print(*built.lines(), sep="\n")
    if left_out:
        print(f"columns left out: {', '.join(left_out)}")
    print(f"probe set: {folder}")
    return 0


def read(source: str, columns: dict[str, str], name: str) -> tuple[ProbeSet, list[str]]:
    """The source as a probe set under our names, and the columns that were left out."""
    if not columns:
        probe_set = probe_io.load(source, name=name)
        return probe_set, probe_set.metadata.get("columns_left_out", [])
    rows = probe_io.read_rows(source)
    present = {column for row in rows for column in row}
    absent = [column for column in columns if column not in present]
    if absent:
        raise ValueError(f"{source!r} has no column {absent[0]!r}; found {sorted(present)}")
    kept = {column: column for column in present if is_known_type(column) or column in RESERVED_FIELDS}
    # A column given to a name takes the place of one that has the name already.
    kept = {column: ours for column, ours in kept.items() if ours not in columns.values()} | columns
    renamed = [{ours: row[column] for column, ours in kept.items() if row.get(column) is not None} for row in rows]
    return from_rows(renamed, name=name, types=tuple(columns.values())), sorted(present - set(kept))
