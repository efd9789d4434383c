"""Options of the influence that is recorded in training."""

import logging
from dataclasses import dataclass, field

from transformers import TrainingArguments

from trl_dynamics.influence.kind import BATCH
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.schema import ProbeSet

logger = logging.getLogger(__name__)


@dataclass
class InfluenceArguments:
    """Predicted and true influence of single steps. Off unless `akg_every` is given; training stays as it is."""

    akg_every: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between those whose influence on the observed answers is predicted before they "
            "are taken, compared with what they did, and recorded; the first step is one. Each costs two forwards of "
            "all observed answers and about three more for each part of the step (gradient, momentum, weight decay), "
            "and memory for two copies of the trained weights per part. Where weights are split (FSDP2, ZeRO-3) "
            "steps are predicted by central differences, with an error that is recorded beside them and in float32 "
            "alone. None: never."
        },
    )
    akg_updates: list[str] = field(
        default_factory=lambda: [BATCH],
        metadata={
            "help": "What is predicted: 'batch', the step that training takes, and types of the observed answers: "
            "what the gradient of the SFT loss of all observed answers of this type would do if the optimiser, as it "
            "is then, took it in place of the batch's; momentum and weight decay left out. For 'rejected' too that is "
            "a descent on its SFT loss; DPO pushes the other way. Each type costs a backward and a pass more. Where "
            "weights are split (FSDP2, ZeRO-3): 'batch' alone."
        },
    )
    akg_observe: str | None = field(
        default=None,
        metadata={
            "help": "Probe set whose answers are observed: a folder or .jsonl/.parquet file, or a dataset on the hub. "
            "None: the one that is tracked."
        },
    )
    akg_max_probes: int | None = field(
        default=8, metadata={"help": "Observe the first so many probes of that set only. None: all."}
    )

    def __post_init__(self):
        for name in ("akg_every", "akg_max_probes"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise ValueError(f"{name} is {value}, expected a whole number of at least 1, or none")
        if isinstance(self.akg_updates, str) or not self.akg_updates:
            raise ValueError(
                f"akg_updates is {self.akg_updates!r}, expected a list of '{BATCH}' and types of observed answers"
            )
        if hasattr(super(), "__post_init__"):
            super().__post_init__()


def find_observed(source: object, tracked: ProbeSet | None, args: TrainingArguments) -> ProbeSet | None:
    """What a run is to observe; None where `akg_every` is not given.

    Args:
        source: As the trainers take it; None for the set that `args` names, and else the tracked one.
        tracked ([`ProbeSet`] or `None`): What the run tracks.
        args: Ours, or a plain TRL config.

    Raises:
        ValueError: If there is nothing to observe, the probe set is not valid, or `akg_updates` names what it lacks.
    """
    source = source if source is not None else getattr(args, "akg_observe", None)
    if getattr(args, "akg_every", None) is None:
        idle = ["akg_observe"] * (source is not None)
        idle += ["akg_updates"] * (getattr(args, "akg_updates", [BATCH]) != [BATCH])
        if idle and args.process_index == 0:
            logger.warning(f"{' and '.join(idle)} without effect: akg_every says how often, and is not given")
        return None
    probe_set = tracked if source is None else probe_io.load(source, types=getattr(args, "probe_types", ()))
    if probe_set is None:
        raise ValueError(
            f"akg_every={args.akg_every} has nothing to observe: give akg_observe, or a probe_set that is tracked"
        )
    probe_set = probe_set if args.akg_max_probes is None else probe_set.select(int(args.akg_max_probes))
    known = [BATCH, *probe_set.response_types]
    if unknown := [name for name in args.akg_updates if name not in known]:
        raise ValueError(f"akg_updates has {unknown[0]!r}, expected some of {', '.join(known)}")
    return probe_set
