"""Central differences against forward mode, the error that they state, and that nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

from akg_models import adapted, batch_of, language_model
from tiny import tiny_model
from trl_dynamics import stats_head
from trl_dynamics.akg.one_step import CENTRAL_DIFFERENCES, FORWARD_MODE, influence, predict, update_gradient
from trl_dynamics.akg.split import differences, fsdp, zero
from trl_dynamics.akg.split.differences import CentralDifferences, Line, Shards, derivative, moving, whole
from trl_dynamics.akg.steps import Step, step_of
from trl_dynamics.akg.task import Task, causal_lm, label_logp

UPDATE, OBSERVE = batch_of(2, 10, 1), batch_of(5, 12, 2)


def warm_optimizer(task: Task, kind: type, **options) -> torch.optim.Optimizer:
    """An optimiser that has taken two steps with other batches."""
    optimizer = kind(list(task.trainable().values()), **options)
    for seed in (3, 4):
        gradients = update_gradient(task, batch_of(2, 10, seed)).gradients
        for name, parameter in task.trainable().items():
            parameter.grad = gradients.get(name)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def prepared(model: nn.Module, kind: type = torch.optim.AdamW, **options) -> tuple[Task, Step]:
    options = options or {"lr": 1e-3, "weight_decay": 0.1}
    task = causal_lm(model)
    optimizer = warm_optimizer(task, kind, **options)
    return task, step_of(update_gradient(task, UPDATE).gradients, task.trainable(), optimizer, None, 1.0)


def by_differences(task: Task, step: Step, found: CentralDifferences | None = None):
    found = found or CentralDifferences(whole(task.model), step)
    return found.predict(lambda: label_logp(task, OBSERVE), task.labels(OBSERVE), task.items(OBSERVE))


def in_float64(step: Step) -> Step:
    return Step({part: {name: c.double() for name, c in changes.items()} for part, changes in step.parts.items()})


def counted(task: Task) -> tuple[list[int], callable]:
    calls = []

    def forward():
        calls.append(1)
        return label_logp(task, OBSERVE)

    return calls, forward


STEPS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equals_forward_mode_in_float64(family, kind):
    task, step = prepared(language_model(family), STEPS[kind][0], **STEPS[kind][1])
    found, exact = by_differences(task, step), predict(task, None, step, OBSERVE)
    assert found.parts.keys() == exact.parts.keys() == {"update", "momentum", "decay"}
    assert torch.equal(found.logp_N, label_logp(task, OBSERVE))
    for ours, theirs in [(found.total, exact.total), *((found.parts[n], exact.parts[n]) for n in exact.parts)]:
        off_N = (ours.target_N - theirs.target_N).abs()
        assert (off_N <= ours.error_N).all()
        # Gemma 2 computes its softmax in float32.
        assert off_N.norm() < (1e-3 if family == "gemma2" else 1e-9) * theirs.target_N.norm()


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_is_within_the_stated_error_in_float32(family, kind):
    model = tiny_model(family)
    task, step = prepared(model, STEPS[kind][0], **STEPS[kind][1])
    found = by_differences(task, step)
    exact = predict(causal_lm(copy.deepcopy(model).double()), None, in_float64(step), OBSERVE)
    for ours, theirs in [(found.total, exact.total), *((found.parts[n], exact.parts[n]) for n in exact.parts)]:
        off_N, size = (ours.target_N - theirs.target_N).abs(), theirs.target_N.norm()
        assert (off_N <= ours.error_N).all()
        assert off_N.norm() < 1e-3 * size and ours.error_N.norm() < 0.03 * size


def test_the_size_of_the_step_does_not_matter():
    """What the outputs move by is chosen, and so it is as exact for a rate of 1e-9 as for one of 1."""
    task, step = prepared(tiny_model("llama"))
    changes = step.parts["update"]
    base = by_differences(task, Step({"update": changes})).total
    for factor in (1e-6, 1e-3, 1e3):
        scaled = Step({"update": {name: factor * change for name, change in changes.items()}})
        found = by_differences(task, scaled).total
        assert ((found.target_N / factor - base.target_N).abs() <= found.error_N / factor + base.error_N).all()
        assert found.error_N.norm() < 0.03 * found.target_N.norm()


def test_an_adapter_alone_is_moved():
    task, step = prepared(adapted())
    found, exact = by_differences(task, step), predict(task, None, step, OBSERVE)
    assert set(found.step.parts["update"]) == set(task.trainable()) and len(task.trainable()) < 20
    torch.testing.assert_close(found.total.target_N, exact.total.target_N, rtol=1e-8, atol=1e-12)


def test_weights_without_effect_are_not_moved_far():
    """An adapter's first factors, while its second ones are zero."""
    task = causal_lm(adapted(init_lora_weights=True))
    decay = {name: -1e-9 * p.detach() for name, p in task.trainable().items()}
    found = CentralDifferences(whole(task.model), Step({"decay": decay}))
    change = by_differences(task, found.step, found).total
    assert not change.target_N.any() and not change.error_N.any()
    assert found.distances["decay"] * 1e-9 <= differences.FARTHEST * (1 + 1e-6)


