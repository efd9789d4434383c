"""What tracking costs: scoring against the ways people score by hand, and training with probes against without.

    python scripts/bench/tracking.py [--quick]

Every arm gives the same numbers from the same model and probes and runs in a process of its own, forked once the model
is loaded, on one thread; time is CPU seconds, memory the peak of the process above what it had before it started, in a
second run where freed blocks are not kept.
Needs the public data files: TRL_DYNAMICS_DATA names their folder (see README.md).
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import measure
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training import overhead
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trl_dynamics import ProbeSet, stats_head
from trl_dynamics.probing.encode import EncodedProbes, LengthLimits, encode
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.setup import CPU_TOKENS

GOALS = {
    "time_straightforward": ">= 3",
    "memory_straightforward": ">= 5",
    "time_sorted_padded": ">= 1.7",
    "overhead_off": "interval contains 1",
    "overhead_budget_5_percent": "<= 1.05",
}
# The real model's context is short; the built one takes every probe as it is.
LIMITS = {"stories": LengthLimits(384, 512, 512), "large": LengthLimits(context_length=1024)}
BATCH_SIZES = (1, 2, 4, 8, 16)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer probes and pairs; under 50 s on two cores")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="of the model that is built from its config")
    parser.add_argument("--architecture", choices=["llama", "gpt_neox"], default="llama")
    args = parser.parse_args(argv)
    folder = os.environ.get("TRL_DYNAMICS_DATA")
    if not folder:
        parser.error("TRL_DYNAMICS_DATA does not name the folder with the public data files (see README.md)")
    torch.set_num_threads(1)
    published = ProbeSet.from_jsonl(Path(folder) / "probing_helpful_base/formal_prob_train.jsonl")
    ratios: dict[str, float] = {}
    sizes = (1, 4) if args.quick else BATCH_SIZES
    for name, probes, (model, tokenizer) in (
        ("stories", 5 if args.quick else 24, real_model(Path(folder))),
        ("large", 1 if args.quick else 6, built_model(args.architecture, args.vocab_size, published)),
    ):
        encoded = encode(spread(published, probes), tokenizer, LIMITS[name])
        ratios |= {f"{name}/{key}": value for key, value in compare(name, model, encoded, sizes).items()}
        if not args.quick:
            ratios |= {f"{name}/{key}": value for key, value in scaling(name, model, encoded).items()}
    intervals = overhead(Path(folder), pairs=2 if args.quick else 16, quick=args.quick)
    ratios |= {name: interval.median for name, interval in intervals.items()}
    met = (
        all(value >= 3 for key, value in ratios.items() if key.endswith("time_straightforward"))
        and all(value >= 5 for key, value in ratios.items() if key.endswith("memory_straightforward"))
        and all(value >= 1.7 for key, value in ratios.items() if key.endswith("time_sorted_padded"))
        and intervals["overhead_off"].contains(1.0)
        and ratios["overhead_budget_5_percent"] <= 1.05
    )
    shown = {key: round(value, 3) for key, value in ratios.items()}
    print(json.dumps({"name": "tracking", "ratios": shown, "goals": GOALS, "met": met}))
    return 0


def spread(probe_set: ProbeSet, num_probes: int) -> ProbeSet:
    """Probes from all over the set, so that their lengths are those of the whole."""
    step = len(probe_set) // num_probes
    return ProbeSet(probe_set.probes[::step][:num_probes], name=probe_set.name)


def real_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The pretrained model of 260 thousand parameters."""
    path = folder / "stories260k"
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def built_model(
    architecture: str, vocab_size: int, probe_set: ProbeSet
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model of 50 to 60 million parameters with random weights, and a BPE tokenizer trained on the probes' text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<eos>", "<pad>"], show_progress=False)
    texts = [text for probe in probe_set for text in (probe.prompt, *probe.responses.values())]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes |= {"max_position_embeddings": 1024, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    if architecture == "llama":
        config = LlamaConfig(**sizes, intermediate_size=1376, num_key_value_heads=8)
    else:
        config = GPTNeoXConfig(**sizes, intermediate_size=2048)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def straightforward(model: PreTrainedModel, encoded: EncodedProbes, batch_size: int) -> dict[int, float]:
    """Log-probability per response: type by type in the set's order, padded, the whole log-softmax in float32."""
    by_type: dict[str, list[int]] = {}
    for index, item in enumerate(encoded.items):
        by_type.setdefault(item.response_type, []).append(index)
    found = {}
    for indices in by_type.values():
        for start in range(0, len(indices), batch_size):
            group = indices[start : start + batch_size]
            rows = [encoded.items[index] for index in group]
            width = max(len(row.input_ids) for row in rows)
            input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
            mask_BT = torch.zeros(len(rows), width, dtype=torch.int64)
            label_mask_BT = torch.zeros(len(rows), width, dtype=torch.bool)
            for r, row in enumerate(rows):
                input_ids[r, : len(row.input_ids)] = torch.tensor(row.input_ids)
                mask_BT[r, : len(row.input_ids)] = 1
                first = len(row.prompt_ids)
                label_mask_BT[r, first : first + len(row.response_ids)] = True
            logp_BTV = model(input_ids, attention_mask=mask_BT).logits.float().log_softmax(-1)[:, :-1]
            logp_BT = logp_BTV.gather(-1, input_ids[:, 1:, None])[..., 0]
            # What else the tracker records of every position, from the same tensor.
            prob_BTV = logp_BTV.exp()
            _ = logp_BTV.max(-1), -(prob_BTV * logp_BTV).sum(-1), prob_BTV.square().sum(-1), prob_BTV.topk(10, dim=-1)
            sums_B = (logp_BT.double() * label_mask_BT[:, 1:]).sum(-1)
            found |= dict(zip(group, sums_B.tolist(), strict=True))
    return found


def compare(
    name: str, model: PreTrainedModel, encoded: EncodedProbes, sizes: tuple[int, ...] = BATCH_SIZES
) -> dict[str, float]:
    """Time and memory of the tracker against the two other ways, after making sure that all give the same numbers."""

    def tracker(layout):
        return lambda: ProbeEngine(encoded, layout).score(model).columns["logp_sum"]

    @torch.no_grad()
    def by_hand(batch_size: int) -> list[float]:
        found = straightforward(model, encoded, batch_size)
        return [found[index] for index in range(len(encoded.items))]

    stats_head.install(model)
    few = EncodedProbes(encoded.items[:2])

    def warm_up() -> None:
        ProbeEngine(few, SharedPrefixLayout()).score(model)
        torch.no_grad()(straightforward)(model, few, 1)

    hand = {size: measure.time_and_memory(lambda size=size: by_hand(size), warm_up) for size in sizes}
    padded = {size: measure.time_and_memory(tracker(PaddedLayout(batch_size=size)), warm_up) for size in sizes}
    shared = measure.time_and_memory(tracker(SharedPrefixLayout(tokens_per_batch=CPU_TOKENS)), warm_up)
    # Against the batch size that is best for time, for memory too.
    best = min(hand.values(), key=lambda run: run.seconds)
    batched = min((run for size, run in hand.items() if size > 1), key=lambda run: run.seconds)
    best_padded = min(padded.values(), key=lambda run: run.seconds)
    reference = torch.tensor(best.result)
    for run in (shared, best_padded):
        worst = (torch.tensor(run.result) - reference).abs().max().item()
        assert worst < 1e-2, f"the ways disagree by {worst} nats"
    layout = SharedPrefixLayout(tokens_per_batch=CPU_TOKENS)
    tokens = sum(group.num_tokens for group in layout.groups(encoded))
    rows = sum(len(item.input_ids) for item in encoded.items)
    print(f"\n{name}: {model.num_parameters() / 1e6:.1f}M parameters, vocabulary {model.config.vocab_size}")
    print(f"{len(encoded.items)} responses, {rows} tokens in rows of their own, {tokens} with shared prompts, padded")
    print(f"{'':<44} {'CPU s':>8} {'ratio':>6} {'peak MB':>8} {'ratio':>6}")
    table = {f"by hand, batches of {size}": run for size, run in hand.items()}
    table |= {f"sorted and padded, head on responses, {size}": run for size, run in padded.items()}
    for label, run in (table | {"tracker": shared}).items():
        ratios = run.seconds / shared.seconds, run.megabytes / shared.megabytes
        print(f"{label:<44} {run.seconds:8.2f} {ratios[0]:6.2f} {run.megabytes:8.0f} {ratios[1]:6.2f}")
    return {
        "time_straightforward": best.seconds / shared.seconds,
        "memory_straightforward": best.megabytes / shared.megabytes,
        "time_sorted_padded": best_padded.seconds / shared.seconds,
        "time_straightforward_batched": batched.seconds / shared.seconds,
        "memory_straightforward_batched": batched.megabytes / shared.megabytes,
    }


def scaling(name: str, model: PreTrainedModel, encoded: EncodedProbes) -> dict[str, float]:
    """Cost per probe of the whole set over that of its half, by the tracker."""
    half = EncodedProbes(encoded.items[: len(encoded.items) // 2])
    seconds = []
    for part in (half, encoded):
        engine = ProbeEngine(part, SharedPrefixLayout(tokens_per_batch=CPU_TOKENS))
        runs = [measure.in_fork(lambda engine=engine: engine.score(model).columns["logp_sum"]) for _ in range(3)]
        seconds.append(statistics.median(run.seconds for run in runs) / engine.batch_plan["num_forward_tokens"])
    print(f"CPU seconds per token, whole set over half: {seconds[1] / seconds[0]:.2f}")
    return {"seconds_per_token_whole_over_half": seconds[1] / seconds[0]}


if __name__ == "__main__":
    sys.exit(main())
