"""What SFT, DPO and GRPO trainers of this package share: tracker, recorded influence, a section in the model card."""

import dataclasses
import logging
from pathlib import Path

from transformers import TrainingArguments

from trl_dynamics import stats_head
from trl_dynamics.paths.card import model_card_section
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import read_records
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.scoring.setup import build_engine, build_sampler, changed_fields, describe_run
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.callback import ProbeCallback
from trl_dynamics.tracking.console import show_messages
from trl_dynamics.trainers.config import ProbeArguments
from trl_dynamics.trainers.influence.arguments import InfluenceArguments
from trl_dynamics.trainers.influence.callback import InfluenceCallback
from trl_dynamics.trainers.influence.lone_run import LoneRun
from trl_dynamics.trainers.influence.observed import observe
from trl_dynamics.trainers.parallelism import refuse_parallelism, refuse_silent_fallback

logger = logging.getLogger(__name__)


class DynamicsMixin:
    """Adds the probe tracker and recorded influence to a TRL trainer; without a probe set it adds nothing.

    Attributes:
        probe_callback ([`ProbeCallback`] or `None`): The tracker, once a probe set was given.
        influence_callback ([`InfluenceCallback`] or `None`): What looks at single steps, where `akg_every` is given.
        store_keeper ([`ProbeCallback`], [`LoneRun`] or `None`): Who opens the run's store, and must close it.
    """

    probe_callback: ProbeCallback | None = None
    influence_callback: InfluenceCallback | None = None
    store_keeper: ProbeCallback | LoneRun | None = None

    def _start_tracking(self, probe_set: ProbeSet | None, observed: ProbeSet | None, method: str) -> None:
        if probe_set is None and observed is None:
            return
        with_probe_defaults(self.args)
        refuse_parallelism(self)
        refuse_silent_fallback(self)
        if self.is_world_process_zero():
            show_messages()
        if probe_set is not None:
            self.store_keeper = self.probe_callback = self._build_tracker(probe_set, method)
            self.add_callback(self.probe_callback)
        if observed is not None:
            answers = observe(self, observed)
            if self.store_keeper is None:
                self.store_keeper = LoneRun(self, answers, method)
                self.add_callback(self.store_keeper)
            self.influence_callback = InfluenceCallback(self, answers, self.store_keeper.series)
            self.add_callback(self.influence_callback)
            self._get_grad_norm = self.influence_callback.noting(self._get_grad_norm)

    def _build_tracker(self, probe_set: ProbeSet, method: str) -> ProbeCallback:
        args = self.args
        engine, fallback = build_engine(self.model, self.processing_class, probe_set, args, self.accelerator)
        sampler = build_sampler(self.model, self.processing_class, probe_set, args, engine)
        stats_head.install(self.model)
        meta = describe_run(self.model, probe_set, engine, method, args, sampler) | {
            "seed": args.seed,
            "num_processes": self.accelerator.num_processes,
        }
        store = DynamicsStore(args.output_dir)
        return ProbeCallback(self, engine, probe_set, store, meta, changed_fields(args), fallback, sampler)

    def train(self, *args, **kwargs) -> tuple:
        """TRL's training; however it ends, other runs may write into the output_dir again."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.store_keeper is not None:
                self.store_keeper.close()

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> tuple:
        """TRL's evaluation; with `probe_on_evaluate`, the probe scalars are among its metrics."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        wanted = self.probe_callback is not None and self.args.probe_on_evaluate
        if wanted and metric_key_prefix.startswith("eval"):
            scalars = self.probe_callback.scalars_now(self.state)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scalars.items()})
        return output

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's model card with a table of what moved, where a probe set was tracked."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.probe_callback is None or not self.is_world_process_zero() or not card.is_file():
            return
        store = self.probe_callback.store
        try:
            if not self.probe_callback.has_records:
                return
            steps = store.steps(RECORDS, 0)
            section = model_card_section(read_records(store, {steps[0], steps[-1]}))
        except (OSError, ValueError) as error:
            # Cards are written at every checkpoint, and records that cannot be read are no reason to stop training.
            logger.warning(f"the model card has no table of the probes: {error}")
            return
        card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{section}", encoding="utf-8")


def with_probe_defaults(args: TrainingArguments) -> TrainingArguments:
    """`args`, with the defaults of our fields where a plain TRL config lacks them."""
    for field in (*dataclasses.fields(ProbeArguments), *dataclasses.fields(InfluenceArguments)):
        if not hasattr(args, field.name):
            listed = field.default_factory is not dataclasses.MISSING
            setattr(args, field.name, field.default_factory() if listed else field.default)
    return args