def test_a_change_of_nothing_is_nothing():
    task = causal_lm(tiny_model("llama"))
    still = {name: torch.zeros_like(p) for name, p in task.trainable().items()}
    change = by_differences(task, Step({"update": still})).total
    assert not change.target_N.any() and not change.error_N.any()


@pytest.mark.parametrize("failing_at", [None, 1, 2, 5, 7])
def test_every_bit_is_put_back(failing_at):
    task, step = prepared(tiny_model("llama", attention_dropout=0.5).train())
    for parameter in task.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(task.model.state_dict())
    calls, forward = counted(task)
    state = torch.get_rng_state()

    def observed():
        if len(calls) + 1 == failing_at:
            raise FloatingPointError("a forward failed")
        return forward()

    found = CentralDifferences(whole(task.model), step)
    given = observed, task.labels(OBSERVE), task.items(OBSERVE)
    if failing_at is None:
        found.predict(*given)
    else:
        with pytest.raises(FloatingPointError):
            found.predict(*given)
    after = task.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all((parameter.grad == 1).all() for parameter in task.trainable().values())
    assert all(module.training for module in task.model.modules()) and torch.equal(state, torch.get_rng_state())


def test_a_batch_after_the_first_takes_four_forwards_a_part():
    task, step = prepared(tiny_model("llama"))
    calls, forward = counted(task)
    found = CentralDifferences(whole(task.model), step)
    given = forward, task.labels(OBSERVE), task.items(OBSERVE)
    first = found.predict(*given)
    calls.clear()
    second = found.predict(*given)
    assert len(calls) == 1 + 4 * 3
    assert torch.equal(first.total.target_N, second.total.target_N)


def test_the_result_says_how_it_was_found():
    task, step = prepared(tiny_model("llama"))
    found = by_differences(task, step)
    assert found.method == CENTRAL_DIFFERENCES and found.loss is None and found.step is step
    assert torch.equal(found.label_N, task.labels(OBSERVE)) and len(found.per_item) == 5
    errors = [part.error_N for part in found.parts.values()]
    torch.testing.assert_close(found.total.error_N, sum(errors))
    exact = influence(task, UPDATE, OBSERVE, lr=1e-3)
    assert exact.method == FORWARD_MODE and exact.total.error_N is None


def at(function, distance: float):
    """(distance, values) up and down, at once and twice the distance."""
    return tuple(tuple((s * k * distance, function(s * k * distance)) for s in (1, -1)) for k in (1, 2))


def test_a_polynomial_of_degree_four_is_exact():
    coefficients_KN = torch.tensor([[1.0, -2, 0.5], [3, 1, -1], [2, 5, 1], [-1, 4, 7], [2, 2, -3]]).double()

    def function(x: float) -> torch.Tensor:
        return sum(c_N * x**k for k, c_N in enumerate(coefficients_KN))

    value_N, error_N = derivative(*at(function, 0.25), function(0.0), 0.25)
    torch.testing.assert_close(value_N, coefficients_KN[1], rtol=1e-12, atol=1e-12)
    cubes_N = coefficients_KN[3].abs() * 0.25**2  # what was corrected; the fourth order is taken for rounding
    assert (error_N > cubes_N).all()
    coefficients_KN[4] = 0
    _, error_N = derivative(*at(function, 0.25), function(0.0), 0.25)
    torch.testing.assert_close(error_N, cubes_N, rtol=1e-9, atol=1e-12)


def test_the_stated_error_covers_the_true_one_at_any_distance():
    """Terms of higher order at far distances, noise at near ones: 1e-7, as of outputs in float32."""
    rng = torch.Generator().manual_seed(0)
    phase_N = torch.linspace(0, 6.28, 200, dtype=torch.float64)
    for distance in (1e-3, 1e-2, 0.05, 0.1, 0.3):

        def noisy(x: float) -> torch.Tensor:
            return torch.sin(phase_N + x) + 1e-7 * torch.randn(200, generator=rng, dtype=torch.float64)

        value_N, error_N = derivative(*at(noisy, distance), noisy(0.0), distance)
        off_N = (value_N - phase_N.cos()).abs()
        assert (off_N <= error_N).double().mean() > 0.995
        # Noise is stated at a few standard errors; where bending is larger, the correction, one order coarser.
        assert (error_N / off_N).median() < (20 if distance <= 1e-2 else 1000)


