"""Training of the embedded base model from nothing, on text of the world alone; minutes on two cores."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_dynamics.embedded.base_model import collate
from trl_dynamics.embedded.data import text_documents
from trl_dynamics.embedded.tokenizer import CONTEXT_LENGTH

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingPlan:
    """How the base model is trained: AdamW, linear warm-up, cosine decay to zero."""

    num_steps: int = 4500
    batch_size: int = 16
    learning_rate: float = 4e-3
    num_warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def new_model(tokenizer: "PreTrainedTokenizerBase", seed: int = 0) -> "LlamaForCausalLM":
    """A Llama with random weights, small enough to ship inside the package; the global random state is left alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    plan: TrainingPlan = TrainingPlan(),
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train in place; `on_step` is called with the step and its loss in nats per token."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    model.train()
    for step in range(plan.num_steps):
        documents = text_documents(plan.batch_size, f"train/{plan.seed}/{step}")
        loss = model(**collate(documents, tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
        optimizer.param_groups[0]["lr"] = plan.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        if on_step:
            on_step(step, loss.item())
    model.eval()
