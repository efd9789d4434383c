"""What inner products of gradients cost beside other tools, on the same pairs: CPU seconds, memory, the same numbers.

    python3.11 -m venv peers
    peers/bin/pip install -c constraints.txt -c scripts/bench/peers_constraints.txt transformers kronfluence dattri
    peers/bin/pip uninstall torchvision
    python scripts/bench/peers.py peers/bin/python [--quick]

kronfluence names torchvision but does not import it; one built for another torch breaks transformers.

The tools run in an environment of their own, since they would replace this one's torch, by peer_arms.py, which reads
the model and the rows that this script writes. Each has the fastest batch sizes that were found: kronfluence keeps the
gradients of all observers and takes 16 updates at a time; dattri takes both sides whole, since it computes all
observers' gradients again for each batch of updates. kronfluence sees linear layers alone and is compared with `gram`
on those; dattri sees all parameters.

Every figure is of a process of its own on one thread, medians of interleaved runs; memory is above what the process
had with the model loaded and warmed up. Included: `gram` as it is by default, with the check of one pair; the scoring
of kronfluence from data loader to the file with the scores, but not the fitting of factors that it insists on;
`attribute` of dattri.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import torch
from akg import Setting, built, rows_of
from transformers.utils import logging as hf_logging

from trl_dynamics.akg.gram import gram

GOALS = {"apart": "<= 1e-4, of all products together"}
UPDATE_BATCH = {"kronfluence": 16, "dattri": 4096}
LINEAR = ("proj.weight", "lm_head.weight")
# Rows of either side, tokens, rounds, tools. dattri takes a minute where the others take seconds.
SETTINGS = [
    (16, 64, 3, ("kronfluence",)),
    (64, 64, 3, ("kronfluence",)),
    (12, 256, 3, ("kronfluence",)),
    (16, 64, 1, ("dattri",)),
]
QUICK = [(4, 64, 1, ("kronfluence", "dattri"))]
# Which of our arms has the same numbers.
SAME = {"kronfluence": "gram, linear", "dattri": "gram, all"}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="the interpreter of the environment that has the other tools")
    parser.add_argument("--quick", action="store_true", help="few rows, once; under 50 s on two cores")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    settings = QUICK if args.quick else SETTINGS
    model, ratios, apart = built(8192), {}, {}
    for num_rows, num_tokens, rounds, tools in settings:
        name = f"{num_rows} rows, {num_tokens} tokens"
        runs = interleaved(args.python, model, num_rows, num_tokens, rounds, tools)
        print(name)
        for arm, (seconds, megabytes, _) in runs.items():
            print(f"    {arm:<14}{seconds:>8.2f} s{megabytes:>8.0f} MB")
        for tool in tools:
            ours, theirs = runs[SAME[tool]], runs[tool]
            ratios |= {
                f"{name}/{tool}/seconds": theirs[0] / ours[0],
                f"{name}/{tool}/memory": theirs[1] / ours[1],
            }
            apart[f"{name}/{tool}"] = float((theirs[2] + ours[2]).norm() / ours[2].norm())  # theirs is of -ln pi
    shown = {key: round(value, 3) for key, value in ratios.items()}
    shown |= {f"{key}/apart": float(f"{value:.1e}") for key, value in apart.items()}
    met = all(value <= 1e-4 for value in apart.values())
    print(json.dumps({"name": "peers", "ratios": shown, "goals": GOALS, "met": met}))
    return 0


def interleaved(
    python: str, model: torch.nn.Module, num_rows: int, num_tokens: int, rounds: int, tools: tuple[str, ...]
) -> dict[str, tuple[float, float, torch.Tensor]]:
    """Median seconds and MB of every arm, and its products (O, U)."""
    setting = Setting("", model, num_rows)
    update, observe = (rows_of(setting, num_rows, seed, num_tokens) for seed in (0, 1))
    runs: dict[str, list[tuple[float, float, torch.Tensor]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        for name, side in (("update", update), ("observe", observe)):
            torch.save(side["input_ids"], Path(folder) / f"{name}.pt")
        for _ in range(rounds):
            for arm, endings in (("gram, all", ("",)), ("gram, linear", LINEAR)):
                runs.setdefault(arm, []).append(ours(model, update, observe, endings))
            for tool in tools:
                runs.setdefault(tool, []).append(theirs(python, tool, Path(folder), num_rows))
    return {
        arm: (*(statistics.median(run[k] for run in several) for k in (0, 1)), several[0][2])
        for arm, several in runs.items()
    }


def ours(model: torch.nn.Module, update: dict, observe: dict, endings: tuple[str, ...]) -> tuple:
    """`gram` over the parameters whose names end so; a small call warms up."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings))
    few = [{name: values[:2] for name, values in side.items()} for side in (update, observe)]
    run = measure.time_and_memory(lambda: gram(model, update, observe).total_OU.numpy(), lambda: gram(model, *few))
    return run.seconds, run.megabytes, torch.from_numpy(run.result)


def theirs(python: str, tool: str, folder: Path, num_rows: int) -> tuple:
    """One of the other tools, by its own interpreter."""
    script, batches = Path(__file__).with_name("peer_arms.py"), (min(UPDATE_BATCH[tool], num_rows), num_rows)
    command = [python, str(script), tool, str(folder), *map(str, batches), "sdpa"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{tool} failed:\n{found.stderr[-2000:]}")
    run = json.loads(found.stdout.splitlines()[-1])
    if run["torch"] != torch.__version__:
        print(f"{tool} runs with torch {run['torch']}, this with {torch.__version__}", file=sys.stderr)
    return run["seconds"], run["megabytes"], torch.load(folder / f"{tool}.pt").double()


if __name__ == "__main__":
    raise SystemExit(main())
