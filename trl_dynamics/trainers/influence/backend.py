"""What reads and predicts the steps of a trainer, whatever way it keeps its weights."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from trl_dynamics.akg.influence import Influence
from trl_dynamics.akg.steps import Step

Batch = Mapping[str, torch.Tensor]


class Backend(Protocol):
    """What predicts steps. All processes call each method together, and the same number of times, each with observers
    of its own and the same updates.

    Between the backward of a step and the step, `.grad` is what the optimiser will get: averaged and clipped.
    """

    method: str

    def step(self) -> Step:
        """The step that training is about to take."""

    def step_on(self, batches: Sequence[Batch]) -> tuple[Step, float, float]:
        """The `update` part of the step that the SFT gradient of `batches` would make in place of training's, and the
        norms of its force and of the gradient before clipping."""

    def predict(self, step: Step, observe: Batch) -> Influence:
        """What a step does to the labels of a batch."""

    def logp(self, observe: Batch) -> torch.Tensor:
        """(N,) ln pi of the labels as the weights are, nats."""
