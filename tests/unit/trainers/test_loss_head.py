"""Hidden states of a loss' own forward, for those who observe tokens."""

import contextlib

import torch

from tiny import tiny_model
from trl_dynamics.ops.tiled_head import Head
from trl_dynamics.trainers.squeeze import loss_head
from trl_dynamics.trainers.squeeze.loss_head import LossRequest


class Devices:
    """Keeps where it was given what."""

    def observe(self, hidden_ND, head, target_N):
        self.found = {hidden_ND.device.type, head.weight_VD.device.type, target_N.device.type}
        self.shape = hidden_ND.shape


def test_observers_are_given_everything_on_the_device_of_the_head(monkeypatch):
    """As with a device_map that puts the head elsewhere than the layers; the other device is that without data."""
    model, observer = tiny_model(), Devices()
    backbone = model.base_model
    model.forward = lambda **inputs: backbone(**inputs)
    loss_head.install(model)
    model.lm_head.to("meta")
    monkeypatch.setattr(loss_head, "whole_head", lambda base, _: contextlib.nullcontext(Head(base.lm_head.weight)))
    ids = torch.arange(12).view(2, 6)
    mask_BT = torch.tensor([[False] * 5, [False, True, True, False, True]])
    model(input_ids=ids, loss_request=LossRequest(False, [observer], ids, mask_BT))
    assert observer.found == {"meta"} and observer.shape == (3, 32)
