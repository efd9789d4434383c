"""Answers that a model writes: the request, what may come back, and a local model that answers in batches."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from trl_dynamics.compat import base_causal_lm, longrope_boundaries
from trl_dynamics.loading import load_causal_lm, load_tokenizer
from trl_dynamics.probing.chat import Chats
from trl_dynamics.probing.encode import answer_text, cut_prompt
from trl_dynamics.probing.labelled import pad_id_of
from trl_dynamics.probing.layouts import side_of
from trl_dynamics.probing.schema import Prompt

# How many of the last tokens are read for a stop string after each step.
STOP_WINDOW = 16


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Args:
        max_new_tokens (`int`, *optional*): A longer answer is cut, and marked as cut.
        temperature (`float`, *optional*): 0 takes the most likely token at each step.
        top_p (`float`, *optional*): Probability mass of the tokens to draw from.
        seed (`int`, *optional*): Of this one answer's draws.
        stop (`tuple[str, ...]`, *optional*): Texts before which the answer ends.
        max_prompt_length (`int`, *optional*): A longer prompt keeps its last tokens (and its BOS token), as in
            tracking. Servers count no tokens and send the whole prompt.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_prompt_length: int | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length is {self.max_prompt_length}, expected at least 1 or no limit")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} and top_p {self.top_p}: expected >= 0 and in (0, 1]")


@dataclass(frozen=True)
class Request:
    """A prompt to answer: plain text to continue, or chat messages as JSON text in `prompt_json`."""

    prompt_json: str
    sampling: Sampling

    @classmethod
    def of(cls, prompt: Prompt, sampling: Sampling) -> "Request":
        """The request for this prompt."""
        return cls(json.dumps(prompt, ensure_ascii=False, sort_keys=True), sampling)

    @property
    def prompt(self) -> Prompt:
        return json.loads(self.prompt_json)

    def key(self, generator: str) -> str:
        """SHA-256 of all that determines the answer: who answers, the prompt and the sampling."""
        content = json.dumps([generator, self.prompt_json, asdict(self.sampling)], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came back; `finish` is `"stop"`, `"length"` (cut at max_new_tokens) or `"refusal"`."""

    text: str
    finish: str = "stop"


@dataclass(frozen=True)
class Failure:
    """Why nothing came back; asking again later may help."""

    reason: str


class Generator(Protocol):
    """Something that answers prompts.

    `name` identifies it for cards and caches; `is_chat` says whether it takes messages (and not plain text);
    `generate` yields each request with its answer as soon as there is one, in any order.
    """

    name: str
    is_chat: bool

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Failure]]: ...


