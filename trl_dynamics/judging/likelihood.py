"""A third model as judge: the answer that it finds likelier per token wins.

N scored positions
"""

from collections.abc import Sequence

import torch

from trl_dynamics import stats_head
from trl_dynamics.judging.scores import Score
from trl_dynamics.loading import load_tokenizer
from trl_dynamics.probing.encode import NO_EOS, EncodedProbes, EncodedResponse, Encoder
from trl_dynamics.probing.generate import Failure, LocalModel
from trl_dynamics.probing.labelled import pad_id_of
from trl_dynamics.probing.layouts import PaddedLayout, ProbeBatch
from trl_dynamics.probing.prompts import UnscorableError
from trl_dynamics.probing.schema import Probe, Prompt, is_blank
from trl_dynamics.progress import with_bar
from trl_dynamics.stats_head import StatsRequest


class Likelihood:
    """Scores an answer by its mean log-probability per token, (1/T) sum_t log pi(y_t | prompt, y_<t), in nats.

    The end-of-turn token is left out, as everywhere in this package. A blank answer loses against any other.

    Args:
        judge ([`LocalModel`]): The third model with its tokenizer; its `batch_size` is that of the forward passes.
        ends (`Sequence[int]`, *optional*): End-of-turn token ids besides the tokenizer's EOS.

    Raises:
        ValueError: If the tokenizer has no EOS token.
    """

    def __init__(self, judge: LocalModel, ends: Sequence[int] = ()):
        self.model, self.tokenizer, self.is_chat = judge.model, judge.tokenizer, judge.is_chat
        self._encoder = Encoder(self.tokenizer, end_ids=ends)
        stats_head.install(self.model)
        self._context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._layout = PaddedLayout(
            judge.batch_size,
            pad_id_of(self.tokenizer, self.model),
            boundaries=stats_head.length_boundaries(self.model),
        )
        self._settled = False
        self.about = {"model": judge.name, "unit": "nats per token"}

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score | Failure]:
        """The mean log-probability of each answer; one that is too long for the model fails, or that it reads as
        another text.

        Raises:
            ValueError: If a prompt is a chat and the model has no chat template.
        """
        scores: list[Score | Failure] = [Score(-float("inf")) for _ in items]
        encoded: dict[int, EncodedResponse] = {}
        for index, (prompt, text) in enumerate(items):
            if is_blank(text):
                continue
            row = self._encode(prompt, text)
            if isinstance(row, Failure):
                scores[index] = row
            else:
                encoded[index] = row
        indices = list(encoded)
        if indices and not self._settled:
            stats_head.settle(self.model, encoded[indices[0]].input_ids)
            self._layout = self._layout.at_most(stats_head.own_forward_tokens(self.model))
            self._settled = True
        batches = self._layout.batches(EncodedProbes(tuple(encoded.values()))) if indices else []
        for batch in with_bar(batches, len(batches), "judging"):
            for item, mean in self._means(batch).items():
                scores[indices[item]] = Score(mean, {"logp_mean": mean})
        return scores

    def _encode(self, prompt: Prompt, text: str) -> EncodedResponse | Failure:
        if not isinstance(prompt, str) and not self.is_chat:
            raise ValueError(
                "the prompts are chats, but the judge's tokenizer has no chat template; take another model"
            )
        try:
            row = self._encoder.response(Probe("", prompt, {"answer": text}), "answer")
        except UnscorableError as error:
            return Failure(str(error))
        if row.response_cut:
            return Failure(f"the answer holds {self.tokenizer.decode([row.eos_id])!r}, which ends it for the judge")
        if self._context is not None and len(row.input_ids) > self._context:
            return Failure(f"prompt and answer have {len(row.input_ids)} tokens, the judge takes {self._context}")
        return row

    @torch.no_grad()
    def _means(self, batch: ProbeBatch) -> dict[int, float]:
        device = self.model.device
        request = StatsRequest(
            batch.rows_N.to(device), batch.cols_N.to(device), batch.target_N.to(device), batch.input_ids.shape[1]
        )
        stats = self.model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            stats_request=request,
        )
        logp_N, keep_N = stats["target_logp"].double().cpu(), ~batch.is_eos_mask_N
        return {item: logp_N[keep_N & (batch.item_N == item)].mean().item() for item in batch.item_N.unique().tolist()}


def require_eos(path: str, trust_remote_code: bool = False) -> None:
    """Look at the tokenizer of a judge before hours are spent on answers for it.

    Raises:
        ValueError: If it has no EOS token, which ends every scored answer, or there is no tokenizer.
    """
    if load_tokenizer(path, trust_remote_code=trust_remote_code).eos_token_id is None:
        raise ValueError(f"judge {path!r}: {NO_EOS}")
