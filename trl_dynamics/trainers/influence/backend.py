"""What reads and predicts the steps of a trainer, whatever way it keeps its weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from trl_dynamics.akg.one_step import Influence
from trl_dynamics.akg.steps import Step

Batch = Mapping[str, torch.Tensor]


class Backend(Protocol):
    """What predicts steps. All processes call each method together, and the same number of times, each with observers
    of its own and the same updates.

    Between the backward of a step and the step, `.grad` is what the optimiser will get: averaged and clipped. Where
    DeepSpeed runs, which steps inside of the backward, its engine knows.

    Attributes:
        method (`str`): How changes are found, as in [`akg.one_step.Influence`].
        steps_in_backward (`bool`): Whether the optimiser has stepped before transformers' callbacks are asked.
    """

    method: str
    steps_in_backward: bool

    def step(self) -> Step:
        """The step that training is about to take."""

    def step_on(self, batches: Sequence[Batch]) -> tuple[Step, float, float]:
        """The `update` part of the step that the SFT gradient of `batches` would make in place of training's, and the
        norms of its force and of the gradient before clipping; of backends that do not refuse such updates."""

    def predict(self, step: Step, observe: Batch) -> Influence:
        """What a step does to the labels of a batch."""

    def before_step(self, call: Callable[[], None]) -> AbstractContextManager:
        """While it is entered, `call` runs right before a step; for where `steps_in_backward`."""

    def logp(self, observe: Batch) -> torch.Tensor:
        """(N,) ln pi of the labels as the weights are, nats."""
