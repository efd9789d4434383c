"""The engine: score(model) -> records of every probe, the same on any number of processes, leaving no trace behind.

    N scored positions of a batch   S statistics per position   I responses of the probe set

Groups of batches are frozen once and dealt out to the processes round robin, so that a response is always scored in
the same company; every process runs the same number of forwards, the surplus ones on a batch that is thrown away.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trl_dynamics.compat import PromptCache
from trl_dynamics.probing.encode import EncodedProbes
from trl_dynamics.probing.layouts import BatchGroup, Layout, ProbeBatch, Prompts
from trl_dynamics.scoring.precision import float32_compute
from trl_dynamics.stats_head import StatsRequest, is_installed, kept_state, prompts_only
from trl_dynamics.stats_head.check import Precision

# Sums over a response's own tokens that the engine accumulates, in this order; EOS and the count follow.
_SUMS = ("logp", "prob", "argmax_logp", "argmax_match", "entropy", "sum_sq", "topk_mass", "star_logp", "rest_mass")
# What comes back from the device per position, in this order, as one tensor.
_FROM_DEVICE = ("target_logp", "argmax_logp", "argmax_match", "entropy", "sum_sq", "topk_mass", "star_logp")


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
        float32 (`bool`, *optional*): Compute in float32, whatever the weights' dtype and the autocast.
    """

    def __init__(
        self, encoded: EncodedProbes, layout: Layout, *, top_k: int = 10, accelerator=None, float32: bool = False
    ):
        if top_k < 1:
            raise ValueError(f"probe_top_k is {top_k}, expected at least 1")
        self.encoded, self.top_k, self.accelerator, self.float32 = encoded, top_k, accelerator, float32
        lengths = [len(item.response_ids) for item in encoded.items]
        self._token_start_I = torch.tensor([0, *lengths]).cumsum(0)
        # May show a progress bar: takes what is gone through, how many there are, and what is done.
        self.watch: Callable[[Iterable, int, str], Iterable] = lambda items, total, what: items
        self.use(layout)

    def use(self, layout: Layout) -> None:
        """Batch the probes by another layout from now on."""
        self.layout, self.groups = layout, layout.groups(self.encoded)
        self._pinned = False

    @property
    def batch_plan(self) -> dict:
        """What makes two scorings comparable token by token: layout, sizes and a fingerprint of every batch."""
        digest = hashlib.sha256(self.encoded.fingerprint.encode())
        for group in self.groups:
            if group.prompts:
                digest.update(json.dumps(list(group.prompts.input_ids.shape)).encode())
            for batch in group.batches:
                digest.update(json.dumps([list(batch.input_ids.shape), batch.item_N.tolist()]).encode())
        return {
            "layout": self.layout.name,
            "tokens_per_batch": self.layout.tokens_per_batch,
            "num_items": len(self.encoded.items),
            "num_groups": len(self.groups),
            "num_batches": sum(len(group.batches) for group in self.groups),
            "num_scored_tokens": int(self._token_start_I[-1]),
            "num_forward_tokens": sum(group.num_tokens for group in self.groups),
            "fingerprint": digest.hexdigest(),
        }

    @property
    def processes(self) -> tuple[int, int]:
        """How many processes share the work, and which one this is."""
        return (self.accelerator.num_processes, self.accelerator.process_index) if self.accelerator else (1, 0)

    @property
    def _num_own_batches(self) -> int:
        world, rank = self.processes
        return sum(len(group.batches) for group in self.groups[rank::world])

    def computes_in_half(self, model: nn.Module) -> bool:
        """Whether forwards of a scoring round to half precision."""
        if self.float32:
            return False
        autocast = self.accelerator is not None and self.accelerator.mixed_precision not in (None, "no")
        return autocast or Precision.of_weights(model).half

    @contextlib.contextmanager
    def scoring(self, model: nn.Module) -> Iterator[torch.device]:
        """How every forward of a probe runs: evaluation mode, no gradient, the engine's precision; on which device."""
        with evaluating(model), torch.no_grad(), self._precision(model):
            yield device_of(model, self.accelerator)

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
        device = device_of(model, self.accelerator)
        self._pin(device)
        sums = torch.zeros(len(self.encoded.items), len(_SUMS) + 2, dtype=torch.float64)
        stars, fresh = self._flat_stars(star_ids), star_ids is None
        with self.scoring(model):
            forwards = _one_behind(self._forwards(model, None if fresh else stars, device), device)
            for batch, values_NS, ids_N in self.watch(forwards, self._num_own_batches, "scoring"):
                self._accumulate(batch, values_NS, sums)
                if fresh:
                    own_N = ~batch.is_eos_mask_N
                    stars[self._token_index(batch)[own_N]] = ids_N[own_N]
        sums = self.all_sum(sums, device)
        stars = self.all_sum(stars, device) if fresh else stars
        return Scores(self._columns(sums), self._nested_stars(stars))

    def _forwards(self, model: nn.Module, stars: torch.Tensor | None, device: torch.device) -> Iterator[tuple]:
        """Run this process's share; yields each batch with its statistics, on their way to the CPU."""
        world, rank = self.processes
        for first in range(0, len(self.groups), world):
            cache = None  # one group's keys go before the next one's come
            turn = self.groups[first : first + world]
            # A process without a group of its own in the last turn repeats one, and one with fewer batches its last.
            group = turn[rank] if rank < len(turn) else turn[0]
            # Where others run prompts, a process without any runs theirs for nothing.
            prompts = group.prompts or next((each.prompts for each in turn if each.prompts), None)
            cache = self._run_prompts(model, prompts, device) if prompts else None
            cache = cache if group.prompts else None
            for index in range(max(len(each.batches) for each in turn)):
                batch = group.batches[min(index, len(group.batches) - 1)]
                stats = self._run(model, batch, cache, stars, device)
                if rank < len(turn) and index < len(group.batches):
                    yield batch, *stats

    def _run_prompts(self, model: nn.Module, prompts: Prompts, device: torch.device) -> PromptCache:
        cache = PromptCache()
        model(
            input_ids=_send(prompts.input_ids, device),
            attention_mask=_send(prompts.attention_mask, device),
            position_ids=_send(prompts.position_ids, device),
            past_key_values=cache,
            stats_request=prompts_only(prompts.input_ids.shape[1], self.float32),
        )
        return cache

    def _run(
        self,
        model: nn.Module,
        batch: ProbeBatch,
        cache: PromptCache | None,
        stars: torch.Tensor | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Statistics (N, S) and y* ids (N,) of one forward, as copies to the CPU that may still be under way."""

        def send(tensor: torch.Tensor) -> torch.Tensor:
            return _send(tensor, device)

        extra_NE = None if stars is None else send(stars[self._token_index(batch)][:, None])
        target_N = send(batch.target_N)
        request = StatsRequest(
            send(batch.rows_N),
            send(batch.cols_N),
            target_N,
            batch.input_ids.shape[1],
            extra_NE,
            self.top_k,
            float32=self.float32,
        )
        inputs = {"input_ids": send(batch.input_ids), "attention_mask": send(batch.attention_mask)}
        if batch.position_ids is not None:
            inputs["position_ids"] = send(batch.position_ids)
        if cache is not None:
            cache.continue_from(send(batch.prompt_B))
            inputs["past_key_values"] = cache
        stats = model(**inputs, stats_request=request)
        # Where logits are NaN the argmax is an index like any other, and no match.
        match_N = (stats["argmax_id"] == target_N).to(stats["argmax_logp"].dtype)
        stats["argmax_match"] = torch.where(stats["argmax_logp"].isfinite(), match_N, torch.nan)
        stats["star_logp"] = stats["other_logp"] if stars is None else stats["extra_logp"][:, 0]
        dtype = stats["target_logp"].dtype
        values_NS = torch.stack([stats[name].to(dtype) for name in _FROM_DEVICE], dim=1)
        # Only a copy that an event can be waited for may be left under way.
        later = device.type == "cuda"
        return values_NS.to("cpu", non_blocking=later), stats["other_id"].to("cpu", non_blocking=later)

    def _accumulate(self, batch: ProbeBatch, values_NS: torch.Tensor, sums: torch.Tensor) -> None:
        own_N = ~batch.is_eos_mask_N
        stats = {name: values_NS[:, index].double() for index, name in enumerate(_FROM_DEVICE)}
        stats["logp"] = stats["target_logp"]
        stats["prob"] = stats["logp"].exp()
        stats["rest_mass"] = 1 - stats["prob"] - stats["star_logp"].exp()
        per_token_NS = torch.stack([stats[name] for name in _SUMS], dim=1)
        sums[:, : len(_SUMS)].index_add_(0, batch.item_N[own_N], per_token_NS[own_N])
        ends = batch.item_N[batch.is_eos_mask_N]
        sums[ends, -2] = stats["logp"][batch.is_eos_mask_N]
        sums[ends, -1] = 1.0

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

    def all_sum(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Sum over processes; each entry is non-zero on one of them only, so the result is exact."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(device), reduction="sum").cpu()

    def _precision(self, model: nn.Module) -> contextlib.AbstractContextManager:
        if self.float32:
            return float32_compute(model, self.accelerator)
        return self.accelerator.autocast() if self.accelerator else contextlib.nullcontext()

    def _pin(self, device: torch.device) -> None:
        """Page-lock the frozen batches once, so that their copies to a GPU need not wait for each other."""
        if device.type == "cuda" and not self._pinned:
            self.groups, self._pinned = [_pinned(group) for group in self.groups], True


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`, under way only where its source is sure to outlast it."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def _pinned(group: BatchGroup) -> BatchGroup:
    def pin(part):
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
        tensors = {name: value.pin_memory() for name, value in fields.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(part, **tensors)

    return BatchGroup(tuple(pin(batch) for batch in group.batches), pin(group.prompts) if group.prompts else None)


def _one_behind(results: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """Hand out each result once the next one has been launched: copies from the device overlap its work."""
    waiting = None
    for result in results:
        event = torch.Event(device) if device.type == "cuda" else None
        if event is not None:
            event.record()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = result, event
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(result: tuple, event: torch.Event | None) -> tuple:
    if event is not None:
        event.synchronize()
    return result


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it every module has its own mode, buffers and plain attributes as before, and its
    parameters are sharded again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with kept_state(model):
            yield
    finally:
        for module in training:
            module.training = True
        # FSDP2 keeps the root's parameters whole after a forward, for a backward that does not follow here.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def device_of(model: nn.Module, accelerator: Accelerator | None) -> torch.device:
    return accelerator.device if accelerator else next(model.parameters()).device
