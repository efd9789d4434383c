"""One forward and one backward of a batch with frozen parameters, which collect every parameter's uses on the way.

    B rows   N labelled positions   M positions of all rows   V labels

Parameters are frozen, so that autograd computes what arrives at the outputs of modules and nothing else. The head is
run backward tile by tile; what reaches the backbone goes through it at the end, once.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from trl_dynamics.akg.gram.uses import Call, Lookup, Outer, Use, Uses, Where, lookup_gradient
from trl_dynamics.akg.modes import evaluated, frozen
from trl_dynamics.akg.task import Task, num_rows


def owners(model: nn.Module) -> dict[str, str]:
    """Each trained parameter's name and the modules that have it, joined by + where it is tied."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                found[names[id(parameter)]].append(path or type(model).__name__)
    return {name: "+".join(dict.fromkeys(paths)) for name, paths in found.items()}


def record(
    task: Task,
    batch: Any,
    weight_N: torch.Tensor,
    *,
    column_N: torch.Tensor | None = None,
    forwarded: Callable[[], None] | None = None,
) -> Uses:
    """The uses of all trained parameters in sum_N weight ln pi(label), each row's by itself.

    Args:
        task ([`Task`]): Model and observables.
        batch: Rows of one side.
        weight_N (`torch.Tensor`): The weight of each labelled position.
        column_N (`torch.Tensor`, *optional*): The column at which the head is applied for each labelled position; with
            it, positions keep their columns.
        forwarded (`Callable`, *optional*): Is called between forward and backward of the backbone.

    Raises:
        ValueError: If a module with trained parameters is called in a way that does not keep rows apart.
    """
    recorder = _Recorder(task, batch, weight_N, column_N)
    with evaluated(task.model), frozen(task.model), recorder.hooked(), torch.enable_grad():
        try:
            recorder.forward()
            if forwarded is not None:
                forwarded()
            recorder.backward()
        finally:
            recorder.let_go()
    return recorder.uses


