"""Where a parameter is applied, and what that adds to the gradient of each row, never held for all rows at once.

    B rows   M positions of all rows   R rows of a parameter, its first axis   C its other axes, flattened

A *use* is one call of a module seen from one of its parameters. Gradients of several uses of one parameter (a module
that is called twice, an embedding that is tied to the head) are added before anything is multiplied with them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Where:
    """Which row and column each position of a call belongs to.

    Args:
        row_M (`torch.Tensor`): The row of the batch.
        column_M (`torch.Tensor`, *optional*): The column, where a split by position is asked for.
        num_rows (`int`): B.
        per_row (`int`, *optional*): Positions of each row, where positions are row by row and all rows from the first
            one on have as many.
    """

    row_M: torch.Tensor
    column_M: torch.Tensor | None
    num_rows: int
    per_row: int | None = None

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Rows and the positions next to each other that belong to them; a row may come more than once."""
        rows, counts = torch.unique_consecutive(self.row_M, return_counts=True)
        start = 0
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            yield row, slice(start, start + count)
            start += count

    def among(self, first: int, num_rows: int) -> "Where":
        """The same in a larger batch, in which these rows begin at `first`."""
        return Where(self.row_M + first, self.column_M, num_rows, self.per_row)


@dataclass(frozen=True)
class Outer:
    """A matrix's gradient as outer products, one for each position: a linear layer's, or a bias' with right = 1."""

    left_MR: torch.Tensor
    right_MC: torch.Tensor
    where: Where

    def ready(self) -> "Outer":
        return self

    def among(self, first: int, num_rows: int) -> "Outer":
        return Outer(self.left_MR, self.right_MC, self.where.among(first, num_rows))

    def added(self, sum_BRC: torch.Tensor | None, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """`sum_BRC` (zeros if None) plus the rows `rows` of the parameter's gradient, for each row of the batch."""
        left_MR, right_MC = self.left_MR[:, rows].to(dtype), self.right_MC.to(dtype)
        if (per_row := self.where.per_row) is not None:
            left_bRT, right_bTC = (
                left_MR.unflatten(0, (-1, per_row)).transpose(1, 2),
                right_MC.unflatten(0, (-1, per_row)),
            )
            if sum_BRC is None and len(left_bRT) == self.where.num_rows:
                return torch.bmm(left_bRT, right_bTC)
        if sum_BRC is None:
            sum_BRC = left_MR.new_zeros(self.where.num_rows, left_MR.shape[1], right_MC.shape[1])
        if per_row is not None:
            first = int(self.where.row_M[0])
            sum_BRC[first : first + len(left_bRT)].baddbmm_(left_bRT, right_bTC)
            return sum_BRC
        for row, run in self.where.runs():
            sum_BRC[row].addmm_(left_MR[run].T, right_MC[run])
        return sum_BRC


@dataclass(frozen=True)
class Lookup:
    """An embedding's gradient: what arrives at each position goes to the row of its token."""

    token_M: torch.Tensor
    grad_MC: torch.Tensor
    where: Where

    def ready(self) -> "Lookup":
        return self

    def among(self, first: int, num_rows: int) -> "Lookup":
        return Lookup(self.token_M, self.grad_MC, self.where.among(first, num_rows))

    def added(self, sum_BRC: torch.Tensor | None, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """As [`Outer.added`]."""
        size = rows.stop - rows.start
        if sum_BRC is None:
            sum_BRC = self.grad_MC.new_zeros(self.where.num_rows, size, self.grad_MC.shape[1], dtype=dtype)
        here_M = ((self.token_M >= rows.start) & (self.token_M < rows.stop)).nonzero()[:, 0]
        index_m = self.where.row_M[here_M] * size + self.token_M[here_M] - rows.start
        sum_BRC.flatten(0, 1).index_add_(0, index_m, self.grad_MC[here_M].to(dtype))
        return sum_BRC

    def restricted(self, token_r: torch.Tensor) -> "Lookup":
        """The same for some tokens alone, ascending, counted from 0."""
        index_M = torch.searchsorted(token_r, self.token_M).clamp(max=len(token_r) - 1)
        kept_M = (token_r[index_M] == self.token_M).nonzero()[:, 0]
        where = Where(self.where.row_M[kept_M], None, self.where.num_rows)
        return Lookup(index_M[kept_M], self.grad_MC[kept_M], where)


@dataclass(frozen=True)
class Dense:
    """The gradients of the rows from `first` on, for parameters that nothing cheaper is known of."""

    value_bRC: torch.Tensor
    first: int
    num_rows: int

    def ready(self) -> "Dense":
        return self

    def among(self, first: int, num_rows: int) -> "Dense":
        return Dense(self.value_bRC, self.first + first, num_rows)

    def added(self, sum_BRC: torch.Tensor | None, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        value_bRC = self.value_bRC[:, rows].to(dtype)
        if sum_BRC is None:
            sum_BRC = value_bRC.new_zeros(self.num_rows, *value_bRC.shape[1:])
        sum_BRC[self.first : self.first + len(value_bRC)] += value_bRC
        return sum_BRC


class Call:
    """One call of a module of any kind, from which the gradients of all its own parameters are computed when needed.

    Args:
        module (`nn.Module`): The module.
        names (`list[str]`): Its parameters that are trained.
        args, kwargs: What it was called with; tensors with a first axis as long as the gradient's are split along it.
        grad_SX (`torch.Tensor`): What arrives at its output; the first axis is of rows, or of positions.
        row_S (`torch.Tensor`): The row of each of them.
        num_rows (`int`): B.
        axis (`int`, *optional*): The axis of `grad_SX` with a row's positions, where a split is asked for.
        where ([`Where`], *optional*): The positions of that split.
    """

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        args: tuple,
        kwargs: dict[str, Any],
        grad_SX: torch.Tensor,
        row_S: torch.Tensor,
        num_rows: int,
        axis: int | None = None,
        where: Where | None = None,
    ):
        self.module, self.names, self.args, self.kwargs = module, names, args, kwargs
        self.grad_SX, self.row_S, self.num_rows, self.axis, self.where = grad_SX, row_S, num_rows, axis, where
        self.found: dict[str, torch.Tensor] = {}

    def settled(self) -> dict[str, "OfCall | Dense"]:
        """Each parameter's use; its gradients at once where they are smaller than what they are computed from."""
        small = sum(self.module.get_parameter(name).numel() for name in self.names) * self.num_rows
        if self.where is not None or small > self.grad_SX.numel():
            return {name: OfCall(self, name, 0, self.num_rows) for name in self.names}
        return {name: Dense(self.take(name), 0, self.num_rows) for name in self.names}

    def take(self, name: str) -> torch.Tensor:
        """(B, R, C) the gradient of each row; those of the module's other parameters wait until they are taken."""
        if name not in self.found:
            self.found = self._per_sample()
        value_SX = self.found.pop(name)
        value_SRC = value_SX.reshape(len(value_SX), value_SX.shape[1] if value_SX.dim() > 1 else 1, -1)
        zeros_BRC = value_SRC.new_zeros(self.num_rows, *value_SRC.shape[1:])
        return zeros_BRC.index_add_(0, self.row_S, value_SRC)

    def take_positions(self, name: str) -> torch.Tensor:
        """(M, RC) what each position of the output adds to the gradient of its row."""
        if name not in self.found:
            self.found = self._per_sample() if self.axis is None else self._per_position()
        return self.found.pop(name).flatten(1)

    def _per_sample(self) -> dict[str, torch.Tensor]:
        size = len(self.grad_SX)
        tensors = [*self.args, *self.kwargs.values()]
        split = tuple(0 if isinstance(x, torch.Tensor) and x.dim() and len(x) == size else None for x in tensors)

        def gradients(grad: torch.Tensor, *sample: Any) -> dict[str, torch.Tensor]:
            sample = [x[None] if axis == 0 else x for x, axis in zip(sample, split, strict=True)]
            return self._pull(sample)(grad[None])[0]

        with self._explained():
            return torch.func.vmap(gradients, (0, *split))(self.grad_SX, *tensors)

    def _per_position(self) -> dict[str, torch.Tensor]:
        """One row after the other, its output's gradient one position at a time."""
        parts = []
        for row in range(len(self.grad_SX)):
            of_row = [
                x[row : row + 1] if isinstance(x, torch.Tensor) and len(x) == len(self.grad_SX) else x
                for x in (*self.args, *self.kwargs.values())
            ]
            grad_TX = self.grad_SX[row].movedim(self.axis - 1, 0)
            spread_TTX = grad_TX.new_zeros(len(grad_TX), *grad_TX.shape)
            each_T = torch.arange(len(grad_TX), device=grad_TX.device)
            spread_TTX[each_T, each_T] = grad_TX
            with self._explained():
                pull = self._pull(of_row)
                parts.append(torch.func.vmap(lambda g, pull=pull: pull(g[None])[0])(spread_TTX.movedim(1, self.axis)))
        return {name: torch.cat([part[name] for part in parts]) for name in self.names}

    def _pull(self, tensors: list) -> Any:
        """The map from the output's gradient to that of the parameters."""
        args, kwargs = tensors[: len(self.args)], dict(zip(self.kwargs, tensors[len(self.args) :], strict=True))
        values = {name: self.module.get_parameter(name).detach() for name in self.names}
        # Those of modules within it have uses of their own, also where they are the same tensor by another name.
        others = {name: p.detach() for name, p in self.module.named_parameters(remove_duplicate=False)}

        def output(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return _output(self.module, others | values, tuple(args), kwargs)

        with torch.enable_grad():
            return torch.func.vjp(output, values)[1]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{type(self.module).__name__} has parameters of its own ({', '.join(self.names)}), and could not be "
                f"run again for one row alone: {str(error).splitlines()[0]:.200}; compare gradients of rows with "
                "akg.influence"
            ) from error


@dataclass(frozen=True)
class OfCall:
    """One parameter's part of a [`Call`], whose rows begin at `first`."""

    call: Call
    name: str
    first: int
    num_rows: int

    def ready(self) -> Dense:
        return Dense(self.call.take(self.name), self.first, self.num_rows)

    def among(self, first: int, num_rows: int) -> "OfCall":
        return OfCall(self.call, self.name, self.first + first, num_rows)

    def positions(self) -> Outer:
        """Each position's gradient as one long row."""
        value_MC = self.call.take_positions(self.name)
        ones_M1 = value_MC.new_ones(1, 1).expand(len(value_MC), 1)
        return Outer(value_MC, ones_M1, self.call.where.among(self.first, self.num_rows))


Use = Outer | Lookup | OfCall | Dense
Uses = dict[str, list[Use]]


class Together:
    """Uses of rows that are run a few at a time, as those of one batch.

    What positions have is copied to where all rows have it, once where uses share it: memory stays in one piece.

    Args:
        num_rows (`int`): B, of all parts.
    """

    def __init__(self, num_rows: int):
        self.num_rows, self.first = num_rows, 0
        self.uses: Uses = {}
        self.wholes: dict[tuple[str, int], Outer] = {}

    def add(self, uses: Uses, size: int) -> None:
        """The next `size` rows."""
        shared: dict[int, torch.Tensor] = {}
        written = set()
        for name, side in uses.items():
            kept = self.uses.setdefault(name, [])
            for key, use in (((name, index), use) for index, use in enumerate(side)):
                if isinstance(use, Outer) and use.where.per_row is not None and key not in self.wholes:
                    self.wholes[key] = self._whole(use, shared)
                    kept.append(self.wholes[key])
                if key in self.wholes and use.where.per_row == self.wholes[key].where.per_row:
                    self._write(self.wholes[key], use)
                    written.add(key)
                else:
                    kept.append(use.among(self.first, self.num_rows))
        for key in self.wholes.keys() - written:
            self._clear(self.wholes[key], self.first, self.first + size)
        self.first += size

    def _whole(self, use: Outer, shared: dict[int, torch.Tensor]) -> Outer:
        """Room for all rows; those before have nothing."""
        per_row = use.where.per_row

        def room(part: torch.Tensor) -> torch.Tensor:
            if part.stride(0) == 0:
                return part[:1].expand(self.num_rows * per_row, -1)
            whole = part.new_empty(self.num_rows * per_row, *part.shape[1:])
            return shared.setdefault(part.data_ptr(), whole)

        row_M = torch.arange(self.num_rows, device=use.left_MR.device).repeat_interleave(per_row)
        column_M = None if use.where.column_M is None else torch.zeros_like(row_M)
        whole = Outer(room(use.left_MR), room(use.right_MC), Where(row_M, column_M, self.num_rows, per_row))
        self._clear(whole, 0, self.first)
        return whole

    def _write(self, whole: Outer, use: Outer) -> None:
        start = self.first * use.where.per_row
        positions = slice(start, start + len(use.left_MR))
        for whole_MX, part_mX in ((whole.left_MR, use.left_MR), (whole.right_MC, use.right_MC)):
            if whole_MX.stride(0):
                whole_MX[positions] = part_mX
        if whole.where.column_M is not None:
            whole.where.column_M[positions] = use.where.column_M

    def _clear(self, whole: Outer, start: int, stop: int) -> None:
        for whole_MX in (whole.left_MR, whole.right_MC):
            if whole_MX.stride(0):
                whole_MX[start * whole.where.per_row : stop * whole.where.per_row] = 0


def lookup_gradient(module: nn.Embedding, token_BT: torch.Tensor, grad_BTC: torch.Tensor) -> torch.Tensor:
    """(M, C) what each position adds to the row of its token, whatever the module does to what it looked up.

    The table is replaced by one that has a row for each position.
    """
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise ValueError("embeddings with max_norm or scale_grad_by_freq have no gradient for a row alone")
    table_MC = module.weight.detach()[token_BT.flatten()]
    each_BT = torch.arange(token_BT.numel(), device=token_BT.device).view_as(token_BT)

    def output(table_MC: torch.Tensor) -> torch.Tensor:
        return _output(module, {"weight": table_MC}, (each_BT,), {})

    padding, module.padding_idx = module.padding_idx, None
    try:
        with torch.enable_grad():
            (grad_MC,) = torch.func.vjp(output, table_MC)[1](grad_BTC)
    finally:
        module.padding_idx = padding
    return grad_MC if padding is None else grad_MC * (token_BT.flatten() != padding)[:, None]


class _Forward(nn.Module):
    """A module without its hooks, which were not written for the transforms of torch.func."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module.forward(*args, **kwargs)


def _output(module: nn.Module, values: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a module returns with other values of its parameters, each name by itself."""
    values = {f"module.{name}": value for name, value in values.items()}
    return torch.func.functional_call(_Forward(module), values, args, kwargs, tie_weights=False)
