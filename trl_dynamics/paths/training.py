"""What the trainer itself logged, as findings need it: values of the last quarter of its lines, and which loss it was.

Without a torch import: the lines and the options are read from a run's store.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import yaml

from trl_dynamics.store.store import DynamicsStore

LAST_SHARE = 0.25
# Options of ours that put another loss in the place of the sigmoid one.
OTHER_LOSSES = ("dpop_lambda", "dpo_shift", "cal_dpo")


@dataclass(frozen=True)
class Training:
    """The log of a trainer and its options.

    Args:
        lines (`list[dict]`): Lines of the trainer's log, ascending.
        config (`dict`): Options that differ from their defaults.
    """

    lines: list[dict]
    config: dict

    def late(self, key: str) -> np.ndarray:
        """Values of `key` in the last quarter of the lines that have it, at least one; finite ones.

        Where the rewards of a line are NaN, its other values mean nothing: the trainer logs a NaN loss as 0, and no
        comparison with NaN holds.
        """
        return np.array([line[key] for line, _ in self._late_lines(key)])

    def late_pairs(self, key: str) -> int:
        """Pairs that [`Training.late`] is over, on one of the processes: training batches of its lines' steps."""
        batch = self.config.get("per_device_train_batch_size", 8) * self.config.get("gradient_accumulation_steps", 1)
        return batch * sum(steps for _, steps in self._late_lines(key))

    def _late_lines(self, key: str) -> list[tuple[dict, int]]:
        """The lines of [`Training.late`], each with the number of steps since the line before."""
        lines = [line for line in self.lines if key in line and "train_runtime" not in line]
        steps = [line.get("step", number) for number, line in enumerate(lines, start=1)]
        covered = [max(1, now - before) for before, now in zip([0, *steps], steps, strict=False)]
        kept = list(zip(lines, covered, strict=True))[len(lines) - math.ceil(LAST_SHARE * len(lines)) :]
        return [
            (line, number)
            for line, number in kept
            if _is_finite(line[key]) and _is_finite(line.get("rewards/margins", 0.0))
        ]

    @property
    def is_plain_sigmoid(self) -> bool:
        """Whether DPO's loss is -log sigmoid of the reward margin and nothing else: ln 2 where no margin has moved."""
        loss, weights = self.config.get("loss_type", "sigmoid"), self.config.get("loss_weights")
        if loss not in ("sigmoid", ["sigmoid"]) or (weights or [1.0]) != [1.0]:
            return False
        changed = any(self.config.get(name) is not None for name in OTHER_LOSSES)
        # Smoothed labels make large margins costly, however right they are.
        changed = changed or self.config.get("use_weighting") or self.config.get("label_smoothing")
        return not changed and not any("aux_loss" in line for line in self.lines)


def read_training(store: DynamicsStore) -> Training:
    """The log and the options of a run; empty where none were written.

    Raises:
        ValueError: If a file is damaged.
    """
    try:
        return Training(store.read_trainer_log(), store.read_config() or {})
    except (json.JSONDecodeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"trainer_log.json or config.yaml in {store.root} is damaged ({error}); copy the run again"
        ) from error


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
