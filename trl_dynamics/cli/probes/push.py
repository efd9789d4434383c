"""trl-dynamics probes push: upload a probe set's folder to the hub as a dataset."""

from dataclasses import dataclass

from trl_dynamics.cli.options import argument, option, read
from trl_dynamics.probing import io as probe_io


@dataclass
class PushArguments:
    """Options of `trl-dynamics probes push`."""

    folder: str = argument("folder that `probes build` or `probes import` wrote")
    repo_id: str = argument("USER/NAME on the hub")
    private: bool = option(False, "make a new dataset private")


def run(argv: list[str]) -> int:
    """Upload and print the address."""
    args = read(PushArguments, argv, "probes push", __doc__)
    print(probe_io.push(args.folder, args.repo_id, private=args.private))
    return 0
