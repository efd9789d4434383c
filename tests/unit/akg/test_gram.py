"""Inner products of gradients against gradients that are stored, their splits, tiles, and what must not matter."""

import copy
import weakref

import pytest
import torch
from torch import nn

from akg_models import (
    adapted,
    batch_of,
    error,
    language_model,
    padded,
    sequence_classifier,
    small_classifier,
    texts_of,
)
from memory_peak import most_alive
from tiny import tiny_model
from trl_dynamics.akg import losses
from trl_dynamics.akg.gram import estimate, gram, journal, loss_weights, pairs, plan, tiles, uses
from trl_dynamics.akg.one_step import influence
from trl_dynamics.akg.task import Task, causal_lm, classifier, num_rows, rows_of
from true_float64 import true_float64


def stored(task: Task, batch, weight_N=None) -> list[dict[str, torch.Tensor]]:
    """For every row the gradient of sum weight ln pi(label), as autograd has it, one backward each."""
    logits_NV = torch.cat(list(task.logits(task.model, batch)))
    label_N, item_N = task.labels(batch), task.items(batch)
    logp_N = logits_NV.log_softmax(dim=-1).gather(1, label_N[:, None])[:, 0]
    logp_N = logp_N if weight_N is None else logp_N * weight_N
    names = task.trainable()
    rows = []
    for row in range(num_rows(batch)):
        score = logp_N[item_N == row].sum()
        found = torch.autograd.grad(score, list(names.values()), retain_graph=True, allow_unused=True)
        rows.append({n: torch.zeros_like(names[n]) if g is None else g for n, g in zip(names, found, strict=True)})
    return rows


def products(task: Task, update, observe, weight_M=None, diagonal=None) -> torch.Tensor:
    def matrix(rows, scale=None):
        return torch.stack([torch.cat([(g * scale[n] if scale else g).flatten() for n, g in r.items()]) for r in rows])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return matrix(stored(task, observe)) @ -matrix(stored(task, update, weight_M), diagonal).T


LANGUAGE_MODELS = {
    "llama": language_model,
    "qwen3": lambda: language_model("qwen3"),
    "gpt_neox": lambda: language_model("gpt_neox"),
    "gpt2": lambda: language_model("gpt2"),
    "gemma2": lambda: language_model("gemma2"),
    "gemma3, tied": lambda: language_model("gemma3", tie_word_embeddings=True),
    "llama, tied": lambda: language_model(tie_word_embeddings=True),
    "lora": adapted,
}


