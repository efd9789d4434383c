"""Whether the stats head's numbers are those of the model's own logits: one short row, compared in nats.

T tokens of the row   V vocabulary   E further labels
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from trl_dynamics.compat import base_causal_lm, logit_transform
from trl_dynamics.ops.tiled_head import KnownLogits, token_stats
from trl_dynamics.stats_head.forward import StatsRequest, own_logits, prompts_only
from trl_dynamics.stats_head.ways import (
    OWN,
    has_split_weights,
    length_boundaries,
    own_forward_tokens,
    use_own_forward,
    way_of,
)

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 64
# Largest |difference| of a log-probability in float32, and the mean one in half precision, nats. Where logits have a
# standard deviation of 5, rounding gives 1e-5 and less than 1e-2, a scale of one percent 3e-1 and 6e-2 to 2e-1, a soft
# cap at 30 more. A model that is known to cap its logits does so in half precision, which gives 4e-2.
TOLERANCE, HALF_TOLERANCE, CAPPED_TOLERANCE = 1e-3, 5e-2, 1e-1
# The mean ones of a row and of its first half. With the length, kernels round otherwise in every layer.
LENGTH_TOLERANCE, LENGTH_HALF_TOLERANCE = 5e-2, 5e-1
# Labels besides the row's own whose log-probabilities are compared, spread over the vocabulary.
_NUM_EXTRA = 64
_COMPARED = ("target_logp", "argmax_logp", "other_logp", "entropy", "extra_logp")


class Disagreement(ValueError):
    """The model's own logits and what is scored are not the same."""


@dataclass(frozen=True)
class Precision:
    """How the scoring computes: whether in half precision, and whether `float32` leaves an autocast that is on."""

    half: bool
    float32: bool = False

    @staticmethod
    def of_weights(model: nn.Module) -> "Precision":
        """Half precision, if any weight is."""
        return Precision(any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()))


@torch.no_grad()
def settle(
    model: nn.Module,
    ids: Sequence[int],
    precision: Precision | None = None,
    by_all: Callable[[bool], bool] = bool,
) -> None:
    """Compare before the first scoring; where the head is not all of it, the model's own forward is used from now on.

    All processes call this together, with the same row, in evaluation mode and in the precision of the scoring.

    Args:
        model (`nn.Module`): With the stats head installed.
        ids (`Sequence[int]`): A row that is to be scored; its first 64 tokens are looked at.
        precision ([`Precision`], *optional*): By default that of the weights.
        by_all (`Callable[[bool], bool]`, *optional*): Whether a statement holds on every process. Each may round
            otherwise, and all must score in one way.

    Raises:
        Disagreement: If no way of scoring gives the model's own log-probabilities.
    """
    check, base = _Check(model, ids, precision or Precision.of_weights(model)), base_causal_lm(model)
    if check.num_tokens < 2:
        return
    check.refuse_sight(by_all)
    why = "come from a head that is no plain linear layer while its weights are split over processes"
    if way_of(base) != OWN:
        agrees, why = check.from_hidden_states()
        if by_all(agrees):
            return
    use_own_forward(base, check.own_TV.shape[-1])
    found = check.apart()
    if not by_all(check.agrees(found)):
        raise Disagreement(
            f"{type(base).__name__} gives other log-probabilities each time it runs (up to {_shown(found)} nats apart "
            "in evaluation mode), so that no number of it holds; switch off what it draws at random"
        )
    logger.warning(
        f"log-probabilities of {type(base).__name__} {why}: it is scored by its own forward, at most "
        f"{own_forward_tokens(base)} tokens at a time, which is slower"
    )


@torch.no_grad()
def confirm(model: nn.Module, ids: Sequence[int], precision: Precision | None = None) -> float | None:
    """Compare once more, at the last scoring: a model can change while it trains.

    Args:
        model, ids, precision: As for [`settle`].

    Returns:
        `float` or `None`: How far apart the two are, in nats; None where they agree.
    """
    check = _Check(model, ids, precision or Precision.of_weights(model))
    if check.num_tokens < 2:
        return None
    found = check.apart()
    return None if check.agrees(found) else float(found.max())


def same_log_probs(one_TV: torch.Tensor, other_TV: torch.Tensor, *, half: bool) -> bool:
    """Whether two sets of logits (T, V) mean the same distributions, up to rounding."""
    one_TV, other_TV = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (one_TV, other_TV))
    return _agree(_difference(one_TV.log_softmax(-1), other_TV.log_softmax(-1)), half)


