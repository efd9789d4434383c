"""Per-token statistics of the next-token distribution, the LM head applied tile by tile.

    N scored positions   D hidden   V vocabulary   E extra labels per position   k top labels

No tensor of shape (all positions, V) ever exists: a tile holds about `TILE_ELEMENTS` logits (on an accelerator
`ACCELERATOR_FACTOR` times as many), whatever N and V are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from trl_dynamics.ops import squeeze

TILE_ELEMENTS, ACCELERATOR_FACTOR = 1 << 20, 4


class TileLogits(Protocol):
    """Gives the logits of some positions; the caller may write into what it gets."""

    @property
    def num_labels(self) -> int:
        """V."""

    def logits(self, inputs_N: torch.Tensor) -> torch.Tensor:
        """(N, V) logits as the model itself computes them, in float32 (float64 for a float64 model)."""


@dataclass(frozen=True)
class Head:
    """The LM head as maths: weight (V, D), bias (V,) or None, factor and soft cap on the raw logits."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    factor: float = 1.0
    softcap: float | None = None

    @property
    def num_labels(self) -> int:
        """V."""
        return self.weight_VD.shape[0]

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) logits of hidden states (N, D)."""
        return transformed(F.linear(hidden_ND, self.weight_VD, self.bias_V), self.factor, self.softcap)


@dataclass(frozen=True)
class CalledHead:
    """The LM head as a module, whatever it does to hidden states; factor and soft cap on what it returns."""

    module: Callable[[torch.Tensor], torch.Tensor]
    num_labels: int
    factor: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) logits of hidden states (N, D)."""
        return transformed(self.module(hidden_ND), self.factor, self.softcap)


@dataclass(frozen=True)
class KnownLogits:
    """Logits (P, V) that a model has computed itself; its positions are asked for by their index."""

    logits_PV: torch.Tensor

    @property
    def num_labels(self) -> int:
        """V."""
        return self.logits_PV.shape[-1]

    def logits(self, index_N: torch.Tensor) -> torch.Tensor:
        """(N, V) logits at these indices (N,) int64."""
        return transformed(self.logits_PV[index_N], 1.0, None)


def transformed(logits_NV: torch.Tensor, factor: float, softcap: float | None) -> torch.Tensor:
    """Raw logits (N, V) in float32 at least, times `factor`, and capped."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if factor != 1.0:
        logits_NV = logits_NV * factor
    if softcap is not None:
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return logits_NV


def token_stats(
    hidden_ND: torch.Tensor,
    head: TileLogits,
    target_N: torch.Tensor,
    extra_NE: torch.Tensor | None = None,
    top_k: int = 10,
) -> dict[str, torch.Tensor]:
    """Statistics of softmax(head(hidden)) at each position, in nats and probabilities.

    Shapes: hidden (N, D), or whatever else the head takes, one entry per position; target (N,) int64, extra (N, E)
    int64. Returned, all (N,) unless said: `target_logp`, `argmax_logp`, `argmax_id`, `other_id` and `other_logp`
    (likeliest label besides the target), `entropy`, `sum_sq` (sum_v p_v^2), `topk_mass` (probability of the k
    likeliest labels), `extra_logp` (N, E) when asked for.
    """
    parts = []
    for rows, logits_NV in _tiles(hidden_ND, head):
        parts.append(_tile_stats(logits_NV, target_N[rows], None if extra_NE is None else extra_NE[rows], top_k))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def squeeze_rows(hidden_ND: torch.Tensor, head: Head, label_N: torch.Tensor) -> squeeze.Rows:
    """What [`squeeze.largest_share`] needs to know of each position; shapes: hidden (N, D), label (N,) int64."""
    return squeeze.join([squeeze.keep_rows(logits_NV, label_N[rows]) for rows, logits_NV in _tiles(hidden_ND, head)])


def _tiles(hidden_ND: torch.Tensor, head: TileLogits) -> Iterator[tuple[slice, torch.Tensor]]:
    """Positions and their logits, tile by tile."""
    factor = 1 if hidden_ND.device.type == "cpu" else ACCELERATOR_FACTOR
    tile = max(1, factor * TILE_ELEMENTS // head.num_labels)
    # An empty request still yields one (empty) tile, so that the outputs keep their dtypes.
    for start in range(0, max(1, len(hidden_ND)), tile):
        rows = slice(start, start + tile)
        yield rows, head.logits(hidden_ND[rows])


def _tile_stats(
    logits_NV: torch.Tensor, target_N: torch.Tensor, extra_NE: torch.Tensor | None, top_k: int
) -> dict[str, torch.Tensor]:
    top_NK, top_id_NK = logits_NV.topk(min(max(top_k, 2), logits_NV.shape[-1]), dim=-1)
    target_logit_N = logits_NV.gather(1, target_N[:, None])[:, 0]
    extra_NE = None if extra_NE is None else logits_NV.gather(1, extra_NE)
    # In place from here on: the tile is the largest tensor of a forward, and nothing else reads its logits.
    peak_N = top_NK[:, 0]
    shifted_NV = logits_NV.sub_(peak_N[:, None])
    weight_NV = shifted_NV.exp()
    total_N = weight_NV.sum(dim=-1)
    log_total_N = total_N.log()
    # 0 * -inf is nan where a label is impossible; its share of the entropy is 0.
    shifted_NV.clamp_(min=torch.finfo(shifted_NV.dtype).min)
    top_logp_NK = top_NK - peak_N[:, None] - log_total_N[:, None]
    is_target_N = top_id_NK[:, 0] == target_N
    stats = {
        "target_logp": target_logit_N - peak_N - log_total_N,
        "argmax_logp": top_logp_NK[:, 0],
        "argmax_id": top_id_NK[:, 0],
        "other_id": torch.where(is_target_N, top_id_NK[:, 1], top_id_NK[:, 0]),
        "other_logp": torch.where(is_target_N, top_logp_NK[:, 1], top_logp_NK[:, 0]),
        # sum_v p_v (log total - shifted_v), which is -sum_v p_v log p_v.
        # Plain products: a dot product would be rounded under autocast.
        "entropy": log_total_N - shifted_NV.mul_(weight_NV).sum(dim=-1) / total_N,
        "sum_sq": weight_NV.square_().sum(dim=-1) / total_N.square(),
        "topk_mass": top_logp_NK[:, :top_k].exp().sum(dim=-1),
    }
    if extra_NE is not None:
        stats["extra_logp"] = extra_NE - peak_N[:, None] - log_total_N[:, None]
    return stats
