"""trl-dynamics track: score models, or the checkpoints of a run, on a probe set, without training."""

import dataclasses
import functools
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from trl_dynamics import loading, stats_head
from trl_dynamics.cli import finite, sources
from trl_dynamics.cli.launching import on_main
from trl_dynamics.cli.targets import METHODS, Target, find_targets, trained_with
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import has_baseline, probe_set_files, read_baseline, write_baseline
from trl_dynamics.paths.summary import summarise_store
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.progress import with_bar
from trl_dynamics.scoring.arguments import ScoringArguments
from trl_dynamics.scoring.head_check import settle_head
from trl_dynamics.scoring.identity import model_identity
from trl_dynamics.scoring.layout_check import settle_layout
from trl_dynamics.scoring.probes import narrow, require_types
from trl_dynamics.scoring.setup import LIMITS, build_engine, build_sampler, changed_fields, describe_run
from trl_dynamics.store.aside import is_tracked
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.threads import tell_threads
from trl_dynamics.trainers.parallelism import refuse_lone_processes

logger = logging.getLogger(__name__)

# What a run wrote into its meta.json: option of this command -> path there.
_REPLAYED = {
    "dtype": ("model", "dtype"),
    "attn_implementation": ("model", "attn_implementation"),
    "mixed_precision": ("mixed_precision",),
    "probe_dtype": ("probe_dtype",),
    "probe_layout": ("batch_plan", "layout"),
    "probe_tokens_per_batch": ("batch_plan", "tokens_per_batch"),
    "probe_top_k": ("top_k",),
    "probe_samples": ("samples", "num_probes"),
    "probe_sample_tokens": ("samples", "max_new_tokens"),
    **{name: ("limits", name) for name in LIMITS},
    **{name: ("probe_set", "metadata", "selection", name) for name in ("probe_max_probes", "probe_subset")},
}


@dataclass
class TrackArguments(ScoringArguments):
    """Options of `trl-dynamics track`."""

    model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Models to score: folders or hub names. Without checkpoints and base, diagnose judges every later "
            "model as the end of a training that began at the first."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Where the records go."})
    checkpoints: str | None = field(
        default=None,
        metadata={"help": "Score the checkpoints in each model folder that match, e.g. 'checkpoint-*', by step."},
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "The model that training began with: step 0 of every model, e.g. runs/sft. A model without "
            "checkpoints follows at its last training step."
        },
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": "What trained the models: sft, dpo or grpo; findings and remedies depend on it. None: what the "
            "run's records or the model card say, if they do."
        },
    )
    replay: bool = field(
        default=True,
        metadata={
            "help": "Where the first model is a run with records: score as that run did (dtype, autocast, attention, "
            "layout, batches, limits, which part of the probe set, y*), unless an option says otherwise."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Weights' dtype: float32, bfloat16, float16 or auto. None: the run's, else float32."},
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "Autocast: no, bf16 or fp16. None: the run's, else what accelerate says."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})


