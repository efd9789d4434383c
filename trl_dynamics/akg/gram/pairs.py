"""Inner products of all rows of two sides in one parameter, from its uses, in blocks of bounded size.

    O observers   U rows of the update   R, C a parameter's first axis, and its others   m, M positions of either side

Two ways with the same result. *Rows*: the gradients of all rows are formed for some rows of the parameter, multiplied,
and dropped: 2 (m + M) R C + 2 O U R C operations. *Positions*: positions are compared pair by pair without any
gradient, (left . left)(right . right): 2 m M (R + C), less where a row has one position or very few.
"""

from collections.abc import Iterator

import torch

from trl_dynamics.akg.gram.uses import Dense, Lookup, OfCall, Outer, Use

BLOCK_BYTES = 16 << 20


def inner_products(
    observe: list[Use], update: list[Use], shape: torch.Size, diagonal: torch.Tensor | None = None
) -> torch.Tensor:
    """(O, U) float64 inner products of the gradients of one parameter.

    Args:
        observe, update: The uses of either side, each at least one.
        shape (`torch.Size`): The parameter's.
        diagonal (`torch.Tensor`, *optional*): Multiplies the update's gradients, element by element.
    """
    if diagonal is None and compares_positions(observe, update, shape):
        return _by_positions(observe, update)
    observe, update = [use.ready() for use in observe], [use.ready() for use in update]
    num_rows, width = shape[0] if shape else 1, shape[1:].numel()
    diagonal_RC = None if diagonal is None else diagonal.reshape(num_rows, width)
    if all(isinstance(use, Lookup) for use in (*observe, *update)):
        token_r = _shared_tokens(observe, update)
        if not len(token_r):
            return torch.zeros(_num_rows(observe), _num_rows(update), dtype=torch.float64)
        observe, update = [u.restricted(token_r) for u in observe], [u.restricted(token_r) for u in update]
        num_rows, diagonal_RC = len(token_r), None if diagonal is None else diagonal_RC[token_r]
    return _by_rows(observe, update, num_rows, width, diagonal_RC)


def compares_positions(observe: list[Use], update: list[Use], shape: torch.Size) -> bool:
    """Whether comparing positions takes fewer operations than forming gradients."""
    if not all(isinstance(use, Outer) for use in (*observe, *update)):
        return False
    m, M = (sum(len(use.left_MR) for use in side) for side in (observe, update))
    rows, positions = operations(m, M, observe[0].where.num_rows * update[0].where.num_rows, shape)
    return positions < rows


def operations(m: float, M: float, num_pairs: int, shape: torch.Size) -> tuple[float, float]:
    """What forming gradients takes, and comparing positions."""
    height, width = shape[0], shape[1:].numel()
    return 2 * (m + M + num_pairs) * height * width, 2 * m * M * (height + width)


def _by_rows(observe: list, update: list, num_rows: int, width: int, diagonal_RC: torch.Tensor | None) -> torch.Tensor:
    num_o, num_u = _num_rows(observe), _num_rows(update)
    total_OU = torch.zeros(num_o, num_u, dtype=torch.float64)
    dtype = _precision(observe[0])
    step = max(1, BLOCK_BYTES // (dtype.itemsize * (num_o + num_u) * max(1, width)))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        grad_OK, grad_UK = _gradients(observe, rows, dtype), _gradients(update, rows, dtype)
        if diagonal_RC is not None:
            grad_UK = grad_UK * diagonal_RC[rows].to(dtype).flatten()
        total_OU += (grad_OK @ grad_UK.T).to(torch.device("cpu")).double()
    return total_OU


def _gradients(uses: list, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """(B, K) all rows' gradients in some rows of a parameter."""
    sum_BRC = None
    for use in uses:
        sum_BRC = use.added(sum_BRC, rows, dtype)
    return sum_BRC.flatten(1)


def _by_positions(observe: list[Outer], update: list[Outer]) -> torch.Tensor:
    num_o, num_u = _num_rows(observe), _num_rows(update)
    total_OU = torch.zeros(num_o, num_u, dtype=torch.float64)
    for one, other in ((one, other) for one in observe for other in update):
        for part, product_mM in _products(one, other):
            by_row_mU = product_mM.new_zeros(len(product_mM), num_u).index_add_(1, other.where.row_M, product_mM)
            by_row_OU = by_row_mU.new_zeros(num_o, num_u).index_add_(0, one.where.row_M[part], by_row_mU)
            total_OU += by_row_OU.to(torch.device("cpu")).double()
    return total_OU


def add_position_products(observe: list[Use], update: list[Use], into_OTUS: torch.Tensor) -> None:
    """Add the inner products of one parameter between all positions, at the columns where it was applied."""
    num_o, width_o, num_u, width_u = into_OTUS.shape
    flat = into_OTUS.view(num_o * width_o, num_u * width_u)
    explicit_o, explicit_u = (
        [use.positions() if isinstance(use, OfCall) else use for use in side] for side in (observe, update)
    )
    for one in explicit_o:
        index_m = one.where.row_M * width_o + one.where.column_M
        for other in explicit_u:
            index_M = (other.where.row_M * width_u + other.where.column_M).cpu()
            for part, product_mM in _products(one, other):
                flat[index_m[part].cpu()[:, None], index_M] += product_mM.to(flat)


def _products(one: Outer | Lookup, other: Outer | Lookup) -> Iterator[tuple[slice, torch.Tensor]]:
    """Inner products of positions, some positions of `one` at a time with all of `other`."""
    dtype = _precision(one)
    num_m, num_M = len(one.where.row_M), len(other.where.row_M)
    step = max(1, BLOCK_BYTES // (3 * dtype.itemsize * max(1, num_M)))
    for start in range(0, num_m, step):
        part = slice(start, start + step)
        if isinstance(one, Outer) and isinstance(other, Outer):
            left_mM = one.left_MR[part].to(dtype) @ other.left_MR.to(dtype).T
            yield part, left_mM * (one.right_MC[part].to(dtype) @ other.right_MC.to(dtype).T)
        elif isinstance(one, Lookup) and isinstance(other, Lookup):
            same_mM = one.token_M[part, None] == other.token_M
            yield part, same_mM * (one.grad_MC[part].to(dtype) @ other.grad_MC.to(dtype).T)
        elif isinstance(one, Lookup):
            left_mM = other.left_MR[:, one.token_M[part]].to(dtype).T
            yield part, left_mM * (one.grad_MC[part].to(dtype) @ other.right_MC.to(dtype).T)
        else:
            left_mM = one.left_MR[part][:, other.token_M].to(dtype)
            yield part, left_mM * (one.right_MC[part].to(dtype) @ other.grad_MC.to(dtype).T)


def _shared_tokens(observe: list[Lookup], update: list[Lookup]) -> torch.Tensor:
    """The tokens of both sides, ascending: all others meet nothing."""
    one, other = (torch.cat([use.token_M for use in side]).unique() for side in (observe, update))
    return one[torch.isin(one, other)]


def _num_rows(uses: list) -> int:
    use = uses[0]
    return use.num_rows if isinstance(use, Dense) else use.where.num_rows


def _precision(use: Use) -> torch.dtype:
    value = use.left_MR if isinstance(use, Outer) else use.grad_MC if isinstance(use, Lookup) else use.value_bRC
    return torch.promote_types(value.dtype, torch.float32)
