"""The tiles of all inner products of gradients: rows of both sides, or the labels of one row after the other.

O observers   U rows of the update   N, M their labelled positions   T, S their columns
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trl_dynamics.akg.gram.journal import Arrays
from trl_dynamics.akg.gram.pairs import add_position_products, inner_products
from trl_dynamics.akg.gram.plan import Estimate, rows_at_once
from trl_dynamics.akg.gram.record import owners, record
from trl_dynamics.akg.gram.uses import Together, Uses
from trl_dynamics.akg.jvp import push_forward
from trl_dynamics.akg.modes import evaluated
from trl_dynamics.akg.one_step import View
from trl_dynamics.akg.task import Task, label_logp_tiles, num_rows, predicting, rows_of

MODULE = "module "


@dataclass(frozen=True)
class Tile:
    """A tile that is done; `arrays` is None where it had been done before."""

    name: str
    arrays: Arrays | None


@dataclass(frozen=True)
class Side:
    """A batch with the signed weight of ln pi at each labelled position: 1 of observers, -w of an update."""

    task: Task
    batch: Any
    weight_N: torch.Tensor

    def rows(self, rows: slice) -> "Side":
        item_N = self.task.items(self.batch).cpu()
        kept_N = (item_N >= rows.start) & (item_N < rows.stop)
        return Side(self.task, rows_of(self.batch, rows), self.weight_N[kept_N])

    def gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        """Of every labelled position, stored one at a time."""
        for score in self._scores():
            yield self._gradient(score)

    def gradient(self) -> dict[str, torch.Tensor]:
        """Of all positions together, stored."""
        return self._gradient(self._scores().sum())

    def _scores(self) -> torch.Tensor:
        with evaluated(self.task.model), torch.enable_grad():
            tiles = self.task.logits(self.task.model, self.batch)
            logp_N = torch.cat(list(label_logp_tiles(tiles, self.task.labels(self.batch))))
            return self.weight_N.to(logp_N) * logp_N

    def _gradient(self, score: torch.Tensor) -> dict[str, torch.Tensor]:
        trained = self.task.trainable()
        found = torch.autograd.grad(score, list(trained.values()), retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(trained, found, strict=True) if g is not None}

    def column_N(self) -> torch.Tensor:
        """The column before each label of a causal LM."""
        return predicting(self.batch["labels"])[1]


class RowTiles:
    """Tiles of rows of both sides: those of the update are run once, observers once for each tile of the update."""

    def __init__(
        self, task: Task, update: Side, observe: Side, by: str | None, diagonal: Mapping | None, plan: Estimate
    ):
        self.task, self.update, self.observe, self.by = task, update, observe, by
        self.diagonal, self.plan = diagonal or {}, plan
        self.owners, self.parameters = owners(task.model), task.trainable()

    def run(self, done: Mapping[str, Arrays], check: bool) -> Iterator[Tile]:
        """Compute what is not done, tile by tile.

        Raises:
            ValueError: If `check` is set and the first pair of rows is not the product of its stored gradients.
        """
        for rows_u, tiles in self._tiles():
            for name, _ in tiles:
                if name in done:
                    yield Tile(name, None)
            todo = [tile for tile in tiles if tile[0] not in done]
            if not todo:
                continue
            update = self.update.rows(rows_u)
            with evaluated(self.task.model):
                uses = self._recorded(update)
            for name, rows_o in todo:
                observe = self.observe.rows(rows_o)
                parts: dict[str, torch.Tensor] = {}
                with evaluated(self.task.model):  # some uses run their module only now
                    arrays = self._products(observe, num_rows(update.batch), uses, parts)
                if check:
                    self._check(observe, update, arrays["total"], parts)
                    check = False
                yield Tile(name, arrays)

    def joined(self, tiles: Mapping[str, Arrays]) -> dict[str, Any]:
        """All tiles put together, as [`akg.gram.GramResult`] has them."""
        by_name = {
            name: np.block([[tiles[t][name] for t, _ in row] for row in self._grid()]) for name in self._names()
        }
        if self.by == "position":
            grid = [np.concatenate([tiles[t]["position"] for t, _ in row], axis=2) for row in self._grid()]
            by_name["position"] = np.concatenate(grid)
        tensors = {name: torch.from_numpy(array) for name, array in by_name.items()}
        modules = {name.removeprefix(MODULE): tensors[name] for name in tensors if name.startswith(MODULE)}
        return {
            "total_OU": tensors["total"],
            "module_OU": modules if self.by == "module" else None,
            "position_OTUS": tensors.get("position"),
            "token_NM": None,
        }

    def _names(self) -> list[str]:
        modules = dict.fromkeys(self.owners.values()) if self.by == "module" else ()
        return ["total", *(MODULE + name for name in modules)]

    def _grid(self) -> list[list[tuple[str, slice]]]:
        """Tiles by rows of observers."""
        return [list(row) for row in zip(*(tiles for _, tiles in self._tiles()), strict=True)]

    def _tiles(self) -> list[tuple[slice, list[tuple[str, slice]]]]:
        slices_u = _slices(num_rows(self.update.batch), self.plan.update_rows)
        slices_o = _slices(num_rows(self.observe.batch), self.plan.observe_rows)
        return [(u, [(f"observe {o.start} update {u.start}", o) for o in slices_o]) for u in slices_u]

    def _columns(self, side: Side) -> torch.Tensor | None:
        return side.column_N() if self.by == "position" else None

    def _recorded(self, side: Side) -> Uses:
        """A few rows at a time, so that autograd's graph is small."""
        size = num_rows(side.batch)
        whole = Together(size)
        for rows in _slices(size, rows_at_once(side.batch)):
            part = side.rows(rows)
            uses = record(self.task, part.batch, part.weight_N, column_N=self._columns(part))
            if rows == slice(0, size):
                return uses
            whole.add(uses, num_rows(part.batch))
        return whole.uses

    def _products(self, observe: Side, num_u: int, uses: Uses, parts: dict[str, torch.Tensor]) -> Arrays:
        """The tile's arrays; `parts` takes those of each parameter, but for a split by position."""
        num_o = num_rows(observe.batch)
        totals = {name: torch.zeros(num_o, num_u, dtype=torch.float64) for name in self._names()}
        position_OTUS = None
        if self.by == "position":
            widths = observe.batch["input_ids"].shape[1], self.update.batch["input_ids"].shape[1]
            position_OTUS = torch.zeros(num_o, widths[0], num_u, widths[1], dtype=torch.float64)

        arrived = self._recorded(observe)
        for name in [name for name in arrived if name in uses]:
            one, other = arrived.pop(name), uses[name]
            if position_OTUS is not None:
                add_position_products(one, other, position_OTUS)
                continue
            part_OU = inner_products(one, other, self.parameters[name].shape, self.diagonal.get(name))
            parts[name] = part_OU
            for key in {"total", MODULE + self.owners[name]} & set(totals):
                totals[key] += part_OU
        arrays = {name: total.numpy() for name, total in totals.items()}
        if position_OTUS is not None:
            arrays |= {"position": position_OTUS.numpy(), "total": position_OTUS.sum(dim=(1, 3)).numpy()}
        return arrays

    def _check(self, observe: Side, update: Side, total_OU: np.ndarray, parts: Mapping[str, torch.Tensor]) -> None:
        """Compare one pair's product with that of its stored gradients, in all and for each parameter."""
        o, u = np.unravel_index(np.abs(total_OU).argmax(), total_OU.shape)
        one = observe.rows(slice(int(o), int(o) + 1)).gradient()
        other = update.rows(slice(int(u), int(u) + 1)).gradient()
        other = {name: g * self.diagonal[name].to(g) if name in self.diagonal else g for name, g in other.items()}
        shared = [name for name in other if name in one]
        true = {name: float((one[name].double() * other[name].double()).sum()) for name in shared}
        norms = {name: float(one[name].double().norm() * other[name].double().norm()) for name in shared}
        lengths = [sum(float(g.double().square().sum()) for g in side.values()) ** 0.5 for side in (one, other)]
        relative = max(1e-4, max(torch.finfo(g.dtype).eps for g in other.values()) ** 0.5)
        compared = [("all parameters", total_OU[o, u], sum(true.values()), lengths[0] * lengths[1])]
        if self.by != "position":
            found = {name: float(parts[name][o, u]) if name in parts else 0.0 for name in shared}
            compared += [(name, found[name], true[name], norms[name]) for name in shared]
        # Rounding of a small part comes from what all parts share.
        least = relative**2 * lengths[0] * lengths[1]
        for name, by_modules, by_gradients, size in compared:
            if abs(by_modules - by_gradients) > relative * size + least:
                raise ValueError(
                    f"the product of observer {o} and update {u} of the first tile is {by_modules:.6g} by modules and "
                    f"{by_gradients:.6g} by both gradients (of {name}): this model lets rows mix, or uses a parameter "
                    "outside of the module that has it; compare gradients of rows with akg.influence"
                )


