"""squeeze_guard in DPO runs: the loss' value stays, rejected tokens are held back as a slow reference says."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, TrainerCallback

import trl_dynamics
from tiny import tiny_model
from tiny_runs import make_trainer
from trl_dynamics.embedded.base_model import model_path
from trl_dynamics.embedded.data import preference_rows
from trl_dynamics.ops import squeeze
from trl_dynamics.trainers.squeeze.guard import SqueezeGuard, drops_out

KAPPA, BUDGET = 2e4, 1e-3


def guard_of(trainer) -> SqueezeGuard:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SqueezeGuard))


def weights_after(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name: str) -> list[float]:
    key = f"squeeze_guard/{name}"
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class AtFirstStep(TrainerCallback):
    """Gives the guard a kappa, as a checkpoint does."""

    def __init__(self, guard: SqueezeGuard, kappa: float = KAPPA):
        self.guard, self.kappa = guard, kappa

    def on_train_begin(self, args, state, control, **kwargs):
        self.guard.kappa = self.kappa


def make_guarded(folder, budget=BUDGET, **options):
    """A run whose guard knows a kappa from the start."""
    trainer = make_trainer("dpo", folder, **({"dropout": 0.0, "squeeze_guard": budget} | options))
    trainer.add_callback(AtFirstStep(guard_of(trainer)))
    return trainer


def spearman(first_N: torch.Tensor, second_N: torch.Tensor) -> float:
    ranks = [values_N.argsort().argsort().double() for values_N in (first_N, second_N)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def first_batch(trainer) -> dict[str, torch.Tensor]:
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def guarded_loss_by_hand(trainer, inputs: dict, kappa: float, budget: float) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO with ln p- = sum [w ln p + (1 - w) ln p.detach()], w from a scan of all labels; and w."""
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()

    def token_logp(model):
        logits = model(ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        return logits, logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask

    logits, logp = token_logp(trainer.model)
    with torch.no_grad():
        reference = token_logp(trainer.ref_model)[1].sum(1)
    half = len(ids) // 2
    margin = (logp.sum(1) - reference)[:half] - (logp.sum(1) - reference)[half:]
    coefficient = trainer.beta * (1 - torch.sigmoid(trainer.beta * margin.detach())) / half
    rate = trainer.optimizer.param_groups[0]["lr"]
    push = (rate * kappa * coefficient)[:, None].expand_as(mask[half:])[mask[half:]].double()
    rows, labels = logits[half:][mask[half:]].detach().double(), ids[half:, 1:][mask[half:]]
    share = torch.zeros_like(push)
    for step in torch.linspace(0, 1, 4001, dtype=torch.float64).tolist():
        share = torch.where(squeeze.drained_mass(rows, labels, -step * push) <= budget, step, share)
    weight = torch.ones_like(logp)
    weight[half:][mask[half:]] = share.float()
    guarded = (weight * logp + (1 - weight) * logp.detach()).sum(1) - reference
    return -F.logsigmoid(trainer.beta * (guarded[:half] - guarded[half:])).mean(), share


def test_gradients_are_those_of_the_loss_with_held_back_tokens_and_the_value_is_the_plain_one(tmp_path):
    plain = make_trainer("dpo", tmp_path / "plain", dropout=0.0, per_device_train_batch_size=4)
    trainer = make_trainer("dpo", tmp_path, dropout=0.0, per_device_train_batch_size=4, squeeze_guard=BUDGET)
    inputs = first_batch(trainer)
    plain.model.train()
    guard_of(trainer).kappa = KAPPA
    loss = trainer.compute_loss(trainer.model, inputs)
    assert torch.equal(loss, plain.compute_loss(plain.model, inputs))
    expected_loss, share = guarded_loss_by_hand(trainer, inputs, KAPPA, BUDGET)
    assert 0.1 < (share < 1).double().mean() < 0.9
    given, expected = gradients(trainer, loss), gradients(trainer, expected_loss)
    unguarded = gradients(plain, plain.compute_loss(plain.model, inputs))
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(given[name], value, rtol=0, atol=1e-3 * scale)
    assert any((given[name] - value).abs().max() > 0.1 * value.abs().max() for name, value in unguarded.items())


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"gradient_accumulation_steps": 2}, {"loss_type": "ipo"}])
def test_a_budget_that_never_binds_leaves_training_bitwise_alone(options, tmp_path):
    """With dropout on: the calibrations draw no random number."""
    options = options | {"max_steps": 5, "logging_steps": 1}
    guarded = make_trainer("dpo", tmp_path / "guarded", squeeze_guard=1.0, squeeze_guard_every=2, **options)
    mine = weights_after(guarded)
    theirs = make_trainer("dpo", tmp_path / "plain", package=trl, **options)
    other = weights_after(theirs)
    assert losses(guarded) == losses(theirs) and len(losses(theirs)) == 5
    assert not [name for name, value in other.items() if not torch.equal(mine[name], value)]
    assert logged(guarded, "weight") == [1.0] * 4 and len(logged(guarded, "kappa")) == 3


