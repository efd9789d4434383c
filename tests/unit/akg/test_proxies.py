"""The cheap forms against loops in float64, and where each is exact."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, OPTConfig

from akg_models import adapted, batch_of, language_model, padded, sequence_classifier, texts_of
from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.proxies import FORMS, agreement, blocks, head_only, mean_features
from trl_dynamics.akg.task import causal_lm, classifier, label_logp

# Few kinds of tokens, so that some are shared.
UPDATE, OBSERVE = (batch_of(num, 7, num, num_labels=4, vocabulary=12) for num in (3, 2))
WEIGHT = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5, -1.0, 0.7, 0.2, 0.9], dtype=torch.float64)
CONFIGS = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}),
    ("gpt_neox", {}),
    ("gemma2", {"final_logit_softcapping": 5.0}),
]


def of_head(model, batch, row: int) -> torch.Tensor:
    """The gradient of a row's ln pi by the weight of a head that shares nothing with the rest, by autograd."""
    weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
    with torch.no_grad():
        hidden_TD = model.base_model(input_ids=batch["input_ids"][[row]]).last_hidden_state[0]
    logits_TV, cap = hidden_TD @ weight.T, getattr(model.config, "final_logit_softcapping", None)
    logits_TV = logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)
    logp = -F.cross_entropy(logits_TV[:-1], batch["labels"][row, 1:], reduction="sum")
    return torch.autograd.grad(logp, weight)[0]


@pytest.mark.parametrize("family, options", CONFIGS)
def test_the_head_form_is_the_product_of_the_heads_own_gradients(family, options):
    model = language_model(family, **options)
    rows = [[of_head(model, batch, row) for row in range(len(batch["labels"]))] for batch in (OBSERVE, UPDATE)]
    expected = torch.stack([torch.stack([-(one * other).sum() for other in rows[1]]) for one in rows[0]])
    torch.testing.assert_close(head_only(model, UPDATE, OBSERVE), expected, rtol=1e-10, atol=1e-12)


def test_the_head_form_is_exact_for_a_step_of_an_untied_head_alone():
    model = language_model(tie_word_embeddings=False)
    model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    task = causal_lm(model)
    found_OU = head_only(task, UPDATE, OBSERVE)
    torch.testing.assert_close(found_OU, gram(task, UPDATE, OBSERVE).total_OU, rtol=1e-10, atol=1e-12)
    before_N, weight = label_logp(task, OBSERVE), model.lm_head.weight
    errors = []
    for rate in (1e-3, 1e-4, 1e-5):
        for row in range(3):
            kept = copy.deepcopy(weight.data)
            logits = torch.cat(list(task.logits(model, {k: v[[row]] for k, v in UPDATE.items()})))
            label_n = task.labels({k: v[[row]] for k, v in UPDATE.items()})
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label_n, reduction="sum"), weight)
            weight.data -= rate * gradient
            moved_N = label_logp(task, OBSERVE) - before_N
            weight.data = kept
            true_O = torch.zeros(2, dtype=torch.float64).index_add(0, task.items(OBSERVE), moved_N)
            errors.append(float((true_O + rate * found_OU[:, row]).norm() / true_O.norm()))
    for small, large in zip(errors[3:], errors[:-3], strict=True):
        assert small < 0.15 * large  # what is left is of second order
    assert errors[-1] < 1e-3


def test_the_head_form_leaves_out_what_a_tied_head_does_as_an_embedding():
    model = language_model(tie_word_embeddings=True)
    whole = gram(model, UPDATE, OBSERVE, by="module").module_OU["model.embed_tokens+lm_head"]
    assert torch.linalg.vector_norm(head_only(model, UPDATE, OBSERVE) - whole) > 0.05 * torch.linalg.vector_norm(whole)


