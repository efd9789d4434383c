"""The options of [`SqueezeArguments`] put to work on TRL's DPO loss, and which of them do not go together.

B = 2P rows: P chosen answers, then the P rejected ones   T tokens, one less than the input has columns
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
import trl
from transformers import TrainingArguments

from trl_dynamics.ops.preference import GATED_PROB, MARGIN_TERMS, cal_dpo, dpo, linear
from trl_dynamics.trainers.squeeze import loss_head
from trl_dynamics.trainers.squeeze.arguments import SqueezeArguments
from trl_dynamics.trainers.squeeze.gate import Gate
from trl_dynamics.trainers.squeeze.gauge import Gauge
from trl_dynamics.trainers.squeeze.guard import SqueezeGuard, check_guard
from trl_dynamics.trainers.squeeze.loss_head import LossRequest
from trl_dynamics.trainers.squeeze.recording import (
    LossRecorder,
    TokenForward,
    TokenWeigher,
    recorded_reference,
    rejected_only,
    watch_gradient,
)

# What a batch holds for the loss and not for the model.
LOSS_KEYS = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
PAIR_OPTIONS = ("dpop_lambda", "dpo_shift", "cal_dpo")


def squeeze_options(args: TrainingArguments | None) -> SqueezeArguments:
    """Our fields of `args`, with their defaults where a plain TRL config lacks them.

    Raises:
        ValueError: If a value is out of range, or options contradict each other or the loss.
    """
    fields = dataclasses.fields(SqueezeArguments)
    options = SqueezeArguments(**{field.name: getattr(args, field.name, field.default) for field in fields})
    _check_values(options)
    if options.squeeze_guard is not None:
        check_guard(options.squeeze_guard, options.squeeze_guard_mode, options.squeeze_guard_every)
    pair_options = [name for name in PAIR_OPTIONS if getattr(options, name) is not None]
    if pair_options:
        _check_pair_loss(" and ".join(pair_options), options, args)
    return options


def _check_values(options: SqueezeArguments) -> None:
    allowed = {
        "gauge_every": (options.gauge_every is None or options.gauge_every >= 0, "a number of steps, 0 for never"),
        "gauge_valley_prob": (0 < options.gauge_valley_prob <= 1, "a probability above 0"),
        "gate_dpo": (
            options.gate_dpo is None or options.gate_dpo in GATED_PROB,
            f"one of {list(GATED_PROB)}, or None",
        ),
        "gate_alpha": (options.gate_alpha > 0, "a number above 0"),
        "gate_tau": (0 <= options.gate_tau <= 1, "a probability"),
        "dpop_lambda": (options.dpop_lambda is None or options.dpop_lambda >= 0, "a number from 0 on, or None"),
        "dpo_shift": (options.dpo_shift is None or 0 <= options.dpo_shift <= 1, "a factor from 0 to 1, or None"),
        "dpo_shift_end": (
            options.dpo_shift_end is None or (options.dpo_shift is not None and 0 <= options.dpo_shift_end <= 1),
            "a factor from 0 to 1 together with dpo_shift, the factor at the start, or None",
        ),
        "cal_dpo": (options.cal_dpo is None or options.cal_dpo > 0, "a weight above 0, or None"),
    }
    for name, (holds, expected) in allowed.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(options, name)!r}, expected {expected}")


def _check_pair_loss(given: str, options: SqueezeArguments, args: TrainingArguments) -> None:
    if options.cal_dpo is not None and given != "cal_dpo":
        raise ValueError(
            f"{given} are different losses of a pair: Cal-DPO fixes where both log-ratios go, and leaves no margin "
            "for DPOP or DPO-Shift to change; set only one side (dpop_lambda and dpo_shift do go together)"
        )
    if args.loss_type.count("sigmoid") != 1:
        raise ValueError(
            f"{given} takes the place of the sigmoid loss, which loss_type {args.loss_type} must name once"
        )
    if args.use_weighting:
        raise ValueError(
            f"{given} cannot be combined with use_weighting, which weighs TRL's own losses by pair: set it to False"
        )
    if args.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"{given} is defined on log-ratios, and f_divergence_type is {args.f_divergence_type!r}: set 'reverse_kl'"
        )


def build_loss(trainer: trl.DPOTrainer, options: SqueezeArguments, *, tracked: bool) -> "SqueezeLoss | None":
    """What computes the trainer's loss with these options; None, and nothing is installed, where all are off.

    Args:
        trainer ([`~trl.DPOTrainer`]): Built, its model not yet wrapped for training.
        options ([`SqueezeArguments`]): As [`squeeze_options`] gives them.
        tracked (`bool`): Whether the run tracks a probe set, which turns the gauge on by default.
    """
    every = int(tracked) if options.gauge_every is None else options.gauge_every
    exchanged = any(getattr(options, name) is not None for name in PAIR_OPTIONS)
    weighed = options.gate_dpo is not None or options.squeeze_guard is not None
    if not (every or exchanged or weighed):
        return None
    loss_head.install(trainer.model)
    weighers: list[TokenWeigher] = []
    if options.gate_dpo is not None:
        weighers.append(Gate(options.gate_dpo, options.gate_alpha, options.gate_tau))
    if options.squeeze_guard is not None:
        weighers.append(SqueezeGuard(trainer))
    gauge = Gauge(trainer, every, options.gauge_valley_prob) if every else None
    if gauge is not None:
        trainer.add_callback(gauge)
    return SqueezeLoss(trainer, PairLoss(trainer, options) if exchanged else None, weighers, gauge)


class PairLoss:
    """DPOP, DPO-Shift, both, or Cal-DPO in place of the sigmoid entry of `loss_type`, with that entry's weight.

    Works on the log-ratios that TRL's loss works on: sums over tokens (weighted by `ld_alpha` where that is set), with
    the reference from its own model, the policy with its adapter off, or the precomputed columns. The logged rewards
    and log-probabilities stay TRL's.
    """

    def __init__(self, trainer, options: SqueezeArguments):
        self.trainer, self.options = trainer, options
        self.weight = trainer.loss_weights[trainer.loss_types.index("sigmoid")]

    @contextlib.contextmanager
    def taken_out(self) -> Iterator[None]:
        """Meanwhile TRL's loss runs without its sigmoid entry."""
        trainer = self.trainer
        types, weights = trainer.loss_types, trainer.loss_weights
        kept = [pair for pair in zip(types, weights, strict=True) if pair[0] != "sigmoid"]
        trainer.loss_types, trainer.loss_weights = [name for name, _ in kept], [weight for _, weight in kept]
        try:
            yield
        finally:
            trainer.loss_types, trainer.loss_weights = types, weights

    def __call__(self, policy_BT: torch.Tensor, reference_BT: torch.Tensor | None, inputs: dict) -> torch.Tensor:
        """The mean loss of the pairs, times the entry's weight.

        Shapes: policy, reference (B, at least T), in nats; the reference is None where `inputs` has it precomputed.
        """
        token_weight_BT = sequence_weights(inputs["completion_mask"][:, 1:], self.trainer.ld_alpha)
        chosen_P, rejected_P = _answer_sums(policy_BT, token_weight_BT)
        if reference_BT is None:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = _answer_sums(reference_BT, token_weight_BT)
        return self.weight * self._losses(chosen_P - reference[0], rejected_P - reference[1]).mean()

    def _losses(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
        beta, options = self.trainer.beta, self.options
        if options.cal_dpo is not None:
            return cal_dpo(chosen_P, rejected_P, beta, options.cal_dpo)
        strengths = {"dpop": options.dpop_lambda, "dpo_shift": self.shift_factor()}
        terms = [MARGIN_TERMS[name](chosen_P, rejected_P, s) for name, s in strengths.items() if s is not None]
        return dpo(chosen_P, rejected_P, beta, sum(terms))

    def shift_factor(self) -> float | None:
        """DPO-Shift's factor at this point of training, None where it is off."""
        start, end, state = self.options.dpo_shift, self.options.dpo_shift_end, self.trainer.state
        if end is None:
            return start
        return linear(start, end, min(1.0, state.global_step / max(1, state.max_steps)))


def sequence_weights(mask_BT: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """(B, T) weights of tokens in an answer's sum: 1, and with LD-DPO `ld_alpha` past the shorter answer's length."""
    if ld_alpha is None:
        return mask_BT
    position_BT, length_B = mask_BT.cumsum(dim=1), mask_BT.sum(dim=1)
    shared_B = length_B.view(2, -1).amin(dim=0).repeat(2)
    return mask_BT * torch.where(position_BT <= shared_B[:, None], 1.0, ld_alpha)


def _answer_sums(log_probs: torch.Tensor, token_weight_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp_BT = log_probs[:, -token_weight_BT.shape[1] :]
    # FSDP2 hands out bf16, in which a sum of -150 nats is good to one nat.
    logp_BT = logp_BT.to(torch.promote_types(logp_BT.dtype, torch.float32))
    return (logp_BT * token_weight_BT).sum(dim=1).chunk(2)


class SqueezeLoss:
    """TRL's DPO loss with a pair loss exchanged, token gradients weighed, and the gauge reading along.

    Args:
        trainer ([`~trl.DPOTrainer`]): The loss is its.
        pair_loss ([`PairLoss`] or `None`): What replaces the sigmoid loss.
        weighers (`list[TokenWeigher]`): Applied one after the other; each sees the gradient that those before it left.
        gauge ([`Gauge`] or `None`): Sees the gradient without weights.
    """

    def __init__(self, trainer, pair_loss: PairLoss | None, weighers: list[TokenWeigher], gauge: Gauge | None):
        self.trainer, self.pair_loss, self.weighers, self.gauge = trainer, pair_loss, weighers, gauge

    def __call__(self, trl_loss: Callable, model, inputs: dict, return_outputs: bool):
        """What `trl_loss(model, inputs, return_outputs)` would give, under the options; gradients in training only."""
        trainer, pair_loss = self.trainer, self.pair_loss
        in_training = trainer.model.training and torch.is_grad_enabled()
        measured = in_training and self.gauge is not None and self.gauge.is_due(trainer.state.global_step + 1)
        recorder = LossRecorder(model, self._request(inputs, measured) if in_training else None)
        needs_reference = pair_loss is not None and not trainer.precompute_ref_logps
        with contextlib.ExitStack() as stack:
            reference = stack.enter_context(recorded_reference(trainer)) if needs_reference else [None]
            if pair_loss is not None:
                stack.enter_context(pair_loss.taken_out())
            result = trl_loss(recorder, inputs, return_outputs)
        loss, *outputs = result if return_outputs else (result,)
        if pair_loss is not None:
            loss = loss + pair_loss(recorder.output.log_probs, reference[-1], inputs)
        if in_training and (measured or self.weighers):
            forward = self._forward(recorder.output, inputs)
            watch = self.gauge.measure if measured else None
            watch_gradient(loss, recorder.output.log_probs, forward, self.weighers, watch)
        return (loss, *outputs) if return_outputs else loss

    def _request(self, inputs: dict, measured: bool) -> LossRequest | None:
        observers = [weigher for weigher in self.weighers if weigher.observes_tokens]
        if not observers:
            return LossRequest(sum_sq=True) if measured else None
        mask_BT = inputs["completion_mask"][:, 1:].bool()
        return LossRequest(measured, observers, inputs["input_ids"], rejected_only(mask_BT))

    def _forward(self, output, inputs: dict) -> TokenForward:
        mask_BT = inputs["completion_mask"][:, 1:].bool()
        columns = slice(-mask_BT.shape[1], None)
        log_sum_sq, trainer = output.log_sum_sq_probs, self.trainer
        # Set by the training loop; a loss may be asked for outside of it.
        accumulated = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
        return TokenForward(
            output.log_probs.detach()[:, columns],
            mask_BT,
            None if log_sum_sq is None else log_sum_sq[:, columns],
            num_pairs=len(mask_BT) // 2,
            num_accumulated=accumulated,
            model_inputs={name: value for name, value in inputs.items() if name not in LOSS_KEYS},
        )
