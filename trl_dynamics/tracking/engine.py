"""The engine: score(model) -> records of every probe, the same on any number of processes, leaving no trace behind.

    N scored positions of a batch   I responses of the probe set

Batches are frozen once and dealt out to the processes round robin, so that a response is always scored in the same
company; every process runs the same number of forwards, the surplus ones on a batch that is thrown away.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from trl_dynamics.probing.encode import EncodedProbes, Layout, ProbeBatch
from trl_dynamics.stats_head import StatsRequest, is_installed

# Sums over a response's own tokens that the engine accumulates, in this order; EOS and the count follow.
_SUMS = ("logp", "prob", "argmax_logp", "argmax_match", "entropy", "sum_sq", "topk_mass", "star_logp", "rest_mass")


@dataclass(frozen=True)
class Scores:
    """What one scoring gives: the record columns (without model and step), one row per response, and y* per token.

    `star_ids` holds, per response, the label whose probability is followed at each of its positions.
    """

    columns: dict[str, list]
    star_ids: list[list[int]]


class ProbeEngine:
    """Scores one encoded probe set again and again.

    Args:
        encoded ([`EncodedProbes`]): What to score.
        layout ([`Layout`]): How to batch it.
        top_k (`int`, *optional*): How many labels `topk_mass` covers.
        accelerator ([`~accelerate.Accelerator`], *optional*): Processes to share the work with, and the autocast that
            training uses. Without one a single process scores in the model's own dtype.
    """

    def __init__(self, encoded: EncodedProbes, layout: Layout, *, top_k: int = 10, accelerator=None):
        if top_k < 1:
            raise ValueError(f"probe_top_k is {top_k}, expected at least 1")
        self.encoded, self.layout, self.top_k, self.accelerator = encoded, layout, top_k, accelerator
        self.batches = layout.batches(encoded)
        lengths = [len(item.response_ids) for item in encoded.items]
        self._token_start_I = torch.tensor([0, *lengths]).cumsum(0)

    @property
    def batch_plan(self) -> dict:
        """What makes two scorings comparable token by token: layout, sizes and a fingerprint of every batch."""
        digest = hashlib.sha256(self.encoded.fingerprint.encode())
        for batch in self.batches:
            digest.update(json.dumps([list(batch.input_ids.shape), batch.item_N.tolist()]).encode())
        return {
            "layout": self.layout.name,
            "num_items": len(self.encoded.items),
            "num_batches": len(self.batches),
            "batch_size": getattr(self.layout, "batch_size", None),
            "num_scored_tokens": int(self._token_start_I[-1]),
            "fingerprint": digest.hexdigest(),
        }

    def score(self, model: nn.Module, star_ids: list[list[int]] | None = None) -> Scores:
        """Score every response; all processes call this together and all get the whole result.

        Args:
            model (`nn.Module`): A model with the stats head installed (see [`stats_head.install`]): the trainer's
                `model`, which under FSDP is the wrapper and under DDP or DeepSpeed the model inside.
            star_ids (`list[list[int]]`, *optional*): The frozen y* of an earlier scoring. Without it this scoring is
                the baseline: y* is the likeliest label besides the response's own token.

        Raises:
            ValueError: If the model has no stats head or `star_ids` belong to another tokenisation.
        """
        if not is_installed(model):
            raise ValueError("the model has no stats head; call trl_dynamics.stats_head.install(model) first")
        device = _device_of(model, self.accelerator)
        sums = torch.zeros(len(self.encoded.items), len(_SUMS) + 2, dtype=torch.float64)
        stars = self._flat_stars(star_ids)
        world, rank = (self.accelerator.num_processes, self.accelerator.process_index) if self.accelerator else (1, 0)
        with _evaluating(model), torch.no_grad(), self._autocast():
            for turn in range(math.ceil(len(self.batches) / world)):
                index = turn * world + rank
                batch = self.batches[index if index < len(self.batches) else 0]
                stats = self._forward(model, batch, stars if star_ids is not None else None, device)
                if index < len(self.batches):
                    self._accumulate(batch, stats, sums, stars, fresh=star_ids is None)
        sums = self._all_sum(sums, device)
        stars = self._all_sum(stars, device) if star_ids is None else stars
        return Scores(self._columns(sums), self._nested_stars(stars))

    def _forward(
        self, model: nn.Module, batch: ProbeBatch, stars: torch.Tensor | None, device: torch.device
    ) -> dict[str, torch.Tensor]:
        extra_NE = None if stars is None else stars[self._token_index(batch)][:, None].to(device)
        rows_N, cols_N, target_N = (t.to(device) for t in (batch.rows_N, batch.cols_N, batch.target_N))
        request = StatsRequest(rows_N, cols_N, target_N, batch.input_ids.shape[1], extra_NE, self.top_k)
        inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids.to(device)
        return {name: value.cpu() for name, value in model(**inputs, stats_request=request).items()}

    def _accumulate(
        self, batch: ProbeBatch, stats: dict[str, torch.Tensor], sums: torch.Tensor, stars: torch.Tensor, fresh: bool
    ) -> None:
        own_N = ~batch.is_eos_mask_N
        logp = stats["target_logp"].double()
        star_logp = (stats["other_logp"] if fresh else stats["extra_logp"][:, 0]).double()
        per_token = {
            "logp": logp,
            "prob": logp.exp(),
            "argmax_logp": stats["argmax_logp"],
            "argmax_match": stats["argmax_id"] == batch.target_N,
            "entropy": stats["entropy"],
            "sum_sq": stats["sum_sq"],
            "topk_mass": stats["topk_mass"],
            "star_logp": star_logp,
            "rest_mass": 1 - logp.exp() - star_logp.exp(),
        }
        values = torch.stack([per_token[name].double() for name in _SUMS], dim=1)
        sums[:, : len(_SUMS)].index_add_(0, batch.item_N[own_N], values[own_N])
        ends = batch.item_N[batch.is_eos_mask_N]
        sums[ends, -2] = logp[batch.is_eos_mask_N]
        sums[ends, -1] = 1.0
        if fresh:
            stars[self._token_index(batch)[own_N]] = stats["other_id"][own_N]

    def _columns(self, sums: torch.Tensor) -> dict[str, list]:
        items = self.encoded.items
        num_tokens = (self._token_start_I[1:] - self._token_start_I[:-1]).double()
        total = {name: sums[:, index] for index, name in enumerate(_SUMS)}
        eos_logp = torch.where(sums[:, -1] > 0, sums[:, -2], torch.nan)
        values = {
            "logp_sum": total["logp"],
            "logp_mean": total["logp"] / num_tokens,
            "prob_mean": total["prob"] / num_tokens,
            "argmax_logp_sum": total["argmax_logp"],
            "argmax_match_mean": total["argmax_match"] / num_tokens,
            "entropy_mean": total["entropy"] / num_tokens,
            "sum_sq_mean": total["sum_sq"] / num_tokens,
            "topk_mass_mean": total["topk_mass"] / num_tokens,
            "star_logp_sum": total["star_logp"],
            "rest_mass_mean": total["rest_mass"] / num_tokens,
            "eos_logp": eos_logp,
        }
        return {
            "probe_id": [item.probe_id for item in items],
            "response_type": [item.response_type for item in items],
            "num_tokens": num_tokens.int().tolist(),
            "truncated": [item.prompt_cut or item.response_cut for item in items],
        } | {name: value.tolist() for name, value in values.items()}

    def _token_index(self, batch: ProbeBatch) -> torch.Tensor:
        """Index of each scored position among all response tokens; an EOS position borrows its response's first."""
        own_N = ~batch.is_eos_mask_N
        index_N = self._token_start_I[batch.item_N]
        # Within a batch the positions of a response lie in order, so a running count per response is its offset.
        first_N = torch.ones_like(batch.item_N, dtype=torch.bool)
        first_N[1:] = batch.item_N[1:] != batch.item_N[:-1]
        starts = torch.arange(len(batch.item_N))[first_N]
        offset_N = torch.arange(len(batch.item_N)) - starts.repeat_interleave(
            torch.diff(starts, append=torch.tensor([len(first_N)]))
        )
        return torch.where(own_N, index_N + offset_N, index_N)

    def _flat_stars(self, star_ids: list[list[int]] | None) -> torch.Tensor:
        if star_ids is None:
            return torch.zeros(int(self._token_start_I[-1]), dtype=torch.int64)
        lengths = [len(item.response_ids) for item in self.encoded.items]
        if [len(ids) for ids in star_ids] != lengths:
            raise ValueError(
                f"the frozen y* tokens cover {len(star_ids)} responses with other lengths than the {len(lengths)} "
                "that are scored: the tokenizer or the length limits changed since the baseline was taken"
            )
        return torch.tensor([token for ids in star_ids for token in ids], dtype=torch.int64)

    def _nested_stars(self, stars: torch.Tensor) -> list[list[int]]:
        return [ids.tolist() for ids in stars.split(torch.diff(self._token_start_I).tolist())]

    def _all_sum(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Sum over processes; each entry is non-zero on one of them only, so the result is exact."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(device), reduction="sum").cpu()

    def _autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast() if self.accelerator else contextlib.nullcontext()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode as it was after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device_of(model: nn.Module, accelerator) -> torch.device:
    return accelerator.device if accelerator else next(model.parameters()).device
