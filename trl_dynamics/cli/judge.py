"""trl-dynamics judge: which of two models, or files of answers, answers better by a judge of your choice."""

import logging

from trl_dynamics.cli.contest import JudgeArguments, find_prompts, find_side
from trl_dynamics.cli.judges import find_judge
from trl_dynamics.cli.options import parser_of, refuse_unknown, require
from trl_dynamics.judging.compare import compare
from trl_dynamics.judging.folder import SUMMARY_FILE, ComparisonFolder
from trl_dynamics.judging.match import SIDES
from trl_dynamics.judging.table import table

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Answer, judge, print the table.

    Raises:
        ValueError: If an option is wrong or missing, or an answer or a verdict is; what arrived is kept.
    """
    parser = parser_of((JudgeArguments,), "judge", __doc__)
    for side in SIDES:
        parser.add_argument(side, help="model (folder, hub name or 'embedded'), or .jsonl file of prompt and response")
    args, given, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    refuse_unknown(unknown, "judge")
    require(args, ("prompts", "judge", "output_dir"), "judge")
    names = {side: getattr(given, side) for side in SIDES}
    prompts = find_prompts(args)
    sides = {side: find_side(name, side, args) for side, name in names.items()}
    judge = find_judge(args, prompts)
    with ComparisonFolder(args.output_dir) as folder:
        folder.settle("judge kind", args.judge)
        summary = compare(
            prompts,
            sides,
            judge,
            folder,
            confidence=args.confidence,
            num_resamples=args.num_resamples,
            seed=args.seed,
            allow_failures=args.allow_failures,
            progress=_progress,
        )
    print(*table(summary, names), sep="\n")
    print(f"results: {folder.root / SUMMARY_FILE}")
    return 0


def _progress(what: str, done: int, total: int) -> None:
    if done % max(50, total // 20) == 0 or done == total:
        logger.info("%s: %d of %d", what, done, total)
