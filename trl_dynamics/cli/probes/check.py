"""trl-dynamics probes check: would a model's numbers on this probe set be right?"""

import argparse

from trl_dynamics import loading
from trl_dynamics.cli import sources
from trl_dynamics.probing.check import CheckReport, check
from trl_dynamics.probing.encode import LengthLimits


def run(argv: list[str]) -> int:
    """Print findings and length statistics; the exit status is 1 if there are errors."""
    parser = argparse.ArgumentParser("trl-dynamics probes check", description=__doc__)
    parser.add_argument("probe_set", help="folder, .jsonl or .parquet file, hub dataset, or 'embedded'")
    parser.add_argument("--model", required=True, help="model whose tokenizer is used: folder, hub name, 'embedded'")
    parser.add_argument("--held_out", help="a probe set over prompts that are not trained on: nothing may be in both")
    parser.add_argument("--max_prompt_length", type=int, help="as probe_max_prompt_length in training")
    parser.add_argument("--max_length", type=int, help="as probe_max_length in training")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes from the hub")
    args = parser.parse_args(argv)
    probe_set = sources.find_probe_set(args.probe_set, None)
    held_out = sources.find_probe_set(args.held_out, None)
    model = sources.find_model(args.model)
    loading.require_causal_lm(model, trust_remote_code=args.trust_remote_code)
    tokenizer = loading.load_tokenizer(model, trust_remote_code=args.trust_remote_code)
    context = loading.context_length(model, trust_remote_code=args.trust_remote_code)
    limits = LengthLimits(args.max_prompt_length, args.max_length, context)
    report = check(probe_set, tokenizer, limits, loading.end_ids(model), held_out)
    print(*length_table(report), "", *report.lines(), sep="\n")
    return 1 if report.errors else 0


def length_table(report: CheckReport) -> list[str]:
    """Response tokens per type."""
    lines = [f"{'response tokens':<28} {'number':>7} {'mean':>8} {'median':>8} {'max':>6} {'cut':>5}"]
    for name, row in report.lengths.items():
        lines.append(
            f"{name:<28} {row['responses']:>7} {row['mean_tokens']:>8.1f} {row['median_tokens']:>8.1f} "
            f"{row['max_tokens']:>6} {row['cut']:>5}"
        )
    return lines
