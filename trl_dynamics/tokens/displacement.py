"""Which preference pairs are likely to lower the likelihood of the chosen answer, told before any training.

CHES, the centred hidden embedding similarity of "Unintentional Unalignment: Likelihood Displacement in Direct
Preference Optimization" (arXiv 2410.08847, definition 2), from one forward pass per response. The definition sums over
a response's tokens; whether an end-of-turn token is one of them is a choice. Here it is not, unless asked for; in the
authors' code it is, where rows end with one. [`ResponseSums.states`] has both.

    N scored positions   I responses   P pairs   D hidden
"""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import nn

from trl_dynamics.stats_head import StatsRequest


@dataclass(frozen=True)
class ResponseSums:
    """Sums over each response's tokens without its end-of-turn token, float64 on the CPU.

    `hidden_ID` sums the final hidden states at the positions that predict these tokens, from the prompt's last token
    to the response's second-to-last one; `logp_sum_I` (nats) sums their log-probabilities; `num_tokens_I` counts them.
    `end_hidden_ID` is the final hidden state at the position that predicts the end-of-turn token, and `num_ends_I`
    counts such tokens: zeros where a response has none.
    """

    hidden_ID: torch.Tensor
    logp_sum_I: torch.Tensor
    num_tokens_I: torch.Tensor
    end_hidden_ID: torch.Tensor
    num_ends_I: torch.Tensor

    def __add__(self, other: "ResponseSums") -> "ResponseSums":
        return ResponseSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def states(self, *, with_end: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(I, D) sums of hidden states and (I,) how many, for [`ches`] and [`ches_normalized`].

        Args:
            with_end (`bool`): Count the state that predicts the end-of-turn token as well, as the code of the paper's
                authors does for responses that end with one. Normalised scores then differ by up to about 10 %.
        """
        if not with_end:
            return self.hidden_ID, self.num_tokens_I
        return self.hidden_ID + self.end_hidden_ID, self.num_tokens_I + self.num_ends_I


def response_sums(
    hidden_ND: torch.Tensor, logp_N: torch.Tensor, item_N: torch.Tensor, is_eos_mask_N: torch.Tensor, num_items: int
) -> ResponseSums:
    """Reduce per-position values to responses.

    The position that predicts the end-of-turn token holds the state after the response's last token, and is summed
    apart. Padding has no positions here, so that it cannot be counted.

    Shapes: hidden_ND (N, D), logp_N (N,) nats, item_N (N,) index of the response, is_eos_mask_N (N,) bool.
    """
    item_N, hidden_ND = item_N.cpu(), hidden_ND.double().cpu()
    zeros_I = torch.zeros(num_items, dtype=torch.float64)
    zeros_ID = torch.zeros(num_items, hidden_ND.shape[1], dtype=torch.float64)
    end_N = is_eos_mask_N.cpu().double()
    keep_N = 1 - end_N
    return ResponseSums(
        zeros_ID.index_add(0, item_N, hidden_ND * keep_N[:, None]),
        zeros_I.index_add(0, item_N, logp_N.double().cpu() * keep_N),
        zeros_I.index_add(0, item_N, keep_N),
        zeros_ID.index_add(0, item_N, hidden_ND * end_N[:, None]),
        zeros_I.index_add(0, item_N, end_N),
    )


class Batch(Protocol):
    """Padded rows and where their scored positions are, as [`probing.layouts.ProbeBatch`] has them.

    Shapes: input_ids, attention_mask, position_ids (B, T); rows_N, cols_N, target_N, item_N, is_eos_mask_N (N,).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    rows_N: torch.Tensor
    cols_N: torch.Tensor
    target_N: torch.Tensor
    item_N: torch.Tensor
    is_eos_mask_N: torch.Tensor


@torch.no_grad()
def score_responses(model: nn.Module, batch: Batch, num_items: int) -> ResponseSums:
    """Run one batch through a model that has the stats head (see [`stats_head.install`]).

    Args:
        model (`nn.Module`): In evaluation mode.
        batch ([`Batch`]): Responses that it does not hold get zeros.
        num_items (`int`): Responses in all.
    """
    device = next(model.parameters()).device
    position_ids = None if batch.position_ids is None else batch.position_ids.to(device)
    stats = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=position_ids,
        stats_request=StatsRequest(
            batch.rows_N.to(device),
            batch.cols_N.to(device),
            batch.target_N.to(device),
            batch.input_ids.shape[1],
            return_hidden=True,
        ),
    )
    return response_sums(stats["hidden_ND"], stats["target_logp"], batch.item_N, batch.is_eos_mask_N, num_items)


def ches(chosen_PD: torch.Tensor, rejected_PD: torch.Tensor) -> torch.Tensor:
    """CHES of each pair: <S+, S-> - ||S+||^2, from the sums of hidden states; larger means more displacement.

    Shapes: chosen_PD, rejected_PD (P, D) -> (P,).
    """
    return (chosen_PD * (rejected_PD - chosen_PD)).sum(-1)


def ches_normalized(
    chosen_PD: torch.Tensor, rejected_PD: torch.Tensor, num_chosen_P: torch.Tensor, num_rejected_P: torch.Tensor
) -> torch.Tensor:
    """Length-normalised CHES: [`ches`] of the mean instead of the summed hidden states, comparable between lengths.

    Shapes: chosen_PD, rejected_PD (P, D), num_chosen_P, num_rejected_P (P,) numbers of tokens -> (P,).
    """
    return ches(chosen_PD / num_chosen_P[:, None], rejected_PD / num_rejected_P[:, None])


def risk(scores_P: torch.Tensor) -> torch.Tensor:
    """Rank of each pair's score in its data: the fraction of pairs that score lower or the same, in (0, 1].

    Shapes: scores_P (P,) -> (P,).
    """
    ordered_P = scores_P.sort().values
    return torch.searchsorted(ordered_P, scores_P.contiguous(), right=True).double() / len(scores_P)
