"""Interventions and the gauge in real DPO steps, against a slow float64 reference from plain logits."""

import copy

import pytest
import torch
from transformers import TrainerCallback

import dpo_reference
from tiny import tiny_model
from tiny_runs import PROBES, make_trainer
from trl_dynamics.trainers.squeeze.recording import TokenForward

BASE = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "dropout": 0.0, "logging_steps": 1}
ONCE = {"per_device_train_batch_size": 3, "gradient_checkpointing": False}
TWICE = {"gradient_accumulation_steps": 2}


class Watched:
    """Trains with a learning rate of 0 and keeps the batches, losses and gradients of the last optimiser step."""

    def __init__(self, output_dir, *, weigher=None, **options):
        self.trainer = trainer = make_trainer("dpo", output_dir, dtype=torch.float64, **(BASE | ONCE | options))
        if weigher is not None:
            trainer._squeeze_loss.weighers.append(weigher)
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            # Away from the reference, or every log-ratio is 0.
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += 0.05 * noise
        self.batches, self.losses, self.gradients, self.factor = [], [], {}, None
        compute, watched = trainer.compute_loss, self

        def compute_loss(model, inputs, **kwargs):
            watched.batches.append(copy.deepcopy(inputs))
            watched.losses.append(compute(model, inputs, **kwargs))
            return watched.losses[-1]

        class KeepGradients(TrainerCallback):
            def on_pre_optimizer_step(self, *args, **kwargs):
                named = trainer.model.named_parameters()
                watched.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

        trainer.compute_loss = compute_loss
        trainer.add_callback(KeepGradients())
        trainer.train()
        self.log = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)

    def reference(self, inputs: dict) -> list[torch.Tensor]:
        with torch.no_grad():
            if hasattr(self.trainer.model, "disable_adapter"):
                with self.trainer.model.disable_adapter():
                    return [answer.logp for answer in dpo_reference.answers(self.trainer.model, inputs)]
            return [answer.logp for answer in dpo_reference.answers(tiny_model().double(), inputs)]


