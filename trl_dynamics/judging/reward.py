"""A reward model as judge: a Hugging Face sequence classifier with one output."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_dynamics.judging.match import prompt_text
from trl_dynamics.judging.scores import Score
from trl_dynamics.probing.chat import Chats, answer_message
from trl_dynamics.probing.generate import Failure, weights_fingerprint
from trl_dynamics.probing.schema import Prompt

# Share of a reward by which padding may change it, which is rounding.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2


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
        self._chats = Chats(tokenizer)
        # Whether rows may be padded; not known before the first ones are.
        self._pads: bool | None = None
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
        """The reward of each answer, in the classifier's own unit.

        One that is too long for it fails, and one that the chat template does not write as it is.
        """
        scores: list[Score | Failure] = []
        rows: dict[int, list[int]] = {}
        for index, (prompt, text) in enumerate(items):
            ids = self._ids(prompt, text)
            if isinstance(ids, list) and len(ids) > self._context:
                ids = Failure(f"prompt and answer have {len(ids)} tokens, the reward model takes {self._context}")
            scores.append(ids if isinstance(ids, Failure) else Failure("not scored"))
            if isinstance(ids, list):
                rows[index] = ids
        order = sorted(rows, key=lambda index: len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            for index, reward in zip(group, self._rewards([rows[i] for i in group]), strict=True):
                scores[index] = Score(reward, {"reward": reward})
        return scores

    def _ids(self, prompt: Prompt, text: str) -> list[int] | Failure:
        if not self.as_chat:
            whole = prompt + text if isinstance(prompt, str) else f"{prompt_text(prompt)}\n{text}"
            return self.tokenizer(text=whole)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        frame, whole = self._chats.frame(messages), [*messages, answer_message(text)]
        chat = self._chats.text(whole, frame.parts)
        if text.strip() and frame.locate(text, chat) is None:
            return Failure(f"the reward model's chat template {frame.difference(text, chat)}")
        return self._chats.ids(whole, frame.parts)

    def _rewards(self, rows: list[list[int]]) -> list[float]:
        """The rewards of rows of ascending length, padded where that changes none."""
        if len(rows[0]) == len(rows[-1]) or self._pads:
            return self._forward(rows)
        if self._pads is None:
            alone, together = self._forward(rows[:1])[0], self._forward(rows)
            tolerance = _TOLERANCE if self.model.dtype == torch.float32 else _HALF_TOLERANCE
            self._pads = abs(alone - together[0]) <= tolerance * max(1.0, abs(alone))
            if self._pads:
                return together
        return [self._forward([row])[0] for row in rows]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """One forward, rows padded on the right with a token that none of them has.

        Decoders read the reward at the last token that is not the padding of their config.
        """
        used = set().union(*rows)
        unused = next(
            (token for token in range(self.model.get_input_embeddings().num_embeddings) if token not in used), None
        )
        if unused is None and len(rows) > 1:
            return [self._forward([row])[0] for row in rows]
        width = max(map(len, rows))
        input_ids = torch.tensor([ids + [unused] * (width - len(ids)) for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
        device = self.model.device
        with _padded_with(self.model, unused):
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].float().tolist()


@contextlib.contextmanager
def _padded_with(model: PreTrainedModel, pad_id: int | None) -> Iterator[None]:
    """The model takes this token for padding, or none."""
    configs = [model.config, model.config.get_text_config()]
    before = [config.pad_token_id for config in configs]
    try:
        for config in configs:
            config.pad_token_id = pad_id
        yield
    finally:
        for config, found in zip(configs, before, strict=True):
            config.pad_token_id = found


def require_one_output(config: PretrainedConfig, name: str) -> None:
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
