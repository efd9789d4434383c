"""Greedy answers of the model as it is, the same on any number of processes, leaving no trace behind.

    Q prompts   B prompts of a batch   P tokens of a prompt   T new tokens

Each new token is the argmax of the stats head's own forward, so no logits are kept and no random number is drawn.
Batches are frozen and dealt out to the processes; all of them run the same number of forwards, and agree when to stop.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from trl_dynamics import stats_head
from trl_dynamics.probing.encode import EncodedPrompt, answer_text
from trl_dynamics.probing.layouts import side_of
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.repetition import distinct_share, longest_repeat, repeat_share, same_shares
from trl_dynamics.stats_head import StatsRequest, is_installed

# New tokens between two looks at whether all answers have ended, which wait for the device and the other processes.
LOOK_EVERY = 8
# Keys of all rows, new tokens included, may be so many times the tokens of a forward.
_KEYS_PER_TOKEN = 4


@dataclass(frozen=True)
class Reading:
    """How answers are read and written.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Turns ids into text.
        end_ids (`frozenset[int]`): Each of them ends an answer.
        pad_id (`int`): Fills rows.
        context_length (`int`, *optional*): Prompt and answer together never exceed it.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    pad_id: int
    context_length: int | None = None


class GreedySampler:
    """Answers the same prompts again and again.

    Args:
        prompts (`Sequence[EncodedPrompt]`): What to answer, in the order of the result.
        reading ([`Reading`]): Tokenizer, ends, padding, context.
        max_new_tokens (`int`): An answer that has not ended by then is cut.
        engine ([`ProbeEngine`]): Its processes, precision and layout are used: where it shares prompts, which a check
            at the start allowed, a new token continues from kept keys and values; else every token runs its whole row.
        tokens_per_batch (`int`): Most tokens of a forward over prompts, padding included; a longer one runs alone.

    Raises:
        ValueError: If there is nothing to answer, no token to answer with, or no room for one in the context.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        reading: Reading,
        max_new_tokens: int,
        engine: ProbeEngine,
        tokens_per_batch: int,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"probe_sample_tokens is {max_new_tokens}, expected at least 1")
        if not prompts:
            raise ValueError("there are no prompts to answer; expected at least one")
        context = reading.context_length
        self._room = [
            min(max_new_tokens, max_new_tokens if context is None else context - len(prompt.input_ids))
            for prompt in prompts
        ]
        for prompt, room in zip(prompts, self._room, strict=True):
            if room < 1:
                raise ValueError(
                    f"the prompt of probe {prompt.probe_id!r} fills the model's context of {context} tokens, so it "
                    "cannot be answered; set probe_max_prompt_length"
                )
        self.prompts, self.reading, self.max_new_tokens = tuple(prompts), reading, max_new_tokens
        self.engine, self.tokens_per_batch = engine, tokens_per_batch

    @property
    def description(self) -> dict:
        """What was asked, for meta.json."""
        asked = [[[p.probe_id, p.input_ids] for p in self.prompts], sorted(self.reading.end_ids)]
        return {
            "num_probes": len(self.prompts),
            "max_new_tokens": self.max_new_tokens,
            "prompts_cut": sum(prompt.cut for prompt in self.prompts),
            "fingerprint": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }

    def sample(self, model: nn.Module) -> dict[str, list]:
        """Answer every prompt; all processes call this together and all get the whole result.

        Args:
            model (`nn.Module`): As for [`ProbeEngine.score`].

        Returns:
            `dict[str, list]`: The columns of [`SAMPLE_SCHEMA`] without model and step, one row per prompt.

        Raises:
            ValueError: If the model has no stats head.
        """
        if not is_installed(model):
            raise ValueError("the model has no stats head; call trl_dynamics.stats_head.install(model) first")
        engine, cached = self.engine, self.engine.layout.name == "shared_prefix"
        ids_QT = torch.zeros(len(self.prompts), self.max_new_tokens, dtype=torch.int64)
        logp_QT = torch.zeros(len(self.prompts), self.max_new_tokens, dtype=torch.float64)
        groups = self.groups(cached, stats_head.own_forward_tokens(model))
        world, rank = engine.processes
        with engine.scoring(model) as device:
            turns = range(0, len(groups), world)
            for first in engine.watch(turns, len(turns), "answering"):
                turn = groups[first : first + world]
                # All processes run as many forwards as the longest group of the turn; surplus ones repeat one.
                limit = max(self._room[index] for group in turn for index in group)
                group = turn[rank] if rank < len(turn) else turn[0]
                ids_BT, logp_BT = self._answer(model, group, limit, cached, device)
                if rank < len(turn):
                    ids_QT[group, : ids_BT.shape[1]] = ids_BT.cpu()
                    logp_QT[group, : logp_BT.shape[1]] = logp_BT.double().cpu()
        ids_QT, logp_QT = engine.all_sum(ids_QT, device), engine.all_sum(logp_QT, device)
        return self._columns(ids_QT.tolist(), logp_QT)

    def groups(self, cached: bool, most: int | None = None) -> list[list[int]]:
        """The frozen batches, as indices of prompts: ascending lengths, within the budget and `most` tokens."""
        budget = self.tokens_per_batch if most is None else min(most, self.tokens_per_batch)
        order = sorted(range(len(self.prompts)), key=lambda index: (len(self.prompts[index].input_ids), index))
        found: list[list[int]] = []
        for index in order:
            width, rows = len(self.prompts[index].input_ids), len(found[-1]) + 1 if found else 0
            keys = rows * (width + self.max_new_tokens)
            fits = rows * width <= budget and keys <= _KEYS_PER_TOKEN * budget if cached else keys <= budget
            if found and fits and self._side(index) == self._side(found[-1][0]):
                found[-1].append(index)
            else:
                found.append([index])
        return found

    def _crosses(self, index: int) -> bool:
        """Whether an answer may begin below a length above which the model computes otherwise, and end beyond."""
        length, boundaries = len(self.prompts[index].input_ids), self.engine.layout.boundaries
        return side_of(length, boundaries) != side_of(length + self.max_new_tokens, boundaries)

    def _side(self, index: int) -> tuple:
        """Equal for prompts that may be answered together."""
        length = len(self.prompts[index].input_ids)
        return (index,) if self._crosses(index) else side_of(length, self.engine.layout.boundaries)

    def _answer(
        self, model: nn.Module, group: list[int], limit: int, cached: bool, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities (B, T) of `limit` new tokens, or fewer where all processes' answers have ended;
        what stands behind an end means nothing."""
        prompts = [self.prompts[index].input_ids for index in group]
        # Keys that were kept from below a boundary are not those that the model has above it.
        kind = _CachedRows if cached and not self._crosses(group[0]) else _WholeRows
        rows = kind(model, prompts, limit, self.reading, device, self.engine.float32)
        ends = torch.tensor(sorted(self.reading.end_ids), device=device)
        room_B = torch.tensor([self._room[index] for index in group], device=device)
        done_B = torch.zeros(len(group), dtype=torch.bool, device=device)
        ids, logps, column = [], [], rows.start()
        for number in range(1, limit + 1):
            next_B, logp_B = column
            ids.append(next_B)
            logps.append(logp_B)
            done_B |= torch.isin(next_B, ends) | (number >= room_B)
            if number == limit or (number % LOOK_EVERY == 0 and self._all_done(done_B, device)):
                break
            column = rows.go_on(next_B)
        return torch.stack(ids, dim=1), torch.stack(logps, dim=1)

    def _all_done(self, done_B: torch.Tensor, device: torch.device) -> bool:
        """Whether every answer of this turn has ended, on every process."""
        return int(self.engine.all_sum((~done_B.all()).long().cpu(), device)) == 0

    def _columns(self, ids: list[list[int]], logp_QT: torch.Tensor) -> dict[str, list]:
        columns: dict[str, list] = {"probe_id": [prompt.probe_id for prompt in self.prompts]}
        for index, prompt in enumerate(self.prompts):
            row = ids[index][: self._room[index]]
            end = next((at for at, token in enumerate(row) if token in self.reading.end_ids), None)
            own, logp = row[:end], logp_QT[index]
            total = float(logp[: len(own)].sum())
            for name, value in {
                "num_tokens": len(own),
                "ended": end is not None,
                "logp_sum": total,
                "logp_mean": total / len(own) if own else torch.nan,
                "eos_logp": torch.nan if end is None else float(logp[end]),
                **{f"distinct_{n}": distinct_share(own, n) for n in (1, 2, 3)},
                "longest_repeat": float(longest_repeat(own)),
                "repeat_share": repeat_share(own),
                "token_ids": own,
                "text": answer_text(self.reading.tokenizer, prompt.input_ids, own),
            }.items():
                columns.setdefault(name, []).append(value)
        return columns | {"same_share": same_shares(columns["token_ids"])}


