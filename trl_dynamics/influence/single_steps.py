"""What one training step on one answer does to every answer of a probe set: the rows of a force map, from any model.

Unlike the other files of influence/, this one runs a model. B rows   N labels
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_dynamics import stats_head
from trl_dynamics.akg import losses
from trl_dynamics.akg.batched import predict_together
from trl_dynamics.akg.one_step import Force, Influence, predict, update_gradient
from trl_dynamics.akg.real_step import fixed_features, last_bits, moved
from trl_dynamics.akg.steps import Step, Tensors, step_of
from trl_dynamics.akg.task import Task, causal_lm, label_logp, row_sums
from trl_dynamics.probing.encode import EncodedResponse, LengthLimits, encode, encode_response, token_texts
from trl_dynamics.probing.labelled import collate, pad_id_of, split
from trl_dynamics.probing.schema import REQUIRED_TYPES, Probe, ProbeSet

logger = logging.getLogger(__name__)

# Besides the types of answers, which are trained on one at a time: both sides of a pair under DPO's loss.
DPO = "dpo"
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """Which step is predicted, and how.

    Args:
        direction (`str`): `"sgd"` or `"adamw"`: a first step of that optimiser.
        learning_rate (`float`): The step's.
        max_grad_norm (`float`, *optional*): Clip the gradient as in training.
        beta (`float`): DPO's, whose reference is the model itself.
        order (`int`): 2 adds the second order along the step.
        verify (`bool`): Take each step, measure what it did, take it back.
        at_once (`int`): Steps in one pass: 4 take 10 to 40 % less time, and 4 times the memory.
        tokens (`bool`): Keep the first order token by token: what the influence of a run has, [`influence.kind`].
    """

    direction: str = "sgd"
    learning_rate: float = 1e-5
    max_grad_norm: float | None = None
    beta: float = 0.1
    order: int = 1
    verify: bool = False
    at_once: int = 1
    tokens: bool = False


@dataclass(frozen=True)
class Update:
    """One step to predict: a row of the data, what of it is trained on, and the batch with its loss."""

    row: int
    kind: str
    prompt_key: str
    batch: Batch
    loss: losses.Loss


@dataclass(frozen=True)
class Reader:
    """How a model reads answers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        limits ([`LengthLimits`]): Where answers are cut.
        end_ids (`frozenset[int]`): Tokens that end an answer, besides the tokenizer's own.
        tokens_per_batch (`int`): Most tokens of a forward over what is observed.
    """

    tokenizer: PreTrainedTokenizerBase
    limits: LengthLimits = field(default_factory=LengthLimits)
    end_ids: frozenset[int] = frozenset()
    tokens_per_batch: int = 2048

    def encoded(self, probe: Probe, name: str) -> EncodedResponse:
        """One answer of a probe, as training reads it.

        Raises:
            ValueError: As [`probing.encode.encode_response`].
        """
        return encode_response(probe, name, self.tokenizer, self.limits, {self.tokenizer.eos_token_id, *self.end_ids})

    def batch(self, model: nn.Module, items: Sequence[EncodedResponse], **how: bool) -> Batch:
        """Some answers as a batch of [`akg.task.causal_lm`]; see [`probing.labelled.collate`]."""
        return collate(items, pad_id_of(self.tokenizer, model), next(model.parameters()).device, **how)


def force_map(
    model: nn.Module,
    reader: Reader,
    observe: ProbeSet,
    update: Sequence[Probe],
    kinds: Collection[str] = (),
    steps: Steps | None = None,
) -> pd.DataFrame:
    """A row per update and observed answer; the model is left as it was.

    Columns: `update_row`, `update_type`, `same_prompt` (whether the update has the probe's prompt), `probe_id`,
    `response_type`, `num_tokens`, `truncated` (prompt or answer was cut), `logp_sum` before the step and `delta_sum`,
    its predicted change (nats, without the end-of-turn token); `delta_sum/PART` per part of the step where there are
    several; with `verify` `true_sum`, `fixed_features_sum`, the prediction of a model whose head alone moves, and
    `rounding_sum`, what weights moved by their last bits do; and of the update `update_loss` (nats) and `force_norm`,
    the norm of G over all its positions and labels. With `tokens` also `predicted_sum`, to first order, `PART_sum` of
    each part of the step, and per token `token_ids`, `token_texts`, `predicted` and `true` (empty without `verify`).

    Args:
        model (`nn.Module`): A causal LM whose weights can be trained; of an adapter, its own weights take the step.
        reader ([`Reader`]): How it reads answers.
        observe ([`ProbeSet`]): Every answer of every probe is observed.
        update (`Sequence[Probe]`): Rows that are trained on, each from the same model.
        kinds (`Collection[str]`, *optional*): What of a row is trained on: types of answers, or `"dpo"` for both
            sides. Default: chosen, rejected and dpo, as far as there are any.
        steps ([`Steps`], *optional*): The steps.

    Raises:
        ValueError: If there is no row, none has one of `kinds`, or as [`akg.influence`].
    """
    steps, task = steps or Steps(), causal_lm(model)
    seen = _Observed.of(task, reader, observe, steps)
    updates, rows = list(_updates(update, kinds, steps.beta, reader, model)), []
    for start in range(0, len(updates), steps.at_once):
        some = updates[start : start + steps.at_once]
        rows += _rows(task, some, steps, seen)
        logger.info("steps predicted: %d of %d", start + len(some), len(updates))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Observed:
    """The observed answers in order, their batches, what rounding does to each batch, prompts by probe, and texts."""

    items: list[EncodedResponse]
    batches: list[Batch]
    rounding: list[torch.Tensor | None]
    prompts: dict[str, str]
    texts: dict[tuple[str, str], list[str]]

    @staticmethod
    def of(task: Task, reader: Reader, observe: ProbeSet, steps: Steps) -> "_Observed":
        items = list(encode(observe, reader.tokenizer, reader.limits, list(reader.end_ids)).items)
        parts = split(items, reader.tokens_per_batch, stats_head.length_boundaries(task.model))
        batches = [reader.batch(task.model, part) for part in parts]
        rounding = [_rounding(task, batch) if steps.verify else None for batch in batches]
        prompts = {probe.probe_id: _key(probe.prompt) for probe in observe}
        kept = items if steps.tokens else []
        texts = {(item.probe_id, item.response_type): token_texts(reader.tokenizer, item) for item in kept}
        return _Observed(items, batches, rounding, prompts, texts)


def _rows(task: Task, updates: list[Update], steps: Steps, seen: _Observed) -> Iterator[dict]:
    """The rows of some updates whose steps share a pass, update by update."""
    forces = [_force(task, one) for one in updates]
    given = steps.direction, steps.learning_rate, steps.max_grad_norm
    taken = [step_of(force.gradients, task.trainable(), *given) for force in forces]
    found: list[list[dict]] = [[] for _ in updates]
    items = iter(seen.items)
    for batch, rounding_B in zip(seen.batches, seen.rounding, strict=True):
        own = list(itertools.islice(items, len(batch["input_ids"])))
        for k, predicted in enumerate(_predicted(task, forces, taken, batch, steps.order)):
            values = _values(task, predicted, batch, rounding_B)
            sums = _sums(values, predicted, batch, rounding_B)
            tokens = _tokens(values, predicted, own, seen.texts) if steps.tokens else [{}] * len(own)
            for item, of_item, by_token in zip(own, sums, tokens, strict=True):
                same_prompt = seen.prompts[item.probe_id] == updates[k].prompt_key
                row = _row(updates[k], forces[k], item, of_item) | {"same_prompt": same_prompt}
                found[k].append(row | by_token)
    return itertools.chain(*found)


def _updates(
    probes: Sequence[Probe], wanted: Collection[str], beta: float, reader: Reader, model: nn.Module
) -> Iterator[Update]:
    known = {name for probe in probes for name in probe.responses}
    if any(set(REQUIRED_TYPES) <= set(probe.responses) for probe in probes):
        known.add(DPO)
    kinds = wanted or [name for name in (*REQUIRED_TYPES, DPO) if name in known]
    if not probes:
        raise ValueError("there is no usable row to train on")
    if unknown := sorted(set(kinds) - known):
        raise ValueError(f"update_types has {unknown[0]!r}; the data has {', '.join(sorted(known))}")
    for index, probe in enumerate(probes):
        for kind in kinds:
            names = REQUIRED_TYPES if kind == DPO else (kind,)
            if set(names) <= set(probe.responses):
                batch = reader.batch(model, [reader.encoded(probe, name) for name in names], ends=True)
                loss = losses.dpo(beta) if kind == DPO else losses.mean_cross_entropy
                yield Update(index, kind, _key(probe.prompt), batch, loss)


def _force(task: Task, update: Update) -> Force:
    trained = dataclasses.replace(task, loss=update.loss)
    return update_gradient(trained, _with_reference(trained, update))


def _with_reference(task: Task, update: Update) -> Batch:
    """The update's batch; DPO's reference is the model as it is."""
    if update.kind != DPO:
        return update.batch
    logp_N = label_logp(task, update.batch)
    return update.batch | {"ref_logps": _by_answer(logp_N, task.items(update.batch), update.batch)}


def _by_answer(values_N: torch.Tensor, row_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(B,) sums over each answer's labels, float64 on the CPU."""
    return row_sums(values_N.cpu().double(), row_N, len(batch["input_ids"]))


def _predicted(task: Task, forces: list[Force], steps: list[Step], batch: Batch, order: int) -> list[Influence]:
    if order == 1 and len(steps) > 1:
        return predict_together(task, forces, steps, batch)
    return [predict(task, force, step, batch, order=order) for force, step in zip(forces, steps, strict=True)]


def _values(task: Task, predicted: Influence, batch: Batch, rounding_B: torch.Tensor | None) -> Tensors:
    """(N,) by the name of its sum; what the real step did too where its rounding is known."""
    values = {"logp_sum": predicted.logp_N, "delta_sum": predicted.total.target_N}
    if len(predicted.parts) > 1:
        values |= {f"delta_sum/{name}": part.target_N for name, part in predicted.parts.items()}
    if rounding_B is not None:
        values["fixed_features_sum"] = fixed_features(task, batch, predicted)
        with moved(task, predicted.step.total):
            values["true_sum"] = label_logp(task, batch) - predicted.logp_N
    return values


def _tokens(
    values: Tensors, predicted: Influence, items: list[EncodedResponse], texts: dict[tuple[str, str], list[str]]
) -> Iterator[dict]:
    """Of each answer, what is recorded of one in training."""
    lengths = [len(item.response_ids) for item in items]
    parts = {name: part.target_N.cpu().split(lengths) for name, part in predicted.parts.items()}
    true = values["true_sum"].cpu().split(lengths) if "true_sum" in values else None
    for row, item in enumerate(items):
        own = {name: tokens[row] for name, tokens in parts.items()}
        first = sum(own.values())
        yield {
            "predicted_sum": float(first.double().sum()),
            **{f"{name}_sum": float(tokens.double().sum()) for name, tokens in own.items()},
            "token_ids": list(item.response_ids),
            "token_texts": texts[item.probe_id, item.response_type],
            "predicted": first.tolist(),
            "true": [] if true is None else true[row].tolist(),
        }


def _sums(
    values: Tensors, predicted: Influence, batch: Batch, rounding_B: torch.Tensor | None
) -> list[dict[str, float]]:
    """Of each row of the batch, over its labels."""
    columns = {name: _by_answer(values_N, predicted.item_N, batch).tolist() for name, values_N in values.items()}
    if rounding_B is not None:
        columns["rounding_sum"] = rounding_B.tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _row(update: Update, force: Force, item: EncodedResponse, sums: dict[str, float]) -> dict:
    return {
        "update_row": update.row,
        "update_type": update.kind,
        "probe_id": item.probe_id,
        "response_type": item.response_type,
        "num_tokens": len(item.response_ids),
        "truncated": item.prompt_cut or item.response_cut,
        **sums,
        "update_loss": force.loss,
        "force_norm": float(torch.linalg.vector_norm(force.norm_U)),
    }


def _rounding(task: Task, batch: Batch) -> torch.Tensor:
    """(B,) how far the last bits of all weights move the log-probability of each answer, nats."""
    before_N = label_logp(task, batch)
    with moved(task, last_bits(task)):
        change_N = label_logp(task, batch) - before_N
    return _by_answer(change_N, task.items(batch), batch)


def _key(prompt: str | list[dict]) -> str:
    return json.dumps(prompt, sort_keys=True)
