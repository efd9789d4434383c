"""What inner products of gradients will take, before they are taken: one row of either side is run and measured.

b rows of a tile
"""

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trl_dynamics.akg.gram.pairs import BLOCK_BYTES, operations
from trl_dynamics.akg.gram.record import record
from trl_dynamics.akg.gram.uses import Dense, Lookup, OfCall, Outer, Use
from trl_dynamics.akg.task import Task, num_rows, rows_of
from trl_dynamics.ops.tiled_head import TILE_ELEMENTS

ALLOCATED = 1.2  # what the process grows by for each byte that is alive
FEWEST_POSITIONS = 512  # that go through the model together; with fewer, it is slower


@dataclass(frozen=True)
class Estimate:
    """What a call of `gram` takes.

    Args:
        bytes (`int`): At most added to what is held before, the result included.
        flops (`float`): Floating-point operations.
        update_rows, observe_rows (`int`): Rows of a tile; with `by="loss_token"` one side goes row by row.
        tiles (`int`): How many tiles there are.
    """

    bytes: int
    flops: float
    update_rows: int
    observe_rows: int
    tiles: int


@dataclass(frozen=True)
class _Row:
    """One row of a side: bytes of autograd's graph, of uses, of the largest tensor; operations; uses by parameter."""

    graph: int
    kept: int
    largest: int
    flops: float
    uses: dict[str, list[Use]]

    @property
    def running(self) -> int:
        """Bytes while it goes through the model."""
        return self.graph + self.kept + 3 * self.largest


