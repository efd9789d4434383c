"""What influence cannot go through is refused with one line that says what can."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from akg_models import batch_of, error, language_model, small_classifier
from tiny import tiny_model
from trl_dynamics.akg.batched import influences
from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.kernel import Kernel
from trl_dynamics.akg.one_step import influence, predict, update_gradient
from trl_dynamics.akg.real_step import verify
from trl_dynamics.akg.split.differences import CentralDifferences, whole
from trl_dynamics.akg.steps import step_of
from trl_dynamics.akg.task import Task, causal_lm, classifier, label_logp

ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
UPDATE, OBSERVE = (ROWS[:2], torch.tensor([0, 3])), (ROWS[1:], torch.tensor([1, 2]))
CALLS = {
    "influence": lambda task: influence(task, UPDATE, OBSERVE, lr=0.1),
    "order two": lambda task: influence(task, UPDATE, OBSERVE, lr=0.1, order=2),
    "several": lambda task: list(influences(task, [UPDATE, OBSERVE], OBSERVE, lr=0.1)),
    "verify": lambda task: verify(task, UPDATE, OBSERVE, lr=0.1),
    "kernel": lambda task: Kernel(task, UPDATE, OBSERVE).frobenius(6),
}


class BackwardOnly(torch.autograd.Function):
    """x W^T of whole numbers and a scale, as kernels of quantised weights have it: a backward and nothing else."""

    @staticmethod
    def forward(ctx, rows, weight, scale):
        ctx.save_for_backward(weight, scale)
        return rows @ (weight.to(rows) * scale).T

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        return gradient @ (weight.to(gradient) * scale), None, None


class Quantised(nn.Module):
    """A frozen linear layer in 8 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        whole_numbers = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole_numbers, requires_grad=False)

    def forward(self, rows):
        return BackwardOnly.apply(rows, self.weight, self.scale)


def quantised_classifier(marked: bool) -> nn.Sequential:
    """A classifier with a quantised layer, marked as transformers does, or not."""
    model = small_classifier()
    model[0] = nn.Sequential(nn.Linear(6, 6).double(), Quantised(model[0]))
    if marked:
        model.is_quantized = True
    return model


@pytest.mark.parametrize("name", CALLS)
def test_quantised_weights_are_told(name):
    with pytest.raises(ValueError, match="weights are quantised.*dequantize.*or use akg.gram"):
        CALLS[name](classifier(quantised_classifier(marked=True)))


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_without_forward_mode_is_told(name):
    with pytest.raises(
        ValueError, match="no forward-mode derivative.*akg.gram and akg.split.differences need no such"
    ):
        CALLS[name](classifier(quantised_classifier(marked=False)))


def test_gram_goes_through_both():
    task = classifier(quantised_classifier(marked=True))

    def gradients(rows, labels):
        logp = task.model(rows).log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
        found = [torch.autograd.grad(one, list(task.trainable().values()), retain_graph=True) for one in logp]
        return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in found])

    true = -gradients(*OBSERVE) @ gradients(*UPDATE).T
    assert error(gram(task, UPDATE, OBSERVE).total_OU, true) < 1e-12


def test_differences_go_through_an_operation_without_forward_mode():
    model = small_classifier()
    task = classifier(nn.Sequential(model, Reversed()))
    force = update_gradient(task, UPDATE)
    step = step_of(force.gradients, task.trainable(), "sgd", 0.1, None)
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        predict(task, force, step, OBSERVE)
    found = CentralDifferences(whole(task.model), step).predict(
        lambda: label_logp(task, OBSERVE), task.labels(OBSERVE), task.items(OBSERVE)
    )
    flipped = [(rows, 4 - labels) for rows, labels in (UPDATE, OBSERVE)]
    expected = influence(classifier(model), *flipped, lr=0.1)
    assert error(found.total.target_N, expected.total.target_N) < 1e-6


class Reversed(nn.Module):
    """The last axis the other way round, by an operation of somebody's own."""

    def forward(self, logits):
        class Flip(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return value.flip(-1)

            @staticmethod
            def backward(ctx, gradient):
                return gradient.flip(-1)

        return Flip.apply(logits)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensor_parallel_weights_are_told(one_process):
    model = small_classifier()
    parallelize_module(model, one_process, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for call in (*CALLS.values(), lambda task: gram(task, UPDATE, OBSERVE)):
        with pytest.raises(ValueError, match="weights are split over processes.*without tp_plan"):
            call(classifier(model))


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_weights_of_fsdp_1_are_told(one_process, use_orig_params):
    model = FullyShardedDataParallel(
        small_classifier(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    for call in (*CALLS.values(), lambda task: gram(task, UPDATE, OBSERVE), lambda task: whole(task.model)):
        with pytest.raises(ValueError, match=r"FSDP1 \(FullyShardedDataParallel\).*FSDP2"):
            call(classifier(model))


def test_differences_of_whole_weights_refuse_pieces(one_process):
    model = small_classifier()
    parallelize_module(model, one_process, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(ValueError, match="weights are split over processes"):
        whole(model)


def test_tensor_parallel_language_models_are_told(one_process):
    model = language_model()
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    parallelize_module(model.model.layers[0], one_process, plan)
    with pytest.raises(ValueError, match="weights are split over processes"):
        causal_lm(model)


def test_experts_of_grouped_products_are_told_and_eager_ones_go_through():
    model, update, observe = tiny_model("mixtral"), batch_of(2, 8, 0), batch_of(3, 7, 1)
    with pytest.raises(ValueError, match="experts_implementation='eager'"):
        influence(model, update, observe, lr=1e-3)
    model.set_experts_implementation("eager")
    found = influence(model, update, observe, lr=1e-3).total.target_N
    assert error(found, verify(model, update, observe, lr=1e-3).first_N) < 1e-5


def test_a_task_of_ones_own_is_told_as_well(one_process):
    linear = nn.Linear(6, 5).double()
    parallelize_module(linear, one_process, ColwiseParallel())
    whole_task = classifier(linear)
    task = Task(linear, whole_task.logits, whole_task.labels, whole_task.items, whole_task.loss)
    with pytest.raises(ValueError, match="weights are split over processes"):
        influence(task, UPDATE, OBSERVE, lr=0.1)