def test_what_weights_really_move_by_is_counted():
    """1 and 1 + 1.2e-7 are neighbours in float32: of a change of 1e-7 the first half is lost, the second doubled."""
    weight = nn.Parameter(torch.ones(1000))
    line = Line(
        Shards({"w": weight.detach()}, lambda: None, torch.device("cpu"), False), {"w": torch.full((1000,), 1e-7)}
    )
    with torch.no_grad():
        assert line.move(0.5) == 0.0
        assert line.move(1.0) == pytest.approx(2**-23 / 1e-7, rel=1e-6)
        assert line.move(1000.0) == pytest.approx(1000.0, rel=1e-3)


def test_a_change_too_small_for_its_square_in_float32_is_measured():
    weight = torch.zeros(10)
    line = Line(Shards({"w": weight}, lambda: None, torch.device("cpu"), False), {"w": torch.full((10,), 1e-25)})
    assert line.length_sq == pytest.approx(1e-49, rel=1e-6)
    assert line.move(1e24) == pytest.approx(1e24, rel=1e-6)


def test_processes_settle_after_every_change():
    calls = []
    values = {"w": torch.ones(3)}
    pieces = Shards(values, lambda: calls.append(values["w"].clone()), torch.device("cpu"), False)
    with moving(pieces, {"w": torch.ones(3)}) as line:
        line.move(2.0)
        line.move(-2.0)
    assert [float(seen[0]) for seen in calls] == [3.0, -1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=f"{str(dtype)[6:]} weights.*float32.*DDP"):
        whole(tiny_model("llama").to(dtype))


def test_frozen_half_precision_below_an_adapter_is_refused():
    model = adapted()
    model.get_base_model().lm_head.base_layer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 weights"):
        whole(model)


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised weights.*float32"):
        whole(model)


@pytest.mark.parametrize(("family", "pad"), [("llama", True), ("gemma2", False)])
def test_observers_through_the_stats_head_are_those_of_the_task(family, pad):
    model, batch = language_model(family), batch_of(3, 9, 5)
    batch |= {"attention_mask": torch.tensor([[0] * 3 * pad + [1] * (9 - 3 * pad), [1] * 9, [1] * 9])}
    expected_N = label_logp(causal_lm(model), batch)
    stats_head.install(model)
    torch.testing.assert_close(fsdp.sharded_label_logp(model, batch), expected_N, rtol=1e-6, atol=1e-6)


def test_a_forward_in_half_precision_is_refused():
    model = tiny_model("llama").to(torch.bfloat16)
    stats_head.install(model)
    with pytest.raises(ValueError, match="computes in bfloat16.*mixed_precision 'no'"):
        fsdp.sharded_label_logp(model, OBSERVE)


def test_a_model_that_fsdp_did_not_split_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not split by FSDP2.*fsdp_version: 2"):
        fsdp.fsdp_shards(tiny_model("llama"))


class Engine(nn.Module):
    """What of DeepSpeed's engine is asked before anything else."""

    def __init__(self, stage: int):
        super().__init__()
        self.stage, self.optimizer, self.taken = stage, self, []

    def zero_optimization_stage(self) -> int:
        return self.stage

    def step(self) -> str:
        self.taken.append("step")
        return "done"


@pytest.mark.parametrize(
    ("function", "stage", "expected"),
    [(zero.zero_shards, 2, "3"), (zero.piecewise_step, 0, "3"), (zero.whole_step, 3, "1 or 2")],
)
def test_another_stage_is_refused(function, stage, expected):
    with pytest.raises(ValueError, match=f"ZeRO stage {stage}, expected {expected}"):
        function(Engine(stage))


def test_something_is_called_before_a_step_and_no_longer():
    engine = Engine(3)
    with zero.before_step(engine, lambda: engine.taken.append("call")):
        assert engine.step() == "done"
    engine.step()
    assert engine.taken == ["call", "step", "step"] and "step" not in vars(engine)


def test_a_wrapped_step_is_wrapped_again_and_put_back():
    engine = Engine(3)
    engine.step = own = lambda: engine.taken.append("own")
    with pytest.raises(RuntimeError), zero.before_step(engine, lambda: engine.taken.append("call")):
        engine.step()
        raise RuntimeError
    assert engine.taken == ["call", "own"] and engine.step is own