def estimate(
    task: Task,
    update: Any,
    observe: Any,
    *,
    by: str | None = None,
    memory_budget: int | None = None,
    check: bool = True,
) -> Estimate:
    """Bytes and operations of [`akg.gram.gram`] with the same arguments, and the tiles that it will take.

    Each side's row with most labels is run once; rows of a batch have the same length, so that it is the largest.

    Raises:
        ValueError: If one row of each side does not fit into the budget.
    """
    num_u, num_o = num_rows(update), num_rows(observe)
    row_u, row_o = _measured(task, update), _measured(task, observe)
    size = max(p.element_size() for p in task.trainable().values())
    fixed = 3 * BLOCK_BYTES + 6 * size * TILE_ELEMENTS + 8 * num_o * num_u
    gradient = size * sum(p.numel() for p in task.trainable().values())
    if by == "loss_token":
        return _of_labels(task, update, observe, row_u, row_o, fixed + 3 * gradient, memory_budget)
    if by == "position":
        fixed += 16 * num_o * num_u * observe["input_ids"].shape[1] * update["input_ids"].shape[1]
    wide = max([p.numel() * size for n, p in task.trainable().items() if _is_dense(row_u, row_o, n)], default=0)
    most_u, most_o = rows_at_once(update), rows_at_once(observe)
    checking = 2 * gradient + 2 * max(row_u.graph, row_o.graph) if check else 0

    def needed(rows_u: int, rows_o: int) -> int:
        running = max(
            min(b, most) * row.running for b, most, row in ((rows_u, most_u, row_u), (rows_o, most_o, row_o))
        )
        kept = rows_u * row_u.kept + max(rows_o * row_o.kept, checking)
        return fixed + int(ALLOCATED * (running + kept + (rows_u + rows_o) * wide))

    rows_u, rows_o = _largest_tiles(needed, num_u, num_o, memory_budget)
    tiles_u = -(-num_u // rows_u)
    tiles = tiles_u * -(-num_o // rows_o)
    flops = num_u * row_u.flops + tiles_u * num_o * row_o.flops
    shapes = {name: p.shape for name, p in task.trainable().items()}
    flops += tiles * sum(_pair_flops(row_o.uses[n], row_u.uses[n], rows_o, rows_u, shapes[n]) for n in shapes)
    return Estimate(needed(rows_u, rows_o), flops, rows_u, rows_o, tiles)


def all_at_once(task: Task, update: Any, observe: Any, by: str | None) -> Estimate:
    """The tiles without a budget; nothing is measured."""
    tiles = _label_rows(task, update, observe) if by == "loss_token" else 1
    return Estimate(0, 0.0, num_rows(update), num_rows(observe), tiles)


def rows_at_once(batch: Any) -> int:
    """Rows of a side that go forward and backward together."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return -(-FEWEST_POSITIONS // (1 if ids is None or ids.dim() < 2 else ids.shape[1]))


def _label_rows(task: Task, update: Any, observe: Any) -> int:
    """How many rows have labels on the side that has fewer labels."""
    return len(min((task.items(update), task.items(observe)), key=len).unique())


def _largest_tiles(needed, num_u: int, num_o: int, budget: int | None) -> tuple[int, int]:
    """Rows of either side: as many of the update as leave room for as many observers, then all observers that fit."""
    if budget is None or needed(num_u, num_o) <= budget:
        return num_u, num_o
    if needed(1, 1) > budget:
        raise ValueError(
            f"memory_budget is {budget} bytes, and one row of each side needs {needed(1, 1)}; raise it, or shorten "
            "rows (check=False saves two gradients of the whole model)"
        )
    rows_u = max(b for b in range(1, num_u + 1) if b == 1 or needed(b, min(b, num_o)) <= budget)
    return rows_u, max(b for b in range(1, num_o + 1) if needed(rows_u, b) <= budget)


def _of_labels(
    task: Task, update: Any, observe: Any, row_u: _Row, row_o: _Row, fixed: int, budget: int | None
) -> Estimate:
    num_u, num_o = num_rows(update), num_rows(observe)
    labels_u, labels_o = len(task.labels(update)), len(task.labels(observe))
    fixed += 8 * labels_u * labels_o
    by_update = labels_u <= labels_o
    (row, other, num_other) = (row_u, row_o, num_o) if by_update else (row_o, row_u, num_u)

    def needed(rows: int, _: int = 1) -> int:
        return fixed + int(ALLOCATED * (row.graph + row.kept + 2 * rows * (other.graph + other.largest)))

    rows, _ = _largest_tiles(needed, num_other, 1, budget)
    flops = min(labels_u, labels_o) * (row.flops + 1.5 * num_other * other.flops)
    tiles = _label_rows(task, update, observe)
    return Estimate(needed(rows), flops, 1 if by_update else rows, rows if by_update else 1, tiles)


def _measured(task: Task, batch: Any) -> _Row:
    """The row with most labels, run."""
    row = int(torch.bincount(task.items(batch)).argmax())
    one = rows_of(batch, slice(row, row + 1))
    weight_N = torch.ones(len(task.labels(one)), dtype=torch.float64)
    values = {p.untyped_storage().data_ptr() for p in (*task.model.parameters(), *task.model.buffers())}
    live, graph, largest = {}, [0], [0]

    def pack(value: torch.Tensor) -> "_Saved":
        saved, pointer = _Saved(value), value.untyped_storage().data_ptr()
        if pointer not in values:
            live[id(saved)] = (pointer, value.untyped_storage().nbytes())
            weakref.finalize(saved, live.pop, id(saved), None)
        return saved

    def forwarded() -> None:
        storages = dict(live.values())
        graph[0], largest[0] = sum(storages.values()), max(storages.values(), default=0)
        hooks.close()  # torch.func, which the backward may use, works without hooks alone

    counter, hooks = FlopCounterMode(display=False), contextlib.ExitStack()
    with counter, hooks:
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value))
        uses = record(task, one, weight_N, forwarded=forwarded)
    found = {name: uses.get(name, []) for name in task.trainable()}
    kept = _bytes(value for side in found.values() for use in side for value in _tensors(use))
    return _Row(graph[0], kept, largest[0], counter.get_total_flops(), found)


class _Saved:
    def __init__(self, value: torch.Tensor):
        self.value = value


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(use: Use) -> list[torch.Tensor]:
    if isinstance(use, Outer):
        return [use.left_MR, use.right_MC, use.where.row_M]
    if isinstance(use, Lookup):
        return [use.token_M, use.grad_MC, use.where.row_M]
    if isinstance(use, Dense):
        return [use.value_bRC]
    return [value for value in (*use.call.args, use.call.grad_SX) if isinstance(value, torch.Tensor)]


def _is_dense(one: _Row, other: _Row, name: str) -> bool:
    return any(isinstance(use, OfCall) for row in (one, other) for use in row.uses[name])


def _pair_flops(observe: list[Use], update: list[Use], rows_o: int, rows_u: int, shape: torch.Size) -> float:
    if not observe or not update:
        return 0.0
    m, M = (b * _positions(side) for b, side in ((rows_o, observe), (rows_u, update)))
    if all(isinstance(use, Outer) for use in (*observe, *update)):
        return min(operations(m, M, rows_o * rows_u, shape))
    if all(isinstance(use, Lookup) for use in (*observe, *update)):
        return 2.0 * rows_o * rows_u * min(m, M, shape[0]) * shape[1]
    return operations(m, M, rows_o * rows_u, shape)[0]


def _positions(uses: list[Use]) -> int:
    return sum(len(use.left_MR) for use in uses if isinstance(use, Outer))