class _CachedRows:
    """Rows that keep their keys and values: prompts padded on the left, one new column per forward."""

    def __init__(self, model, prompts, limit: int, reading: Reading, device: torch.device, float32: bool):
        self.model, self.reading, self.float32 = model, reading, float32
        width = max(map(len, prompts))
        pads = [width - len(ids) for ids in prompts]
        self.input_ids = torch.tensor(
            [[reading.pad_id] * pad + list(ids) for pad, ids in zip(pads, prompts, strict=True)], device=device
        )
        self.mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
        self.cache = DynamicCache()

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(self.input_ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def go_on(self, next_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        position_B1 = self.mask.sum(-1, keepdim=True) - 1
        if self.reading.context_length is not None:  # a row that is done may go on past the last position
            position_B1 = position_B1.clamp(max=self.reading.context_length - 1)
        return self._run(next_B[:, None], position_B1)

    def _run(self, ids_BT: torch.Tensor, position_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last_B = torch.full_like(ids_BT[:, 0], ids_BT.shape[1] - 1)
        inputs = {"attention_mask": self.mask, "position_ids": position_BT, "past_key_values": self.cache}
        return _argmax(self.model, ids_BT, last_B, self.float32, **inputs)


class _WholeRows:
    """Rows that run as a whole for every new token, padded on the right: slow, and right for every causal model."""

    def __init__(self, model, prompts, limit: int, reading: Reading, device: torch.device, float32: bool):
        self.model, self.reading, self.float32 = model, reading, float32
        self.width = max(map(len, prompts))
        self.length_B = torch.tensor([len(ids) for ids in prompts], device=device)
        rows = [list(ids) + [reading.pad_id] * (self.width + limit - len(ids)) for ids in prompts]
        self.input_ids = torch.tensor(rows, device=device)

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.width if self.reading.context_length is None else min(self.width, self.reading.context_length)
        ids_BT = self.input_ids[:, :width]
        # A row that is done may go on past the last position; what it says there is not read.
        last_B = (self.length_B - 1).clamp(max=width - 1)
        mask_BT = (torch.arange(width, device=ids_BT.device) <= last_B[:, None]).long()
        return _argmax(self.model, ids_BT, last_B, self.float32, attention_mask=mask_BT)

    def go_on(self, next_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.input_ids.scatter_(1, self.length_B[:, None], next_B[:, None])
        self.length_B, self.width = self.length_B + 1, self.width + 1
        return self.start()


def _argmax(
    model: nn.Module, ids_BT: torch.Tensor, last_B: torch.Tensor, float32: bool, **inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest next token after column `last_B` of each row, and its log-probability, both (B,)."""
    rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
    request = StatsRequest(rows_B, last_B, torch.zeros_like(rows_B), ids_BT.shape[1], top_k=1, float32=float32)
    stats = model(input_ids=ids_BT, stats_request=request, **inputs)
    return stats["argmax_id"].to(ids_BT.device), stats["argmax_logp"].to(ids_BT.device)