def test_off_there_is_no_guard(tmp_path):
    trainer = make_trainer("dpo", tmp_path)
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, SqueezeGuard)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_micro_batches_of_a_step_are_held_back_as_one_batch(lora, tmp_path):
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lora": lora}
    whole = make_guarded(tmp_path / "whole", per_device_train_batch_size=4, **options)
    parts = make_guarded(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    plain = make_guarded(tmp_path / "plain", budget=1.0, per_device_train_batch_size=4, **options)
    (a, b, c) = (weights_after(trainer) for trainer in (whole, parts, plain))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=2e-6)
    assert max((c[name] - value).abs().max().item() for name, value in a.items()) > 1e-4


def test_what_is_logged_keeps_the_budget_and_the_guard_holds_back_what_breaks_it(tmp_path):
    trainer = make_trainer("dpo", tmp_path, dropout=0.0, squeeze_guard=BUDGET, max_steps=12, logging_steps=1)
    trainer.train()
    assert len(logged(trainer, "kappa")) == 8, "after each of the first eight steps, then after 16, 24, ..."
    assert all(kappa > 0 for kappa in logged(trainer, "kappa"))
    assert all(0.3 < fit <= 1 for fit in logged(trainer, "kappa_fit"))
    series = {
        name: logged(trainer, name) for name in ("weight", "held_back", "drained_mass", "drained_mass_unguarded")
    }
    assert {len(values) for values in series.values()} == {11}, "the first step has no kappa yet"
    for weight, held_back, kept, unguarded in zip(*series.values(), strict=True):
        assert 0 < weight <= 1 and 0 <= held_back <= 1 and kept <= BUDGET and kept <= unguarded
    assert series["held_back"][0] > 0.2 and series["drained_mass_unguarded"][0] > 2 * series["drained_mass"][0]


def test_without_a_learning_rate_nothing_is_calibrated(tmp_path):
    """The first step of a warm-up has none."""
    trainer = make_trainer("dpo", tmp_path, squeeze_guard=BUDGET, max_steps=3, logging_steps=1, warmup_steps=2)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "squeeze_guard/kappa" in entry]
    assert steps == [2, 3]


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dropout_is_found_as_a_number_and_as_a_module(rate):
    bloom = BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2, attention_dropout=rate)
    assert drops_out(tiny_model(attention_dropout=rate)) == drops_out(BloomForCausalLM(bloom)) == (rate > 0)