class Net(nn.Module):
    """Convolutions, group norm, a layer called twice, a parameter of its own, activations in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, image):
        hidden = torch.relu_(self.conv(image))
        hidden = torch.relu_(self.mix(torch.relu_(self.mix(self.norm(hidden))))).mean(dim=(2, 3))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))) * self.scale)


def classifiers():
    rng = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 3, 1, 4, 2, 1, 0])
    rows = torch.randn(7, 6, generator=rng, dtype=torch.float64)
    yield classifier(small_classifier()), (rows[:4], labels[:4]), (rows[4:], labels[4:])
    torch.manual_seed(0)
    images = torch.randn(7, 1, 6, 6, generator=rng, dtype=torch.float64)
    yield classifier(Net().double()), (images[:4], labels[:4]), (images[4:], labels[4:])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_they_are_those_of_stored_gradients(name):
    task, update, observe = causal_lm(LANGUAGE_MODELS[name]()), batch_of(3, 8, 0), batch_of(4, 7, 1)
    true = products(task, update, observe)
    assert error(gram(task, update, observe, check=False).total_OU, true) < 1e-12


@pytest.mark.parametrize("index", [0, 1], ids=["mlp", "cnn"])
def test_classifiers_too(index):
    task, update, observe = list(classifiers())[index]
    assert error(gram(task, update, observe, check=False).total_OU, products(task, update, observe)) < 1e-12


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "cnn"])
def test_how_many_rows_run_together_does_not_matter(name, rows, monkeypatch):
    if name == "cnn":
        task, update, observe = list(classifiers())[1]
    else:
        task, update, observe = causal_lm(LANGUAGE_MODELS[name]()), batch_of(4, 8, 0), batch_of(5, 7, 1)
        update["labels"] = update["input_ids"].clone()
    for module in (tiles, plan):
        monkeypatch.setattr(module, "rows_at_once", lambda batch: rows)
    assert error(gram(task, update, observe).total_OU, products(task, update, observe)) < 1e-12


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_with_one_label_per_text_too(family):
    task, update, observe = classifier(sequence_classifier(family)), texts_of(2, 6, 0), texts_of(3, 5, 1)
    assert error(gram(task, update, observe).total_OU, products(task, update, observe)) < 1e-12


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_comparing_positions_and_forming_gradients_agree(name, forced, monkeypatch):
    task, update, observe = (
        next(classifiers())
        if name == "mlp"
        else (causal_lm(language_model("gpt2")), batch_of(3, 8, 0), batch_of(4, 7, 1))
    )
    true = products(task, update, observe)

    def choice(observe, update, shape):
        return forced and all(isinstance(use, uses.Outer) for use in (*observe, *update))

    monkeypatch.setattr(pairs, "compares_positions", choice)
    monkeypatch.setattr(pairs, "BLOCK_BYTES", 1000)
    assert error(gram(task, update, observe).total_OU, true) < 1e-12


@pytest.mark.parametrize("name", ["tied head", "layer called twice"])
def test_without_the_terms_between_two_uses_of_a_parameter_they_are_wrong(name, monkeypatch):
    if name == "tied head":
        model = language_model(tie_word_embeddings=True)
        # Few kinds of tokens, so that in the pair that is checked, too, one row looks up what the other predicts.
        sides = batch_of(3, 8, 0, vocabulary=12), batch_of(4, 7, 1, vocabulary=12)
        task, update, observe = causal_lm(model), *sides
    else:
        task, update, observe = list(classifiers())[1]
    true = products(task, update, observe)
    whole = tiles.inner_products

    def apart(observe, update, *options):
        pairs = zip(sorted(observe, key=by_kind), sorted(update, key=by_kind), strict=True)
        return sum(whole([one], [other], *options) for one, other in pairs)

    def by_kind(use):
        return type(use).__name__

    monkeypatch.setattr(tiles, "inner_products", apart)
    assert error(gram(task, update, observe, check=False).total_OU, true) > 0.01
    with pytest.raises(ValueError, match="by both gradients"):
        gram(task, update, observe)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "lora"])
def test_modules_add_up_and_each_is_its_own_gradients_product(name):
    task, update, observe = causal_lm(LANGUAGE_MODELS[name]()), batch_of(3, 8, 0), batch_of(4, 7, 1)
    found = gram(task, update, observe, by="module")
    true = products(task, update, observe)
    assert error(found.total_OU, true) < 1e-12 and error(sum(found.module_OU.values()), true) < 1e-12
    gradients = stored(task, update), stored(task, observe)
    for key, module_OU in found.module_OU.items():
        own = {n for n in task.trainable() if n.rpartition(".")[0] in key.split("+")}
        update_UP, observe_OP = (
            torch.stack([torch.cat([g[n].flatten() for n in own]) for g in side]) for side in gradients
        )
        assert error(module_OU, -observe_OP @ update_UP.T) < 1e-11, key
    assert ("model.embed_tokens+lm_head" in found.module_OU) == (name == "llama, tied")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_positions_add_up(name):
    # Gemma 2's own attention makes nan of a column that sees nothing.
    task, left = causal_lm(LANGUAGE_MODELS[name]()), 0 if name == "gemma2" else 2
    update = padded(batch_of(3, 9, 0), left, 4 - left)
    observe = batch_of(4, 7, 1)
    observe["labels"][1, -2:] = -100
    found = gram(task, update, observe, by="position")
    assert error(found.position_OTUS.sum(dim=(1, 3)), products(task, update, observe)) < 1e-12
    assert found.position_OTUS.shape == (4, 7, 3, 13)
    real = found.position_OTUS[:, :, :, left : left + 8]  # the last token predicts nothing
    assert found.position_OTUS.count_nonzero() == real.count_nonzero() and not found.position_OTUS[1, 4:].any()
    assert all(found.position_OTUS[1, t].any() for t in range(3))


def only(model: nn.Module, *endings: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings))
    return model


def logp_of(model: nn.Module, batch, row: int, **inputs) -> torch.Tensor:
    inputs = inputs or {"input_ids": batch["input_ids"][row : row + 1]}
    logp_TV = model(**inputs).logits[0, :-1].log_softmax(dim=-1)
    label_T = batch["labels"][row, 1:]
    return logp_TV[label_T != -100].gather(1, label_T[label_T != -100, None]).sum()


def test_positions_of_the_embedding_are_those_of_the_inputs_gradient():
    model = only(language_model(), "embed_tokens.weight")
    update, observe = batch_of(2, 8, 0), batch_of(2, 7, 1)
    update["input_ids"] %= 5
    observe["input_ids"] %= 5

    def gradient_BTD(batch):
        rows = []
        for row in range(2):
            hidden_1TD = model.model.embed_tokens(batch["input_ids"][row : row + 1]).detach().requires_grad_()
            rows += torch.autograd.grad(logp_of(model, batch, row, inputs_embeds=hidden_1TD), hidden_1TD)
        return torch.cat(rows)

    same = observe["input_ids"][:, :, None, None] == update["input_ids"][None, None]
    true = -1 * same * torch.einsum("otd,usd->otus", gradient_BTD(observe), gradient_BTD(update))
    assert error(gram(model, update, observe, by="position").position_OTUS, true) < 1e-9


@pytest.mark.parametrize(
    ("family", "ending", "ones"),
    [("llama", "0.input_layernorm.weight", (1, 1)), ("qwen3", "1.self_attn.q_norm.weight", (1, 1, 1))],
)
def test_positions_of_a_norm_are_those_of_a_weight_for_each_column(family, ending, ones):
    model = only(tiny_model(family, initializer_range=0.15).double(), ending)
    update, observe = batch_of(2, 8, 0), batch_of(2, 7, 1)
    (name,) = causal_lm(model).trainable()

    def gradient_BTD(batch):
        rows = []
        for row in range(2):
            weight = (
                model.get_parameter(name)
                .detach()
                .repeat(1, batch["input_ids"].shape[1], *ones[2:], 1)
                .requires_grad_()
            )

            class Call(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.model = model

                def forward(self, row=row):
                    return logp_of(self.model, batch, row)

            logp = torch.func.functional_call(Call(), {f"model.{name}": weight}, ())
            rows.append(torch.autograd.grad(logp, weight)[0].flatten(2))
        return torch.cat(rows)

    true = -torch.einsum("otd,usd->otus", gradient_BTD(observe), gradient_BTD(update))
    assert error(gram(model, update, observe, by="position").position_OTUS, true) < 1e-5  # norms round to float32


@pytest.mark.parametrize("fewer", ["update", "observe"])
@pytest.mark.parametrize("scaled", [False, True])
def test_labels_add_up_and_each_is_the_product_of_its_gradients(fewer, scaled):
    task = causal_lm(language_model(tie_word_embeddings=True))
    update, observe = batch_of(3, 8, 0), batch_of(4, 7, 1)
    if fewer == "update":
        update, observe = observe, update
        update["labels"][:2] = -100
    weight_M = torch.linspace(-1, 2, len(task.labels(update)), dtype=torch.float64)
    diagonal = random_diagonal(task) if scaled else None
    found = gram(task, update, observe, by="loss_token", weight=weight_M, diagonal=diagonal)
    assert error(found.total_OU, products(task, update, observe, weight_M, diagonal)) < 1e-9

    def each_label(batch):
        return Task(task.model, task.logits, task.labels, lambda b: torch.arange(len(task.labels(b))), task.loss)

    gradients = []
    for batch in (observe, update):
        one = each_label(batch)
        scores = (
            torch.cat(list(one.logits(one.model, batch))).log_softmax(dim=-1).gather(1, one.labels(batch)[:, None])
        )
        parameters = list(one.trainable().values())
        gradients.append([torch.autograd.grad(score, parameters, retain_graph=True) for score in scores[:, 0]])
    scales = [torch.ones_like(p) for p in task.trainable().values()] if diagonal is None else list(diagonal.values())
    for n, m in ((0, 0), (len(gradients[0]) - 1, 1), (2, len(gradients[1]) - 1)):
        true = -weight_M[m] * sum(
            (a * d * b).sum() for a, d, b in zip(gradients[0][n], scales, gradients[1][m], strict=True)
        )
        torch.testing.assert_close(found.token_NM[n, m], true.detach(), rtol=1e-8, atol=1e-10)
    assert torch.equal(found.label_N, task.labels(observe)) and torch.equal(found.item_M, task.items(update))


def random_diagonal(task: Task) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return {name: torch.rand(p.shape, generator=rng, dtype=p.dtype) for name, p in task.trainable().items()}


@pytest.mark.parametrize("name", ["gpt2", "gemma3, tied", "lora"])
def test_a_diagonal_scales_the_updates_gradients(name):
    task, update, observe = causal_lm(LANGUAGE_MODELS[name]()), batch_of(3, 8, 0), batch_of(4, 7, 1)
    diagonal = random_diagonal(task)
    found = gram(task, update, observe, diagonal=diagonal, by="module")
    assert error(found.total_OU, products(task, update, observe, diagonal=diagonal)) < 1e-12


def test_a_column_is_what_one_sgd_step_on_that_row_does():
    task, update, observe = causal_lm(language_model(), losses.sum_cross_entropy), batch_of(3, 8, 0), batch_of(4, 7, 1)
    total_OU = gram(task, update, observe).total_OU
    for row in range(3):
        moved = influence(task, rows_of(update, slice(row, row + 1)), observe, lr=0.1).per_item
        assert error(-0.1 * total_OU[:, row], moved) < 1e-10


@pytest.mark.parametrize("name", ["mean", "ascent", "dpo", "dapo", "grpo"])
def test_with_the_weights_of_a_loss_the_rows_add_up_to_its_step(name):
    update, observe = batch_of(4, 8, 0), batch_of(3, 7, 1)
    update |= {"ref_logps": torch.tensor([-20.0, -21, -19, -25]), "advantages": torch.tensor([1.0, -0.5, 0.3, -2])}
    found = {
        "mean": losses.mean_cross_entropy,
        "ascent": losses.gradient_ascent,
        "dpo": losses.dpo(0.3),
        "dapo": losses.policy_gradient(),
        "grpo": losses.policy_gradient("grpo"),
    }
    task = causal_lm(language_model(), found[name])
    summed = gram(task, update, observe, weight=loss_weights(task, update)).total_OU.sum(dim=1)
    assert error(-0.1 * summed, influence(task, update, observe, lr=0.1).per_item) < 1e-9


def test_losses_of_more_than_the_labels_are_told():
    def smoothed(logits_NV, label_N, row_N, batch):
        return nn.functional.cross_entropy(logits_NV, label_N, label_smoothing=0.1)

    with pytest.raises(ValueError, match="more than the labels' log-probabilities"):
        loss_weights(causal_lm(language_model(), smoothed), batch_of(2, 8, 0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 2)])
def test_padding_and_other_rows_move_nothing(name, left, right):
    task, update, observe = causal_lm(LANGUAGE_MODELS[name]()), batch_of(2, 8, 0), batch_of(3, 7, 1)
    plain = gram(task, update, observe).total_OU
    wide = gram(task, padded(update, left, right), padded(observe, right, left)).total_OU
    assert error(wide, plain) < 1e-10
    one = gram(task, rows_of(update, slice(1, 2)), rows_of(observe, slice(2, 3))).total_OU
    torch.testing.assert_close(one[0, 0], plain[2, 1], rtol=1e-10, atol=1e-12)


class Mark:
    def __call__(self, grad: torch.Tensor) -> None:
        pass


def test_checkpointing_dropout_and_training_mode_change_nothing_and_nothing_is_left_behind():
    model, update, observe = language_model(attention_dropout=0.5), batch_of(2, 8, 0), batch_of(3, 7, 1)
    plain = gram(model, update, observe).total_OU
    model.gradient_checkpointing_enable()
    model.train()
    model.model.norm.weight.requires_grad_(False)
    flags, weights = [p.requires_grad for p in model.parameters()], copy.deepcopy(model.state_dict())
    hooks, marks = [len(module._forward_hooks) for module in model.modules()], []

    def leave_mark(module, args, output):  # the graph holds what is hooked to it
        output.register_hook(mark := Mark())
        marks.append(weakref.ref(mark))

    task = causal_lm(model)
    hook = model.model.layers[0].mlp.register_forward_hook(leave_mark)
    found = gram(task, update, observe, by="module")
    hook.remove()
    assert "model.norm" not in found.module_OU
    model.model.norm.weight.requires_grad_(True)
    assert error(gram(model, update, observe).total_OU, plain) < 1e-12
    assert [p.requires_grad for p in model.parameters()].count(False) == 0 and flags.count(False) == 1
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(marks) == 4 and not any(mark() for mark in marks)  # two sides, and the pair that is checked


class ByMode(nn.Module):
    """A scale and a shift that training mode halves."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(7)), nn.Parameter(torch.zeros(7))

    def forward(self, rows):
        return (0.5 if self.training else 1.0) * rows * self.scale + self.shift


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(7), ByMode])
def test_a_layer_whose_gradients_are_formed_late_is_in_evaluation_mode_too(layer, check):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), layer(), nn.Tanh(), nn.Linear(7, 4)).double()
    rows, labels = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    expected = products(classifier(model.eval()), (rows, labels), (rows, labels))
    kept = copy.deepcopy(model.state_dict())
    found = gram(classifier(model.train()), (rows, labels), (rows, labels), check=check).total_OU
    assert error(found, expected) < 1e-12
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_close_to_float64(dtype, bound):
    update, observe = batch_of(3, 8, 0), batch_of(4, 7, 1)
    rounded = tiny_model("llama", initializer_range=0.15).to(dtype)
    exact = true_float64(copy.deepcopy(rounded))
    assert error(gram(rounded, update, observe).total_OU, gram(exact, update, observe).total_OU) < bound


