"""trl-dynamics probes push: upload a probe set's folder to the hub as a dataset."""

import argparse

from trl_dynamics.probing import io as probe_io


def run(argv: list[str]) -> int:
    """Upload and print the address."""
    parser = argparse.ArgumentParser("trl-dynamics probes push", description=__doc__)
    parser.add_argument("folder", help="folder that `probes build` or `probes import` wrote")
    parser.add_argument("repo_id", help="USER/NAME on the hub")
    parser.add_argument("--private", action="store_true", help="make a new dataset private")
    args = parser.parse_args(argv)
    print(probe_io.push(args.folder, args.repo_id, private=args.private))
    return 0
