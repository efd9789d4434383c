"""trl-dynamics squeeze-demo: one gradient step on a softmax of 50 labels, drawn before and after."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from trl_dynamics.cli.options import option, read
from trl_dynamics.ops import squeeze
from trl_dynamics.report.squeeze_demo import StepCase, build_page, export_png, number_rows

# ||x||^2 of the toy in arXiv 2407.10490; a step of learning rate r moves the logits with a strength of r ||x||^2.
FEATURE_NORM_SQ = 10.397
VOCAB = 50
# Labels of the peaked distribution by rank of their probability.
LIKELY, UNLIKELY, VALLEY = 2, 38, 49


@dataclass
class DemoArguments:
    """Options of `trl-dynamics squeeze-demo`."""

    output: str | None = option(None, "the file to write; default: squeeze.html or squeeze.png", "-o")
    format: str = option("html", "", choices=["html", "png"])


def run(argv: list[str]) -> int:
    """Draw the cases, print their numbers and where the picture lies."""
    args = read(DemoArguments, argv, "squeeze-demo", __doc__)
    drawn = cases()
    write = build_page if args.format == "html" else export_png
    path = write(drawn, Path(args.output or f"squeeze.{args.format}"))
    for case in drawn:
        print(case.title)
        for label, before, after in number_rows(case):
            print(f"  {label:<12} {before:>9} -> {after}")
        print(f"  {case.counted}; drained mass {case.drained:+.4f}\n")
    print(path)
    return 0


def flat_logits() -> torch.Tensor:
    """(50,) logits of nearly equal labels, the likeliest first: probabilities from 0.028 to 0.014."""
    return torch.linspace(0.35, -0.35, VOCAB, dtype=torch.float64)


def peaked_logits() -> torch.Tensor:
    """(50,) logits, the likeliest first: three labels have 98 % between them, the others fall off to 4e-10."""
    tail = math.log(0.0057) + math.log(0.699) * torch.arange(VOCAB - 3, dtype=torch.float64)
    return torch.cat([torch.tensor([0.7627, 0.189, 0.0293], dtype=torch.float64).log(), tail])


def cases() -> list[StepCase]:
    """Cases after the toy of arXiv 2407.10490 (section 3.3), with its step sizes and the probabilities of its labels.

    Negative on a flat distribution; on a likely label and in the valley of a peaked one; positive; and both signs in
    the valley of one context.
    """
    flat, peaked = flat_logits(), peaked_logits()
    small, large = 0.3 * FEATURE_NORM_SQ, 0.5 * FEATURE_NORM_SQ
    return [
        take_step(
            "flat",
            "Flat: the step is harmless",
            "All labels are about equally likely. What y− loses is shared by all others, each rises a little.",
            flat,
            small,
            rejected=12,
        ),
        take_step(
            "peaked",
            "Peaked, y− likely: the rich get richer",
            "y− is the third likeliest label. What it loses goes to y*, and y* takes from all others besides.",
            peaked,
            large,
            rejected=LIKELY,
        ),
        take_step(
            "valley",
            "Valley: squeezing",
            "y− has next to nothing to lose, and yet the step moves as much as before: y* takes it from everybody "
            "else. This is what an off-policy rejected answer does.",
            peaked,
            large,
            rejected=VALLEY,
        ),
        take_step(
            "positive",
            "Positive step, for comparison",
            "Learning y+ takes from all other labels, most from the likeliest.",
            flat,
            large,
            chosen=12,
        ),
        take_step(
            "both",
            "Valley, and a positive step on the same context: they cancel",
            "Both pull the distribution with the same force in opposite directions. In DPO the two answers share a "
            "context only up to the token at which they part, so from there on nothing cancels.",
            peaked,
            large,
            chosen=UNLIKELY,
            rejected=VALLEY,
        ),
    ]


def take_step(
    name: str,
    title: str,
    text: str,
    logits: torch.Tensor,
    strength: float,
    *,
    chosen: int | None = None,
    rejected: int | None = None,
) -> StepCase:
    """A case: `strength` up on `chosen` and down on `rejected`, both from the same `logits` (V,)."""
    moved = logits.clone()
    for label, signed in ((chosen, strength), (rejected, -strength)):
        if label is not None:
            moved += squeeze.step(logits[None], torch.tensor([label]), signed)[0] - logits
    named = chosen if rejected is None else rejected
    rival = squeeze.rival(logits[None], torch.tensor([named])).item()
    before, after = logits.softmax(0).tolist(), moved.softmax(0).tolist()
    return StepCase(name, title, text, strength, before, after, rival, chosen, rejected)