@pytest.mark.parametrize("by", [None, "module", "position", "loss_token"])
def test_tiles_within_a_budget_have_the_same_numbers(by, monkeypatch):
    task, update, observe = causal_lm(language_model()), batch_of(5, 8, 0), batch_of(7, 7, 1)
    whole = gram(task, update, observe, by=by)
    small_blocks(monkeypatch)
    smallest = least_budget(task, update, observe, by=by, check=False)
    budget = int(smallest * 1.6)
    plan = estimate(task, update, observe, by=by, memory_budget=budget, check=False)
    assert plan.tiles > 3 and plan.bytes <= budget and plan.flops > 0
    tiled = gram(task, update, observe, by=by, memory_budget=budget, check=False, disable_tqdm=True)
    assert error(tiled.total_OU, whole.total_OU) < 1e-11
    for name in ("position_OTUS", "token_NM"):
        if getattr(whole, name) is not None:
            assert error(getattr(tiled, name), getattr(whole, name)) < 1e-11
    if by == "module":
        assert all(error(tiled.module_OU[name], value) < 1e-11 for name, value in whole.module_OU.items())
    with pytest.raises(ValueError, match="one row of each side needs"):
        gram(task, update, observe, by=by, memory_budget=smallest - 1, check=False)


@pytest.mark.parametrize("by", [None, "module"])
def test_what_is_alive_stays_within_the_budget(by, monkeypatch):
    task, update, observe = causal_lm(language_model(hidden_size=64)), batch_of(8, 16, 0, 5), batch_of(8, 16, 1, 5)
    small_blocks(monkeypatch)
    options = {"by": by, "check": by is None}
    smallest = least_budget(task, update, observe, **options)
    without = most_alive(lambda: gram(task, update, observe, **options))
    for factor in (1, 2):
        budget = int(factor * smallest)
        plan = estimate(task, update, observe, memory_budget=budget, **options)
        peak = most_alive(
            lambda budget=budget: gram(task, update, observe, memory_budget=budget, disable_tqdm=True, **options)
        )
        assert peak <= plan.bytes <= budget, factor
        assert factor > 1 or peak < without


