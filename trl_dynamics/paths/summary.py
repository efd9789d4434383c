"""Records -> what they say at every step, exactly, one probing step in memory at a time.

A store is read row group by row group (one per probing step, as the store writes them), only the columns needed, and
each step is reduced before the next is read: memory does not grow with the number of steps. A frame goes through the
same reduction.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from trl_dynamics.paths.changes import Changes, Squeeze
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.metrics import METRICS, PER_SEQUENCE, PER_TOKEN
from trl_dynamics.paths.records import no_records
from trl_dynamics.paths.samples import Samples, summarise_samples
from trl_dynamics.paths.step_table import COLUMNS, StepTable, split_frame
from trl_dynamics.paths.training import Training, read_training
from trl_dynamics.probing.schema import order_types
from trl_dynamics.store.store import Block, DynamicsStore

# What is described per response type: name -> column, and whether it is the paired change since the start.
MEASURES: dict[str, tuple[str, bool]] = {
    PER_TOKEN: (PER_TOKEN, False),
    f"{PER_TOKEN}_change": (PER_TOKEN, True),
    PER_SEQUENCE: (PER_SEQUENCE, False),
    f"{PER_SEQUENCE}_change": (PER_SEQUENCE, True),
}
QUANTILES = (0.1, 0.5, 0.9)
STATISTICS = ("mean", "num_probes", *(f"q{round(100 * q)}" for q in QUANTILES))
# Each reads and reduces one probing step; about 100 MB for 130,000 responses.
MAX_THREADS = 8
# A run that is still writing may merge files while they are read.
_TRIES = 5


@dataclass(frozen=True)
class StepSummary:
    """One step reduced.

    Args:
        step (`int`): The step.
        types (`list[str]`): The response types it has.
        bands (`numpy.ndarray`): measures x statistics x types, in the order of [`MEASURES`] and [`STATISTICS`].
        metrics (`list[float]`): In the order of [`METRICS`]; NaN where the types are missing.
        squeeze ([`Squeeze`]): The changes since the start that a finding dates.
        not_finite (`tuple[int, int]`): How many of the scored answers are not finite, and how many were scored.
    """

    step: int
    types: list[str]
    bands: np.ndarray
    metrics: list[float]
    squeeze: Squeeze
    not_finite: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Summary:
    """What the records of one run and model say, step by step.

    Args:
        parts (`list[StepSummary]`): Every recorded step, ascending.
        first ([`StepTable`]): The start, which changes are paired with.
        read (`Callable[[int], StepTable]`): The records of a recorded step.
        samples ([`Samples`], *optional*): Greedy answers, where any were taken.
        training ([`Training`], *optional*): What the trainer logged, where it was read.
        fingerprint (`str`, *optional*): Of the probe set; only runs of the same one compare probe by probe.
        alone ([`Summary`], *optional*): Of a model whose start is another one: its own records, without that.
        compared_with (`str`, *optional*): That other model.
    """

    parts: list[StepSummary]
    first: StepTable
    read: Callable[[int], StepTable]
    samples: Samples | None = None
    training: Training | None = None
    fingerprint: str | None = None
    alone: "Summary | None" = None
    compared_with: str | None = None

    @property
    def own(self) -> "Summary":
        """What was recorded of the model itself, whatever it is compared with: what charts and tables show."""
        return self.alone or self

    @cached_property
    def steps(self) -> list[int]:
        return [part.step for part in self.parts]

    @cached_property
    def types(self) -> list[str]:
        """Every response type of any step, in the usual order."""
        return order_types(name for part in self.parts for name in part.types)

    @cached_property
    def last(self) -> StepTable:
        return self.read(self.steps[-1])

    @cached_property
    def _tidy(self) -> pd.DataFrame:
        """Every statistic: columns measure, step, response_type and the statistics."""
        counts = [len(part.types) for part in self.parts]
        tables = []
        for index, name in enumerate(MEASURES):
            values = np.concatenate([part.bands[index] for part in self.parts], axis=1)
            keys = {"measure": name, "step": np.repeat(self.steps, counts)}
            keys |= {"response_type": [name for part in self.parts for name in part.types]}
            tables.append(pd.DataFrame(keys | dict(zip(STATISTICS, values, strict=True))))
        return pd.concat(tables, ignore_index=True)

    def bands(self, column: str = PER_TOKEN, *, since_start: bool = False) -> pd.DataFrame:
        """Mean and exact quantiles over probes, tidy: columns step, response_type, mean, num_probes, q10, q50, q90.

        Args:
            column (`str`, *optional*): `logp_mean` or `logp_sum`.
            since_start (`bool`, *optional*): Describe the paired changes since the start instead of the values.
        """
        measure = next(name for name, wanted in MEASURES.items() if wanted == (column, since_start))
        tidy = self._tidy[(self._tidy["measure"] == measure) & (self._tidy["num_probes"] > 0)]
        rank = {name: index for index, name in enumerate(self.types)}
        tidy = tidy.assign(order=tidy["response_type"].map(rank), num_probes=tidy["num_probes"].astype(int))
        return tidy.sort_values(["order", "step"], ignore_index=True).drop(columns=["order", "measure"])

    def path(self, column: str = PER_TOKEN) -> pd.DataFrame:
        """Mean over probes per response type: steps x response_type, in the column's unit (nats)."""
        return self._means(self.bands(column), self.types)

    def levels(self, response_type: str, *, since_start: bool = False) -> dict[int, float]:
        """Mean over probes of a response type's `logp_mean`, or of its paired change since the start, at every step
        that has it: step -> nats per token."""
        measures, mean = list(MEASURES.values()), STATISTICS.index("mean")
        measure = measures.index((PER_TOKEN, since_start))
        known = [part for part in self.parts if response_type in part.types]
        values = {p.step: float(p.bands[measure, mean, p.types.index(response_type)]) for p in known}
        return {step: value for step, value in values.items() if not np.isnan(value)}

    def change_since_start(self, column: str = PER_TOKEN) -> pd.DataFrame:
        """Mean over probes of (value now - value at the start), paired by probe: steps x response_type, nats.

        Differs from the difference of two [`Summary.path`] rows wherever a probe lacks a type at one of the steps.
        """
        bands = self.bands(column, since_start=True)
        return self._means(bands, order_types(bands["response_type"]))

    def metric(self, name: str) -> pd.Series:
        """One of [`METRICS`] over the steps that have it."""
        index = list(METRICS).index(name)
        return pd.Series([part.metrics[index] for part in self.parts], index=self.steps, dtype=float).dropna()

    def metric_table(self) -> pd.DataFrame:
        """Every metric whose response types the records have, tidy: columns metric, step, value."""
        tables = [self.metric(name).rename_axis("step").rename("value").reset_index() for name in METRICS]
        tidy = pd.concat([table.assign(metric=name) for name, table in zip(METRICS, tables, strict=True)])
        return tidy[["metric", "step", "value"]].reset_index(drop=True)

    def squeezed_since(self) -> int | None:
        """The step from which squeezing holds at every later step, or None if it does not hold at the last."""
        since = None
        for part in reversed(self.parts[1:]):
            if not part.squeeze.holds:
                break
            since = part.step
        return since

    def any_finite(self, step: int) -> bool:
        """Whether any answer of a recorded step has a finite log-probability."""
        return any(lost < scored for part in self.parts if part.step == step for lost, scored in [part.not_finite])

    def table(self, step: int) -> StepTable:
        """The records of a recorded step; the first and the last are at hand."""
        known = {self.first.step: lambda: self.first, self.steps[-1]: lambda: self.last}
        return known[step]() if step in known else self.read(step)

    def changes(self, start: int | None = None, end: int | None = None) -> Changes:
        """Paired changes between two steps, by default the first and the last."""
        ends = (self.steps[0] if start is None else start, self.steps[-1] if end is None else end)
        return self._whole if ends == (self.steps[0], self.steps[-1]) else self._changes(ends)

    @cached_property
    def _whole(self) -> Changes:
        """What rules read again and again."""
        return self._changes((self.steps[0], self.steps[-1]))

    def _changes(self, ends: tuple[int, int]) -> Changes:
        return Changes(*(self.table(step) for step in ends))

    def _means(self, bands: pd.DataFrame, types: list[str]) -> pd.DataFrame:
        table = bands.pivot(index="step", columns="response_type", values="mean")
        return table.reindex(index=pd.Index(self.steps, name="step"), columns=types)


