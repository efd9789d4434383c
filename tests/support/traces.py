"""Everything that training leaves behind, exactly, so that two runs can be compared bit for bit."""

import random
from dataclasses import dataclass

import numpy as np
import torch
import trl

import trl_dynamics
from tiny_runs import PROBES, make_trainer

TIMINGS = ("_runtime", "_per_second", "step_time")
# What the tracker adds to the log: lines of its own, and values in evaluation lines.
OWN = ("probe/", "squeeze/", "samples/", "eval_probe/", "eval_squeeze/", "eval_samples/")
# What the gauge adds to lines of TRL's own.
ADDED = ("squeeze_risk/",)


@dataclass
class Trace:
    """Losses of every micro-step, the log, and the state at the end of training."""

    losses: list[torch.Tensor]
    log: list[str]
    weights: dict[str, torch.Tensor]
    gradients_wanted: dict[str, bool]
    modes: dict[str, bool]
    optimizer: dict[tuple, torch.Tensor]
    rng: list[torch.Tensor]
    # GRPO's own state: how far its generation buffer is, and what was sampled last.
    sampled: list


def trace(method: str, arm: str, output_dir, **options) -> Trace:
    """Train for 20 steps; `arm` is "trl", "off" (ours without a probe set) or the probe layout."""
    probed = arm not in ("trl", "off")
    probe_options = {"probe_layout": arm} if probed else {}
    trainer = make_trainer(
        method,
        output_dir,
        package=trl if arm == "trl" else trl_dynamics,
        probes=PROBES if probed else None,
        **{name: value for name, value in options.items() if probed or not name.startswith(("probe_", "akg_"))},
        **probe_options,
    )
    losses = _record_losses(trainer)
    trainer.train()
    assert trainer.state.global_step == 20
    # With a probe set, the gauge reads along in every DPO step.
    gauged = any(key.startswith(ADDED) for entry in trainer.state.log_history for key in entry)
    assert gauged == (probed and method == "dpo")
    state = trainer.optimizer.state_dict()["state"]
    return Trace(
        losses,
        _log(trainer),
        {name: value.clone() for name, value in trainer.model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()},
        {name: module.training for name, module in trainer.model.named_modules()},
        {(index, slot): torch.as_tensor(value) for index, slots in state.items() for slot, value in slots.items()},
        _random_states(),
        [trainer._step, list(trainer._logs["completion"])] if method == "grpo" else [],
    )


def assert_equal(ours: Trace, theirs: Trace) -> None:
    """Bitwise, the losses first: they show when two runs parted."""
    assert len(ours.losses) == len(theirs.losses) >= 20
    differing = [i for i, pair in enumerate(zip(ours.losses, theirs.losses, strict=True)) if not torch.equal(*pair)]
    assert not differing, f"losses differ from micro-step {differing[0]} on"
    assert ours.log == theirs.log
    for name in ("weights", "optimizer"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.keys() == other.keys() and mine
        assert not [key for key, value in mine.items() if not torch.equal(value, other[key])], name
    assert all(torch.equal(*pair) for pair in zip(ours.rng, theirs.rng, strict=True)), "a random number was drawn"
    assert (ours.modes, ours.gradients_wanted) == (theirs.modes, theirs.gradients_wanted)
    assert ours.sampled == theirs.sampled


def _record_losses(trainer) -> list[torch.Tensor]:
    losses, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        losses.append(step(*args, **kwargs).clone())
        return losses[-1]

    trainer.training_step = training_step
    return losses


def _log(trainer) -> list[str]:
    """Log lines without timings and without what the tracker adds; as text, so that NaN equals NaN."""
    lines = []
    for entry in trainer.state.log_history:
        if not any(key.startswith(OWN) for key in entry) or any(key.startswith("eval_") for key in entry):
            kept = {k: v for k, v in entry.items() if not k.endswith(TIMINGS) and not k.startswith(OWN + ADDED)}
            lines.append(str(kept))
    return lines


def _random_states() -> list[torch.Tensor]:
    _, keys, position, *_ = np.random.get_state()
    numpy_state = torch.tensor([*keys.tolist(), position])
    return [torch.get_rng_state(), torch.tensor(random.getstate()[1]), numpy_state]
