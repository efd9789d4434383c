"""What competes in `trl-dynamics judge`: its options, the prompts, and the two sides."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import trl

from trl_dynamics import places
from trl_dynamics.cli import inputs, sources
from trl_dynamics.cli.options import option
from trl_dynamics.judging.answers import FileSide, ModelSide
from trl_dynamics.judging.compare import Side
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.generate import LocalModel, Sampling
from trl_dynamics.probing.rows import read_prompts
from trl_dynamics.probing.schema import Prompt

logger = logging.getLogger(__name__)


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
        splits = inputs.load_splits(data, trl.DatasetMixtureConfig())
        rows = inputs.take_split(splits, args.split or ("test" if "test" in splits else "train"))
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
    return ModelSide(lambda: local_model(path, args), sampling, side)


def local_model(path: str, args: JudgeArguments) -> LocalModel:
    """A model that answers here."""
    return LocalModel.load(
        path, dtype=args.dtype, batch_size=args.batch_size, trust_remote_code=args.trust_remote_code
    )