CASES = {
    "gate_token": {"gate_dpo": "token", "gate_alpha": 50.0, "gate_tau": 0.01},
    "gate_sequence": {"gate_dpo": "sequence", "gate_alpha": 200.0, "gate_tau": 0.005},
    "gate_q10": {"gate_dpo": "q10", "gate_alpha": 2000.0, "gate_tau": 1e-4},
    "gate_ipo_accumulated": {"gate_dpo": "token", "gate_alpha": 50.0, "loss_type": ["ipo"], **TWICE},
    "dpop": {"dpop_lambda": 50.0, "beta": 0.02},
    "dpop_accumulated": {"dpop_lambda": 5.0, **TWICE},
    "dpop_lora": {"dpop_lambda": 5.0, "lora": True},
    "dpop_precomputed": {"dpop_lambda": 5.0, "precompute_ref_log_probs": True},
    "dpo_shift": {"dpo_shift": 0.75},
    "dpo_shift_scheduled": {"dpo_shift": 1.0, "dpo_shift_end": 0.5, "max_steps": 2},
    "dpo_shift_lora_gate": {"dpo_shift": 0.5, "lora": True, "gate_dpo": "token", "gate_alpha": 50.0},
    "dpo_shift_precomputed": {"dpo_shift": 0.5, "precompute_ref_log_probs": True, "gauge_every": 1},
    "dpop_and_dpo_shift": {"dpop_lambda": 5.0, "dpo_shift": 0.5, "gauge_every": 1},
    "cal_dpo": {"cal_dpo": 1.0},
    "cal_dpo_lora": {"cal_dpo": 0.5, "lora": True, "gauge_every": 1},
    "cal_dpo_precomputed_gate": {"cal_dpo": 0.5, "precompute_ref_log_probs": True, "gate_dpo": "sequence"},
    "dpop_beside_sft": {"dpop_lambda": 5.0, "loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 0.7]},
    "dpop_ld_dpo": {"dpop_lambda": 5.0, "ld_alpha": 0.5},
    "checkpointed": {"dpop_lambda": 5.0, "gate_dpo": "token", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_slow_reference(name, tmp_path):
    options = CASES[name]
    watched = Watched(tmp_path, **options)
    model, last = watched.trainer.model, options.get("gradient_accumulation_steps", 1)
    start, end, steps = options.get("dpo_shift", 1.0), options.get("dpo_shift_end"), options.get("max_steps", 1)
    factor = start if end is None else start + (end - start) * (steps - 1) / steps
    parameters = dict((n, p) for n, p in model.named_parameters() if p.requires_grad)
    expected = dict.fromkeys(parameters, 0.0)
    for inputs, got in zip(watched.batches[-last:], watched.losses[-last:], strict=True):
        rows = [answer.logp for answer in dpo_reference.answers(model, inputs)]
        slow = dpo_reference.loss(rows, watched.reference(inputs), options, factor)
        assert got.item() == pytest.approx(slow.item(), rel=1e-5)
        gradients = torch.autograd.grad(slow / last, list(parameters.values()))
        expected = {n: expected[n] + g for n, g in zip(parameters, gradients, strict=True)}
    for parameter, gradient in expected.items():
        error = (watched.gradients[parameter] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (parameter, error)


PLAIN = ("loss", "rewards/margins", "logps/chosen", "entropy")


@pytest.mark.parametrize("options", [{"dpop_lambda": 0.0}, {"dpo_shift": 1.0}, {"dpop_lambda": 0.0, "dpo_shift": 1.0}])
def test_without_strength_a_pair_loss_is_dpos(options, tmp_path):
    plain, ours = Watched(tmp_path / "plain", gauge_every=0), Watched(tmp_path / "ours", **options)
    assert {key: ours.log[key] for key in PLAIN} == pytest.approx({key: plain.log[key] for key in PLAIN}, rel=1e-6)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient)


def test_what_trl_logs_stays_that_of_the_unmodified_quantities(tmp_path):
    plain = Watched(tmp_path / "plain", gauge_every=0)
    ours = Watched(tmp_path / "ours", cal_dpo=1.0, gate_dpo="token", gauge_every=1)
    logged = [key for key in plain.log if key.startswith(("rewards/", "logps/", "logits/", "entropy", "mean_token"))]
    assert len(logged) >= 9 and ours.log["loss"] != plain.log["loss"]
    assert [ours.log[key] for key in logged] == [plain.log[key] for key in logged]


GAUGED = {
    "plain": {},
    "accumulated": TWICE | {"per_device_train_batch_size": 2},
    "lora": {"lora": True},
    "sft_beside_sigmoid": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "ipo_and_valley": {"loss_type": ["ipo"], "gauge_valley_prob": 0.1},
    "dpop_and_gate": {"dpop_lambda": 5.0, "gate_dpo": "token"},
}


@pytest.mark.parametrize("name", GAUGED)
def test_the_gauge_is_the_slow_references(name, tmp_path):
    """Micro-batches of the same number of tokens per side would hide a mean of means; these differ."""
    options = GAUGED[name]
    watched = Watched(tmp_path, gauge_every=1, **options)
    batches = watched.batches[-options.get("gradient_accumulation_steps", 1) :]
    rows, gradients = [[], []], [[], []]
    for inputs in batches:
        found = dpo_reference.answers(watched.trainer.model, inputs)
        # Gates are no part of the energy: it is that of the loss.
        ungated = options | {"gate_dpo": None}
        logps = [answer.logp for answer in found]
        slow = dpo_reference.loss(logps, watched.reference(inputs), ungated, 1.0)
        own = torch.autograd.grad(slow, logps)
        for side in (0, 1):
            half = slice(side * len(found) // 2, (side + 1) * len(found) // 2)
            rows[side] += found[half]
            # As if all pairs of the step were one batch with a mean loss.
            gradients[side] += [gradient / len(batches) for gradient in own[half]]
    expected = dpo_reference.risk(rows[0] + rows[1], gradients[0] + gradients[1], len(rows[0]), 0.01)
    if "gauge_valley_prob" in options:
        valley = dpo_reference.risk(rows[0] + rows[1], gradients[0] + gradients[1], len(rows[0]), 0.1)
        assert valley["squeeze_risk/rejected/valley_share"] != expected["squeeze_risk/rejected/valley_share"]
        expected = valley
    got = {key: value for key, value in watched.log.items() if key.startswith("squeeze_risk/")}
    kept = got.pop("squeeze_risk/rejected/kept", None)
    assert got == pytest.approx(expected, rel=1e-4)
    assert (kept is not None) == ("gate_dpo" in options)


def test_in_dpo_the_energy_is_beta_times_one_minus_a(tmp_path):
    watched = Watched(tmp_path, gauge_every=1, beta=0.3)
    inputs = watched.batches[-1]
    policy = [answer.logp.sum().item() for answer in dpo_reference.answers(watched.trainer.model, inputs)]
    margins = torch.tensor(policy) - torch.tensor([row.sum().item() for row in watched.reference(inputs)])
    chosen, rejected = margins.chunk(2)
    expected = (0.3 * (1 - torch.sigmoid(0.3 * (chosen - rejected)))).mean().item()
    for side in ("chosen", "rejected"):
        assert watched.log[f"squeeze_risk/{side}/energy"] == pytest.approx(expected, rel=1e-5)


class Half:
    """A weigher that observes, and halves the gradient of rejected tokens."""

    observes_tokens = True

    def __init__(self):
        self.observed, self.gradients, self.forwards = [], [], []

    def observe(self, hidden_ND, head, target_N):
        assert not torch.is_grad_enabled() and not hidden_ND.requires_grad
        self.observed.append((head.logits(hidden_ND).log_softmax(-1), target_N))

    def weights(self, gradient_BT: torch.Tensor, forward: TokenForward) -> torch.Tensor:
        self.gradients.append(gradient_BT)
        self.forwards.append(forward)
        return torch.ones_like(gradient_BT).masked_fill(forward.rejected_mask_BT, 0.5)


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_weigher_sees_the_rejected_tokens_and_the_exact_gradient(options, tmp_path):
    half = Half()
    gate = {"gate_dpo": "token", "gate_alpha": 50.0, "gate_tau": 0.01}
    watched = Watched(tmp_path, weigher=half, gauge_every=1, **gate, **TWICE, **options)
    assert len(half.observed) == len(half.gradients) == len(watched.batches) == 2
    for inputs, (logp_NV, target_N), gradient_BT, forward in zip(
        watched.batches, half.observed, half.gradients, half.forwards, strict=True
    ):
        rows = dpo_reference.answers(watched.trainer.model, inputs)
        logps = [answer.logp for answer in rows]
        num_pairs = len(rows) // 2
        assert (forward.num_pairs, forward.num_accumulated) == (num_pairs, 2)
        # `out_BT[forward.rejected_mask_BT] = values_N` puts what was observed in its place.
        seen_N = logp_NV.gather(1, target_N[:, None])[:, 0]
        torch.testing.assert_close(seen_N.double(), torch.cat(logps[num_pairs:]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            forward.logp_BT[forward.rejected_mask_BT], seen_N.to(forward.logp_BT), atol=1e-5, rtol=0
        )
        # What the gate before it left of the loss' gradient, whatever accumulation divides by.
        slow = dpo_reference.loss(logps, watched.reference(inputs), gate, 1.0)
        expected = torch.cat(torch.autograd.grad(slow, logps))
        torch.testing.assert_close(gradient_BT[forward.mask_BT].double(), expected, rtol=1e-4, atol=1e-9)
    # The gauge accounts for both weights.
    alone = Watched(tmp_path / "gate", gauge_every=1, **gate, **TWICE, **options)
    kept = "squeeze_risk/rejected/kept"
    assert watched.log[kept] == pytest.approx(0.5 * alone.log[kept], rel=1e-5)


@pytest.mark.parametrize(("every", "measured"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4]), (0, []), (None, [])])
def test_the_gauge_measures_every_so_many_steps_and_the_first(every, measured, tmp_path):
    trainer = make_trainer("dpo", tmp_path, max_steps=5, logging_steps=1, gauge_every=every)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line["step"] for line in lines if "squeeze_risk/rejected/energy" in line] == measured


def test_evaluation_is_not_measured_and_its_loss_is_the_trained_one(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "gauge_every": 1, "logging_steps": 1}
    lines = {}
    for name, extra in {"dpo": {}, "cal": {"cal_dpo": 1.0}, "gate": {"gate_dpo": "token"}}.items():
        trainer = make_trainer("dpo", tmp_path / name, dropout=0.0, learning_rate=0.0, **options, **extra)
        trainer.train()
        lines[name] = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        assert not [key for key in lines[name] if "squeeze_risk" in key]
    # At the reference: ln 2 plus two squares of 1 / (2 beta) = 5.
    assert lines["dpo"]["eval_loss"] == lines["gate"]["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert lines["cal"]["eval_loss"] == pytest.approx(50.693147, abs=1e-3)


def test_a_second_trainer_on_the_same_model_works(tmp_path):
    """TRL puts a head over the one of the first trainer, and ours must follow."""
    shared = tiny_model()
    for name in ("first", "second"):
        models = iter([shared, tiny_model()])
        trainer = make_trainer(
            "dpo", tmp_path / name, make_model=lambda *a, i=models, **k: next(i), max_steps=2, probes=PROBES
        )
        trainer.train()
        assert trainer.model is shared
        assert shared(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 260)


REFUSED = [
    ({"cal_dpo": 1.0, "dpop_lambda": 5.0}, "dpop_lambda and cal_dpo are different losses"),
    ({"cal_dpo": 1.0, "dpo_shift": 0.5}, "dpo_shift and cal_dpo are different losses"),
    ({"dpop_lambda": 5.0, "loss_type": ["ipo"]}, r"dpop_lambda takes the place of the sigmoid loss"),
    ({"dpo_shift": 0.5, "loss_type": ["sigmoid", "sigmoid"]}, "must name once"),
    ({"cal_dpo": 1.0, "use_weighting": True}, "cal_dpo cannot be combined with use_weighting"),
    ({"dpop_lambda": 1.0, "f_divergence_type": "js_divergence"}, "f_divergence_type is 'js_divergence'"),
    ({"dpo_shift_end": 0.5}, "dpo_shift_end is 0.5, expected a factor from 0 to 1 together with dpo_shift"),
    ({"dpo_shift": 1.5}, "dpo_shift is 1.5"),
    ({"dpop_lambda": -1.0}, "dpop_lambda is -1.0"),
    ({"cal_dpo": 0.0}, "cal_dpo is 0.0"),
    ({"gate_dpo": "median"}, "gate_dpo is 'median'"),
    ({"gate_alpha": 0.0}, "gate_alpha is 0.0"),
    ({"gate_tau": 2.0}, "gate_tau is 2.0"),
    ({"gauge_every": -1}, "gauge_every is -1"),
    ({"gauge_valley_prob": 0.0}, "gauge_valley_prob is 0.0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_go_together_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer("dpo", tmp_path, **options)
