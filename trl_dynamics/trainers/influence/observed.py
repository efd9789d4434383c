"""What is observed: the answers of a probe set, encoded once, in batches that stay the same for the run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Trainer

from trl_dynamics import stats_head
from trl_dynamics.probing.encode import EncodedProbes, EncodedResponse, encode, token_texts
from trl_dynamics.probing.labelled import collate, pad_id_of, split
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.scoring.setup import end_ids_of, limits_of, tokens_per_batch_of
from trl_dynamics.trainers.influence.backend import Batch


@dataclass(frozen=True)
class Share:
    """One process' part of the observed answers.

    Args:
        batches (`list`): Their tokens, labels on the answers' own; as many on every process.
        items (`list[list[int]]`): Which answers the rows of each batch are; none where a batch only fills up.
    """

    batches: list[Batch]
    items: list[list[int]]


@dataclass(frozen=True)
class Observed:
    """The answers of a probe set.

    Args:
        probe_set ([`ProbeSet`]): Where they are from.
        encoded ([`EncodedProbes`]): Their tokens.
        texts (`list[list[str]]`): What each token of each answer adds to the text.
        tokens_per_batch (`int`): Most tokens of a forward, padding included.
        pad_id (`int`): What fills rows up.
        boundaries (`tuple[int, ...]`, *optional*): As of [`PaddedLayout`].
    """

    probe_set: ProbeSet
    encoded: EncodedProbes
    texts: list[list[str]]
    tokens_per_batch: int
    pad_id: int
    boundaries: tuple[int, ...] = ()

    @property
    def description(self) -> dict:
        """For meta.json."""
        return {
            "name": self.probe_set.name,
            "fingerprint": self.encoded.fingerprint,
            "num_probes": len(self.probe_set),
            "counts": self.probe_set.counts,
            "tokens_per_batch": self.tokens_per_batch,
        }

    def share(self, process_index: int, num_processes: int, device: torch.device) -> Share:
        """The batches of one process: dealt out in turn, the last one again where others have one more."""
        parts = list(self._numbered())
        batches, items = [], []
        for first in range(0, len(parts), num_processes):
            index = first + process_index
            part = parts[min(index, len(parts) - 1)]
            batches.append(collate([self.encoded.items[i] for i in part], self.pad_id, device))
            items.append(part if index < len(parts) else [])
        return Share(batches, items)

    def answers(self, response_type: str, device: torch.device) -> list[Batch]:
        """All answers of a type as SFT trains on them: their end-of-turn token is learnt as well."""
        chosen = [item for item in self.encoded.items if item.response_type == response_type]
        return [collate(part, self.pad_id, device, ends=True) for part in self._parts(chosen)]

    def _parts(self, items: Sequence[EncodedResponse]) -> Iterator[list[EncodedResponse]]:
        return split(items, self.tokens_per_batch, self.boundaries)

    def _numbered(self) -> Iterator[Sequence[int]]:
        first = 0
        for part in self._parts(self.encoded.items):
            yield list(range(first, first + len(part)))
            first += len(part)


def observe(trainer: Trainer, probe_set: ProbeSet) -> Observed:
    """The answers of a probe set as a trainer's model reads them, cut as its probes are.

    Raises:
        ValueError: As [`probing.encode.encode`].
    """
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    model, args = trainer.model, trainer.args
    encoded = encode(probe_set, trainer.processing_class, limits_of(model, args), end_ids_of(model))
    texts = [token_texts(tokenizer, item) for item in encoded.items]
    tokens, boundaries = tokens_per_batch_of(args, trainer.accelerator), stats_head.length_boundaries(model)
    return Observed(probe_set, encoded, texts, tokens, pad_id_of(tokenizer, model), boundaries)
