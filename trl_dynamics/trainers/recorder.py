"""What the forward of a loss gave, without a second forward."""

import torch
from torch import nn
from transformers.utils import ModelOutput


class Recorder:
    """Stands in for the model in TRL's `compute_loss` and keeps what the fused LM head returned.

    Args:
        model (`torch.nn.Module`): The model, in whatever wraps it.

    Attributes:
        output (`ModelOutput` or `None`): The last output that has per-token log-probabilities, with its graph.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.output: ModelOutput | None = None

    def __call__(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        if isinstance(getattr(output, "log_probs", None), torch.Tensor):
            self.output = output
        return output

    def __getattr__(self, name: str):
        return getattr(self.__dict__["model"], name)