class _Recorder:
    def __init__(self, task: Task, batch: Any, weight_N: torch.Tensor, column_N: torch.Tensor | None):
        self.task, self.batch, self.column_N = task, batch, column_N
        self.weight_N, self.item_N, self.label_N = weight_N, task.items(batch), task.labels(batch)
        self.num_rows = num_rows(batch)
        names = {id(p): name for name, p in task.trainable().items()}
        held = {inner for module in task.model.modules() for holder in _holders(module).values() for inner in holder}
        self.trained = {
            module: own
            for module in task.model.modules()
            if module not in held and (own := {key: names[id(p)] for key, p in _own(module) if id(p) in names})
        }
        _refuse_computed(self.trained)
        self.paths = {module: path or "the model" for path, module in task.model.named_modules()}
        self.uses: Uses = {}
        self.cuts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # logits that go backward at the end, and their G
        self.running = False
        self.called: set[nn.Module] = set()
        self.spans: list[tuple[nn.Module, int]] = []  # what the head's modules returned in this tile
        self.heads: dict[tuple[nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.depth = self.num_roots = self.num_seen = 0

    def forward(self) -> None:
        """The backbone forward, the head forward and backward."""
        self.running = True
        for tile_nV in self.task.logits(self.task.model, self.batch):
            tile = slice(self.num_seen, self.num_seen + len(tile_nV))
            self._check_tile(len(tile_nV))
            self.num_seen += len(tile_nV)
            if self.num_roots > 1 and tile_nV.requires_grad:
                tile_nV.backward(self._force(tile_nV, tile))
            elif tile_nV.requires_grad:
                self.pending.append((tile_nV, self._force(tile_nV, tile)))
        self.running = False
        everywhere = slice(0, len(self.label_N))
        for (module, _), (inputs_N, grad_N) in self.heads.items():
            self._add(module, self.trained[module], (inputs_N,), {}, grad_N, everywhere)
        self.heads.clear()

    def backward(self) -> None:
        """All that is left to go backward through."""
        if ends := [(hidden, leaf.grad) for hidden, leaf in self.cuts] + self.pending:
            torch.autograd.backward(*zip(*ends, strict=True))

    def _force(self, tile_nV: torch.Tensor, tile: slice) -> torch.Tensor:
        """The gradient w (e_y - pi) of the logits."""
        with torch.no_grad():
            weight_n = self.weight_N[tile].to(tile_nV)
            force_nV = tile_nV.softmax(dim=-1).mul_(-weight_n[:, None])
            return force_nV.scatter_add_(1, self.label_N[tile, None], weight_n[:, None])

    def let_go(self) -> None:
        """The graph, whose hooks know this recorder: a circle that Python's collector does not see through."""
        self.cuts.clear()
        self.pending.clear()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self.task.model.modules():
                handle = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
            yield

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self.running:
            return None
        self.depth += 1
        if self.depth == 1:
            self.num_roots += 1
            if self.num_roots > 1:  # the head: its tiles go backward one by one, so what they read is cut off
                return tuple(self._cut(value) for value in args), kwargs
        elif module in self.trained and self.num_roots == 1:
            return tuple(self._spread(value) for value in args), kwargs
        return None

    def _cut(self, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            return value
        leaf = value.detach().requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
        self.cuts.append((value, leaf))
        return leaf

    def _spread(self, value: Any) -> Any:
        """What all rows share (learnt positions are looked up once) is looked up for each of them."""
        shared = isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == 1 < self.num_rows
        return value.expand(self.num_rows, *value.shape[1:]) if shared else value

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.running:
            return None
        self.depth -= 1
        self.called.add(module)
        own = self.trained.get(module)
        if own is None:
            return None
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"{self.paths[module]} has parameters of its own ({', '.join(own)}) and returns a "
                f"{type(output).__name__}; gram needs modules that return one tensor"
            )
        own = own | self._used_by_hand(module)
        nth = sum(module is other for other, _ in self.spans)
        span = self._span(module, output)
        args = tuple(_detached(value) for value in args)
        kwargs = {name: _detached(value) for name, value in kwargs.items()}
        versions = [(value, value._version) for value in args if isinstance(value, torch.Tensor)]

        def arrived(grad: torch.Tensor) -> None:
            if any(value._version != version for value, version in versions):
                raise ValueError(f"what {self.paths[module]} read is changed in place later; gram needs it as it was")
            # Some modules are run again in here, and those within them are none of the forward's.
            running, self.running = self.running, False
            with torch.no_grad():
                if span is None or len(args) != 1 or kwargs:
                    self._add(module, own, args, kwargs, grad.detach(), span)
                else:
                    self._gather(module, nth, args[0], grad.detach(), span)
            self.running = running

        if not output.requires_grad:
            # The graph starts here; the copy lets later modules work in place.
            output = output.detach().requires_grad_().clone()
        output.register_hook(arrived)
        return output

    def _used_by_hand(self, module: nn.Module) -> dict[str, str]:
        """Parameters of children that were not called, which a module with parameters of its own may have read.

        Those of children that it did not read add zeros.
        """
        return {
            f"{name}.{key}": parameter
            for name, child in module.named_children()
            if child in self.trained and child not in self.called and not any(child.children())
            for key, parameter in self.trained[child].items()
        }

    def _span(self, module: nn.Module, output: torch.Tensor) -> slice | None:
        """The labelled positions of the output's first axis; None where it is the rows of the batch."""
        size = len(output) if output.dim() else 0
        if self.num_roots == 1 and size == self.num_rows:
            return None
        if self.num_roots > 1 and size:
            self.spans.append((module, size))
            return slice(self.num_seen, self.num_seen + size)
        raise self._mixed(module, output.shape)

    def _check_tile(self, size: int) -> None:
        for module, found in self.spans:
            if found != size:
                raise self._mixed(module, (found,))
        self.spans.clear()

    def _mixed(self, module: nn.Module, shape: tuple) -> ValueError:
        return ValueError(
            f"{self.paths[module]} returns {tuple(shape)} where the batch has {self.num_rows} rows; gram needs rows "
            "along the first axis and cannot tell them apart here (experts that get some of the tokens, parameters "
            "looked up once for all rows)"
        )

    def _add(self, module: nn.Module, own: dict[str, str], args: tuple, kwargs: dict, grad, span) -> None:
        for key, use in self._uses(module, list(own), args, kwargs, grad, span):
            self.uses.setdefault(own[key], []).append(use)

    def _gather(self, module: nn.Module, nth: int, inputs_n: torch.Tensor, grad_n: torch.Tensor, span: slice) -> None:
        """Put a tile's part of a call of the head where the whole of it is kept, in one piece of memory."""
        if (module, nth) not in self.heads:
            size = len(self.label_N)
            self.heads[module, nth] = tuple(part.new_zeros(size, *part.shape[1:]) for part in (inputs_n, grad_n))
        for whole_N, part_n in zip(self.heads[module, nth], (inputs_n, grad_n), strict=True):
            whole_N[span] = part_n

    def _uses(
        self, module: nn.Module, keys: list[str], args: tuple, kwargs: dict, grad: torch.Tensor, span: slice | None
    ) -> Iterator[tuple[str, Use]]:
        linear = type(module).forward is nn.Linear.forward
        plain = {"weight", "bias"}.issuperset(keys) and not is_parametrized(module)
        if (linear or type(module).__name__ == "Conv1D") and plain and len(args) == 1:
            where = self._where(module, grad, span, matrix=True)
            input_MI, grad_MO = args[0].flatten(0, -2), grad.flatten(0, -2)
            ones_M1 = grad_MO.new_ones(1, 1).expand(len(grad_MO), 1)
            weight = Outer(grad_MO, input_MI, where) if linear else Outer(input_MI, grad_MO, where)
            for key in keys:
                yield key, weight if key == "weight" else Outer(grad_MO, ones_M1, where)
        elif isinstance(module, nn.Embedding) and plain and _is_lookup(keys, args, kwargs):
            where = self._where(module, grad, span, matrix=True)
            yield "weight", Lookup(args[0].flatten(), lookup_gradient(module, args[0], grad), where)
        else:
            row_S = torch.arange(self.num_rows, device=grad.device) if span is None else self.item_N[span]
            split = self.column_N is not None
            axis = self._axis(module, grad) if split and span is None else None
            where = self._where(module, grad, span) if split else None
            call = Call(module, keys, args, kwargs, grad, row_S, self.num_rows, axis, where)
            yield from call.settled().items()

    def _where(self, module: nn.Module, grad: torch.Tensor, span: slice | None, matrix: bool = False) -> Where:
        """Row and column of the positions of a gradient; a matrix has all axes but the last as positions."""
        if span is not None:
            per_each = grad[..., 0].numel() // len(grad) if matrix else 1
            column_M = None if self.column_N is None else self.column_N[span].repeat_interleave(per_each)
            row_M = self.item_N[span].repeat_interleave(per_each)
            return Where(row_M, column_M, self.num_rows, _per_row(row_M, self.num_rows))
        each_B = torch.arange(self.num_rows, device=grad.device)
        if self.column_N is None:
            per_row, column_M = grad[..., 0].numel() // self.num_rows, None
        else:
            per_row = grad.shape[self._axis(module, grad, matrix)]
            column_M = torch.arange(per_row, device=grad.device).repeat(self.num_rows)
        return Where(each_B.repeat_interleave(per_row), column_M, self.num_rows, per_row)

    def _axis(self, module: nn.Module, grad: torch.Tensor, matrix: bool = False) -> int:
        """The axis of a gradient that has the columns."""
        columns = self.batch["input_ids"].shape[1]
        axes = [axis for axis in range(1, grad.dim() - 1) if grad.shape[axis] == columns]
        if len(axes) != 1 or (matrix and grad.dim() != 3):
            raise ValueError(
                f"{self.paths[module]} returns {tuple(grad.shape)}, of which no axis, or more than one, can be the "
                f"{columns} columns; add a column of padding, or leave out by='position'"
            )
        return axes[0]


def _holders(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Children that are never called on rows, but only hold parameters for a module, with all that is in them."""
    return {
        name: list(child.modules())
        for name, child in module.named_children()
        if isinstance(child, nn.ParameterList | nn.ParameterDict)
        or (name == "parametrizations" and is_parametrized(module))
    }


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters by name, with those that are held for it; one that has two names comes twice."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name in _holders(module):
        held = module.get_submodule(name).named_parameters(remove_duplicate=False)
        yield from ((f"{name}.{key}", parameter) for key, parameter in held)


def _refuse_computed(modules: Iterable[nn.Module]) -> None:
    """Refuse weights that hooks compute of others before a forward, which a forward without hooks does not see."""
    for module in modules:
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        if found := [name for name in hooks if name in ("WeightNorm", "SpectralNorm")]:
            raise ValueError(
                f"a {type(module).__name__} has the hook {found[0]} of torch.nn.utils, which gram cannot go through; "
                "use the function of the same name in torch.nn.utils.parametrizations"
            )


def _per_row(row_M: torch.Tensor, num_rows: int) -> int | None:
    """How many positions each row has, where they come row by row and all have as many."""
    per_row = len(row_M) // num_rows
    each_B = torch.arange(num_rows, device=row_M.device)
    return per_row if per_row and torch.equal(row_M, each_B.repeat_interleave(per_row)) else None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _is_lookup(keys: list[str], args: tuple, kwargs: dict) -> bool:
    one = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
    return keys == ["weight"] and one and not args[0].is_floating_point()