@pytest.mark.parametrize("form", [head_only, blocks])
def test_weights_count_labels_as_those_of_gram_do(form):
    model = language_model()
    ones = [form(model, UPDATE, OBSERVE, torch.eye(9, dtype=torch.float64)[m]) for m in range(9)]
    expected = sum(float(weight) * one for weight, one in zip(WEIGHT, ones, strict=True))
    torch.testing.assert_close(form(model, UPDATE, OBSERVE, WEIGHT), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(form(model, UPDATE, OBSERVE), sum(ones), rtol=1e-10, atol=1e-12)


NORMS = dict.fromkeys(("llama", "gpt_neox"), ("input_layernorm", "post_attention_layernorm"))
NORMS["gemma2"] = ("input_layernorm", "pre_feedforward_layernorm")


def positions(model, batch, norms: tuple[str, ...]) -> list[dict]:
    """Every labelled position of a batch: all that the formula of CH2 reads, from the norms' outputs."""
    seen, head = [], model.get_output_embeddings().weight
    layers = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    hooks = [
        getattr(layer, norm).register_forward_hook(lambda module, args, output: seen.append(output))
        for layer in layers
        for norm in norms
    ]
    with torch.no_grad():
        hidden_BTD = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
    for hook in hooks:
        hook.remove()
    found = []
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        logits_V = (head @ hidden_BTD[row, column]).requires_grad_()
        cap = getattr(model.config, "final_logit_softcapping", None)
        out_V = logits_V if cap is None else cap * torch.tanh(logits_V / cap)
        (error_V,) = torch.autograd.grad(out_V.log_softmax(-1)[batch["labels"][row, column + 1]], logits_V)
        place = {"row": row, "token": int(batch["input_ids"][row, column]), "h": hidden_BTD[row, column]}
        found.append(place | {"e": error_V, "f": head.detach().T @ error_V, "a": [a[row, column] for a in seen]})
    return found


@pytest.mark.parametrize("family, options", CONFIGS)
def test_the_form_of_blocks_is_its_formula_position_by_position(family, options):
    model = language_model(family, **options)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for one in positions(model, OBSERVE, NORMS[family]):
        for other in positions(model, UPDATE, NORMS[family]):
            alike = sum(x @ y for x, y in zip(one["a"], other["a"], strict=True)) + (one["token"] == other["token"])
            value = (one["e"] @ other["e"]) * (one["h"] @ other["h"]) + (one["f"] @ other["f"]) * alike
            expected[one["row"], other["row"]] -= value
    torch.testing.assert_close(blocks(model, UPDATE, OBSERVE), expected, rtol=1e-9, atol=1e-11)


def test_the_mlp_of_opt_reads_rows_and_columns_as_one_axis_and_counts():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=260, num_attention_heads=2, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    layers = model.model.decoder.layers
    norms = [norm for layer in layers for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)]
    head_TV = model.get_output_embeddings().weight.detach()

    def side(batch):
        seen, keep = [], lambda module, args, output: seen.append(output.view(*batch["input_ids"].shape, -1))
        hooks = [norm.register_forward_hook(keep) for norm in norms]
        with torch.no_grad():
            hidden_BTD = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
        for hook in hooks:
            hook.remove()
        place = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        hidden_ND, label_N = hidden_BTD[place], batch["labels"][:, 1:][place]
        error_NV = F.one_hot(label_N, 260) - (hidden_ND @ head_TV.T).softmax(-1)
        read_NS = torch.cat([value[place] for value in seen], dim=1)
        return place[0], batch["input_ids"][place], hidden_ND, error_NV, error_NV @ head_TV, read_NS

    (row, token, h, e, f, a), (row_u, token_u, h_u, e_u, f_u, a_u) = side(OBSERVE), side(UPDATE)
    alike_NM = a @ a_u.T + (token[:, None] == token_u)
    product_NM = (e @ e_u.T) * (h @ h_u.T) + (f @ f_u.T) * alike_NM
    expected = torch.zeros(2, 3, dtype=torch.float64).index_put_((row[:, None], row_u[None]), -product_NM, True)
    torch.testing.assert_close(blocks(model, UPDATE, OBSERVE), expected, rtol=1e-9, atol=1e-11)