def small_blocks(monkeypatch) -> None:
    """What does not grow with rows is small, so that the budget is about rows."""
    for module in (pairs, plan):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(plan, "TILE_ELEMENTS", 1000)
    monkeypatch.setattr(plan, "FEWEST_POSITIONS", 14)


def least_budget(task, update, observe, **options) -> int:
    with pytest.raises(ValueError) as told:
        estimate(task, update, observe, memory_budget=1, **options)
    return int(str(told.value).split("needs ")[1].split(";")[0])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("by", ["module", "loss_token"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(by, tmp_path, monkeypatch):
    task, update, observe = causal_lm(language_model()), batch_of(5, 8, 0), batch_of(7, 7, 1)
    small_blocks(monkeypatch)
    options = {"by": by, "check": False}
    options["memory_budget"] = int(least_budget(task, update, observe, **options) * 1.6)
    num_tiles, done = estimate(task, update, observe, **options).tiles, []
    options["disable_tqdm"] = True
    whole, path = gram(task, update, observe, **options), tmp_path / "new" / "journal"
    add = journal.Journal.add

    def failing(self, *tile):
        if len(done) == 3:
            raise Interrupted
        done.append(tile[0])
        add(self, *tile)

    monkeypatch.setattr(journal.Journal, "add", failing)
    with pytest.raises(Interrupted):
        gram(task, update, observe, journal=path, **options)
    with path.open("ab") as file:
        file.write((1000).to_bytes(8, "little") + b"cut off")
    first, done = done, []
    monkeypatch.setattr(journal.Journal, "add", lambda self, *tile: (done.append(tile[0]), add(self, *tile)))
    resumed = gram(task, update, observe, journal=path, **options)
    assert len(first) == 3 and len(done) == num_tiles - 3 and not set(first) & set(done)
    assert torch.equal(resumed.total_OU, whole.total_OU)
    assert torch.equal(gram(task, update, observe, journal=path, **options).total_OU, whole.total_OU)
    assert len(done) == num_tiles - 3


def test_a_journal_of_something_else_is_refused(tmp_path):
    task, update, observe, path = causal_lm(language_model()), batch_of(2, 8, 0), batch_of(3, 7, 1), tmp_path / "j"
    gram(task, update, observe, journal=path)
    with pytest.raises(ValueError, match="run with other data"):
        gram(task, update, batch_of(3, 7, 2), journal=path)
    with pytest.raises(ValueError, match="run with other options"):
        gram(task, update, observe, journal=path, by="module")
    with torch.no_grad():
        task.model.model.norm.weight[3] += 1e-9
    with pytest.raises(ValueError, match="run with other model values"):
        gram(task, update, observe, journal=path)
    path.write_text("notes of mine")
    with pytest.raises(ValueError, match="no journal"):
        gram(task, update, observe, journal=path)
    assert path.read_text() == "notes of mine"


class Mixing(nn.Module):
    """What a model may do that keeps hooks from telling rows apart."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, rows):
        hidden = self.first(rows)
        if self.how == "rows mix":
            hidden = hidden - hidden.mean(dim=0)
        if self.how == "in place":
            hidden = torch.tanh(hidden)
            logits = self.last(hidden)
            hidden.mul_(2)
            return logits
        if self.how == "outside":
            return nn.functional.linear(torch.tanh(hidden), self.last.weight, self.last.bias)
        if self.how == "some rows":
            return torch.cat([self.last(hidden[:1]), self.last(hidden[1:])])
        return self.last(torch.tanh(hidden))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rows mix", "lets rows mix, or uses a parameter outside"),
        ("outside", "lets rows mix, or uses a parameter outside"),
        ("some rows", "last returns .* where the batch has 3 rows"),
        ("in place", "what last read is changed in place"),
    ],
)
def test_models_whose_rows_cannot_be_told_apart_are_refused(how, message):
    torch.manual_seed(0)
    rows, labels = torch.randn(3, 6).double(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        gram(classifier(Mixing(how).double()), (rows, labels), (rows + 1, labels))
    gram(classifier(Mixing("").double()), (rows, labels), (rows + 1, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "layer"}, "by is 'layer'"),
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"diagonal": {"0.weight": torch.ones(2)}}, "diagonal differs"),
        ({"by": "position"}, "needs batches of a causal language model"),
    ],
)
def test_bad_arguments_are_told(options, message):
    batch = (torch.zeros(1, 6).double(), torch.zeros(1).long())
    with pytest.raises(ValueError, match=message):
        gram(classifier(small_classifier()), batch, batch, **options)


def test_nothing_to_train_nothing_to_observe_and_no_batch_are_told():
    batch, nothing = (torch.zeros(1, 6).double(), torch.zeros(1).long()), batch_of(1, 6, 0)
    nothing["labels"][:] = -100
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        gram(classifier(small_classifier().requires_grad_(False)), batch, batch)
    with pytest.raises(ValueError, match="observe has no labelled position"):
        gram(language_model(), batch_of(1, 6, 0), nothing)
