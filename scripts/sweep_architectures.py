"""Score every causal LM that transformers can build: its own log-probabilities, or a line that says why not.

    python scripts/sweep_architectures.py [--only NAME ...] [--output trl_dynamics/scoring/ARCHITECTURES.md]

Each architecture is a tiny random model (see tiny_architectures.py) in a process of its own. The engine's
log-probability of every token, in both layouts, is compared with the log-softmax of the model's own logits, one
unpadded row at a time; once more with a LoRA adapter on the LM head. Takes some minutes on one core.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import tiny_architectures
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from trl_dynamics import stats_head
from trl_dynamics.compat import base_causal_lm, can_share_prompts
from trl_dynamics.probing.encode import EncodedProbes, EncodedResponse
from trl_dynamics.probing.layouts import Layout, PaddedLayout, SharedPrefixLayout
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.head_check import settle_head
from trl_dynamics.scoring.layout_check import settle_layout
from trl_dynamics.stats_head.check import Disagreement
from trl_dynamics.stats_head.ways import OWN

RIGHT, SLOWER, REFUSED, NOT_BUILT, WRONG = "right", "slower path", "refused", "not built", "WRONG"
GOAL = 1e-5  # nats, float32 on both sides
SECONDS = 90


@dataclass
class Outcome:
    """What came of one architecture: largest deviations in nats per token, by layout and with an adapter.

    `way` is the outcome that its way of scoring has where its numbers hold.
    """

    name: str
    outcome: str
    padded: float | None = None
    shared_prefix: float | None = None
    adapter: float | None = None
    note: str = ""
    way: str = ""

    @property
    def worst(self) -> float:
        """The largest of the deviations."""
        return max(value for value in (self.padded, self.shared_prefix, self.adapter) if value is not None)


def main(argv: list[str] | None = None) -> int:
    """Print a line per architecture, write the table; status 1 if any number is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, e.g. llama gemma2")
    parser.add_argument("--output", type=Path, help="write the table as Markdown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = tiny_architectures.names()
    if unknown := sorted(set(args.only or ()) - set(known)):
        parser.error(f"no causal LM is called {unknown[0]!r}; see transformers.MODEL_FOR_CAUSAL_LM_MAPPING")
    began, found = time.perf_counter(), []
    for name in args.only or known:
        found.append(in_a_process(name))
        print(_line(found[-1]), flush=True)
    counts = {kind: sum(one.outcome == kind for one in found) for kind in (RIGHT, SLOWER, REFUSED, NOT_BUILT, WRONG)}
    print(f"{json.dumps(counts)} in {time.perf_counter() - began:.0f} s")
    if args.output:
        args.output.write_text(as_markdown(found, counts), encoding="utf-8")
    return 1 if counts[WRONG] else 0


def in_a_process(name: str) -> Outcome:
    """[`examine`] in a fork, so that nothing that an architecture does ends the sweep."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        logging.disable(logging.CRITICAL)
        transformers.logging.set_verbosity_error()
        os.write(writer, json.dumps(asdict(examine(name))).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return Outcome(name, NOT_BUILT, note=f"its process ended (signal {os.WTERMSIG(status)})")
    return Outcome(**json.loads(answer))


def examine(name: str) -> Outcome:
    """Build a model of this type and compare what is scored of it with its own logits."""
    try:
        model = tiny_architectures.build(name)
    except Exception as error:
        return Outcome(name, NOT_BUILT, note=_first_line(error))
    try:
        outcome = compare(name, model)
        if GOAL < outcome.worst < 10 * GOAL:
            own = rounding(tiny_architectures.build(name), some_probes())
            if outcome.worst <= 2 * own:
                outcome.outcome = outcome.way
                outcome.note = f"its own logits move by {own:.1e} when a row is padded"
        return outcome
    except Disagreement as error:
        return Outcome(name, REFUSED, note=_first_line(error))
    except Exception as error:
        return Outcome(name, WRONG, note=f"{type(error).__name__}: {_first_line(error)}")


def compare(name: str, model: PreTrainedModel) -> Outcome:
    """Largest deviation per token in each layout that the model allows, and with an adapter on its head."""
    encoded = some_probes()
    own = own_log_probs(model, encoded)
    outcome = Outcome(name, RIGHT)
    notes = []
    padded, way = deviation(model, encoded, own, PaddedLayout(tokens_per_batch=160))
    outcome.padded, outcome.outcome = padded, SLOWER if way == OWN else RIGHT
    if can_share_prompts(model) and way != OWN:
        outcome.shared_prefix, _ = deviation(model, encoded, own, SharedPrefixLayout(160))
        if outcome.shared_prefix is None:
            notes.append("shared prompts are given up")
    adapted = with_adapter(model)
    if adapted is None:
        notes.append("its head takes no LoRA")
    else:
        outcome.adapter, _ = deviation(adapted, encoded, own_log_probs(adapted, encoded), PaddedLayout())
    outcome.way = outcome.outcome
    if not outcome.worst <= GOAL:
        outcome.outcome = WRONG
    outcome.note = "; ".join(notes)
    return outcome


def deviation(model, encoded: EncodedProbes, own: list[torch.Tensor], layout: Layout) -> tuple[float | None, str]:
    """Largest |difference| per token, nats, and which way it was scored; None if the layout is given up."""
    stats_head.install(model)
    engine = ProbeEngine(encoded, layout)
    fallback = PaddedLayout(tokens_per_batch=160)
    settle_head(engine, model, fallback, required=False)
    settle_layout(engine, model, fallback, required=False)
    way = stats_head.ways.way_of(base_causal_lm(model))
    if engine.layout.name != layout.name and layout.name != fallback.name:
        return None, way
    worst = 0.0
    with engine.scoring(model) as device:
        for batch, values_NS, _ in engine._forwards(model, None, device):
            for index in batch.item_N.unique().tolist():
                logp_N = values_NS[batch.item_N == index, 0].double()
                worst = max(worst, float((logp_N - own[index]).abs().max()))
    return worst, way


def own_log_probs(model, encoded: EncodedProbes, padding: int = 0) -> list[torch.Tensor]:
    """Per response the log-probabilities of its tokens, by the model's own logits of its row alone."""
    found = []
    with torch.no_grad():
        for item in encoded.items:
            ids, start, stop = torch.tensor([item.input_ids]), len(item.prompt_ids), len(item.input_ids)
            inputs = {"input_ids": F.pad(ids, (0, padding))}
            if padding:
                inputs["attention_mask"] = F.pad(torch.ones_like(ids), (0, padding))
            logp_TV = model(**inputs).logits[0].double().log_softmax(-1)
            found.append(logp_TV[start - 1 : stop - 1].gather(1, ids[0, start:, None])[:, 0])
    return found


def rounding(model, encoded: EncodedProbes) -> float:
    """How far the model's own log-probabilities move when its rows are padded, without anything of ours."""
    alone = own_log_probs(model, encoded)
    padded = [own_log_probs(model, encoded, padding) for padding in (1, 4, 16)]
    return max(float((a - b).abs().max()) for found in padded for a, b in zip(alone, found, strict=True))


def some_probes() -> EncodedProbes:
    """Random tokens, prompts and answers of several lengths."""
    generator, items = torch.Generator().manual_seed(1), []
    for probe, (prompt_length, lengths) in enumerate([(5, (7, 12)), (14, (3, 20)), (30, (9, 1))]):
        prompt = _tokens(prompt_length, generator)
        for kind, length in zip(("chosen", "rejected"), lengths, strict=True):
            answer = _tokens(length, generator)
            items.append(
                EncodedResponse(
                    probe_id=str(probe),
                    response_type=kind,
                    prompt_ids=prompt,
                    response_ids=answer,
                    eos_id=2,
                    prompt_cut=False,
                    response_cut=False,
                )
            )
    return EncodedProbes(tuple(items))


def with_adapter(model: PreTrainedModel):
    """The model with a LoRA adapter on its head, whose weights are not zero; None where PEFT knows no such head."""
    stats_head.remove(model)
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    config = peft.LoraConfig(r=2, target_modules=f"^{name}$".replace(".", r"\."), init_lora_weights=False)
    try:
        return peft.get_peft_model(model, config).eval()
    except Exception:
        return None


def as_markdown(found: list[Outcome], counts: dict[str, int]) -> str:
    """The table, with what its words mean."""
    lines = [
        "# Architectures",
        "",
        "What is scored is the model: before the first scoring, log-probabilities of one row are compared with those",
        "of the model's own logits. A head that is a plain linear layer is applied in tiles; any other head is called",
        "as a module; where that is not all that a model does, its own forward runs in small batches (*slower path*).",
        "A model that has no log-probability of a token given those before it is refused with one line.",
        "",
        "Made by `python scripts/sweep_architectures.py --output trl_dynamics/scoring/ARCHITECTURES.md`: tiny random",
        f"models of transformers {transformers.__version__}, logits with a standard deviation of at least "
        f"{tiny_architectures.LEAST_SPREAD:g}, no bias zero.",
        "Deviations are the largest of any token, in nats, float32 on both sides; *adapter*: LoRA on the LM head.",
        "",
        "| " + " | ".join(f"{kind}: {count}" for kind, count in counts.items()) + " |",
        "|" + "---|" * len(counts),
        "",
        "| architecture | outcome | padded | shared prompts | adapter | note |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        numbers = [_number(value) for value in (one.padded, one.shared_prefix, one.adapter)]
        lines.append(f"| {' | '.join([one.name, one.outcome, *numbers, one.note.replace('|', '/')])} |")
    return "\n".join(lines) + "\n"


def _line(one: Outcome) -> str:
    numbers = " ".join(f"{_number(value):>9}" for value in (one.padded, one.shared_prefix, one.adapter))
    return f"{one.name:<28} {one.outcome:<12} {numbers}  {one.note}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _first_line(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"


def _tokens(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, tiny_architectures.VOCAB_SIZE, (count,), generator=generator).tolist())


if __name__ == "__main__":
    sys.exit(main())