def test_a_resumed_run_goes_on_with_its_kappa(tmp_path):
    options = {"squeeze_guard": BUDGET, "squeeze_guard_mode": "shuffled", "max_steps": 5, "dropout": 0.0}
    saving = {"save_strategy": "steps", "save_steps": 3}
    expected = weights_after(make_trainer("dpo", tmp_path, **options, **saving))
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["squeeze_guard"]["kappa"] > 0
    resumed = make_trainer("dpo", tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    given = resumed.model.state_dict()
    assert not [name for name, value in expected.items() if not torch.equal(given[name], value)]


class WithoutFloat64(TorchFunctionMode):
    """What goes to Apple's GPU stays on the CPU, and fails in float64 as it does there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "to" and torch.device("mps") in args:
            dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), args[0].dtype)
            if dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return args[0].to(dtype)
        return func(*args, **(kwargs or {}))


def test_kappa_can_be_measured_on_a_device_without_float64(tmp_path, monkeypatch):
    trainer = make_trainer("dpo", tmp_path, dropout=0.0, squeeze_guard=BUDGET)
    trainer.compute_loss(trainer.model, first_batch(trainer)).backward()
    trainer.optimizer.step()
    guard = guard_of(trainer)
    expected = guard._response(guard._pushed)
    there = SimpleNamespace(device=torch.device("mps"), autocast=trainer.accelerator.autocast)
    monkeypatch.setattr(trainer, "accelerator", there)
    with WithoutFloat64():
        given = guard._response(guard._pushed)
    assert expected.dtype == torch.float64 and (expected != 0).all()
    torch.testing.assert_close(given, expected.float())


def first_weights(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """The guard's weights in the first micro-batch, and which tokens are rejected ones."""
    guard, found = guard_of(trainer), []
    weights = guard.weights

    def keep(gradient_BT, forward):
        found.append((weights(gradient_BT, forward), forward.rejected_mask_BT))
        return found[-1][0]

    guard.weights = keep
    trainer.train()
    return found[0]


def test_controls_deal_out_the_guards_weights(tmp_path):
    given = {
        mode: first_weights(make_guarded(tmp_path / mode, squeeze_guard_mode=mode, max_steps=1))
        for mode in ("guard", "uniform", "shuffled")
    }
    for weight_BT, mask_BT in given.values():
        assert (weight_BT[~mask_BT] == 1).all()
    guard_N, uniform_N, shuffled_N = (weight_BT[mask_BT] for weight_BT, mask_BT in given.values())
    assert len(guard_N.unique()) > 3
    torch.testing.assert_close(uniform_N, guard_N.mean().expand_as(uniform_N))
    assert torch.equal(guard_N.sort().values, shuffled_N.sort().values) and not torch.equal(guard_N, shuffled_N)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"squeeze_guard": -0.1}, "squeeze_guard is -0.1, expected a probability"),
        ({"squeeze_guard": 0.1, "squeeze_guard_mode": "half"}, "expected one of guard, uniform, shuffled"),
        ({"squeeze_guard": 0.1, "squeeze_guard_every": 0}, "expected a number of steps from 1 on"),
    ],
)
def test_options_out_of_range_are_refused_before_a_model_is_looked_for(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        trl_dynamics.DPOTrainer("no/such-model", args=trl_dynamics.DPOConfig(str(tmp_path), use_cpu=True, **options))


def test_what_a_push_on_one_token_alone_drains_is_predicted_in_rank_and_scale():
    """One real SGD step per rejected token, each from the same weights, and one kappa for all of them."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    row, start = preference_rows(1)[0], {name: value.clone() for name, value in model.state_dict().items()}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"] + row["rejected"])["input_ids"]])
    label_N, rate = ids[0, len(prompt) :], 1e-3
    before_NV = model(ids).logits[0, len(prompt) - 1 : -1].detach()
    rows, after = squeeze.keep_rows(before_NV.clone(), label_N), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for index, label in enumerate(label_N):
        model.load_state_dict(start)
        optimizer.zero_grad()
        model(ids).logits[0, len(prompt) - 1 + index].log_softmax(-1)[label].backward()
        optimizer.step()
        with torch.no_grad():
            after.append(model(ids).logits[0, len(prompt) - 1 + index].log_softmax(-1))
    after_NV = torch.stack(after)
    label_logp_N, rival_logp_N = (after_NV.gather(1, n[:, None])[:, 0] for n in (label_N, rows.rival_id_N))
    push_N = torch.full_like(label_logp_N, rate)
    product, square, change = squeeze.response_sums(rows, label_logp_N, rival_logp_N, push_N)
    predicted_N = squeeze.drained_by_push(rows, product / square * push_N)
    before_N, after_N = rows.label_logp_N.exp() + rows.rival_logp_N.exp(), label_logp_N.exp() + rival_logp_N.exp()
    actual_N = after_N - before_N
    assert len(label_N) > 15 and product / (square * change).sqrt() > 0.8
    assert spearman(predicted_N, actual_N) > 0.9
    assert (predicted_N @ actual_N / predicted_N.square().sum()).item() == pytest.approx(1, abs=0.2)


class ActualDrain(TrainerCallback):
    """Predicted and actual drained mass of the rejected tokens of the first step, with the kappa of that very step."""

    def __init__(self, trainer):
        self.trainer, self.guard = trainer, guard_of(trainer)

    def _logits(self) -> torch.Tensor:
        with torch.no_grad():
            logits = self.trainer.model(**self.forward.model_inputs).logits[:, :-1].double()
        return logits[self.forward.rejected_mask_BT]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.forward, self.unit_N = self.guard._pushed.forward, self.guard._pushed.unit_N.double()
        self.before_NV = self._logits()

    def on_step_end(self, args, state, control, **kwargs):
        after_NV = self._logits()
        label_N = self.forward.model_inputs["input_ids"][:, 1:][self.forward.rejected_mask_BT]
        named_N2 = torch.stack([label_N, squeeze.rival(self.before_NV, label_N)], dim=-1)
        named = [logits_NV.softmax(-1).gather(1, named_N2).sum(-1) for logits_NV in (self.before_NV, after_NV)]
        self.actual_N = named[1] - named[0]
        self.predicted_N = squeeze.drained_mass(self.before_NV, label_N, -self.guard.kappa * self.unit_N)


def test_after_a_real_step_on_a_batch_the_prediction_is_right_in_scale_and_weak_in_rank(tmp_path):
    """Tokens of a batch move each other's logits as well, which no push of a token on itself can tell."""
    args = trl_dynamics.DPOConfig(
        output_dir=str(tmp_path),
        squeeze_guard=1.0,
        max_steps=1,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    models = [AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32) for _ in range(2)]
    data = Dataset.from_list(preference_rows(32))
    trainer = trl_dynamics.DPOTrainer(*models, args, train_dataset=data, processing_class=tokenizer)
    trainer.callback_handler.callbacks.append(drain := ActualDrain(trainer))
    trainer.train()
    scale = (drain.predicted_N @ drain.actual_N) / drain.predicted_N.square().sum()
    assert len(drain.actual_N) > 100
    assert spearman(drain.predicted_N, drain.actual_N) > 0.4
    assert 0.4 < scale < 2.5 and 0.4 < drain.actual_N.mean() / drain.predicted_N.mean() < 2.5