def summarise(records: pd.DataFrame | Summary, vocab_size: int | None = None) -> Summary:
    """A frame of records of one run and model, reduced; a summary is returned as it is.

    Args:
        records (`pandas.DataFrame` or [`Summary`]): Records of one run and one model, any order.
        vocab_size (`int`, *optional*): Of the model, from meta.json; metrics that need it are left out without it.

    Raises:
        ValueError: If the frame holds several runs or models.
    """
    if isinstance(records, Summary):
        return records
    tables = {table.step: table for table in split_frame(records, vocab_size)}
    first = next(iter(tables.values()))
    return Summary([summarise_step(first, table) for table in tables.values()], first, tables.__getitem__)


def summarise_store(store: DynamicsStore) -> dict[str, Summary]:
    """The records of a store, reduced without ever holding more than a few steps: model -> summary, in store order.

    Raises:
        ValueError: If there are no records, a newer version wrote them, or a key is there twice.
    """
    meta = store.read_meta()  # reading it refuses a newer schema
    return _retried(lambda: _summarise_all(store, meta))


def summarise_step(start: StepTable, now: StepTable) -> StepSummary:
    """Everything that is known about one step; `start` may have another layout."""
    paired = start.like(now)
    described = []
    for column, since_start in MEASURES.values():
        values_TP = now.values(column)
        described.append(describe(values_TP - paired.values(column) if since_start else values_TP))
    metrics = [metric(paired, now) for metric in METRICS.values()]
    return StepSummary(now.step, now.types, np.stack(described), metrics, Changes(start, now).squeeze, now.not_finite)


