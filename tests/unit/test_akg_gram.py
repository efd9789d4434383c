"""Inner products of gradients against gradients that are stored, their splits, tiles, and what must not matter."""

import pytest
import torch
from test_akg_influence import batch_of, language_model, small_classifier, true_float64_of_adapter
from torch import nn

from tiny import tiny_model
from trl_dynamics.akg import gram_record
from trl_dynamics.akg.gram import gram
from trl_dynamics.akg.task import Task, causal_lm, classifier
from true_float64 import true_float64


def stored(task: Task, batch, weight_N=None) -> list[dict[str, torch.Tensor]]:
    """For every row the gradient of sum weight ln pi(label), as autograd has it, one backward each."""
    logits_NV = torch.cat(list(task.logits(task.model, batch)))
    label_N, item_N = task.labels(batch), task.items(batch)
    logp_N = logits_NV.log_softmax(dim=-1).gather(1, label_N[:, None])[:, 0]
    logp_N = logp_N if weight_N is None else logp_N * weight_N
    names = task.trainable()
    rows = []
    for row in range(gram_record.num_rows(batch)):
        score = logp_N[item_N == row].sum()
        found = torch.autograd.grad(score, list(names.values()), retain_graph=True, allow_unused=True)
        rows.append({n: torch.zeros_like(names[n]) if g is None else g for n, g in zip(names, found, strict=True)})
    return rows


def products(task: Task, update, observe, weight_M=None, diagonal=None) -> torch.Tensor:
    def matrix(rows, scale=None):
        return torch.stack([torch.cat([(g * scale[n] if scale else g).flatten() for n, g in r.items()]) for r in rows])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return matrix(stored(task, observe)) @ -matrix(stored(task, update, weight_M), diagonal).T


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.15)
    return true_float64(GPT2LMHeadModel(config))


def adapter(**options) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False, **options
    )
    torch.manual_seed(0)
    return true_float64_of_adapter(get_peft_model(tiny_model("llama", initializer_range=0.15), config))


LANGUAGE_MODELS = {
    "llama": language_model,
    "qwen3": lambda: language_model("qwen3"),
    "gpt_neox": lambda: language_model("gpt_neox"),
    "gpt2": gpt2,
    "gemma2": lambda: language_model("gemma2"),
    "gemma3, tied": lambda: language_model("gemma3", tie_word_embeddings=True),
    "llama, tied": lambda: language_model(tie_word_embeddings=True),
    "lora": adapter,
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
