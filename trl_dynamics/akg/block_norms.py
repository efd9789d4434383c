"""||K_ou||_F of every pair of rows: how strongly an update's logits are tied to an observer's, whatever the force.

O observers   U rows of the update   N, M labelled positions of all observers, of one row   V labels   P parameters
"""

from collections.abc import Callable
from typing import Any

import torch

from trl_dynamics.akg.kernel import Kernel
from trl_dynamics.akg.task import Task, num_rows, row_sums, rows_of


def block_norms(
    task: Task,
    update: Any,
    observe: Any,
    *,
    num_products: int | None = None,
    seed: int = 0,
    moves: Callable[[str], bool] = lambda name: True,
) -> torch.Tensor:
    """The Frobenius norm of K's block between each observer and each row of the update, (O, U) float64.

    Args:
        task ([`Task`]): What K is of.
        update, observe: Batches of the task.
        num_products (`int`, *optional*): Products with K for each row of the side that has fewer rows, at least 6: a
            third finds the directions of that row's logits that move the observers most, a third gives what these
            move, exactly, and the rest estimates what is left, as in [`akg.kernel.Kernel.frobenius`], for all
            observers at once. Default: exact, by all Jacobians, which hold (N + M U) V P numbers: for few labels and
            small models.
        seed (`int`): Of the random vectors, which are the same for batches of the same shape: norms at two
            checkpoints differ by what K does, hardly by the draw.
        moves (`Callable`, *optional*): As of [`akg.kernel.Kernel`]: which parameters count, by name.

    Raises:
        ValueError: If there are too few products, or no parameter is left.
    """
    if num_products is None:
        return _exact(Kernel(task, update, observe, moves))
    if num_products < 6:
        raise ValueError(f"num_products is {num_products}, expected at least 6: two for each of three parts")
    if num_rows(observe) < num_rows(update):
        return block_norms(task, observe, update, num_products=num_products, seed=seed, moves=moves).T
    rng = torch.Generator().manual_seed(seed)
    rows = [rows_of(update, slice(row, row + 1)) for row in range(num_rows(update))]
    kernels = (Kernel(task, row, observe, moves) for row in rows)
    return torch.stack([_sketched(kernel, num_products, rng) for kernel in kernels], dim=1).sqrt()


def _sketched(kernel: Kernel, num_products: int, rng: torch.Generator) -> torch.Tensor:
    """(O,) unbiased estimates of ||K_o||_F^2: ||K_o Q||_F^2, and means of ||K_o (1 - Q Q^T) v||^2 over Gaussian v."""

    def gaussian(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(kernel.device, kernel.dtype)

    third = num_products // 3
    pulled = [kernel.apply_transposed(gaussian(kernel.shape_o)).flatten() for _ in range(third)]
    range_Q, _ = torch.linalg.qr(torch.stack(pulled, dim=-1))
    square_N = torch.zeros(kernel.shape_o[0], dtype=torch.float64)
    for direction in range_Q.T:
        square_N += _squares(kernel, direction)
    num_left = num_products - third - range_Q.shape[1]
    for _ in range(num_left):
        probe = gaussian(kernel.shape_u).flatten()
        square_N += _squares(kernel, probe - range_Q @ (range_Q.T @ probe)) / num_left
    return row_sums(square_N, kernel.task.items(kernel.observe), num_rows(kernel.observe))


def _squares(kernel: Kernel, vector: torch.Tensor) -> torch.Tensor:
    """(N,) squared norms of K v at each observed position."""
    return kernel.apply(vector.view(kernel.shape_u)).double().square().sum(dim=1).cpu()


def _exact(kernel: Kernel) -> torch.Tensor:
    square_NM = kernel.exact().double().square().sum(dim=(1, 3)).cpu()
    square_OM = row_sums(square_NM, kernel.task.items(kernel.observe), num_rows(kernel.observe))
    return row_sums(square_OM.T, kernel.task.items(kernel.update), num_rows(kernel.update)).T.sqrt()