def describe(values_TP: np.ndarray) -> np.ndarray:
    """Per type over the probes that have it: statistics x types, in the order of [`STATISTICS`].

    Quantiles are exact and interpolate linearly between neighbours, as numpy and pandas do.
    """
    known_TP = ~np.isnan(values_TP)
    counts = known_TP.sum(axis=1)
    last, rows = np.maximum(counts - 1, 0), np.arange(len(counts))
    total = np.where(known_TP, values_TP, 0.0).sum(axis=1)
    statistics = [total / np.where(counts > 0, counts, np.nan), counts.astype(float)]
    below = {q: np.floor(q * last).astype(int) for q in QUANTILES}
    above = {q: np.minimum(below[q] + 1, last) for q in QUANTILES}
    # The places that are asked for are as in a sorted row, where NaN comes last.
    places = np.unique(np.concatenate([*below.values(), *above.values()]))
    ordered_TP = np.partition(values_TP, places, axis=1)
    for q in QUANTILES:
        low, high = ordered_TP[rows, below[q]], ordered_TP[rows, above[q]]
        statistics.append(low + (high - low) * (q * last - below[q]))
    return np.stack(statistics)


def read_block(block: Block, vocab_size: int | None = None) -> StepTable:
    """The records of one step."""
    return StepTable.of(block.read(COLUMNS, names=("model", "probe_id", "response_type")), vocab_size)


def _blocks(store: DynamicsStore) -> dict[str, list[Block]]:
    """Per model, what to read in order of steps."""
    by_index: dict[int, list[Block]] = {}
    for block in store.blocks(RECORDS):
        by_index.setdefault(block.model_index, []).append(block)
    if not by_index:
        raise no_records(store)
    return {str(own[0].read(["model"])["model"][0]): own for own in by_index.values()}


def _summarise_all(store: DynamicsStore, meta: dict) -> dict[str, Summary]:
    answers, vocab_size = summarise_samples(store), meta.get("model", {}).get("vocab_size")
    shared = {"training": read_training(store), "fingerprint": meta.get("probe_set", {}).get("fingerprint")}
    return {
        model: replace(_summarise(store, model, blocks, vocab_size), samples=answers.get(model), **shared)
        for model, blocks in _blocks(store).items()
    }


def _summarise(store: DynamicsStore, model: str, blocks: list[Block], vocab_size: int | None) -> Summary:
    def read_again(step: int) -> StepTable:
        return _retried(lambda: _read_step(_blocks(store)[model], step, vocab_size))

    def reduce(block: Block) -> StepSummary:
        try:
            return summarise_step(first, read_block(block, vocab_size))
        except FileNotFoundError:
            return summarise_step(first, read_again(block.step))

    first = read_block(blocks[0], vocab_size)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(reduce, blocks))
    _refuse_repeats(part.step for part in parts)

    def read(step: int) -> StepTable:
        try:
            return _read_step(blocks, step, vocab_size)
        except FileNotFoundError:
            return read_again(step)

    return Summary(parts, first, read)


def _read_step(blocks: list[Block], step: int, vocab_size: int | None) -> StepTable:
    block = next((block for block in blocks if block.step == step), None)
    if block is None:
        raise FileNotFoundError(f"step {step} has no records any more: the run has gone on from an earlier one")
    return read_block(block, vocab_size)


def _retried(read: Callable[[], object]) -> object:
    for _ in range(_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return read()
    return read()


def _refuse_repeats(steps: Iterable[int]) -> None:
    before = None
    for step in steps:
        if step == before:
            raise ValueError(f"two record files hold step {step} of the same model: the same key is there twice")
        before = step
