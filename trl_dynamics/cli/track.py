"""trl-dynamics track: score models, or the checkpoints of a run, on a probe set, without training."""

from collections.abc import Collection
from dataclasses import dataclass

import pandas as pd
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed

from trl_dynamics.cli import finite, outputs, sources
from trl_dynamics.cli.options import option, parser_of, refuse_unknown, require
from trl_dynamics.cli.targets import METHODS, find_targets, trained_with
from trl_dynamics.paths.checkpoints import (
    LoadingArguments,
    RecordedRun,
    Target,
    not_finite,
    recorded_run,
    replay,
    score_checkpoints,
)
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.summary import summarise_store
from trl_dynamics.scoring.probes import narrow, require_types
from trl_dynamics.scoring.processes import on_main
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.threads import tell_threads
from trl_dynamics.trainers.parallelism import refuse_lone_processes


@dataclass
class TrackArguments(LoadingArguments):
    """Options of `trl-dynamics track`."""

    model_name_or_path: list[str] = option(
        [],
        "Models to score: folders or hub names. Without checkpoints and base, diagnose judges every later "
        "model as the end of a training that began at the first.",
    )
    output_dir: str | None = option(None, "Where the records go.")
    checkpoints: str | None = option(
        None, "Score the checkpoints in each model folder that match, e.g. 'checkpoint-*', by step."
    )
    base: str | None = option(
        None,
        "The model that training began with: step 0 of every model, e.g. runs/sft. A model without "
        "checkpoints follows at its last training step.",
    )
    method: str | None = option(
        None,
        "What trained the models: sft, dpo or grpo; findings and remedies depend on it. None: what the "
        "run's records or the model card say, if they do.",
    )
    replay: bool = option(
        True,
        "Where the first model is a run with records: score as that run did (dtype, autocast, attention, "
        "layout, batches, limits, which part of the probe set, y*), unless an option says otherwise.",
    )


def run(argv: list[str]) -> int:
    """Score every target and print a table of the mean log-probability per token.

    The status is 4 if an answer's log-probability is not finite.

    Raises:
        ValueError: If an option is missing or a path does not exist.
    """
    parser = parser_of((TrackArguments,), "track")
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    refuse_unknown(unknown, "track")
    require(args, ("model_name_or_path", "probe_set", "output_dir"), "track")
    # An option that was given wins over the run's, also where it says what is the default anyway.
    given = {arg.split("=")[0].removeprefix("--") for arg in argv if arg.startswith("--")}
    store = track(args, given)
    if not PartialState().is_main_process:
        return 0
    paths = {model: summary.path() for model, summary in summarise_store(store).items()}
    table = pd.concat(paths, names=["model"])
    print("mean log-probability per token (nats):", table.round(3).to_string(), f"records: {store.root}", sep="\n")
    return finite.exit_status("track", *not_finite(store), where=str(store.root / RECORDS.name))


def track(args: TrackArguments, given: Collection[str] = ()) -> DynamicsStore:
    """Score the models of `args` that have no records yet; returns the store; see [`score_checkpoints`].

    `given` names the options that a replayed run does not overrule.
    """
    # Whoever asks first settles who the processes are, and only `Accelerator` would look at this variable by itself.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    refuse_lone_processes(state.num_processes, "with ACCELERATE_USE_CPU=true in their environment")
    if args.method not in (None, *METHODS):
        raise ValueError(f"--method is {args.method!r}, expected one of {', '.join(METHODS)}")
    # One process looks at the files, for all: they may see them at different moments.
    targets, run, methods = on_main(lambda: _found(args))
    for name, value in replay(args, run.meta if run else {}, given).items():
        setattr(args, name, value)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if state.is_main_process:
        tell_threads(accelerator.device, accelerator.num_processes)
    set_seed(0)
    probe_set = sources.find_probe_set(args.probe_set, args.probe_max_probes, args.probe_types)
    require_types(probe_set, args.probe_types)
    probe_set = narrow(probe_set, args.probe_max_probes, args.probe_subset, tells=state.is_main_process)
    outputs.require_writable(args.output_dir)
    return score_checkpoints(
        targets,
        probe_set,
        args.output_dir,
        args,
        accelerator,
        run=run,
        same_reading=args.base is not None,
        layout_required="probe_layout" in given and args.probe_layout == "shared_prefix",
        facts={"trained_with": methods},
    )


def _found(args: TrackArguments) -> tuple[list[Target], RecordedRun | None, dict[str, str]]:
    """What to score, the run to score as, and which method trained each model."""
    targets = find_targets(args.model_name_or_path, args.checkpoints, args.base)
    run = recorded_run(args.model_name_or_path[0]) if args.replay else None
    return targets, run, trained_with(targets, args.method)
