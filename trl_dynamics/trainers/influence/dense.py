"""Steps of weights that every process holds as a whole, one process or data parallel: exact, by forward mode."""

from collections.abc import Sequence

import torch
from transformers import Trainer

from trl_dynamics.akg.batched import predict_together
from trl_dynamics.akg.jvp import refuse
from trl_dynamics.akg.one_step import FORWARD_MODE, Influence, update_gradient
from trl_dynamics.akg.steps import UPDATE, Step, Tensors, step_of, whole_norm
from trl_dynamics.akg.task import causal_lm, label_logp
from trl_dynamics.trainers.influence.backend import Batch


class Dense:
    """The backend of one process, or of several with a copy of the weights each.

    It computes in the dtype of the weights, and leaves autocast: in half precision the change of an answer in one step
    is less than its rounding.

    Args:
        trainer ([`~transformers.Trainer`]): Its model, optimiser and gradients are read, never written.

    Raises:
        ValueError: If the model cannot be observed, see [`akg.task.causal_lm`], or its weights are quantised.
    """

    method, steps_in_backward = FORWARD_MODE, False

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        refuse(trainer.model)
        with self._without_autocast():
            self.task = causal_lm(trainer.model)

    def step(self) -> Step:
        """As in [`Backend`]."""
        gradients = {name: p.grad for name, p in self.task.trainable().items() if p.grad is not None}
        return step_of(gradients, self.task.trainable(), self.trainer.optimizer, None, None)

    def step_on(self, batches: Sequence[Batch]) -> tuple[Step, float, float]:
        """As in [`Backend`]; every process computes it as a whole."""
        gradients, force_norm = self.sft_gradient(batches)
        max_norm = self.trainer.args.max_grad_norm or None
        step = step_of(gradients, self.task.trainable(), self.trainer.optimizer, None, max_norm)
        return Step({UPDATE: step.parts[UPDATE]}, step.clip), force_norm, float(whole_norm(gradients))

    def predict(self, step: Step, observe: Batch) -> Influence:
        """As in [`Backend`]."""
        with self._without_autocast():
            return predict_together(self.task, [None], [step], observe)[0]

    def logp(self, observe: Batch) -> torch.Tensor:
        """As in [`Backend`]."""
        with self._without_autocast():
            return label_logp(self.task, observe)

    def sft_gradient(self, batches: Sequence[Batch]) -> tuple[Tensors, float]:
        """Gradient of the mean loss over all labels of some batches, and the norm of its force over all of them."""
        counts = [len(self.task.labels_of(batch, "an update")) for batch in batches]
        gradients: Tensors = {}
        force_sq = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with self._without_autocast():
                force = update_gradient(self.task, batch)
            share = count / sum(counts)
            force_sq += float(force.norm_U.double().square().sum()) * share**2
            for name, gradient in force.gradients.items():
                part = share * gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                gradients[name] = gradients[name] + part if name in gradients else part
        return gradients, force_sq**0.5

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(self.trainer.accelerator.device.type, enabled=False)
