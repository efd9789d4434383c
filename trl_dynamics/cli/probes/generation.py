"""Options of `trl-dynamics probes build`, and the models and servers that they name."""

import logging
from dataclasses import dataclass
from pathlib import Path

from trl_dynamics import loading
from trl_dynamics.cli import sources
from trl_dynamics.cli.options import option
from trl_dynamics.probing.cache import AnswerCache
from trl_dynamics.probing.files import parse_mapping, read_mapping
from trl_dynamics.probing.generate import LocalModel, Sampling
from trl_dynamics.probing.generated import Generation
from trl_dynamics.probing.quality import Embedder, Gate
from trl_dynamics.probing.rephrase import FileRephraser, GeneratedRephraser, Rephraser
from trl_dynamics.probing.server import OpenAIServer

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Where the pairs come from, and where the set goes."""

    dataset_name: str | None = option(None, "File, folder, hub dataset, or 'embedded'.", "--dataset")
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub dataset, such as helpful-base of hh-rlhf.")
    split: str = option("train", "Split that is trained on.")
    dataset_num_rows: int | None = option(None, "Use the first so many rows only. None: all.")
    dataset_streaming: bool = option(False, "Read a hub dataset without downloading all of it.")
    held_out: str | None = option(None, "Data that is not trained on; by default the dataset's own held-out split.")
    held_out_split: str = option("test", "Split of the held-out data.")
    output_dir: str | None = option(None, "Folder of the new set.", "-o")
    overwrite: bool = option(False, "Replace a probe set in that folder.")
    name: str | None = option(None, "Name of the set; by default that of its folder.")
    license: str | None = option(None, "Licence of the source, for the card.")


@dataclass
class BuildArguments(DataArguments):
    """Options of `trl-dynamics probes build`."""

    types: list[str] = option([], "Response types; by default all that the data and the models given allow.")
    num_probes: int | None = option(None, "Prompts to probe. None: 500, or all where the data has fewer.")
    seed: int = option(0, "Of the selection and of every draw.")
    select: str = option("random", "'random', or 'first' for the first rows of the data.")
    columns: list[str] = option([], "COLUMN=TYPE: answers that the data already has.")
    human_text: str | None = option(None, "Text file, one fluent sentence per line, for human_unrelated.")
    dictionary: str | None = option(None, "Text file, one word per line, for random_words.")
    model: str | None = option(None, "The model to be tracked: its own answers, its tokenizer's boundaries.")
    dtype: str = option("auto", "Dtype of local models' weights.")
    batch_size: int = option(16, "Prompts that a local model answers at a time.")
    trust_remote_code: bool = option(False, "Run model code that comes from the hub.")
    max_new_tokens: int = option(256, "Longest answer or rephrase, in tokens.")
    max_prompt_length: int | None = option(
        None,
        "For own answers: a longer prompt keeps its last tokens. Rephrases are of whole texts: one too long for "
        "the model's context has none.",
    )
    stop: list[str] = option([], "Texts before which the model's own answers end.")
    rephraser: str | None = option(
        None, "Who rephrases: a server's URL (OpenAI-compatible), a file of ready rephrases, or a model as in --model."
    )
    rephraser_model: str | None = option(None, "Name of the model on the server.")
    temperature: float = option(0.7, "Of rephrases.")
    attempts: int = option(3, "Rephrases to ask for until one passes the checks.")
    instructions: str | None = option(
        None, "YAML file with prompts of your own: 'semantic' and 'format', each with {text}."
    )
    concurrency: int = option(8, "Requests under way at a time.")
    requests_per_minute: float | None = option(None, "Rate limit.")
    timeout: float = option(120.0, "Seconds without a byte from the server.")
    max_retries: int = option(5, "Further attempts of a request that failed.")
    server_options: str | None = option(None, "JSON object added to every request.")
    cache: str | None = option(None, "File of answers so far; by default OUTPUT_DIR.answers.jsonl.")
    allow_failures: bool = option(False, "Leave out responses that got no answer, instead of stopping.")
    min_length_ratio: float = option(0.4, "Shortest rephrase, in characters per character of its source.")
    max_length_ratio: float = option(2.5, "Longest rephrase.")
    embedding_model: str | None = option(None, "Encoder that compares meanings; none: they are not compared.")
    similarity: float = option(0.7, "Cosine that semantic rephrases reach and format rephrases do not.")


def generation_of(args: BuildArguments, cache: AnswerCache) -> Generation:
    """Who answers and who rephrases, as the options say.

    Raises:
        ValueError: If there is no such model, server file or encoder.
    """
    model = None
    if args.model:
        model = _local(sources.find_model(args.model), args)
    similarity = _embedder(args.embedding_model) if args.embedding_model else None
    return Generation(
        model=model,
        rephraser=_rephraser(args, model),
        cache=cache,
        gate=Gate(args.min_length_ratio, args.max_length_ratio, similarity, args.similarity),
        sampling=Sampling(args.max_new_tokens, stop=tuple(args.stop), max_prompt_length=args.max_prompt_length),
        self_sampling=Sampling(args.max_new_tokens, args.temperature),
        attempts=args.attempts,
        allow_failures=args.allow_failures,
        progress=_progress,
    )


def _embedder(name: str) -> Embedder:
    with loading.naming(sources.require_folder(name, "embedding model")):
        return Embedder(name)


def _rephraser(args: BuildArguments, model: LocalModel | None) -> Rephraser | None:
    if not args.rephraser:
        return None
    if Path(args.rephraser).suffix in (".jsonl", ".parquet"):
        return FileRephraser(args.rephraser)
    sampling = Sampling(args.max_new_tokens, args.temperature, seed=args.seed)
    instructions = read_mapping(args.instructions, "--instructions") if args.instructions else None
    if args.rephraser.startswith(("http://", "https://")):
        generator = OpenAIServer(
            args.rephraser,
            args.rephraser_model or "",
            concurrency=args.concurrency,
            timeout=args.timeout,
            max_retries=args.max_retries,
            requests_per_minute=args.requests_per_minute,
            options=parse_mapping(args.server_options, "--server_options") if args.server_options else None,
        )
    elif args.rephraser == args.model:
        generator = model
    else:
        generator = _local(sources.find_model(args.rephraser), args)
    return GeneratedRephraser(generator, sampling, instructions)


def _local(path: str, args: BuildArguments) -> LocalModel:
    return LocalModel.load(
        path, dtype=args.dtype, batch_size=args.batch_size, trust_remote_code=args.trust_remote_code
    )


def _progress(done: int, total: int) -> None:
    if done % max(50, total // 20) == 0 or done == total:
        logger.info("answers: %d of %d", done, total)