class LabelTiles:
    """The labels of the side with fewer, row by row: one backward each, and a forward-mode pass of the other side."""

    def __init__(
        self, task: Task, update: Side, observe: Side, by: str | None, diagonal: Mapping | None, plan: Estimate
    ):
        self.task, self.update, self.observe, self.diagonal = task, update, observe, diagonal or {}
        self.by_update = len(update.weight_N) <= len(observe.weight_N)
        self.side, self.other = (update, observe) if self.by_update else (observe, update)
        self.other_rows = plan.observe_rows if self.by_update else plan.update_rows

    def run(self, done: Mapping[str, Arrays], check: bool) -> Iterator[Tile]:
        """Compute what is not done, row by row; there is nothing to check."""
        for row in self._rows():
            if str(row) in done:
                yield Tile(str(row), None)
                continue
            moved = [self._moved(g) for g in self.side.rows(slice(row, row + 1)).gradients()]
            yield Tile(str(row), {"token": torch.stack(moved).numpy()})

    def joined(self, tiles: Mapping[str, Arrays]) -> dict[str, Any]:
        """All rows put together, as [`akg.gram.GramResult`] has them."""
        token_NM = torch.from_numpy(np.concatenate([tiles[str(row)]["token"] for row in self._rows()]))
        token_NM = token_NM.T.contiguous() if self.by_update else token_NM
        total_OU = torch.zeros(num_rows(self.observe.batch), num_rows(self.update.batch), dtype=torch.float64)
        item_N, item_M = (self.task.items(side.batch).cpu() for side in (self.observe, self.update))
        total_OU.index_put_((item_N[:, None], item_M[None]), token_NM, accumulate=True)
        return {"total_OU": total_OU, "module_OU": None, "position_OTUS": None, "token_NM": token_NM}

    def _rows(self) -> list[int]:
        return self.task.items(self.side.batch).unique().tolist()

    def _moved(self, changes: dict[str, torch.Tensor]) -> torch.Tensor:
        """The derivative of the other side's weighted ln pi along a gradient, at each of its labels."""
        changes = {name: g * self.diagonal[name].to(g) if name in self.diagonal else g for name, g in changes.items()}
        parts = []
        for rows in _slices(num_rows(self.other.batch), self.other_rows):
            tile = rows_of(self.other.batch, rows)
            label_n = self.task.labels(tile)
            if len(label_n):
                view = View(label_n, "target", 0)
                push_forward(self.task, changes, tile, view.add)
                parts.append(view.change().target_N.double().cpu())
        return torch.cat(parts) * self.other.weight_N


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
