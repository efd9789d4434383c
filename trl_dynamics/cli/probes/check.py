"""trl-dynamics probes check: would a model's numbers on this probe set be right?"""

from dataclasses import dataclass

from trl_dynamics import loading
from trl_dynamics.cli import sources
from trl_dynamics.cli.options import argument, option, read
from trl_dynamics.probing.check import CheckReport, check
from trl_dynamics.probing.encode import LengthLimits


@dataclass
class CheckArguments:
    """Options of `trl-dynamics probes check`."""

    probe_set: str = argument("folder, .jsonl or .parquet file, hub dataset, or 'embedded'")
    model: str | None = option(None, "model whose tokenizer is used: folder, hub name, 'embedded'", required=True)
    held_out: str | None = option(None, "a probe set over prompts that are not trained on: nothing may be in both")
    max_prompt_length: int | None = option(None, "as probe_max_prompt_length in training")
    max_length: int | None = option(None, "as probe_max_length in training")
    trust_remote_code: bool = option(False, "run code that comes from the hub")


def run(argv: list[str]) -> int:
    """Print findings and length statistics; the exit status is 1 if there are errors."""
    args = read(CheckArguments, argv, "probes check", __doc__)
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
