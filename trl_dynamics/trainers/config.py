"""Our fields, flat and prefixed, mixed into TRL's configs. Without a probe set they change nothing."""

from dataclasses import dataclass, field

import trl

from trl_dynamics.scoring.arguments import ScoringArguments
from trl_dynamics.tracking.budget import check_budget
from trl_dynamics.tracking.schedule import check_every
from trl_dynamics.trainers.data import SFT_ON
from trl_dynamics.trainers.influence.arguments import InfluenceArguments
from trl_dynamics.trainers.squeeze.arguments import SqueezeArguments


@dataclass
class ProbeArguments(ScoringArguments):
    """What is scored, how and when; shared by all trainers of this package."""

    probe_every: float | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between scorings; below 1 a share of all steps, 0 for no regular ones. "
            "`probe_log_spaced` adds steps 1, 2, 4, ... before the first regular one. None: 0.05, thinned so that "
            "scoring takes at most a third of training time (see `probe_budget`). Which steps a thinned schedule "
            "keeps depends on the clock; give a value for the same steps in every run."
        },
    )
    probe_log_spaced: bool = field(
        default=True, metadata={"help": "Also probe at steps 1, 2, 4, 8, ... up to the first regular probe."}
    )
    probe_at_start: bool = field(default=True, metadata={"help": "Probe at step 0, the baseline of every change."})
    probe_at_end: bool = field(default=True, metadata={"help": "Probe at the last step."})
    probe_on_save: bool = field(default=True, metadata={"help": "Probe whenever a checkpoint is saved."})
    probe_on_evaluate: bool = field(
        default=False,
        metadata={
            "help": "Add the probe scalars to every evaluation as eval_probe/... and eval_squeeze/..., and with "
            "`probe_samples` as eval_samples/..., usable as metric_for_best_model."
        },
    )
    probe_budget: float | None = field(
        default=None,
        metadata={
            "help": "Most time that scoring may take, as a share of training time, e.g. 0.05: scheduled scorings are "
            "left out evenly to keep to it, but for the first and the last. Which ones depends on the clock. Scorings "
            "that `probe_on_evaluate` asks for are always taken. None: no limit where `probe_every` is given, else "
            "1/3."
        },
    )
    probe_alerts: bool = field(
        default=True,
        metadata={
            "help": "Tell a warning or alert among the findings, once, as soon as it holds at two probing steps in a "
            "row: on the console, and in wandb and trackio where `report_to` names them."
        },
    )
    probe_on_error: str = field(
        default="warn",
        metadata={
            "help": "When records cannot be written: 'warn' and train on without them, or 'stop'.",
            "choices": ["warn", "stop"],
        },
    )

    def __post_init__(self):
        check_every(self.probe_every)
        check_budget(self.probe_budget)
        super().__post_init__()


@dataclass
class SFTConfig(InfluenceArguments, ProbeArguments, trl.SFTConfig):
    """[`trl.SFTConfig`] with probing, the influence of single steps, and extended SFT.

    Args:
        sft_on (`str`, *optional*):
            What to train on where rows have chosen answers. None: the columns that TRL trains on (`text`, `messages`,
            `prompt` and `completion`), and the chosen answers, with a warning, where TRL cannot train on the data.
            `"chosen"`: the chosen answers. `"both"`: extended SFT (arXiv 2407.10490, section 4.3), chosen and
            rejected, so two rows per pair and twice the steps per epoch. Two controls of `"both"` have as many rows,
            so that more steps do not pass for its effect: `"chosen_twice"` (each chosen row twice) and
            `"chosen_and_other"` (chosen, and another prompt's chosen answer put under this prompt; needs map-style
            data). Packing puts rows together by length: compare packed runs at equal `max_steps`.
    """

    sft_on: str | None = field(
        default=None,
        metadata={
            "help": "What to train on where rows have chosen answers: 'chosen', or 'both' for extended SFT (chosen "
            "and rejected, logged apart). Controls with as many rows as 'both': 'chosen_twice', and "
            "'chosen_and_other' (the chosen answer, then another prompt's). None: what TRL trains on (text, messages, "
            "prompt and completion), else chosen.",
            "choices": list(SFT_ON),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sft_on is not None and self.sft_on not in SFT_ON:
            raise ValueError(f"sft_on is {self.sft_on!r}, expected one of {', '.join(SFT_ON)}, or none")


@dataclass
class DPOConfig(SqueezeArguments, InfluenceArguments, ProbeArguments, trl.DPOConfig):
    """[`trl.DPOConfig`] with probing, the influence of single steps, the gauge of the squeezing risk and interventions
    against it."""


@dataclass
class GRPOConfig(InfluenceArguments, ProbeArguments, trl.GRPOConfig):
    """[`trl.GRPOConfig`] with probing and the influence of single steps."""
