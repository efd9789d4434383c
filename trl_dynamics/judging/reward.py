"""A reward model as judge: a Hugging Face sequence classifier with one output."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_dynamics.judging.match import prompt_text
from trl_dynamics.judging.scores import Score
from trl_dynamics.probing.generate import Failure, weights_fingerprint
from trl_dynamics.probing.schema import Prompt


class RewardModel:
    """Scores prompt + answer by the classifier's one logit.

    Args:
        model ([`~transformers.PreTrainedModel`]): A sequence classifier with one label.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        name (`str`, *optional*): For reports.
        as_chat (`bool`, *optional*): Through the chat template, a plain prompt as the user's message; or as plain
            text, a chat prompt and its answer on lines of their own. By default as a chat if there is a template.
        batch_size (`int`, *optional*): Answers of a forward pass.

    Raises:
        ValueError: If the model has not exactly one output, or chats are wanted and there is no template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "model",
        *,
        as_chat: bool | None = None,
        batch_size: int = 16,
    ):
        require_one_output(model.config, name)
        if as_chat and not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of the reward model {name!r} has no chat template; pass --judge_format plain"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.as_chat = bool(tokenizer.chat_template) if as_chat is None else as_chat
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad_id = 0 if pad_id is None else pad_id
        # Decoders find the last token of a row by the padding behind it.
        model.config.get_text_config().pad_token_id = self._pad_id
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
        label = Path(name).name if Path(name).is_dir() else name
        self.about = {"model": f"{label}@{weights_fingerprint(model)[:16]}", "as_chat": self.as_chat}

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        as_chat: bool | None = None,
        batch_size: int = 16,
    ) -> "RewardModel":
        """The model at a folder or hub name, on the first accelerator if there is one.

        Raises:
            ValueError: If it has weights missing, as a language model's folder has no reward head.
        """
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise ValueError(
                f"{path!r} is no reward model: it has no weights for {min(loading['missing_keys'])!r}; expected a "
                "trained sequence classifier"
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return cls(model.to(device), tokenizer, path, as_chat=as_chat, batch_size=batch_size)

    @torch.inference_mode()
    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score | Failure]:
        """The reward of each answer, in the classifier's own unit; one that is too long for it fails."""
        rows = [self._ids(prompt, text) for prompt, text in items]
        scores: list[Score | Failure] = [
            Failure(f"prompt and answer have {len(ids)} tokens, the reward model takes {self._context}")
            for ids in rows
        ]
        order = sorted((i for i, ids in enumerate(rows) if len(ids) <= self._context), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            for index, reward in zip(group, self._forward([rows[i] for i in group]), strict=True):
                scores[index] = Score(reward, {"reward": reward})
        return scores

    def _ids(self, prompt: Prompt, text: str) -> list[int]:
        if not self.as_chat:
            return self.tokenizer(text=prompt + text if isinstance(prompt, str) else f"{prompt_text(prompt)}\n{text}")[
                "input_ids"
            ]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": text}]
        return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        width = max(map(len, rows))
        input_ids = torch.tensor([ids + [self._pad_id] * (width - len(ids)) for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
        device = self.model.device
        logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].float().tolist()


def require_one_output(config, name: str) -> None:
    """Refuse a classifier whose output is no single reward.

    Raises:
        ValueError: If it has another number of labels than 1.
    """
    if config.num_labels != 1:
        raise ValueError(f"the reward model {name!r} has {config.num_labels} outputs; expected a classifier with 1")


def require_reward_model(path: str, trust_remote_code: bool = False) -> None:
    """Look at the config of a reward model before hours are spent on answers for it.

    Raises:
        ValueError: As [`require_one_output`], or if it is no sequence classifier at all.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    kinds = config.architectures or []
    if kinds and not any("SequenceClassification" in kind or "Reward" in kind for kind in kinds):
        raise ValueError(f"{path!r} is a {kinds[0]}, no reward model; expected a sequence classifier with one output")
    require_one_output(config, path)
