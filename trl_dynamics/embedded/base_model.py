"""Where the shipped base model lies, and its loss on held-out text of the world.

B documents   T tokens of the longest
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trl_dynamics.embedded.data import text_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_HELD_OUT_DOCUMENTS = 512
HELD_OUT_SEED = "held-out"
IGNORED = -100
BUILD_FILE = "build.json"


def model_path() -> str:
    """Folder of the shipped model and tokenizer, for `from_pretrained`."""
    return str(Path(__file__).parent / "model")


def build_card() -> dict:
    """How the shipped model was built: seed, steps, held-out loss (nats per token), tokenizer hash, versions."""
    return json.loads((Path(model_path()) / BUILD_FILE).read_text(encoding="utf-8"))


def collate(documents: list, tokenizer: "PreTrainedTokenizerBase") -> dict[str, "torch.Tensor"]:
    """Documents as one padded batch for a causal LM.

    Args:
        documents (`list`): Chats (lists of messages) and running text, as [`data.text_documents`] gives them.
        tokenizer: The world's tokenizer.

    Shapes: `input_ids`, `attention_mask`, `labels` (B, T); padding has the label -100.
    """
    texts = [
        f"{document}{tokenizer.eos_token}"
        if isinstance(document, str)
        else tokenizer.apply_chat_template(document, tokenize=False)
        for document in documents
    ]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def held_out_loss(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64) -> float:
    """Mean negative log-likelihood of fresh documents, nats per token; the same documents on every call."""
    import torch

    documents = text_documents(NUM_HELD_OUT_DOCUMENTS, HELD_OUT_SEED)
    loss_sum, num_tokens = 0.0, 0
    for start in range(0, len(documents), batch_size):
        batch = collate(documents[start : start + batch_size], tokenizer)
        with torch.no_grad():
            loss = model(**batch).loss
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        loss_sum, num_tokens = loss_sum + loss.item() * count, num_tokens + count
    return loss_sum / num_tokens
