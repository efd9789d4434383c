"""trl-dynamics judge: which of two models, or files of answers, answers better by a judge of your choice."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trl
from transformers import HfArgumentParser

from trl_dynamics import loading, places
from trl_dynamics.cli import sources
from trl_dynamics.cli.options import option
from trl_dynamics.judging.answers import FileSide, ModelSide
from trl_dynamics.judging.compare import Side, compare
from trl_dynamics.judging.folder import SUMMARY_FILE, ComparisonFolder
from trl_dynamics.judging.likelihood import Likelihood, require_eos
from trl_dynamics.judging.match import SIDES, Judge
from trl_dynamics.judging.pairwise import INSTRUCTION, PairwiseJudge
from trl_dynamics.judging.reward import RewardModel, require_reward_model
from trl_dynamics.judging.scores import ScoreJudge
from trl_dynamics.judging.table import table
from trl_dynamics.judging.world import WorldChecker
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.files import parse_mapping
from trl_dynamics.probing.generate import LocalModel, Sampling
from trl_dynamics.probing.rows import read_prompts
from trl_dynamics.probing.schema import Prompt
from trl_dynamics.probing.server import OpenAIServer

logger = logging.getLogger(__name__)

JUDGES = ("embedded", "reward", "likelihood", "server")
FORMATS = {"auto": None, "chat": True, "plain": False}


@dataclass
class JudgeArguments:
    """Options of `trl-dynamics judge`."""

    prompts: str | None = option(None, "Probe set, file, folder or hub dataset with prompts, or 'embedded'.")
    split: str | None = option(None, "Split of the prompts; by default 'test' if there is one, else 'train'.")
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub dataset.")
    num_prompts: int | None = option(None, "Take the prompts of the first so many rows. None: all.")
    output_dir: str | None = option(None, "Folder of answers, verdicts and summary; resumed if begun.", "-o")
    judge: str | None = option(
        None,
        "'reward' (a sequence classifier), 'server' (OpenAI-compatible), 'likelihood' (per token, under a third "
        "model) or 'embedded' (the embedded world's own checker).",
    )
    judge_model: str | None = option(None, "The judge's folder or hub name, or its name on the server.")
    judge_url: str | None = option(None, "The server's address, such as http://localhost:8000/v1.")
    judge_format: str = option("auto", "How a reward model reads: 'chat', 'plain', or by whether it has a template.")
    judge_prompt: str | None = option(None, "Text file with a question of your own: {prompt}, {first}, {second}.")
    judge_max_new_tokens: int = option(512, "Room for the server's reasons and verdict.")
    tie_margin: float = option(0.0, "Scores that differ by so much or less tie; in the judge's unit.")
    concurrency: int = option(8, "Requests to the server under way at a time.")
    requests_per_minute: float | None = option(None, "Rate limit.")
    timeout: float = option(120.0, "Seconds without a byte from the server.")
    max_retries: int = option(5, "Further attempts of a request that failed.")
    server_options: str | None = option(None, "JSON object added to every request.")
    temperature: float = option(0.0, "Of the answers; 0 takes the likeliest token at each step.")
    top_p: float = option(1.0, "Probability mass of the tokens to draw from.")
    seed: int = option(0, "Of sampled answers and of the interval.")
    max_new_tokens: int = option(256, "Longest answer, in tokens.")
    max_prompt_length: int | None = option(None, "A longer prompt keeps its last tokens.")
    stop: list[str] = option([], "Texts before which an answer ends.")
    batch_size: int = option(16, "Rows that a local model or judge runs at a time.")
    dtype: str = option("auto", "Weights' dtype of local models and judges.")
    trust_remote_code: bool = option(False, "Run model code that comes from the hub.")
    confidence: float = option(0.95, "Of the bootstrap interval.")
    num_resamples: int = option(10_000, "Of the bootstrap.")
    allow_failures: bool = option(False, "Leave out prompts without answer or verdict, instead of stopping.")


def run(argv: list[str]) -> int:
    """Answer, judge, print the table.

    Raises:
        ValueError: If an option is wrong or missing, or an answer or a verdict is; what arrived is kept.
    """
    parser = HfArgumentParser(JudgeArguments, prog="trl-dynamics judge", description=__doc__)
    for side in SIDES:
        parser.add_argument(side, help="model (folder, hub name or 'embedded'), or .jsonl file of prompt and response")
    args, given, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; see trl-dynamics judge --help")
    for name in ("prompts", "judge", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; see trl-dynamics judge --help")
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


def find_prompts(args: JudgeArguments) -> list[Prompt]:
    """The different prompts of the first `num_prompts` rows of the source.

    Raises:
        ValueError: If the source does not exist or has no usable prompt.
    """
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"num_prompts is {args.num_prompts}, expected at least 1")
    if (Path(args.prompts) / probe_io.DATA_FILE).is_file():
        prompts, reasons = [probe.prompt for probe in probe_io.load(args.prompts)][: args.num_prompts], []
    else:
        data = _PromptSource(args.prompts, args.dataset_config, args.dataset_data_dir, args.num_prompts)
        splits = sources.load_splits(data, trl.DatasetMixtureConfig())
        rows = sources.take_split(splits, args.split or ("test" if "test" in splits else "train"))
        rows = rows if args.num_prompts is None else rows.take(args.num_prompts)
        prompts, reasons = read_prompts(rows, source=args.prompts)
    different = list({json.dumps(prompt): prompt for prompt in prompts}.values())
    if reasons:
        logger.warning("%d rows have no usable prompt, first: %s", len(reasons), reasons[0])
    if len(different) < len(prompts):
        logger.info("%d prompts repeat earlier ones and are left out", len(prompts) - len(different))
    if not different:
        raise ValueError(f"{args.prompts!r} has no usable prompt")
    return different


@dataclass
class _PromptSource:
    dataset_name: str
    dataset_config: str | None
    dataset_data_dir: str | None
    dataset_num_rows: int | None
    dataset_streaming: bool = False


def find_side(name: str, side: str, args: JudgeArguments) -> Side:
    """A file of answers, or a model that is loaded when its answers are wanted.

    Raises:
        ValueError: If there is no such file or folder, or the sampling options are wrong.
    """
    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_p, args.seed, tuple(args.stop), args.max_prompt_length
    )
    if Path(name).suffix == ".jsonl":
        places.require_file(name, "file of answers")
        return FileSide(name)
    path = sources.find_model(name)
    return ModelSide(lambda: _local(path, args), sampling, side)


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
    return Likelihood(_local(path, args), loading.end_ids(path))


def _local(path: str, args: JudgeArguments) -> LocalModel:
    return LocalModel.load(
        path, dtype=args.dtype, batch_size=args.batch_size, trust_remote_code=args.trust_remote_code
    )


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


def _progress(what: str, done: int, total: int) -> None:
    if done % max(50, total // 20) == 0 or done == total:
        logger.info("%s: %d of %d", what, done, total)
