"""Who judges in `trl-dynamics judge`, as the options say."""

import logging
from collections.abc import Callable
from pathlib import Path

from trl_dynamics import loading
from trl_dynamics.cli import sources
from trl_dynamics.cli.contest import JudgeArguments, local_model
from trl_dynamics.judging.likelihood import Likelihood, require_eos
from trl_dynamics.judging.match import Judge
from trl_dynamics.judging.pairwise import INSTRUCTION, PairwiseJudge
from trl_dynamics.judging.reward import RewardModel, require_reward_model
from trl_dynamics.judging.scores import ScoreJudge
from trl_dynamics.judging.world import WorldChecker
from trl_dynamics.probing.files import parse_mapping
from trl_dynamics.probing.schema import Prompt
from trl_dynamics.probing.server import OpenAIServer

logger = logging.getLogger(__name__)

JUDGES = ("embedded", "reward", "likelihood", "server")
FORMATS = {"auto": None, "chat": True, "plain": False}


def find_judge(args: JudgeArguments, prompts: list[Prompt]) -> Callable[[], Judge]:
    """What makes the judge once all answers are there; whatever can be checked before is checked now.

    Raises:
        ValueError: If an option is wrong or missing.
    """
    if args.judge not in JUDGES:
        raise ValueError(f"judge is {args.judge!r}, expected one of {', '.join(JUDGES)}")
    if args.judge_format not in FORMATS:
        raise ValueError(f"judge_format is {args.judge_format!r}, expected one of {', '.join(FORMATS)}")
    if args.judge == "embedded":
        checker = ScoreJudge(WorldChecker(prompts), args.tie_margin)
        return lambda: checker
    if not args.judge_model:
        raise ValueError(f"--judge {args.judge} needs --judge_model")
    if args.judge == "server":
        server = _server_judge(args)
        return lambda: server
    path = sources.find_model(args.judge_model)
    if args.judge == "reward":
        if loading.find_adapter_config(path) is not None:
            raise ValueError(
                f"{path!r} is an adapter, but a reward model is taken whole; merge it into its base (peft's "
                "merge_and_unload) and save that"
            )
        with loading.naming(path):
            require_reward_model(path, args.trust_remote_code)
    if args.judge == "likelihood":
        require_eos(path, args.trust_remote_code)
    make = _reward if args.judge == "reward" else _likelihood
    return lambda: ScoreJudge(make(path, args), args.tie_margin)


def _reward(path: str, args: JudgeArguments) -> RewardModel:
    with loading.naming(path):
        return RewardModel.load(
            path,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            as_chat=FORMATS[args.judge_format],
            batch_size=args.batch_size,
        )


def _likelihood(path: str, args: JudgeArguments) -> Likelihood:
    return Likelihood(local_model(path, args), loading.end_ids(path))


def _server_judge(args: JudgeArguments) -> PairwiseJudge:
    if not args.judge_url:
        raise ValueError("--judge server needs --judge_url, such as http://localhost:8000/v1")
    server = OpenAIServer(
        args.judge_url,
        args.judge_model,
        concurrency=args.concurrency,
        timeout=args.timeout,
        max_retries=args.max_retries,
        requests_per_minute=args.requests_per_minute,
        options=parse_mapping(args.server_options, "--server_options") if args.server_options else None,
    )
    instruction = INSTRUCTION if args.judge_prompt is None else _read(args.judge_prompt)
    return PairwiseJudge(server, instruction, args.judge_max_new_tokens)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--judge_prompt {path!r} cannot be read: {error}") from error