class LocalModel:
    """A Hugging Face causal LM that answers in left-padded batches.

    Draws depend on a request's own seed alone, not on what shares its batch: the Gumbel-max trick with one random
    generator per request. An answer may still differ between batch sizes where two tokens tie within rounding.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any causal LM.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        name (`str`): Folder or hub name, for cards.
        batch_size (`int`, *optional*): Rows of a batch.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model", batch_size: int = 16
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.is_chat, self._chats = bool(tokenizer.chat_template), Chats(tokenizer)
        self.label = Path(name).name if Path(name).is_dir() else name
        self.name = f"{self.label}@{weights_fingerprint(model)[:16]}"
        self._ends = _end_ids(model, tokenizer)
        # Padding would come between a learned prompt and the text, and shift the positions of the latter.
        adapters = getattr(model, "peft_config", {}).values()
        self._may_pad = not any(config.is_prompt_learning for config in adapters)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._boundaries = longrope_boundaries(base_causal_lm(model).config)

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "auto", batch_size: int = 16, trust_remote_code: bool = False
    ) -> "LocalModel":
        """The model (or adapter on its base) and tokenizer at a folder or hub name, on the first accelerator if any.

        Raises:
            NotLoadable: If it is no causal language model with a tokenizer, or a file is missing or damaged.
        """
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        model = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return cls(model.to(device), tokenizer, str(path), batch_size)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer | Failure]]:
        """Answer batch by batch, short prompts first.

        Raises:
            ValueError: If a request is a chat and the tokenizer has no chat template, or one that refuses it.
        """
        rows = []
        for request in requests:
            ids = self._ids_of(request)
            room = request.sampling.max_new_tokens if self._context is None else self._context - len(ids)
            if room < 1:
                yield request, Failure(f"{self.too_long(request)}; --max_prompt_length keeps the prompt's last tokens")
            else:
                rows.append((min(room, request.sampling.max_new_tokens), ids, request))
        # Rows of one batch share their limit: past the context a model may have no positions left for any of them.
        rows.sort(key=lambda row: (self._kind(*row[:2]), len(row[1]), row[2].prompt_json, row[2].sampling.seed))
        for _, alike in itertools.groupby(rows, key=lambda row: self._kind(*row[:2])):
            alike = list(alike)
            limit = alike[0][0]
            for start in range(0, len(alike), self.batch_size):
                group = alike[start : start + self.batch_size]
                yield from self._answer([row[1] for row in group], [row[2] for row in group], limit)

    def _kind(self, limit: int, ids: list[int]) -> tuple:
        """Equal for prompts that may be answered in one batch.

        LongRoPE picks its factors by the longest row, so no batch has rows on both sides of a boundary; a prompt whose
        answer may cross one is answered with prompts of its own length.
        """
        sides = side_of(len(ids), self._boundaries)
        alone = not self._may_pad or side_of(len(ids) + limit, self._boundaries) != sides
        return limit, alone, (len(ids),) if alone else sides

    def too_long(self, request: Request) -> str | None:
        """Why the model's context has no room for an answer to this; None if it has."""
        num_tokens = len(self._ids_of(request))
        if self._context is None or num_tokens < self._context:
            return None
        return f"the prompt has {num_tokens} tokens, the model's context is {self._context}"

    def _ids_of(self, request: Request) -> list[int]:
        ids = self._prompt_ids(request.prompt)
        return cut_prompt(ids, request.sampling.max_prompt_length, self.tokenizer.bos_token_id)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt)["input_ids"]
        if not self.is_chat:
            raise ValueError(
                f"the prompts are chats, but the tokenizer of {self.label!r} has no chat template; use plain prompts "
                "or a model with a template"
            )
        return self._chats.ids(prompt, self._chats.frame(prompt).parts, opening=True)

    @torch.inference_mode()
    def _answer(
        self, prompts: list[list[int]], requests: list[Request], limit: int
    ) -> Iterator[tuple[Request, Answer | Failure]]:
        width = max(map(len, prompts))
        pad = pad_id_of(self.tokenizer, self.model)
        pad = min(self._ends) if pad is None else pad
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            eos_token_id=sorted(self._ends),
            pad_token_id=pad,
        )
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_SeededSampling(requests)]),
            stopping_criteria=StoppingCriteriaList([_StopTexts(self.tokenizer, requests, width)]),
        )
        for request, prompt, row in zip(requests, prompts, output[:, width:].tolist(), strict=True):
            yield request, self._read(request, prompt, row, limit)

    def _read(self, request: Request, prompt: list[int], row: list[int], limit: int) -> Answer:
        end = next((index for index, token in enumerate(row) if token in self._ends), None)
        ids = row if end is None else row[:end]
        text = answer_text(self.tokenizer, prompt, ids)
        stops = [text.index(stop) for stop in request.sampling.stop if stop in text]
        text = text[: min(stops)] if stops else text
        finish = "stop" if stops or end is not None or len(row) < limit else "length"
        return Answer(text.rstrip() if isinstance(request.prompt, str) else text.strip(), finish)


class _SeededSampling(LogitsProcessor):
    """Turns the arg max that follows into a draw: logits / temperature + Gumbel noise of each row's own generator."""

    def __init__(self, requests: Sequence[Request]):
        self.sampling = [request.sampling for request in requests]
        self.generators = [torch.Generator().manual_seed(sampling.seed) for sampling in self.sampling]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = []
        for logits, sampling, generator in zip(scores, self.sampling, self.generators, strict=True):
            logits = logits.float()
            if logits.isnan().any():
                raise ValueError(
                    "the model's logits are not finite (NaN), so that it has no answer; look for NaN in its weights, "
                    "or load it in float32"
                )
            if sampling.temperature > 0:
                logits = logits / sampling.temperature
                if sampling.top_p < 1:
                    logits = TopPLogitsWarper(sampling.top_p)(input_ids, logits[None])[0]
                uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
                logits = logits - (-uniform.log()).log().to(logits)
            rows.append(logits)
        return torch.stack(rows)


class _StopTexts(StoppingCriteria):
    """Ends a row as soon as its last tokens hold one of its stop texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], width: int):
        self.tokenizer, self.stops, self.width = tokenizer, [r.sampling.stop for r in requests], width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        done = [False] * len(self.stops)
        if any(self.stops):
            tails = input_ids[:, self.width :][:, -STOP_WINDOW:].tolist()
            texts = self.tokenizer.batch_decode(tails)
            done = [any(stop in text for stop in stops) for text, stops in zip(texts, self.stops, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and some values of every parameter: another checkpoint has another one."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config = model.generation_config.eos_token_id
    ends = set(config if isinstance(config, list) else [config]) | {tokenizer.eos_token_id}
    ends.discard(None)
    if not ends:
        raise ValueError("the tokenizer has no EOS token, which ends every answer; set tokenizer.eos_token")
    return ends


def seed_of(*parts: object) -> int:
    """A seed below 2**31 from any values, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4]) % 2**31


def unique(requests: Iterable[Request]) -> list[Request]:
    """The requests without repetition, in the order of their first appearance."""
    return list(dict.fromkeys(requests))
