"""The option `--columns` of `probes build` and `probes import`."""


def parse_columns(given: list[str]) -> dict[str, str]:
    """`COLUMN=TYPE` options as a mapping.

    Raises:
        ValueError: If one has no `=`, or a type is given twice.
    """
    columns: dict[str, str] = {}
    for item in given:
        column, equals, response_type = item.partition("=")
        if not (column and equals and response_type):
            raise ValueError(f"--columns {item!r}: expected COLUMN=TYPE")
        if response_type in columns.values():
            raise ValueError(f"--columns gives {response_type!r} twice; expected one column per type")
        columns[column] = response_type
    return columns