def run(argv: list[str]) -> int:
    """Score every target and print a table of the mean log-probability per token.

    The status is 4 if an answer's log-probability is not finite.

    Raises:
        ValueError: If an option is missing or a path does not exist.
    """
    parser = HfArgumentParser(TrackArguments, prog="trl-dynamics track")
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; see trl-dynamics track --help")
    for name in ("model_name_or_path", "probe_set", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; see trl-dynamics track --help")
    # An option that was given wins over the run's, also where it says what is the default anyway.
    given = {arg.split("=")[0].removeprefix("--") for arg in argv if arg.startswith("--")}
    store = track(args, given)
    if not PartialState().is_main_process:
        return 0
    paths = {model: summary.path() for model, summary in summarise_store(store).items()}
    table = pd.concat(paths, names=["model"])
    print("mean log-probability per token (nats):", table.round(3).to_string(), f"records: {store.root}", sep="\n")
    return finite.exit_status("track", *not_finite(store), where=str(store.root / RECORDS.name))


def not_finite(store: DynamicsStore) -> tuple[int, int]:
    """How many of all recorded answers have a log-probability that is not finite, and how many there are."""
    indices = {target["model_index"] for target in store.read_meta()["targets"]}
    steps = sorted({step for index in indices for step in store.steps(RECORDS, index)})
    columns = [store.read(RECORDS, {step}, ["logp_sum"])["logp_sum"] for step in steps]
    return sum(int((~np.isfinite(column)).sum()) for column in columns), sum(map(len, columns))


def track(args: TrackArguments, given: Collection[str] = ()) -> DynamicsStore:
    """Score the models of `args` that have no records yet, and write those; returns the store.

    `given` names the options that a replayed run does not overrule.

    y* is that of the replayed run, or frozen at the first target; a target that tokenises the probes differently
    starts a baseline of its own. An interrupted call goes on where it stopped when it is given again.
    """
    # Whoever asks first settles who the processes are, and only `Accelerator` would look at this variable by itself.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    refuse_lone_processes(state.num_processes, "with ACCELERATE_USE_CPU=true in their environment")
    if args.method not in (None, *METHODS):
        raise ValueError(f"--method is {args.method!r}, expected one of {', '.join(METHODS)}")
    # One process looks at the files, for all: they may see them at different moments.
    targets, run, methods = on_main(lambda: _found(args))
    settings = replay(args, run.meta if run else {}, given)
    for name, value in settings.items():
        setattr(args, name, value)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if state.is_main_process:
        tell_threads(accelerator.device, accelerator.num_processes)
    set_seed(0)
    probe_set = sources.find_probe_set(args.probe_set, args.probe_max_probes, args.probe_types)
    require_types(probe_set, args.probe_types)
    probe_set = narrow(probe_set, args.probe_max_probes, args.probe_subset, tells=state.is_main_process)
    sources.require_writable(args.output_dir)
    store = DynamicsStore(args.output_dir)
    session = _Session(store, run, accelerator, targets, settings | {"model_revision": args.model_revision})
    session.facts["trained_with"] = methods
    try:
        session.begin(probe_set)
        for target in targets:
            if (target.model_index, target.step) not in session.done:
                session.score(
                    target, args, probe_set, required="probe_layout" in given and args.probe_layout == "shared_prefix"
                )
        session.finish()
    finally:
        store.close()
    accelerator.wait_for_everyone()
    return store


@dataclass(frozen=True)
class RecordedRun:
    """What a run left behind: its meta.json and the y* it froze."""

    output_dir: str
    meta: dict
    star_ids: list[list[int]] | None


class _Session:
    """One call of `track`: what it scores goes into one store, which an earlier call may have begun."""

    def __init__(
        self, store: DynamicsStore, run: RecordedRun | None, accelerator, targets: list[Target], settings: dict
    ):
        self.store, self.run, self.accelerator, self.targets = store, run, accelerator, targets
        self.meta: dict = {}
        self.facts = {
            "status": "running",
            "num_processes": accelerator.num_processes,
            "targets": [vars(target) for target in targets],
            "settings": settings,
        }
        self.done: set[tuple[int, int]] = set()
        self.news: list[str] = []
        self.baselines: dict[str, list[list[int]]] = {}
        if run is not None and run.star_ids is not None:
            self.baselines[run.meta["batch_plan"]["fingerprint"]] = run.star_ids

    def begin(self, probe_set) -> None:
        """Keep other writers out, and take over what an earlier call has done in the same way."""
        self.meta, self.done, earlier = on_main(lambda: self._continued(probe_set))
        self.baselines |= earlier

    def score(self, target: Target, args: TrackArguments, probe_set, *, required: bool) -> None:
        """Load the weights, score them, write their records."""
        began = time.perf_counter()
        model, tokenizer = _load(target.path, args, self.accelerator.device)
        engine, fallback = build_engine(model, tokenizer, probe_set, args, self.accelerator)
        shown = self.accelerator.is_main_process and transformers_logging.is_progress_bar_enabled()
        engine.watch = functools.partial(with_bar, shown=shown)
        sampler = build_sampler(model, tokenizer, probe_set, args, engine)
        stats_head.install(model)
        settle_head(engine, model, fallback, required=required)
        settle_layout(engine, model, fallback, required=required)
        plan = engine.batch_plan["fingerprint"]
        if args.base is not None and self.meta.get("plans", {}).get(str(target.model_index), plan) != plan:
            raise ValueError(
                f"{target.path} does not read the probes as {args.base} does (tokenizer, chat template or batches), "
                "so that their numbers cannot be compared; give --base the model that training began with"
            )
        replayed = self.run.meta["batch_plan"]["fingerprint"] if self.run is not None else plan
        if plan != replayed and self.accelerator.is_main_process:
            same_probes = self.run.meta["probe_set"]["fingerprint"] == probe_set.fingerprint
            logger.warning(
                f"{target.path} is not scored in the batches of the run in {self.run.output_dir}"
                f"{'' if same_probes else ', whose probes were others'}: token by token the numbers differ by "
                "rounding, and y* is frozen anew"
            )
        scores = engine.score(model, self.baselines.get(plan))
        num_rows = len(scores.columns["probe_id"])
        table = RECORDS.table({"model": [target.model] * num_rows, "step": [target.step] * num_rows} | scores.columns)
        tables = {RECORDS: table, SAMPLES: None}
        if sampler is not None:
            answers = sampler.sample(model)
            num_rows = len(answers["probe_id"])
            keys = {"model": [target.model] * num_rows, "step": [target.step] * num_rows}
            tables[SAMPLES] = SAMPLES.table(keys | answers)
        # Which y* goes on after an interruption: that of each model's first target.
        plans = self.meta.setdefault("plans", {})
        is_first, is_begun = "batch_plan" not in self.meta, str(target.model_index) in plans
        plans.setdefault(str(target.model_index), plan)
        if is_first:
            self.meta |= describe_run(model, probe_set, engine, "track", args, sampler) | self.meta
        size = model_identity(model)["vocab_size"]
        # Metrics that need it are left out where models have vocabularies of different sizes.
        self.meta["model"]["vocab_size"] = size if is_first or size == self.meta["model"].get("vocab_size") else None

        def write() -> None:
            if is_first:
                why = "; ".join(self.news) or "track begins there"
                self.store.create(self.meta, changed_fields(args), probe_set_files(probe_set), why)
            if not has_baseline(self.store, target.model_index):
                write_baseline(self.store, scores.star_ids, model_index=target.model_index)
            if not is_begun:
                self.store.write_meta(self.meta)
            self.store.write(target.step, tables, target.model_index)
            logger.info(f"scored {target.model} at step {target.step}")

        on_main(write)
        self.baselines.setdefault(plan, scores.star_ids)
        self.meta["probe_seconds"] += time.perf_counter() - began

    def finish(self) -> None:
        """Say in meta.json that all is done."""
        self.meta["status"] = "finished"
        on_main(lambda: self.store.write_meta(self.meta))

    def _continued(self, probe_set) -> tuple[dict, set[tuple[int, int]], dict[str, list[list[int]]]]:
        """What the store of an interrupted or smaller call says: meta, the done, the y* of each plan."""
        self.store.open()
        earlier = self.store.read_meta() if self.store.exists else {}
        if earlier and not is_tracked(earlier):
            raise ValueError(
                f"{self.store.root} holds the records of a training run ({earlier.get('method')}), whose place those "
                "of track would take; choose another --output_dir, e.g. "
                f"{self.store.output_dir.with_name(self.store.output_dir.name + '-track')}"
            )
        self.news = what_differs(earlier, self.facts, probe_set) if earlier else []
        indices = {target.model_index for target in self.targets}
        done = set() if self.news else {(i, step) for i in indices for step in self.store.steps(RECORDS, i)}
        if self.facts["settings"]["probe_samples"]:
            done &= {(i, step) for i in indices for step in self.store.steps(SAMPLES, i)}
        if not done:
            return self.facts, set(), {}
        logger.info(f"{self.store.root} has records of {len(done)} of {len(self.targets)} targets already")
        begun = sorted({index for index, _ in done})
        plans = {str(begun[0]): earlier["batch_plan"]["fingerprint"]} | earlier.get("plans", {})
        star_ids = {plans[str(i)]: read_baseline(self.store, model_index=i) for i in begun if str(i) in plans}
        return earlier | self.facts | {"plans": plans}, done, star_ids


def what_differs(earlier: dict, facts: dict, probe_set: ProbeSet) -> list[str]:
    """Why records of an earlier call are not those that this call would take, one phrase per difference.

    Args:
        earlier (`dict`): meta.json as that call left it.
        facts (`dict`): `settings` and `targets` of this call.
        probe_set ([`ProbeSet`]): What this call scores.
    """
    news, before = [], earlier["probe_set"]
    if before["fingerprint"] != probe_set.fingerprint:
        news.append(
            f"the probe set {probe_set.name!r} now asked for is another ({len(probe_set)} probes, fingerprint "
            f"{probe_set.fingerprint[:12]})"
        )
    # A setting that the earlier call did not know yet had what is its default now.
    defaults = {option.name: option.default for option in dataclasses.fields(TrackArguments)}
    was = {name: defaults.get(name) for name in facts["settings"]} | earlier.get("settings", {})
    now = facts["settings"]
    names = was.keys() | now.keys()
    if not was["probe_samples"] and not now["probe_samples"]:
        names -= {"probe_samples", "probe_sample_tokens"}
    for name in sorted(names):
        if was.get(name) != now.get(name):
            news.append(f"{name} was {was.get(name)}, is {now.get(name)}")
    gone = [target["path"] for target in earlier["targets"] if target not in facts["targets"]]
    return news + ([f"these models are not among those asked for now: {', '.join(gone)}"] if gone else [])


def _found(args: TrackArguments) -> tuple[list[Target], RecordedRun | None, dict[str, str]]:
    """What to score, the run to score as, and which method trained each model."""
    targets = find_targets(args.model_name_or_path, args.checkpoints, args.base)
    return targets, recorded_run(args) if args.replay else None, trained_with(targets, args.method)


def recorded_run(args: TrackArguments) -> RecordedRun | None:
    """The run that the first model is the output of; None if it has no records."""
    source = DynamicsStore(args.model_name_or_path[0])
    if not source.exists:
        return None
    star_ids = read_baseline(source) if has_baseline(source) else None
    return RecordedRun(str(source.output_dir), source.read_meta(), star_ids)


def replay(args: TrackArguments, meta: dict, given: Collection[str]) -> dict:
    """How to score: what was given, else as the run of `meta` did, else the defaults."""
    settings = {}
    for name, path in _REPLAYED.items():
        value = meta
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        settings[name] = getattr(args, name) if name in given or value is None else value
    settings["dtype"] = settings["dtype"] or "float32"
    if meta and PartialState().is_main_process:
        shown = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        logger.info(f"scoring as the run did ({shown}); --replay False scores by the options alone")
    return settings


def _load(path: str, args: TrackArguments, device: torch.device):
    options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = loading.load_tokenizer(path, **options)
    model = loading.load_causal_lm(path, dtype=args.dtype, attn_implementation=args.attn_implementation, **options)
    return model.to(device), tokenizer