class _Check:
    """One row, and the model's own logits of it."""

    def __init__(self, model: nn.Module, ids: Sequence[int], precision: Precision):
        self.model, self.half, self.float32 = model, precision.half, precision.float32
        # Hooks on a root gather split weights; where none are split, the model runs without them.
        self.call = model if has_split_weights(model) else model.forward
        device = next(model.parameters()).device
        most = min((CHECKED_TOKENS, *length_boundaries(model)))
        self.row_1T = torch.tensor([list(ids[:most])], dtype=torch.int64, device=device)
        self.num_tokens = self.row_1T.shape[1]
        if has_split_weights(model):
            # ZeRO-3 gathers the head for a backward only if the first forward of all looked at its weights.
            self.call(**_inputs(self.row_1T), stats_request=prompts_only(self.num_tokens, self.float32))
        self.own_TV = self.own(self.row_1T) if self.num_tokens > 1 else torch.empty(0)

    def own(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """(T, V) the model's own logits, by an ordinary forward."""
        inputs = _inputs(ids_1T)
        if self.float32:  # An autocast around the model's forward can be left in there alone.
            inputs["stats_request"] = replace(prompts_only(ids_1T.shape[1], float32=True), own_logits=True)
            logits_BTV = self.call(**inputs)["logits"]
        else:
            logits_BTV = own_logits(base_causal_lm(self.model), self.call, **inputs)
        # An adapter that prepends virtual tokens makes the logits longer than the input.
        return logits_BTV[0, -ids_1T.shape[1] :]

    def apart(self) -> torch.Tensor:
        """|differences| between stats head and own logits: log-probabilities, entropies of all positions, flat."""
        device, last = self.row_1T.device, self.num_tokens - 1
        rows_N, cols_N = torch.zeros(last, dtype=torch.int64, device=device), torch.arange(last, device=device)
        extra_E = torch.linspace(0, self.own_TV.shape[-1] - 1, _NUM_EXTRA, device=device).long()
        extra_NE = extra_E.expand(last, -1).contiguous()
        target_N = self.row_1T[0, 1:]
        request = StatsRequest(rows_N, cols_N, target_N, self.num_tokens, extra_NE, float32=self.float32)
        ours = self.call(**_inputs(self.row_1T), stats_request=request)
        place = self.own_TV.device
        own = token_stats(cols_N.to(place), KnownLogits(self.own_TV), target_N.to(place), extra_NE.to(place))
        return torch.cat([_difference(ours[name].to(place), own[name]).flatten() for name in _COMPARED])

    def agrees(self, found: torch.Tensor) -> bool:
        """Whether such differences are rounding."""
        capped = logit_transform(base_causal_lm(self.model))[1] is not None
        return _agree(found, self.half, CAPPED_TOLERANCE if capped else HALF_TOLERANCE)

    def from_hidden_states(self) -> tuple[bool, str]:
        """Whether the stats head as it is gives the model's own log-probabilities, and what is said where not."""
        try:
            found = self.apart()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            return False, f"cannot be had from its last hidden states ({_first_line(error)})"
        what = f"differ by up to {_shown(found)} nats from those that its LM head makes of its last hidden states"
        return self.agrees(found), what

    def refuse_sight(self, by_all: Callable[[bool], bool]) -> None:
        """Refuse models that look ahead: what they say of a token has seen that token."""
        part = self.num_tokens // 2
        if part < 2:
            return
        start_1P, rest_1R = self.row_1T[:, :part], self.row_1T.flip(1)[:, part:]
        for ids_1T, half_tolerance, tolerance in (
            (torch.cat([start_1P, rest_1R], dim=1), HALF_TOLERANCE, 10 * TOLERANCE),
            (start_1P, LENGTH_HALF_TOLERANCE, LENGTH_TOLERANCE),
        ):
            whole_PV, other_PV = self.own_TV[:part].log_softmax(-1), self.own(ids_1T)[:part].log_softmax(-1)
            # A weight that is not finite reaches earlier tokens even through a mask, which multiplies it by 0.
            finite_P = ~(whole_PV.isnan() | other_PV.isnan()).any(-1)
            found = _difference(other_PV[finite_P], whole_PV[finite_P])
            if not by_all(not len(found) or float(found.mean()) <= (half_tolerance if self.half else tolerance)):
                raise Disagreement(
                    f"{type(base_causal_lm(self.model)).__name__} is not causal: its log-probabilities change by up "
                    f"to {_shown(found)} nats with the tokens that follow; set is_decoder=True in its config, or take "
                    "another model"
                )


def _inputs(ids_1T: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}


def _difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """|one - other|, 0 where both are the same infinity or both are not a number."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _agree(found: torch.Tensor, half: bool, half_tolerance: float = CAPPED_TOLERANCE) -> bool:
    return bool(found.mean() <= half_tolerance) if half else bool(found.max() <= TOLERANCE)


def _shown(found: torch.Tensor) -> str:
    return f"{float(found.max()) if len(found) else 0.0:.2g}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.100}"