def test_mean_features_are_means_over_labels():
    model = language_model()
    means = []
    for batch in (OBSERVE, UPDATE):
        with torch.no_grad():
            hidden_BTD = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
        rows = [hidden[:-1][label[1:] != -100] for hidden, label in zip(hidden_BTD, batch["labels"], strict=True)]
        means.append(torch.stack([row.mean(dim=0) for row in rows]))
    torch.testing.assert_close(mean_features(model, UPDATE, OBSERVE), -means[0] @ means[1].T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_forms_see_neither_padding_nor_tiles_nor_the_order_of_rows(name, monkeypatch):
    model = language_model()
    plain = FORMS[name](model, UPDATE, OBSERVE)
    turned = {key: value.flip(0) for key, value in padded(UPDATE, 2, 3).items()}
    torch.testing.assert_close(FORMS[name](model, turned, OBSERVE).flip(1), plain, rtol=1e-9, atol=1e-11)
    monkeypatch.setattr("trl_dynamics.akg.task.TILE_ELEMENTS", 2 * model.config.vocab_size)
    torch.testing.assert_close(FORMS[name](model, UPDATE, OBSERVE), plain, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)
        self.double()

    def forward(self, rows):
        return self.head(self.body(rows))


def test_a_classifiers_head_with_its_bias_is_exact():
    model = Network()
    model.body.requires_grad_(False)
    task = classifier(model, head=model.head)
    rng = torch.Generator().manual_seed(0)
    sides = [(torch.randn(n, 4, generator=rng, dtype=torch.float64), torch.arange(n) % 3) for n in (4, 5)]
    torch.testing.assert_close(head_only(task, *sides), gram(task, *sides).total_OU, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_transformers_classifiers_heads_are_exact(family):
    """BERT pools before its head; Llama's head reads every position, of which one counts."""
    model = sequence_classifier(family)
    head = model.classifier if family == "bert" else model.score
    model.requires_grad_(False)
    head.requires_grad_(True)
    task, batch, gradients = classifier(model, head=head), texts_of(3, 7, 0), []
    for row in range(3):
        one = {name: value[[row]] for name, value in batch.items()}
        logp = next(task.logits(model, one)).log_softmax(-1)[0, batch["labels"][row]]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, list(head.parameters()))]))
    expected = -torch.stack(gradients) @ torch.stack(gradients).T
    torch.testing.assert_close(head_only(task, batch, batch), expected, rtol=1e-6, atol=1e-9)


def test_agreement_is_over_all_pairs_with_both_sides_drawn_again():
    rng = torch.Generator().manual_seed(0)
    exact_OU = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    near_OU = exact_OU + 0.1 * torch.randn(6, 5, generator=rng, dtype=torch.float64)
    found = agreement({"itself": exact_OU, "near": near_OU, "turned": -exact_OU.exp()}, exact_OU)
    assert found["itself"].value == found["itself"].low == 1 and found["turned"].value == -1
    assert 0.9 < found["near"].low < found["near"].value < 1 and found["near"].num_pairs == 30


class Twice(Network):
    def forward(self, rows):
        return self.head(self.body(rows)) + self.head(self.body(-rows))


def test_what_has_no_form_is_told():
    rows, model = (torch.ones(1, 4).double(), torch.tensor([0])), Network()
    with pytest.raises(ValueError, match="head is none"):
        head_only(classifier(model), rows, rows)
    with pytest.raises(ValueError, match="head is a torch.nn.modules.container.Sequential"):
        head_only(classifier(model, head=model.body), rows, rows)
    with pytest.raises(ValueError, match="use head_only"):
        blocks(classifier(model, head=model.head), rows, rows)
    with pytest.raises(ValueError, match="for 1 labels, expected one tensor"):
        twice = Twice()
        head_only(classifier(twice, head=twice.head), rows, rows)


def test_an_adapter_on_the_head_is_told_and_goes_through_once_it_is_merged():
    model = adapted()
    with pytest.raises(ValueError, match=r"head is a peft\.tuners\.lora\.layer\.Linear.*merge_and_unload"):
        head_only(model, UPDATE, OBSERVE)
    assert head_only(model.merge_and_unload(), UPDATE, OBSERVE).shape == (2, 3)


def test_blocks_without_an_attention_and_an_mlp_are_told():
    config = MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(ValueError, match="of block 0, 1 of its modules were seen.*use head_only"):
        blocks(AutoModelForCausalLM.from_config(config), UPDATE, OBSERVE)
